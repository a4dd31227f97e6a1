# SPDX-License-Identifier: GPL-3.0-or-later
"""A whole MoE layer on torch._grouped_mm alone: what careful PyTorch without kernels of one's own can do.

Rows are gathered and summed through the routing's permutation and its inverse, in both directions. Left to autograd,
the gather's backward would be a scatter with atomics, which is slower and not reproducible.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


class _GatherRows(torch.autograd.Function):
    """x_TD -> rows [N, D] in the experts' order."""

    @staticmethod
    def forward(ctx, x_TD: Tensor, token_N: Tensor, pos_TK: Tensor) -> Tensor:
        ctx.save_for_backward(pos_TK)
        return x_TD[token_N]

    @staticmethod
    def backward(ctx, drows_ND: Tensor) -> tuple[Tensor, None, None]:
        (pos_TK,) = ctx.saved_tensors
        return drows_ND[pos_TK].sum(1), None, None


class _SumRoutes(torch.autograd.Function):
    """y [N, D] in the experts' order -> each token's sum [T, D]."""

    @staticmethod
    def forward(ctx, y_ND: Tensor, token_N: Tensor, pos_TK: Tensor) -> Tensor:
        ctx.save_for_backward(token_N)
        return y_ND[pos_TK].sum(1)

    @staticmethod
    def backward(ctx, dout_TD: Tensor) -> tuple[Tensor, None, None]:
        (token_N,) = ctx.saved_tensors
        return dout_TD[token_N], None, None


def grouped_mm_moe(x_TD: Tensor, gate_ED: Tensor, gate_up_EHD: Tensor, down_EDF: Tensor, top_k: int) -> Tensor:
    """Dropless SwiGLU MoE, softmax over the chosen logits. [T, D] -> [T, D]; waits nowhere for the GPU."""
    logits_TK, idx_TK = (x_TD @ gate_ED.T).float().topk(top_k, dim=1)
    weight_TK = logits_TK.softmax(dim=1)

    expert_N = idx_TK.flatten()
    order_N = expert_N.argsort(stable=True)
    counts_E = torch.zeros(len(gate_ED), dtype=torch.int32, device=x_TD.device)
    ends_E = counts_E.scatter_add(0, expert_N, torch.ones_like(expert_N, dtype=torch.int32)).cumsum(0).int()
    token_N = order_N // top_k
    pos_TK = torch.empty_like(order_N).scatter_(0, order_N, torch.arange(len(order_N), device=x_TD.device))
    pos_TK = pos_TK.view_as(idx_TK)

    rows_ND = _GatherRows.apply(x_TD, token_N, pos_TK)
    gate_NF, up_NF = torch._grouped_mm(rows_ND, gate_up_EHD.transpose(1, 2), offs=ends_E).chunk(2, dim=1)
    # Weighing the activation, not the output, leaves an unweighted sum whose backward needs no output.
    weight_N1 = weight_TK.flatten()[order_N].unsqueeze(1).to(x_TD.dtype)
    y_ND = torch._grouped_mm(F.silu(gate_NF) * up_NF * weight_N1, down_EDF.transpose(1, 2), offs=ends_E)
    return _SumRoutes.apply(y_ND, token_N, pos_TK)
