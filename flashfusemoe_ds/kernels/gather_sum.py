# SPDX-License-Identifier: GPL-3.0-or-later
"""Sums of routes back into rows: the last step of the experts' forward, and of their input gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from flashfusemoe_ds.kernels.activation import compute_dtype


def gather_sum(y_ND: Tensor, pos_RK: Tensor) -> Tensor:
    """[N, D], [R, K] -> [R, D]: the sum of each row's routes, added in k order, in float32 for 16-bit inputs.

    Args:
        y_ND: rows in sorted order; rows that no entry of pos_RK names may hold anything, NaN included.
        pos_RK: int [R, K], positions in [0, N); N for a dropped route, which adds nothing.
    """
    num_routes, width = y_ND.shape
    total = torch.zeros(pos_RK.shape[0], width, dtype=compute_dtype(y_ND.dtype), device=y_ND.device)
    if num_routes:
        for pos_R in pos_RK.unbind(1):
            # A select, not a product with 0: rows past the last expert's may hold NaN.
            rows = y_ND.index_select(0, pos_R.clamp(max=num_routes - 1)).to(total.dtype)
            total += torch.where((pos_R < num_routes).unsqueeze(1), rows, 0)
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
