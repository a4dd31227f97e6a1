# SPDX-License-Identifier: GPL-3.0-or-later
"""Inputs that make every layer's own router choose a given routing.

No router is replaced, so that each layer pays for its own. The gate's E rows are orthonormal, so an input can be
random and yet have any E logits: its part in the rows' span is set, the rest is noise. Chosen experts get logits in
[1, 2), the others in [-1, 0.5): the gap is far above the rounding of a bfloat16 gate, so all layers choose alike.
"""

from __future__ import annotations

import torch
from shapes import Shape
from torch import Tensor

ROUTINGS = ("balanced", "zipf", "onehot")


def choose_experts(shape: Shape, routing: str, generator: torch.Generator) -> Tensor:
    """idx_TK, int64 [T, K], distinct in each row.

    balanced: every K of the E experts are equally likely, so loads differ by chance alone.
    zipf: experts are drawn with probabilities 1 / rank, the ranks shuffled; the work in total is the same.
    onehot: all tokens go to the same K experts.
    """
    device = generator.device
    if routing == "onehot":
        return torch.randperm(shape.E, generator=generator, device=device)[: shape.K].expand(shape.T, shape.K)
    noise = torch.rand(shape.T, shape.E, generator=generator, device=device).clamp_(1e-20, 1 - 1e-7)
    score = -torch.log(-torch.log(noise))  # Gumbel: the top K are K draws without replacement
    if routing == "zipf":
        rank = torch.randperm(shape.E, generator=generator, device=device) + 1
        score -= torch.log(rank.float())
    elif routing != "balanced":
        raise ValueError(f"routing {routing!r}: must be one of {', '.join(ROUTINGS)}")
    return score.topk(shape.K, dim=1)[1]


def make_gate(shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Tensor:
    """[E, D] with orthonormal rows, up to rounding to dtype."""
    gaussian = torch.randn(shape.D, shape.E, generator=generator, device=generator.device)
    return torch.linalg.qr(gaussian)[0].T.contiguous().to(dtype)


def make_input(shape: Shape, gate_ED: Tensor, routing: str, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """x_TD in the gate's dtype, of about unit variance, and the idx_TK that softmax-top-k of x @ gate.T chooses."""
    device = generator.device
    idx_TK = choose_experts(shape, routing, generator)
    uniform = torch.rand(shape.T, shape.E, generator=generator, device=device)
    logits_TE = (1.5 * uniform - 1).scatter(1, idx_TK, 1 + uniform.gather(1, idx_TK))
    gate = gate_ED.float()
    x_TD = torch.randn(shape.T, shape.D, generator=generator, device=device)
    for _ in range(2):  # the second pass removes what rounding the gate left
        x_TD += (logits_TE - x_TD @ gate.T) @ gate
    return x_TD.to(gate_ED.dtype), idx_TK
