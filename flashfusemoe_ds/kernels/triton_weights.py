# SPDX-License-Identifier: GPL-3.0-or-later
"""Kernels that sum over the rows of each expert: the gradients of the weights and of the biases.

    weight_grad_kernel  out[e] = L_e' R_e    dw_down: L = dY[row], R = A    dw_up: L = dH, R = X[row]
    segment_sum_kernel  out[e] = sum of T_e  db_down: T = weight * dY[row]  db_up: T = dH

One of the two operands of a weight gradient is gathered while it is read. Experts differ in how many rows they sum,
so their tiles are started from the largest expert to the smallest, and what is left at the end is short. An expert
without rows stores the zeros of its accumulator.

Rows are summed here, so both operands are masked at the expert's end: the next row belongs to another expert, or to
nobody, and 0 * NaN would be NaN. The sum runs in row order in one program: equal inputs give equal bits.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def operand_block(
    T, row_N, k, end, col, WIDTH: tl.constexpr, GATHER: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr
):
    """[BK, BN] of T at sorted rows k.., columns col..; zero past row `end` and column WIDTH."""
    rows = k + tl.arange(0, BK)
    cols = col + tl.arange(0, BN)
    inside = rows < end
    source = rows
    if GATHER:
        source = tl.load(row_N + rows, mask=inside, other=0)
    mask = inside[:, None]
    if WIDTH % BN != 0:
        mask = mask & (cols < WIDTH)[None, :]
    return tl.load(T + source.to(tl.int64)[:, None] * WIDTH + cols[None, :], mask=mask, other=0.0)


@triton.jit(do_not_specialize=["num_experts"])
def weight_grad_kernel(
    L,
    R,
    row_N,
    by_size_e3,
    OUT,
    num_experts,
    M: tl.constexpr,
    N: tl.constexpr,
    GATHER_L: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """L [., M], R [., N] -> OUT [e, M, N]. GATHER_L: L is read at row_N[n], R at n; otherwise the other way round."""
    ROWS: tl.constexpr = (M + BM - 1) // BM
    COLS: tl.constexpr = (N + BN - 1) // BN
    for t in tl.range(tl.program_id(0), num_experts * (ROWS * COLS), tl.num_programs(0)):
        record = by_size_e3 + t // (ROWS * COLS) * 3
        expert = tl.load(record)
        start = tl.load(record + 1)
        end = tl.load(record + 2)
        # Up to GROUP blocks of M side by side, as in triton_rows.locate: both operands stay in L2.
        local = t % (ROWS * COLS)
        first = local // (GROUP * COLS) * GROUP
        within = local - first * COLS
        here = tl.minimum(GROUP, ROWS - first)
        m = (first + within % here) * BM
        n = within // here * BN

        acc = tl.zeros((BM, BN), tl.float32)
        for k in tl.range(start, end, BK):
            left = operand_block(L, row_N, k, end, m, M, GATHER_L, BK, BM)
            right = operand_block(R, row_N, k, end, n, N, not GATHER_L, BK, BN)
            acc = tl.dot(left.T, right, acc, input_precision="ieee")

        rows = m + tl.arange(0, BM)
        cols = n + tl.arange(0, BN)
        at = OUT + expert.to(tl.int64) * (M * N) + rows[:, None].to(tl.int64) * N + cols[None, :]
        stored = (rows < M)[:, None] & (cols < N)[None, :]
        tl.store(at, acc.to(OUT.dtype.element_ty), mask=stored)


@triton.jit
def segment_sum_kernel(
    T,
    weight,
    row_N,
    route_N,
    ends,
    OUT,
    WIDTH: tl.constexpr,
    GATHER: tl.constexpr,
    BR: tl.constexpr,
    BW: tl.constexpr,
):
    """T [., WIDTH] -> OUT [e, WIDTH]: sums of T[n], or where GATHER of weight[route[n]] * T[row[n]], in float32.

    One program per expert and BW columns; no [N, WIDTH] float32 copy is made.
    """
    expert = tl.program_id(1)
    start = tl.load(ends + expert - 1, mask=expert > 0, other=0)
    end = tl.load(ends + expert)
    cols = tl.program_id(0) * BW + tl.arange(0, BW)
    acc = tl.zeros((BR, BW), tl.float32)
    for k in tl.range(start, end, BR):
        rows = k + tl.arange(0, BR)
        inside = rows < end
        source = rows
        if GATHER:
            source = tl.load(row_N + rows, mask=inside, other=0)
        mask = inside[:, None] & (cols < WIDTH)[None, :]
        block = tl.load(T + source.to(tl.int64)[:, None] * WIDTH + cols[None, :], mask=mask, other=0.0).to(tl.float32)
        if GATHER:
            scale = tl.load(weight + tl.load(route_N + rows, mask=inside, other=0), mask=inside, other=0.0)
            block = block * scale.to(tl.float32)[:, None]
        acc += block
    at = OUT + expert.to(tl.int64) * WIDTH + cols
    tl.store(at, tl.sum(acc, 0).to(OUT.dtype.element_ty), mask=cols < WIDTH)
