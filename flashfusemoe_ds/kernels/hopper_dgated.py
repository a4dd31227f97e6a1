# SPDX-License-Identifier: GPL-3.0-or-later
"""Hopper kernel dgated: dA = dY W_down, and from dA and H everything that follows from it: dH, A and dS.

Tiles and producer are those of hopper_rows.py, whose rows are sorted routes. What is its own is the epilogue, which
reads two numbers and writes three for every one that was summed. What it reads, H, comes through the ring too, in four
stages behind a tile's products. See hopper_pipeline.py for partitions and barriers.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from flashfusemoe_ds.kernels.hopper_pipeline import (
    BLOCK_K,
    BLOCK_M,
    BLOCK_N,
    CONSUMER_REGS,
    HALF_M,
    NARROW,
    PRODUCER_REGS,
    STAGES,
    SWIZZLED,
    column_halves,
    curve_and_slope,
    make_barriers,
    multiply,
    reinterpret,
)
from flashfusemoe_ds.kernels.hopper_rows import place, produce, read_tile, route_weights

SLICE_M = gl.constexpr(16)  # rows and columns of the epilogue at a time
SLICE_N = gl.constexpr(64)


@gluon.jit
def finish_slice(
    buffer,
    g_block,
    u_block,
    weight,
    dh,
    a,
    h_offsets,
    a_offsets,
    width,
    F,
    rows,
    stop,
    columns,
    left,
    HALF: gl.constexpr,
    INDEX: gl.constexpr,
    CURVE: gl.constexpr,
    GATED: gl.constexpr,
):
    """Stores dH and A of 16 rows of a [64, 64] block, whose H are rows of a stage. Returns the rows' share of dS.

    The slices of a block are INDEX = 0 to 3; `left` columns of the tile are left from this block on.
    """
    dtype: gl.constexpr = a.dtype.element_ty
    mask = (rows + INDEX * SLICE_M < stop)[:, None] & (columns < left)[None, :]
    g = g_block.slice(HALF * HALF_M + INDEX * SLICE_M, SLICE_M, 0).load(NARROW).to(gl.float32)
    da = buffer.slice(INDEX * SLICE_M, SLICE_M, 0).load(NARROW).to(gl.float32)
    value, slope = curve_and_slope(g, CURVE)
    if GATED:
        up = u_block.slice(HALF * HALF_M + INDEX * SLICE_M, SLICE_M, 0).load(NARROW).to(gl.float32)
        act = value * up
        slope = slope * up
    else:
        act = value
    # Where there is no H, TMA has left zeros, another expert's rows, or columns of the other half.
    ds = gl.sum(gl.where(mask, da * act, 0.0), 1)
    gl.store(a + INDEX * SLICE_M * F + a_offsets, (act * weight[:, None]).to(dtype), mask=mask)
    da = da * weight[:, None]
    dh_slice = dh + INDEX * SLICE_M * width + h_offsets
    gl.store(dh_slice, (da * slope).to(dtype), mask=mask)
    if GATED:
        gl.store(dh_slice + F, (da * value).to(dtype), mask=mask)
    return ds


@gluon.jit
def consume_dgated(
    a_ring,
    b_ring,
    buffers,
    full,
    empty,
    weight_RK,
    route_N,
    tiles_M4,
    num_tiles_1,
    dh,
    a,
    ds_PN,
    num_routes,
    column_tiles,
    D,
    F,
    HALF: gl.constexpr,
    CURVE: gl.constexpr,
    GATED: gl.constexpr,
):
    """One half of every tile: dA = dY W_down, then slice by slice of 16 x 64 what H makes of it.

    The epilogue is loops, not unrolled code: unrolled for all slices of both halves it missed the instruction cache,
    and dgated took 1.57 ms where this takes 0.86 (qwen3's shape). H comes through the ring, in the stages behind the
    products': loaded by the consumers, one slice ahead, it cost 5 to 15 %. 32 rows a slice are as fast, and spill.
    """
    dtype: gl.constexpr = a.dtype.element_ty
    h_ring = reinterpret(b_ring, b_ring.dtype, [2 * STAGES, BLOCK_M, BLOCK_K], SWIZZLED)
    num_tiles = gl.load(num_tiles_1)
    rows = HALF * HALF_M + gl.arange(0, SLICE_M, gl.SliceLayout(1, NARROW))
    columns = gl.arange(0, SLICE_N, gl.SliceLayout(0, NARROW))
    if GATED:
        width = 2 * F
    else:
        width = F
    ho = rows[:, None] * width + columns[None, :]
    ao = rows[:, None] * F + columns[None, :]
    step = 0
    _, start, end, base = read_tile(tiles_M4, gl.program_id(0), num_tiles, column_tiles)
    for t in range(gl.program_id(0), num_tiles * column_tiles, gl.num_programs(0)):
        row, n = place(t, column_tiles, start, end, base)
        stop = end - row
        col0 = n * (2 * BLOCK_N)
        left = gl.minimum(F - col0, 2 * BLOCK_N)
        dh_tile = dh + row.to(gl.int64) * width + col0
        a_tile = a + row.to(gl.int64) * F + col0
        weight0 = route_weights(weight_RK, route_N + row, rows, stop)
        weight1 = route_weights(weight_RK, route_N + row, rows + SLICE_M, stop)
        weight2 = route_weights(weight_RK, route_N + row, rows + 2 * SLICE_M, stop)
        weight3 = route_weights(weight_RK, route_N + row, rows + 3 * SLICE_M, stop)
        _, start, end, base = read_tile(tiles_M4, t + gl.num_programs(0), num_tiles, column_tiles)
        acc0, acc1, step = multiply(a_ring, b_ring, full, empty, step, gl.cdiv(D, BLOCK_K), HALF, False, False, False)

        ds0 = gl.zeros((SLICE_M,), gl.float32, gl.SliceLayout(1, NARROW))
        ds1 = ds0
        ds2 = ds0
        ds3 = ds0
        for half in range(2):
            left_part, right_part = column_halves(acc0, BLOCK_N)
            buffers.index(2 * HALF).store(left_part.to(dtype))
            buffers.index(2 * HALF + 1).store(right_part.to(dtype))
            for c in range(2):
                off = (2 * half + c) * SLICE_N
                s = step % STAGES
                mbarrier.wait(full.index(s), (step // STAGES) & 1)
                b = buffers.index(2 * HALF + c)
                g = h_ring.index(2 * s)
                u = h_ring.index(2 * s + 1)
                dp = dh_tile + off
                ap = a_tile + off
                rest = left - off
                # fmt: off
                ds0 += finish_slice(b, g, u, weight0, dp, ap, ho, ao, width, F, rows, stop, columns, rest, HALF, 0,
                                    CURVE, GATED)
                ds1 += finish_slice(b, g, u, weight1, dp, ap, ho, ao, width, F, rows, stop, columns, rest, HALF, 1,
                                    CURVE, GATED)
                ds2 += finish_slice(b, g, u, weight2, dp, ap, ho, ao, width, F, rows, stop, columns, rest, HALF, 2,
                                    CURVE, GATED)
                ds3 += finish_slice(b, g, u, weight3, dp, ap, ho, ao, width, F, rows, stop, columns, rest, HALF, 3,
                                    CURVE, GATED)
                # fmt: on
                mbarrier.arrive(empty.index(s))
                step += 1
            acc0 = acc1
        ds_tile = ds_PN + n.to(gl.int64) * num_routes + row
        gl.store(ds_tile + rows, ds0, mask=rows < stop)
        gl.store(ds_tile + rows + SLICE_M, ds1, mask=rows + SLICE_M < stop)
        gl.store(ds_tile + rows + 2 * SLICE_M, ds2, mask=rows + 2 * SLICE_M < stop)
        gl.store(ds_tile + rows + 3 * SLICE_M, ds3, mask=rows + 3 * SLICE_M < stop)


@gluon.jit(do_not_specialize=["num_routes"])
def dgated_kernel(
    dout_RD,
    w_desc,
    weight_RK,
    row_N,
    route_N,
    tiles_M4,
    num_tiles_1,
    h_desc,
    dh,
    a,
    ds_PN,
    num_routes,
    column_tiles,
    D8,
    F8,
    CURVE: gl.constexpr,
    GATED: gl.constexpr,
):
    """dA = dY[row_N] W_down, and from H: dH (may be H itself), A = weight * act(H), and dS, one partial sum a column
    tile, [cdiv(F, 256), N]. Launch with num_warps=4.

    Args:
        w_desc: descriptor of W_down [e * D, F] in blocks [64, 128].
        h_desc: descriptor of H [N, 2F], or [N, F] if not GATED, in blocks [128, 64].
        dh: [N, 2F] or [N, F], another tensor or H's memory.
        D8, F8: D / 8 and F / 8, see rows_kernel. D is a multiple of 64.
    """
    dtype: gl.constexpr = a.dtype.element_ty
    D = D8 * 8
    F = F8 * 8
    a_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_K], SWIZZLED)
    b_ring = gl.allocate_shared_memory(dtype, [2 * STAGES, BLOCK_K, BLOCK_N], SWIZZLED)
    buffers = gl.allocate_shared_memory(dtype, [4, HALF_M, SLICE_N], SWIZZLED)
    full, empty = make_barriers(2)
    # fmt: off
    gl.warp_specialize([
        (consume_dgated, (a_ring, b_ring, buffers, full, empty, weight_RK, route_N, tiles_M4, num_tiles_1, dh, a,
                          ds_PN, num_routes, column_tiles, D, F, 0, CURVE, GATED)),
        (consume_dgated, (a_ring, b_ring, buffers, full, empty, weight_RK, route_N, tiles_M4, num_tiles_1, dh, a,
                          ds_PN, num_routes, column_tiles, D, F, 1, CURVE, GATED)),
        (produce, (dout_RD, w_desc, w_desc, row_N, tiles_M4, num_tiles_1, a_ring, b_ring, full, empty, column_tiles, D,
                   D, F, True, False, False, False, True, h_desc, 2 if GATED else 1)),
    ], [4, 4], [CONSUMER_REGS, PRODUCER_REGS])
    # fmt: on
