# SPDX-License-Identifier: GPL-3.0-or-later
"""Hopper kernel whose rows are sorted routes: up, down and dX; and the producer that dgated shares.

A tile is 128 routes of one expert by 256 columns. Its rows come through TMA where they lie in sorted order (A of down,
dH of dX), or one by one through cp.async where the tile's order names them (X of up, dY of dgated); weights come
through TMA. Rows past the expert's last are computed from whatever lies there and never stored. See hopper_pipeline.py
for the partitions and barriers.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from flashfusemoe_ds.kernels.hopper_pipeline import (
    BLOCK_K,
    BLOCK_M,
    BLOCK_N,
    CONSUMER_REGS,
    HALF_M,
    MMA,
    PRODUCER_REGS,
    STAGES,
    SWIZZLED,
    WIDE,
    column_halves,
    cp_async,
    curve,
    grouped,
    make_barriers,
    multiply,
    publish,
    publish_last,
    reinterpret,
    store_block,
    through_shared,
    tma_load,
    tma_store,
    wait_empty,
)


@gluon.jit
def read_tile(tiles_M4, t, num_tiles, column_tiles):
    """The record of tile t's row tile: expert, its first route, its end, tiles before it. The last one's past the end.

    Four loads that do not wait for each other, so that the next tile's can run under this tile's products.
    """
    p = tiles_M4 + gl.maximum(gl.minimum(t // column_tiles, num_tiles - 1), 0) * 4
    return gl.load(p), gl.load(p + 1), gl.load(p + 2), gl.load(p + 3)


@gluon.jit
def place(t, column_tiles, start, end, base):
    """First route and column tile of tile t, given its record."""
    m, n = grouped(t - base * column_tiles, gl.cdiv(end - start, BLOCK_M), column_tiles)
    return start + m * BLOCK_M, n


@gluon.jit
def route_weights(weight_RK, route_N, rows, end):
    """float32: the weights of these sorted routes, 0 past the end."""
    ok = rows < end
    return gl.load(weight_RK + gl.load(route_N + rows, mask=ok, other=0), mask=ok, other=0.0)


@gluon.jit
def produce(
    a,
    w_desc,
    w2_desc,
    row_N,
    tiles_M4,
    num_tiles_1,
    a_ring,
    b_ring,
    full,
    empty,
    column_tiles,
    K,
    w_rows,
    second,
    GATHER: gl.constexpr,
    W_TRANSPOSED: gl.constexpr,
    PAIRED: gl.constexpr,
    APART: gl.constexpr,
    EVEN_K: gl.constexpr,
    h_desc=None,
    H_HALVES: gl.constexpr = 0,
):
    """Loads A's rows and two blocks of W for every step of every tile of this program.

    PAIRED: the second block is `second` rows of W after the first; otherwise the next 128 rows, or columns.
    H_HALVES: after a tile's steps come four stages with its H in W's place, [128, 64] each; with 2 two a stage,
    which is gated: the columns `second` after the first's.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    if H_HALVES:
        h_ring = reinterpret(b_ring, b_ring.dtype, [2 * STAGES, BLOCK_M, BLOCK_K], SWIZZLED)
    num_tiles = gl.load(num_tiles_1)
    rows = gl.arange(0, BLOCK_M, gl.SliceLayout(1, LAYOUT))
    columns = gl.arange(0, BLOCK_K, gl.SliceLayout(0, LAYOUT))
    step = 0
    expert, start, end, base = read_tile(tiles_M4, gl.program_id(0), num_tiles, column_tiles)
    for t in range(gl.program_id(0), num_tiles * column_tiles, gl.num_programs(0)):
        row, n = place(t, column_tiles, start, end, base)
        if PAIRED:
            n0 = n * BLOCK_N
            n1 = second + n0
        else:
            n0 = n * (2 * BLOCK_N)
            n1 = n0 + BLOCK_N
        w_row = expert * w_rows
        if GATHER:
            ok = row + rows < end
            source = gl.load(row_N + row + rows, mask=ok, other=0)
            a_ptrs = a + (source.to(gl.int64) * K)[:, None] + columns[None, :]
        expert, start, end, base = read_tile(tiles_M4, t + gl.num_programs(0), num_tiles, column_tiles)
        for k in range(0, K, BLOCK_K):
            s = wait_empty(empty, step)
            ready = full.index(s)
            if GATHER:
                mbarrier.expect(ready, 2 * BLOCK_N * BLOCK_K * 2)
            else:
                mbarrier.expect(ready, (BLOCK_M + 2 * BLOCK_N) * BLOCK_K * 2)
                tma_load(a, [row, k], ready, a_ring.index(s))
            if W_TRANSPOSED:
                tma_load(w_desc, [w_row + n0, k], ready, b_ring.index(2 * s))
                tma_load(w2_desc, [w_row + n1, k], ready, b_ring.index(2 * s + 1))
            else:
                # K is a multiple of 64 here, and w_rows: rows beyond would be the next expert's.
                if APART:
                    if k < w_rows:
                        tma_load(w_desc, [w_row + k, n0], ready, b_ring.index(2 * s))
                        tma_load(w_desc, [w_row + k, n1], ready, b_ring.index(2 * s + 1))
                    else:
                        tma_load(w2_desc, [w_row - w_rows + k, n0], ready, b_ring.index(2 * s))
                        tma_load(w2_desc, [w_row - w_rows + k, n1], ready, b_ring.index(2 * s + 1))
                else:
                    tma_load(w_desc, [w_row + k, n0], ready, b_ring.index(2 * s))
                    tma_load(w_desc, [w_row + k, n1], ready, b_ring.index(2 * s + 1))
            if GATHER:
                if EVEN_K:
                    mask = ok[:, None]
                else:
                    mask = ok[:, None] & (k + columns < K)[None, :]
                cp_async(a_ring.index(s), a_ptrs, mask)
                publish(full, step)
                a_ptrs += BLOCK_K
            step += 1
        if H_HALVES:
            for column in range(n0, n0 + 2 * BLOCK_N, BLOCK_K):
                s = wait_empty(empty, step)
                ready = full.index(s)
                mbarrier.expect(ready, H_HALVES * BLOCK_M * BLOCK_K * 2)
                tma_load(h_desc, [row, column], ready, h_ring.index(2 * s))
                if H_HALVES == 2:
                    tma_load(h_desc, [row, second + column], ready, h_ring.index(2 * s + 1))
                publish(full, step)
                step += 1
    if GATHER:
        publish_last(full, step)


@gluon.jit
def activate(buffer, acc, weight, CURVE: gl.constexpr):
    """Writes weight * curve(acc) to the buffer, 32 columns at a time: the whole of a gelu at once would spill."""
    QUARTER: gl.constexpr = BLOCK_N // 4
    left, right = column_halves(acc, BLOCK_N)
    q0, q1 = column_halves(left, BLOCK_N // 2)
    q2, q3 = column_halves(right, BLOCK_N // 2)
    weight = gl.convert_layout(weight, gl.SliceLayout(1, q0.type.layout), assert_trivial=True)[:, None]
    buffer.slice(0, QUARTER, 1).store((curve(q0, CURVE) * weight).to(buffer.dtype))
    buffer.slice(QUARTER, QUARTER, 1).store((curve(q1, CURVE) * weight).to(buffer.dtype))
    buffer.slice(2 * QUARTER, QUARTER, 1).store((curve(q2, CURVE) * weight).to(buffer.dtype))
    buffer.slice(3 * QUARTER, QUARTER, 1).store((curve(q3, CURVE) * weight).to(buffer.dtype))


@gluon.jit
def consume_rows(
    a_ring,
    b_ring,
    buffer,
    full,
    empty,
    bias,
    weight_RK,
    route_N,
    tiles_M4,
    num_tiles_1,
    out,
    out_desc,
    h,
    h_desc,
    column_tiles,
    K,
    W,
    HALF: gl.constexpr,
    GATHER: gl.constexpr,
    W_TRANSPOSED: gl.constexpr,
    ACTIVATE: gl.constexpr,
    PAIRED: gl.constexpr,
    CURVE: gl.constexpr,
    BIAS: gl.constexpr,
):
    """One half of every tile: multiply, then store the sums (W wide), or H and the weighed activation (W wide)."""
    num_tiles = gl.load(num_tiles_1)
    rows = gl.arange(0, HALF_M, gl.SliceLayout(1, WIDE))
    columns = gl.arange(0, BLOCK_N, gl.SliceLayout(0, WIDE))
    mma_rows = gl.arange(0, HALF_M, gl.SliceLayout(1, MMA))
    mma_columns = gl.arange(0, BLOCK_N, gl.SliceLayout(0, MMA))
    step = 0
    expert, start, end, base = read_tile(tiles_M4, gl.program_id(0), num_tiles, column_tiles)
    for t in range(gl.program_id(0), num_tiles * column_tiles, gl.num_programs(0)):
        row, n = place(t, column_tiles, start, end, base)
        row += HALF * HALF_M
        stop = end - row  # this half's rows that are routes of the expert; 0 or less for none
        this_expert = expert
        if ACTIVATE or BIAS:
            weight = route_weights(weight_RK, route_N + row, mma_rows, stop)
        expert, start, end, base = read_tile(tiles_M4, t + gl.num_programs(0), num_tiles, column_tiles)
        acc0, acc1, step = multiply(
            a_ring, b_ring, full, empty, step, gl.cdiv(K, BLOCK_K), HALF, False, W_TRANSPOSED, False
        )

        if PAIRED:
            col0 = n * BLOCK_N
            width = 2 * W  # of H, and of the bias
            second = W  # from a column of H to its partner
            whole = (stop >= HALF_M) & (W - col0 >= BLOCK_N)
        else:
            col0 = n * (2 * BLOCK_N)
            width = W
            second = BLOCK_N
            whole = (stop >= HALF_M) & (W - col0 >= 2 * BLOCK_N)
        left = W - col0
        if BIAS:
            bias_ptrs = bias + this_expert.to(gl.int64) * width + col0 + mma_columns
            bias0 = gl.load(bias_ptrs, mask=mma_columns < left, other=0.0).to(gl.float32)
            if PAIRED:
                bias1 = gl.load(bias_ptrs + second, mask=mma_columns < left, other=0.0).to(gl.float32)
            else:
                bias1 = gl.load(bias_ptrs + second, mask=mma_columns + BLOCK_N < left, other=0.0).to(gl.float32)
            if ACTIVATE:
                acc0 += bias0[None, :]
                acc1 += bias1[None, :]
            else:
                acc0 += weight[:, None] * bias0[None, :]
                acc1 += weight[:, None] * bias1[None, :]
        if whole:
            if ACTIVATE:
                store_block(h_desc, buffer, acc0, row, col0)
                if PAIRED:
                    value = curve(acc0, CURVE) * acc1 * weight[:, None]
                    store_block(h_desc, buffer, acc1, row, col0 + second)
                    store_block(out_desc, buffer, value, row, col0)
                else:
                    store_block(h_desc, buffer, acc1, row, col0 + second)
                    tma.store_wait(0)
                    activate(buffer, acc0, weight, CURVE)
                    fence_async_shared()
                    tma_store(out_desc, [row, col0], buffer)
                    tma.store_wait(0)
                    activate(buffer, acc1, weight, CURVE)
                    fence_async_shared()
                    tma_store(out_desc, [row, col0 + second], buffer)
            else:
                store_block(out_desc, buffer, acc0, row, col0)
                store_block(out_desc, buffer, acc1, row, col0 + second)
        else:
            tma.store_wait(0)  # the buffer is about to be written without asking
            mask0 = (rows < stop)[:, None] & (columns < left)[None, :]
            if PAIRED:
                mask1 = mask0
            else:
                mask1 = (rows < stop)[:, None] & (columns + BLOCK_N < left)[None, :]
            if ACTIVATE:
                p = h + row.to(gl.int64) * width + col0 + (rows[:, None] * width + columns[None, :])
                gl.store(p, through_shared(buffer, acc0, WIDE), mask=mask0)
                gl.store(p + second, through_shared(buffer, acc1, WIDE), mask=mask1)
                p = out + row.to(gl.int64) * W + col0 + (rows[:, None] * W + columns[None, :])
                if PAIRED:
                    value = curve(acc0, CURVE) * acc1 * weight[:, None]
                    gl.store(p, through_shared(buffer, value, WIDE), mask=mask0)
                else:
                    activate(buffer, acc0, weight, CURVE)
                    gl.store(p, buffer.load(WIDE), mask=mask0)
                    activate(buffer, acc1, weight, CURVE)
                    gl.store(p + second, buffer.load(WIDE), mask=mask1)
            else:
                p = out + row.to(gl.int64) * W + col0 + (rows[:, None] * W + columns[None, :])
                gl.store(p, through_shared(buffer, acc0, WIDE), mask=mask0)
                gl.store(p + second, through_shared(buffer, acc1, WIDE), mask=mask1)
    tma.store_wait(0)


@gluon.jit
def rows_kernel(
    a,
    w_desc,
    w2_desc,
    bias,
    weight_RK,
    row_N,
    route_N,
    tiles_M4,
    num_tiles_1,
    out,
    out_desc,
    h,
    h_desc,
    column_tiles,
    K8,
    W8,
    w_rows,
    GATHER: gl.constexpr,
    W_TRANSPOSED: gl.constexpr,
    ACTIVATE: gl.constexpr,
    PAIRED: gl.constexpr,
    APART: gl.constexpr,
    CURVE: gl.constexpr,
    BIAS: gl.constexpr,
    EVEN_K: gl.constexpr,
):
    """out[n] = A[n] W[expert of n]', or the activation of that. Launch with num_warps=4.

    Args:
        a: pointer to [R, K], gathered by row_N, if GATHER; else a descriptor of [N, K] in blocks [128, 64].
        w_desc: descriptor of [e * w_rows, .] in blocks [128, 64] if W_TRANSPOSED (W is [e, w_rows, K]), else [64, 128]
            (W is [e, w_rows = K, W], K a multiple of 64).
        w2_desc: the same again, or, APART, of the other half: gate rows in one tensor, up rows in another, each
            [e * w_rows, .]. If not W_TRANSPOSED, K = 2 * w_rows, and w_rows a multiple of 64.
        bias: [e, W or 2 W] if BIAS; times the route's weight unless ACTIVATE.
        out: [N, W], with a descriptor in blocks [64, 128]. With ACTIVATE also h, [N, 2 W] if PAIRED, which is gated:
            columns c and W + c belong together.
        column_tiles: cdiv(W, 128) if PAIRED, else cdiv(W, 256).
        K8, W8: K / 8 and W / 8, so that the compiler knows rows to start at multiples of 16 bytes.
    """
    dtype: gl.constexpr = out.dtype.element_ty
    K = K8 * 8
    W = W8 * 8
    second = W  # rows of W from a gate's to its up's
    if APART:
        second = W * 0  # the same row of the other tensor; a plain 0 would be of another type
    a_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_K], SWIZZLED)
    if W_TRANSPOSED:
        b_ring = gl.allocate_shared_memory(dtype, [2 * STAGES, BLOCK_N, BLOCK_K], SWIZZLED)
    else:
        b_ring = gl.allocate_shared_memory(dtype, [2 * STAGES, BLOCK_K, BLOCK_N], SWIZZLED)
    buffers = gl.allocate_shared_memory(dtype, [2, HALF_M, BLOCK_N], SWIZZLED)
    full, empty = make_barriers(2 if GATHER else 1)
    # fmt: off
    gl.warp_specialize([
        (consume_rows, (a_ring, b_ring, buffers.index(0), full, empty, bias, weight_RK, route_N, tiles_M4, num_tiles_1,
                        out, out_desc, h, h_desc, column_tiles, K, W, 0, GATHER, W_TRANSPOSED, ACTIVATE, PAIRED,
                        CURVE, BIAS)),
        (consume_rows, (a_ring, b_ring, buffers.index(1), full, empty, bias, weight_RK, route_N, tiles_M4, num_tiles_1,
                        out, out_desc, h, h_desc, column_tiles, K, W, 1, GATHER, W_TRANSPOSED, ACTIVATE, PAIRED,
                        CURVE, BIAS)),
        (produce, (a, w_desc, w2_desc, row_N, tiles_M4, num_tiles_1, a_ring, b_ring, full, empty, column_tiles, K,
                   w_rows, second, GATHER, W_TRANSPOSED, PAIRED, APART, EVEN_K)),
    ], [4, 4], [CONSUMER_REGS, PRODUCER_REGS])
    # fmt: on
