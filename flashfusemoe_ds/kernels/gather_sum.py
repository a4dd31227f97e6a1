# SPDX-License-Identifier: GPL-3.0-or-later
"""Sums of routes back into rows: the last step of the experts' forward, and of their input gradient.

One launch on CUDA (triton_gather_sum.py) where no autograd has to see it, PyTorch elsewhere.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashfusemoe_ds.kernels.precision import compute_dtype


def gather_sum(y_ND: Tensor, pos_RK: Tensor, extra_RD: Tensor | None = None) -> Tensor:
    """[N, D], [R, K] -> [R, D]: the sum of each row's routes, added in k order, in float32 for 16-bit inputs.

    Args:
        y_ND: rows in sorted order; rows that no entry of pos_RK names may hold anything, NaN included.
        pos_RK: int [R, K], positions in [0, N); N for a dropped route, which adds nothing.
        extra_RD: added last, before the sum is rounded to y's dtype.
    """
    # Experts that are users' own modules are differentiated through this sum; the kernel knows no gradient.
    recorded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (y_ND, extra_RD))
    if recorded or not y_ND.is_cuda:
        return gather_sum_torch(y_ND, pos_RK, extra_RD)
    from flashfusemoe_ds.kernels import triton_gather_sum  # not at the top: machines without CUDA may lack triton

    return triton_gather_sum.gather_sum(y_ND, pos_RK, None, extra_RD)[0]


def gather_sum_and_partials(y_ND: Tensor, pos_RK: Tensor, ds_PN: Tensor) -> tuple[Tensor, Tensor]:
    """`gather_sum`, and in the same launch each route's partial sums added up, in order of P.

    Args:
        ds_PN: float [P, N]; entries that no entry of pos_RK names may hold anything.

    Returns:
        [R, D] in y's dtype, and [R, K] in ds_PN's dtype, 0 for a dropped route.
    """
    if not y_ND.is_cuda:
        return gather_sum_torch(y_ND, pos_RK), gather_partials(ds_PN, pos_RK)
    from flashfusemoe_ds.kernels import triton_gather_sum

    return triton_gather_sum.gather_sum(y_ND, pos_RK, ds_PN)


def gather_sum_torch(y_ND: Tensor, pos_RK: Tensor, extra_RD: Tensor | None = None) -> Tensor:
    """The twin of the sum, in PyTorch."""
    num_routes, width = y_ND.shape
    total = torch.zeros(pos_RK.shape[0], width, dtype=compute_dtype(y_ND.dtype), device=y_ND.device)
    if num_routes:
        for pos_R in pos_RK.unbind(1):
            # A select, not a product with 0: rows past the last expert's may hold NaN.
            rows = y_ND.index_select(0, pos_R.clamp(max=num_routes - 1)).to(total.dtype)
            total += torch.where((pos_R < num_routes).unsqueeze(1), rows, 0)
    if extra_RD is not None:
        total += extra_RD
    return total.to(y_ND.dtype)


def gather_partials(ds_PN: Tensor, pos_RK: Tensor) -> Tensor:
    """float [P, N], [R, K] -> [R, K]: each route's partial sums added in order of P; 0 for a dropped route."""
    num_routes = ds_PN.shape[1]
    if not num_routes:
        return ds_PN.new_zeros(pos_RK.shape)
    flat = pos_RK.reshape(-1)
    total = torch.zeros(flat.shape, dtype=ds_PN.dtype, device=ds_PN.device)
    for ds_N in ds_PN.unbind(0):
        total += ds_N.index_select(0, flat.clamp(max=num_routes - 1))
    return torch.where(flat < num_routes, total, 0).view(pos_RK.shape)
