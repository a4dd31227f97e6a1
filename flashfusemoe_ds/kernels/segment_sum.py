# SPDX-License-Identifier: GPL-3.0-or-later
"""Sums over the rows of each expert: the gradients of the experts' biases."""

from __future__ import annotations

import torch
from torch import Tensor

from flashfusemoe_ds.kernels.order import ExpertOrder
from flashfusemoe_ds.kernels.precision import compute_dtype


def segment_sum(rows: Tensor, order: ExpertOrder, dtype: torch.dtype, weight_RK: Tensor | None = None) -> Tensor:
    """The sum of each expert's rows, or of its gathered rows times their routing weight. [e, W] in `dtype`.

    One launch on CUDA, which makes no [N, W] copy; PyTorch elsewhere and in float64.

    Args:
        rows: [N, W] in sorted order; with weight_RK instead [R, W], read at order.row_N. Sorted rows at or past
            order.ends_e[-1] may hold anything, NaN included.
        weight_RK: float [R, K].
    """
    if not rows.is_cuda or rows.dtype is torch.float64:
        return segment_sum_torch(rows, order, dtype, weight_RK)
    from flashfusemoe_ds.kernels import triton_products  # not at the top: machines without CUDA may lack triton

    return triton_products.segment_sum(rows, order, dtype, weight_RK)


def segment_sum_torch(rows: Tensor, order: ExpertOrder, dtype: torch.dtype, weight_RK: Tensor | None = None) -> Tensor:
    """The twin, in PyTorch: summed in row order."""
    acc = compute_dtype(rows.dtype)
    if weight_RK is not None:
        scale_N = weight_RK.reshape(-1).index_select(0, order.route_N)
        rows = rows.index_select(0, order.row_N).to(acc) * scale_N.to(acc).unsqueeze(1)
    ends_e = order.ends_e.long()
    lengths = torch.diff(ends_e, prepend=ends_e.new_zeros(1), append=ends_e.new_full((1,), len(rows)))
    total = torch.segment_reduce(rows.to(acc), "sum", lengths=lengths, axis=0, unsafe=True, initial=0)
    return total[:-1].to(dtype)
