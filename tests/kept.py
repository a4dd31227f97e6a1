# SPDX-License-Identifier: GPL-3.0-or-later
"""What a forward keeps for its backward."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn


@contextlib.contextmanager
def kept_for_backward() -> Iterator[list[Tensor]]:
    """Every tensor that autograd is given to keep, by nodes of torch and of others, in order."""
    kept: list[Tensor] = []

    def note(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        yield kept


def is_a_copy_of_weights(t: Tensor, layer: nn.Module) -> bool:
    """Whether it has as many numbers as stacked matrices of the layer's, in rows as long, and is none of them."""
    stacked = {(p.numel(), p.shape[-1]) for p in layer.parameters() if p.dim() == 3}
    alike = t.dim() > 0 and (t.numel(), t.shape[-1]) in stacked
    return alike and t.data_ptr() not in {p.data_ptr() for p in layer.parameters()}
