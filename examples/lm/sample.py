# SPDX-License-Identifier: GPL-3.0-or-later
"""Text from the model, one byte at a time."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lm.model import LMOutput


@torch.no_grad()
def generate(
    model: Callable[[Tensor], LMOutput],
    prompt: str,
    length: int,
    context: int,
    device: torch.device,
    temperature: float = 0.8,
    seed: int = 0,
) -> str:
    """`prompt` and `length` sampled bytes, decoded as UTF-8.

    Every rank of an expert-parallel group must call this with the same arguments: each forward pass exchanges tokens
    with all of them, so the ranks stay in lockstep, one forward pass per byte.
    """
    generator = torch.Generator().manual_seed(seed)
    text = list(prompt.encode())
    for _ in range(length):
        window_BS = torch.tensor([text[-context:]], device=device)
        logits_V = model(window_BS).logits_BSV[0, -1].float().cpu()
        text.append(int(torch.multinomial((logits_V / temperature).softmax(-1), 1, generator=generator)))
    return bytes(text).decode(errors="replace")
