# SPDX-License-Identifier: GPL-3.0-or-later
"""The gather-sum in one launch: rows of routes added up, and the routing weights' partial gradients beside them.

It moves N * D + R * D elements and computes nothing worth mentioning, so that all is in the loads: every thread reads
16 bytes of each route of its row, several in flight, and at 35 registers 14 programs share a multiprocessor. A row
wider than a program is split over several. The partial gradients are a few percent of the traffic; programs of their
own, started first, read them while the others stream.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashfusemoe_ds.kernels.launch import Bound, launch
from flashfusemoe_ds.kernels.precision import compute_dtype
from flashfusemoe_ds.kernels.sizes import cdiv, next_power_of_2

NUM_WARPS = 4
ROUTES_PER_PROGRAM = 256  # of the programs that add up partial gradients
UNROLL = 8  # routes of a row whose loads may overlap
TRITON_DTYPE = {torch.float32: tl.float32, torch.float64: tl.float64}


@triton.jit
def _sum_partials(
    ds_ptr, pos_ptr, dweight_ptr, program, num_entries, num_routes, P: tl.constexpr, BLOCK: tl.constexpr
):
    routes = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    pos = tl.load(pos_ptr + routes, mask=routes < num_entries, other=num_routes).to(tl.int64)
    total = tl.zeros([BLOCK], dtype=ds_ptr.dtype.element_ty)
    for _ in range(P):
        total += tl.load(ds_ptr + pos, mask=pos < num_routes, other=0.0)
        ds_ptr += num_routes
    tl.store(dweight_ptr + routes, total, mask=routes < num_entries)


@triton.jit
def _add_route(total, y_ptr, pos_ptr, k, rows, columns, num_rows, num_routes, D: tl.constexpr, K: tl.constexpr):
    pos = tl.load(pos_ptr + rows * K + k, mask=rows < num_rows, other=num_routes).to(tl.int64)
    mask = (pos < num_routes)[:, None] & (columns < D)
    # D is a constant, so that the compiler sees the alignment of multiples of 8 and not only of 16.
    return total + tl.load(y_ptr + pos[:, None] * D + columns, mask=mask, other=0.0).to(total.dtype)


@triton.jit
def _sum_rows(
    y_ptr,
    pos_ptr,
    extra_ptr,
    out_ptr,
    program,
    num_rows,
    num_routes,
    D: tl.constexpr,
    K: tl.constexpr,
    ACC: tl.constexpr,
    HAS_EXTRA: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    UNROLL: tl.constexpr,
):
    strips: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    rows = (program // strips).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = (program % strips) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    total = tl.zeros([BLOCK_R, BLOCK_D], dtype=ACC)
    whole: tl.constexpr = K // UNROLL * UNROLL
    for first in range(0, whole, UNROLL):
        for i in tl.static_range(UNROLL):
            total = _add_route(total, y_ptr, pos_ptr, first + i, rows, columns, num_rows, num_routes, D, K)
    for i in tl.static_range(K - whole):
        total = _add_route(total, y_ptr, pos_ptr, whole + i, rows, columns, num_rows, num_routes, D, K)
    out = rows[:, None] * D + columns
    mask = (rows < num_rows)[:, None] & (columns < D)
    if HAS_EXTRA:
        total += tl.load(extra_ptr + out, mask=mask, other=0.0).to(ACC)
    tl.store(out_ptr + out, total.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows", "num_routes", "partial_programs"])
def _gather_sum_kernel(
    y_ptr,
    pos_ptr,
    extra_ptr,
    out_ptr,
    ds_ptr,
    dweight_ptr,
    num_rows,
    num_routes,
    partial_programs,
    D: tl.constexpr,
    K: tl.constexpr,
    P: tl.constexpr,
    ACC: tl.constexpr,
    HAS_EXTRA: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK: tl.constexpr,
    UNROLL: tl.constexpr,
):
    program = tl.program_id(0)
    if program < partial_programs:
        if P > 0:
            _sum_partials(ds_ptr, pos_ptr, dweight_ptr, program, num_rows * K, num_routes, P, BLOCK)
    else:
        _sum_rows(
            y_ptr, pos_ptr, extra_ptr, out_ptr, program - partial_programs, num_rows, num_routes,
            D, K, ACC, HAS_EXTRA, BLOCK_R, BLOCK_D, UNROLL,
        )  # fmt: skip


@functools.lru_cache(maxsize=256)
def _block(width: int, element_size: int) -> tuple[int, int]:
    """Rows and columns of a program: one 16-byte load per thread and route, over as many rows as that takes.

    Of the strips that a row can be cut into, those that leave the fewest threads idle past its end.
    """
    elements = NUM_WARPS * 32 * 16 // element_size
    widest = min(elements, max(64, next_power_of_2(width)))
    block_d = min((widest, widest // 2, widest // 4), key=lambda strip: cdiv(width, strip) * strip)
    return elements // block_d, block_d


@functools.cache
def _gather_sum_bound(width: int, top_k: int, partials: int, dtype: torch.dtype, has_extra: bool) -> Bound:
    block_r, block_d = _block(width, dtype.itemsize)
    return Bound(
        _gather_sum_kernel,
        D=width,
        K=top_k,
        P=partials,
        ACC=TRITON_DTYPE[compute_dtype(dtype)],
        HAS_EXTRA=has_extra,
        BLOCK_R=block_r,
        BLOCK_D=block_d,
        BLOCK=ROUTES_PER_PROGRAM,
        UNROLL=UNROLL,
        num_warps=NUM_WARPS,
    )


def gather_sum(
    y_ND: Tensor, pos_RK: Tensor, ds_PN: Tensor | None = None, extra_RD: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """[N, D], [R, K] -> [R, D], and [P, N] -> [R, K] if ds_PN is given; see `kernels.gather_sum` for the meaning."""
    (num_routes, width), (num_rows, top_k) = y_ND.shape, pos_RK.shape
    y_ND, pos_RK = y_ND.contiguous(), pos_RK.contiguous()
    extra_RD = None if extra_RD is None else extra_RD.contiguous()
    out_RD = torch.empty(num_rows, width, dtype=y_ND.dtype, device=y_ND.device)
    dweight_RK, partials, partial_programs = None, 0, 0
    if ds_PN is not None:
        ds_PN = ds_PN.contiguous()
        dweight_RK = torch.empty(pos_RK.shape, dtype=ds_PN.dtype, device=y_ND.device)
        partials = ds_PN.shape[0]
        partial_programs = cdiv(pos_RK.numel(), ROUTES_PER_PROGRAM)
    if not num_rows:
        return out_RD, dweight_RK
    block_r, block_d = _block(width, y_ND.element_size())
    programs = partial_programs + cdiv(num_rows, block_r) * cdiv(width, block_d)
    launch(
        _gather_sum_bound(width, top_k, partials, y_ND.dtype, extra_RD is not None),
        (programs,),
        y_ND,
        pos_RK,
        out_RD if extra_RD is None else extra_RD,
        out_RD,
        out_RD if ds_PN is None else ds_PN,
        out_RD if dweight_RK is None else dweight_RK,
        num_rows,
        num_routes,
        partial_programs,
    )
    return out_RD, dweight_RK
