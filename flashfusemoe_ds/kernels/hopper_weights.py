# SPDX-License-Identifier: GPL-3.0-or-later
"""Hopper kernel for the weight gradients: each expert's sum over its routes, out[e] = sum_n left[n]' right[n].

A step sums 64 routes. One operand lies in sorted order and comes through TMA; the other is gathered, through cp.async,
row by row as the order names them. The gathered one is the narrow side of the tile, so that cp.async moves a third of
the bytes: tiles are 128 x 256 where left is gathered (dW_down) and 256 x 128 where right is (dW_up).

The last step of an expert holds fewer than 64 routes: then both come through cp.async, which writes zeros past the
end, so nothing of the next expert (or of rows that nobody wrote) enters the sum. Experts come largest first: their
tiles cost in proportion to their routes. See hopper_pipeline.py for partitions and barriers.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from flashfusemoe_ds.kernels.hopper_pipeline import (
    BLOCK_K,
    BLOCK_N,
    HALF_M,
    NARROW,
    STAGES,
    SWIZZLED,
    WIDE,
    column_halves,
    cp_async,
    grouped,
    make_barriers,
    multiply,
    reinterpret,
    through_shared,
    tma_load,
    tma_store,
    wait_empty,
)

# Here the producer computes the addresses of a whole stage; with 56 registers it spills and takes 4 % longer.
PRODUCER_REGS = gl.constexpr(80)
CONSUMER_REGS = gl.constexpr(216)

# A last step of at most so many routes multiplies no more. With 256 routes an expert on average, a third of the
# experts have one: dsv3's dW take 3 % less.
SHORT = gl.constexpr(16)


@gluon.jit
def read_expert(by_size_e3, t, tiles_each, num_tiles):
    """The record of tile t's expert (id, its first route, its end); of the last expert if t is past it."""
    p = by_size_e3 + (gl.minimum(t, num_tiles - 1) // tiles_each) * 3
    return gl.load(p), gl.load(p + 1), gl.load(p + 2)


@gluon.jit
def copy_rows(block, source, rows, width, first, columns, ok):
    """cp.async of [64, 128] at (rows, first + columns) of a [., width] tensor; zeros where not ok or past width."""
    p = source + rows.to(gl.int64)[:, None] * width + (first + columns)[None, :]
    cp_async(block, p, ok[:, None] & (first + columns < width)[None, :])


@gluon.jit
def produce(
    gathered,
    lying,
    lying_desc,
    row_N,
    by_size_e3,
    narrow,
    wide,
    full,
    empty,
    num_tiles,
    m_tiles,
    n_tiles,
    gathered_width,
    lying_width,
    GATHER_LEFT: gl.constexpr,
):
    """Loads 64 routes of both operands for every step of every tile of this program."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0])
    columns = gl.arange(0, BLOCK_N, gl.SliceLayout(0, LAYOUT))
    rows = gl.arange(0, BLOCK_K, gl.SliceLayout(1, LAYOUT))
    step = 0
    tiles_each = m_tiles * n_tiles
    stride = gl.num_programs(0)
    _, start, end = read_expert(by_size_e3, gl.program_id(0), tiles_each, num_tiles)
    _, next_start, next_end = read_expert(by_size_e3, gl.program_id(0) + stride, tiles_each, num_tiles)
    # Where the gathered rows lie is read one step ahead of their use, across tiles too, and an expert's record two
    # tiles ahead: an expert may have as few as four steps, and each read takes as long as one.
    source = gl.load(row_N + start + rows, mask=start + rows < end, other=0)
    for t in range(gl.program_id(0), num_tiles, stride):
        m, n = grouped(t % tiles_each, m_tiles, n_tiles)
        if GATHER_LEFT:
            narrow0 = m * BLOCK_N
            wide0 = n * (2 * BLOCK_N)
        else:
            narrow0 = n * BLOCK_N
            wide0 = m * (2 * BLOCK_N)
        _, later_start, later_end = read_expert(by_size_e3, t + 2 * stride, tiles_each, num_tiles)
        if start == end:
            source = gl.load(row_N + next_start + rows, mask=next_start + rows < next_end, other=0)
        for row in range(start, end, BLOCK_K):
            last = row + BLOCK_K >= end
            ahead = gl.where(last, next_start, row + BLOCK_K) + rows
            next_source = gl.load(row_N + ahead, mask=ahead < gl.where(last, next_end, end), other=0)
            s = wait_empty(empty, step)
            ready = full.index(s)
            ok = row + rows < end
            whole = row + BLOCK_K <= end
            mbarrier.expect(ready, 2 * BLOCK_N * BLOCK_K * 2, pred=whole)
            tma_load(lying_desc, [row, wide0], ready, wide.index(2 * s), pred=whole)
            tma_load(lying_desc, [row, wide0 + BLOCK_N], ready, wide.index(2 * s + 1), pred=whole)
            if row + BLOCK_K > end:
                mbarrier.arrive(ready)
                copy_rows(wide.index(2 * s), lying, row + rows, lying_width, wide0, columns, ok)
                copy_rows(wide.index(2 * s + 1), lying, row + rows, lying_width, wide0 + BLOCK_N, columns, ok)
            copy_rows(narrow.index(s), gathered, source, gathered_width, narrow0, columns, ok)
            async_copy.mbarrier_arrive(ready, increment_count=False)
            source = next_source
            step += 1
        start = next_start
        end = next_end
        next_start = later_start
        next_end = later_end


@gluon.jit
def store_piece(desc, desc2, buffer, piece, expert, row, column, M, TURNED: gl.constexpr, APART: gl.constexpr):
    """Stores [64, 64], or its transpose if TURNED, at (row, column) of the expert's matrix, through a buffer of the
    same size, and returns while the copy runs. Rows from M on are nobody's.

    Two buffers take turns, so the copy before this one may still run when this one's buffer is written.
    """
    if APART:
        rows_each = M // 2
    else:
        rows_each = M
    if row < M:
        tma.store_wait(1)
        if TURNED:
            buffer.permute((1, 0)).store(piece.to(buffer.dtype))
        else:
            buffer.store(piece.to(buffer.dtype))
        fence_async_shared()
        if APART:
            if row < rows_each:
                tma_store(desc, [expert * rows_each + row, column], buffer)
            else:
                tma_store(desc2, [(expert - 1) * rows_each + row, column], buffer)
        else:
            tma_store(desc, [expert * rows_each + row, column], buffer)
    else:
        tma.store_wait(0)  # the turn that this one leaves out


@gluon.jit
def consume(
    narrow,
    wide,
    buffers,
    full,
    empty,
    by_size_e3,
    out,
    out_desc,
    out2_desc,
    num_tiles,
    m_tiles,
    n_tiles,
    M,
    N,
    HALF: gl.constexpr,
    GATHER_LEFT: gl.constexpr,
    TMA_STORE: gl.constexpr,
    APART: gl.constexpr,
):
    """One half of every tile: multiply and store; zeros for an expert without routes."""
    rows = gl.arange(0, HALF_M, gl.SliceLayout(1, WIDE))
    columns = gl.arange(0, BLOCK_N, gl.SliceLayout(0, WIDE))
    turned_rows = gl.arange(0, BLOCK_N, gl.SliceLayout(1, NARROW))
    turned_columns = gl.arange(0, HALF_M, gl.SliceLayout(0, NARROW))
    step = 0
    tiles_each = m_tiles * n_tiles
    expert, start, end = read_expert(by_size_e3, gl.program_id(0), tiles_each, num_tiles)
    for t in range(gl.program_id(0), num_tiles, gl.num_programs(0)):
        m, n = grouped(t % tiles_each, m_tiles, n_tiles)
        k_steps = gl.cdiv(end - start, BLOCK_K)
        last = end - start - (k_steps - 1) * BLOCK_K
        this_expert = expert
        expert, start, end = read_expert(by_size_e3, t + gl.num_programs(0), tiles_each, num_tiles)
        acc0, acc1, step = multiply(narrow, wide, full, empty, step, k_steps, HALF, True, False, True, last, SHORT)
        if TMA_STORE:
            buffer0 = buffers.index(2 * HALF)
            buffer1 = buffers.index(2 * HALF + 1)
            p0, p1 = column_halves(acc0, BLOCK_N)
            p2, p3 = column_halves(acc1, BLOCK_N)
            if GATHER_LEFT:
                row = m * (2 * HALF_M) + HALF * HALF_M
                col = n * (2 * BLOCK_N)
                store_piece(out_desc, out2_desc, buffer0, p0, this_expert, row, col, M, False, APART)
                store_piece(out_desc, out2_desc, buffer1, p1, this_expert, row, col + HALF_M, M, False, APART)
                store_piece(out_desc, out2_desc, buffer0, p2, this_expert, row, col + 2 * HALF_M, M, False, APART)
                store_piece(out_desc, out2_desc, buffer1, p3, this_expert, row, col + 3 * HALF_M, M, False, APART)
            else:
                row = m * (2 * BLOCK_N)
                col = n * (2 * HALF_M) + HALF * HALF_M
                store_piece(out_desc, out2_desc, buffer0, p0, this_expert, row, col, M, True, APART)
                store_piece(out_desc, out2_desc, buffer1, p1, this_expert, row + HALF_M, col, M, True, APART)
                store_piece(out_desc, out2_desc, buffer0, p2, this_expert, row + 2 * HALF_M, col, M, True, APART)
                store_piece(out_desc, out2_desc, buffer1, p3, this_expert, row + 3 * HALF_M, col, M, True, APART)
        else:
            matrix = out + this_expert.to(gl.int64) * M * N
            buffer = buffers.index(HALF)
            if GATHER_LEFT:
                r = m * (2 * HALF_M) + HALF * HALF_M + rows
                c = n * (2 * BLOCK_N) + columns
                p = matrix + r.to(gl.int64)[:, None] * N + c[None, :]
                gl.store(p, through_shared(buffer, acc0, WIDE), mask=(r < M)[:, None] & (c < N)[None, :])
                c += BLOCK_N
                gl.store(p + BLOCK_N, through_shared(buffer, acc1, WIDE), mask=(r < M)[:, None] & (c < N)[None, :])
            else:
                r = m * (2 * BLOCK_N) + turned_rows
                c = n * (2 * HALF_M) + HALF * HALF_M + turned_columns
                p = matrix + r.to(gl.int64)[:, None] * N + c[None, :]
                turned = reinterpret(buffer, buffer.dtype, [BLOCK_N, HALF_M], SWIZZLED)
                turned.permute((1, 0)).store(acc0.to(buffer.dtype))
                gl.store(p, turned.load(NARROW), mask=(r < M)[:, None] & (c < N)[None, :])
                r += BLOCK_N
                p += BLOCK_N * N
                turned.permute((1, 0)).store(acc1.to(buffer.dtype))
                gl.store(p, turned.load(NARROW), mask=(r < M)[:, None] & (c < N)[None, :])
    if TMA_STORE:
        tma.store_wait(0)


@gluon.jit
def weight_grad_kernel(
    gathered,
    lying,
    lying_desc,
    row_N,
    by_size_e3,
    out,
    out_desc,
    out2_desc,
    num_tiles,
    m_tiles,
    n_tiles,
    M8,
    N8,
    GATHER_LEFT: gl.constexpr,
    TMA_STORE: gl.constexpr,
    APART: gl.constexpr,
):
    """out [e, M, N]: for each expert, the sum over its routes n of left[n]' right[n]. Launch with num_warps=4.

    Left [., M] is `gathered`, read at row_N[n], and right [., N] is `lying` in sorted order; or, without GATHER_LEFT,
    the other way round.

    Args:
        lying_desc: descriptor of lying in blocks [64, 128].
        out_desc: descriptor of [e * M, N] in blocks [64, 64]. TMA_STORE: store through it, for M a multiple of 64, so
            that no block reaches into the next expert.
        out2_desc: the same again, or, APART, of the second of two outputs [e, M / 2, N], which have the upper and the
            lower half of the rows; M a multiple of 128, with TMA_STORE.
        m_tiles, n_tiles: cdiv(M, 128) and cdiv(N, 256) with GATHER_LEFT, else cdiv(M, 256) and cdiv(N, 128).
        num_tiles: e * m_tiles * n_tiles.
        M8, N8: M / 8 and N / 8, so that the compiler knows rows to start at multiples of 16 bytes.
    """
    dtype: gl.constexpr = out.dtype.element_ty
    M = M8 * 8
    N = N8 * 8
    if GATHER_LEFT:
        gathered_width = M
        lying_width = N
    else:
        gathered_width = N
        lying_width = M
    narrow = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_K, BLOCK_N], SWIZZLED)
    wide = gl.allocate_shared_memory(dtype, [2 * STAGES, BLOCK_K, BLOCK_N], SWIZZLED)
    if TMA_STORE:
        buffers = gl.allocate_shared_memory(dtype, [4, HALF_M, BLOCK_N // 2], SWIZZLED)
    else:
        buffers = gl.allocate_shared_memory(dtype, [2, HALF_M, BLOCK_N], SWIZZLED)
    full, empty = make_barriers(129)
    # fmt: off
    gl.warp_specialize([
        (consume, (narrow, wide, buffers, full, empty, by_size_e3, out, out_desc, out2_desc, num_tiles, m_tiles,
                   n_tiles, M, N, 0, GATHER_LEFT, TMA_STORE, APART)),
        (consume, (narrow, wide, buffers, full, empty, by_size_e3, out, out_desc, out2_desc, num_tiles, m_tiles,
                   n_tiles, M, N, 1, GATHER_LEFT, TMA_STORE, APART)),
        (produce, (gathered, lying, lying_desc, row_N, by_size_e3, narrow, wide, full, empty, num_tiles, m_tiles,
                   n_tiles, gathered_width, lying_width, GATHER_LEFT)),
    ], [4, 4], [CONSUMER_REGS, PRODUCER_REGS])
    # fmt: on
