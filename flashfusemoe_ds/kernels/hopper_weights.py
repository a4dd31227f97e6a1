# SPDX-License-Identifier: GPL-3.0-or-later
"""Hopper kernel for the weight gradients: each expert's sum over its routes, out[e] = sum_n left[n]' right[n].

A tile is 128 x 256 of one expert's matrix, summed over that expert's routes, 64 at a time. One operand lies in sorted
order and comes through TMA; the other is gathered, through cp.async, row by row as the order names them. The last step
of an expert holds fewer than 64 routes: then both come through cp.async, which writes zeros past the end, so nothing
of the next expert (or of rows that nobody wrote) enters the sum. See hopper_pipeline.py for partitions and barriers.

Experts come largest first: their tiles cost in proportion to their routes.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from flashfusemoe_ds.kernels.hopper_pipeline import (
    BLOCK_K,
    BLOCK_M,
    BLOCK_N,
    HALF_M,
    STAGES,
    SWIZZLED,
    grouped,
    make_barriers,
    multiply,
    through_shared,
    wait_empty,
)

# Here the producer computes the addresses of a whole stage; with 56 registers it spills and takes 4 % longer.
PRODUCER_REGS = gl.constexpr(80)
CONSUMER_REGS = gl.constexpr(216)

WIDE = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0]))


@gluon.jit
def read_expert(by_size_e3, t, tiles_each, num_tiles):
    """The record of tile t's expert (id, its first route, its end); of the last expert if t is past it."""
    p = by_size_e3 + (gl.minimum(t, num_tiles - 1) // tiles_each) * 3
    return gl.load(p), gl.load(p + 1), gl.load(p + 2)


@gluon.jit
def copy_rows(block, source, rows, width, first, columns, ok):
    """cp.async of [64, 128] at (rows, first + columns) of a [., width] tensor; zeros where not ok or past width."""
    p = source + rows.to(gl.int64)[:, None] * width + (first + columns)[None, :]
    async_copy.async_copy_global_to_shared(block, p, ok[:, None] & (first + columns < width)[None, :])


@gluon.jit
def produce(
    left,
    left_desc,
    right,
    right_desc,
    row_N,
    by_size_e3,
    a_ring,
    b_ring,
    full,
    empty,
    num_tiles,
    m_tiles,
    n_tiles,
    M,
    N,
    GATHER_LEFT: gl.constexpr,
):
    """Loads 64 routes of both operands for every step of every tile of this program."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    columns = gl.arange(0, BLOCK_M, gl.SliceLayout(0, LAYOUT))
    rows = gl.arange(0, BLOCK_K, gl.SliceLayout(1, LAYOUT))
    step = 0
    tiles_each = m_tiles * n_tiles
    _, start, end = read_expert(by_size_e3, gl.program_id(0), tiles_each, num_tiles)
    for t in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        m, n = grouped(t % tiles_each, m_tiles, n_tiles)
        m0 = m * BLOCK_M
        n0 = n * (2 * BLOCK_N)
        this_start = start
        this_end = end
        source = gl.load(row_N + start + rows, mask=start + rows < end, other=0)
        _, start, end = read_expert(by_size_e3, t + gl.num_programs(0), tiles_each, num_tiles)
        for row in range(this_start, this_end, BLOCK_K):
            ahead = row + BLOCK_K + rows
            next_source = gl.load(row_N + ahead, mask=ahead < this_end, other=0)
            s = wait_empty(empty, step)
            ready = full.index(s)
            ok = row + rows < this_end
            whole = row + BLOCK_K <= this_end
            if GATHER_LEFT:
                mbarrier.expect(ready, 2 * BLOCK_N * BLOCK_K * 2, pred=whole)
                tma.async_copy_global_to_shared(right_desc, [row, n0], ready, b_ring.index(2 * s), pred=whole)
                tma.async_copy_global_to_shared(
                    right_desc, [row, n0 + BLOCK_N], ready, b_ring.index(2 * s + 1), pred=whole
                )
                if row + BLOCK_K > this_end:
                    mbarrier.arrive(ready)
                    copy_rows(b_ring.index(2 * s), right, row + rows, N, n0, columns, ok)
                    copy_rows(b_ring.index(2 * s + 1), right, row + rows, N, n0 + BLOCK_N, columns, ok)
                copy_rows(a_ring.index(s), left, source, M, m0, columns, ok)
            else:
                mbarrier.expect(ready, BLOCK_M * BLOCK_K * 2, pred=whole)
                tma.async_copy_global_to_shared(left_desc, [row, m0], ready, a_ring.index(s), pred=whole)
                if row + BLOCK_K > this_end:
                    mbarrier.arrive(ready)
                    copy_rows(a_ring.index(s), left, row + rows, M, m0, columns, ok)
                copy_rows(b_ring.index(2 * s), right, source, N, n0, columns, ok)
                copy_rows(b_ring.index(2 * s + 1), right, source, N, n0 + BLOCK_N, columns, ok)
            async_copy.mbarrier_arrive(ready, increment_count=False)
            source = next_source
            step += 1


@gluon.jit
def consume(
    a_ring, b_ring, buffer, full, empty, by_size_e3, out, num_tiles, m_tiles, n_tiles, M, N, HALF: gl.constexpr
):
    """One half of every tile: multiply and store; zeros for an expert without routes."""
    rows = HALF * HALF_M + gl.arange(0, HALF_M, gl.SliceLayout(1, WIDE))
    columns = gl.arange(0, BLOCK_N, gl.SliceLayout(0, WIDE))
    step = 0
    tiles_each = m_tiles * n_tiles
    expert, start, end = read_expert(by_size_e3, gl.program_id(0), tiles_each, num_tiles)
    for t in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        m, n = grouped(t % tiles_each, m_tiles, n_tiles)
        k_steps = gl.cdiv(end - start, BLOCK_K)
        col = n * (2 * BLOCK_N) + columns
        p = out + (expert.to(gl.int64) * M + m * BLOCK_M) * N + (rows[:, None] * N + col[None, :])
        ok = (m * BLOCK_M + rows < M)[:, None]
        expert, start, end = read_expert(by_size_e3, t + gl.num_programs(0), tiles_each, num_tiles)
        acc0, acc1, step = multiply(a_ring, b_ring, full, empty, step, k_steps, HALF, True, False, True)
        gl.store(p, through_shared(buffer, acc0, WIDE), mask=ok & (col < N)[None, :])
        gl.store(p + BLOCK_N, through_shared(buffer, acc1, WIDE), mask=ok & (col + BLOCK_N < N)[None, :])


@gluon.jit
def weight_grad_kernel(
    left,
    left_desc,
    right,
    right_desc,
    row_N,
    by_size_e3,
    out,
    num_tiles,
    m_tiles,
    n_tiles,
    M8,
    N8,
    GATHER_LEFT: gl.constexpr,
):
    """out [e, M, N]: for each expert, the sum over its routes n of left[n]' right[n]. Launch with num_warps=4.

    One of left [., M] and right [., N] is read at row_N[n], which GATHER_LEFT chooses; the other lies in sorted order,
    and its descriptor has blocks [64, 128]. The gathered one's descriptor is not used.
    num_tiles = e * m_tiles * n_tiles, with m_tiles = cdiv(M, 128) and n_tiles = cdiv(N, 256); M8 = M / 8 and
    N8 = N / 8, so that the compiler knows rows to start at multiples of 16 bytes.
    """
    dtype: gl.constexpr = out.dtype.element_ty
    M = M8 * 8
    N = N8 * 8
    a_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_K, BLOCK_M], SWIZZLED)
    b_ring = gl.allocate_shared_memory(dtype, [2 * STAGES, BLOCK_K, BLOCK_N], SWIZZLED)
    buffers = gl.allocate_shared_memory(dtype, [2, HALF_M, BLOCK_N], SWIZZLED)
    full, empty = make_barriers(129)
    # fmt: off
    gl.warp_specialize([
        (consume, (a_ring, b_ring, buffers.index(0), full, empty, by_size_e3, out, num_tiles, m_tiles, n_tiles, M, N,
                   0)),
        (consume, (a_ring, b_ring, buffers.index(1), full, empty, by_size_e3, out, num_tiles, m_tiles, n_tiles, M, N,
                   1)),
        (produce, (left, left_desc, right, right_desc, row_N, by_size_e3, a_ring, b_ring, full, empty, num_tiles,
                   m_tiles, n_tiles, M, N, GATHER_LEFT)),
    ], [4, 4], [CONSUMER_REGS, PRODUCER_REGS])
    # fmt: on
