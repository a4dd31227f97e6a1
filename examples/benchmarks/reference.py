# SPDX-License-Identifier: GPL-3.0-or-later
"""What a layer's output and input gradient should be, in wide precision, one expert at a time."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from weights import Weights


def reference(x_TD: Tensor, dout_TD: Tensor, weights: Weights, top_k: int) -> tuple[Tensor, Tensor]:
    """Output and input gradient [T, D] of a dropless SwiGLU layer weighted by the softmax over the top_k logits.

    In float32 for 16-bit inputs and float64 for float32 ones. Only one expert's weights are widened at a time.
    """
    wide = torch.float64 if x_TD.dtype is torch.float32 else torch.float32
    x, dout, gate = x_TD.detach().to(wide).requires_grad_(), dout_TD.to(wide), weights.gate.to(wide)
    logits_TK, idx_TK = (x @ gate.T).topk(top_k, dim=1)
    weight_TK = logits_TK.softmax(dim=1)
    out_TD, dx_TD, dweight_TK = torch.zeros_like(dout), torch.zeros_like(dout), torch.zeros_like(weight_TK)
    for expert in range(len(gate)):
        token, route = (idx_TK == expert).nonzero(as_tuple=True)
        if not len(token):
            continue
        w_gate, w_up = weights.gate_up[expert].to(wide).chunk(2)
        rows = x.detach()[token].requires_grad_()
        weight = weight_TK.detach()[token, route].requires_grad_()
        act = F.silu(rows @ w_gate.T) * (rows @ w_up.T)
        y = (act @ weights.down[expert].to(wide).T) * weight.unsqueeze(1)
        drows, dweight = torch.autograd.grad(y, (rows, weight), dout[token])
        out_TD.index_add_(0, token, y.detach())
        dx_TD.index_add_(0, token, drows)
        dweight_TK[token, route] = dweight
    (through_router,) = torch.autograd.grad(weight_TK, x, dweight_TK)
    return out_TD, dx_TD + through_router


def relative_error(got: Tensor, expected: Tensor) -> float:
    """Euclidean norm of the difference over the norm of the expected; inf where `got` is not finite."""
    error = ((got.to(expected.dtype) - expected).norm() / expected.norm()).item()
    return error if error == error else float("inf")
