# SPDX-License-Identifier: GPL-3.0-or-later
"""Hopper kernels whose rows are sorted routes: up, down, dX (`rows_kernel`) and dgated (`dgated_kernel`).

A tile is 128 routes of one expert by 256 columns. Its rows come through TMA where they lie in sorted order (A of down,
dH of dX), or one by one through cp.async where the tile's order names them (X of up, dY of dgated); weights come
through TMA. Rows past the expert's last are computed from whatever lies there and never stored. See hopper_pipeline.py
for the partitions and barriers.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from flashfusemoe_ds.kernels.hopper_pipeline import (
    BLOCK_K,
    BLOCK_M,
    BLOCK_N,
    CONSUMER_REGS,
    HALF_M,
    MMA,
    NARROW,
    PRODUCER_REGS,
    STAGES,
    SWIZZLED,
    WIDE,
    column_halves,
    cp_async,
    curve,
    curve_and_slope,
    grouped,
    make_barriers,
    multiply,
    store_block,
    through_shared,
    tma_load,
    tma_store,
    wait_empty,
)

SLICE_M = gl.constexpr(16)  # rows and columns of dgated's epilogue at a time
SLICE_N = gl.constexpr(64)


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
):
    """Loads A's rows and two blocks of W for every step of every tile of this program.

    PAIRED: the second block is `second` rows of W after the first; otherwise the next 128 rows, or columns.
    """
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
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
                async_copy.mbarrier_arrive(ready, increment_count=False)
                a_ptrs += BLOCK_K
            step += 1


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
            a_ring, b_ring, full, empty, step, gl.cdiv(K, BLOCK_K), HALF, False, W_TRANSPOSED, GATHER
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
    full, empty = make_barriers(129 if GATHER else 1)
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


@gluon.jit
def load_h(h, offsets, partner, mask, GATED: gl.constexpr):
    """A slice of H and, if gated, of its partner columns."""
    g = gl.load(h + offsets, mask=mask, other=0.0)
    u = g
    if GATED:
        u = gl.load(h + partner + offsets, mask=mask, other=0.0)
    return g, u


@gluon.jit
def finish_slice(
    buffer,
    g,
    u,
    weight,
    h,
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
    INDEX: gl.constexpr,
    CURVE: gl.constexpr,
    GATED: gl.constexpr,
):
    """Stores dH and A of 16 rows of a [64, 64] block, of which g and u are H. Returns the rows' share of dS, and the
    H of the slice to come: the next 16 rows, or the next block's first.

    The slices of a block are INDEX = 0 to 3; `left` columns of the tile are left from this block on.
    """
    dtype: gl.constexpr = a.dtype.element_ty
    if INDEX + 1 < HALF_M // SLICE_M:
        mask = (rows + (INDEX + 1) * SLICE_M < stop)[:, None] & (columns < left)[None, :]
        next_g, next_u = load_h(h + (INDEX + 1) * SLICE_M * width, h_offsets, F, mask, GATED)
    else:
        mask = (rows < stop)[:, None] & (columns < left - SLICE_N)[None, :]
        next_g, next_u = load_h(h + SLICE_N, h_offsets, F, mask, GATED)

    mask = (rows + INDEX * SLICE_M < stop)[:, None] & (columns < left)[None, :]
    da = buffer.slice(INDEX * SLICE_M, SLICE_M, 0).load(NARROW).to(gl.float32)
    value, slope = curve_and_slope(g.to(gl.float32), CURVE)
    if GATED:
        up = u.to(gl.float32)
        act = value * up
        slope = slope * up
    else:
        act = value
    ds = gl.sum(da * act, 1)
    gl.store(a + INDEX * SLICE_M * F + a_offsets, (act * weight[:, None]).to(dtype), mask=mask)
    da = da * weight[:, None]
    dh_slice = dh + INDEX * SLICE_M * width + h_offsets
    gl.store(dh_slice, (da * slope).to(dtype), mask=mask)
    if GATED:
        gl.store(dh_slice + F, (da * value).to(dtype), mask=mask)
    return ds, next_g, next_u


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
    h,
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
    and dgated took 1.57 ms where this takes 0.86 (qwen3's shape). A slice's H is loaded one slice ahead, the first one
    before the products. 32 rows a slice are as fast, and spill.
    """
    dtype: gl.constexpr = a.dtype.element_ty
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
        h_tile = h + row.to(gl.int64) * width + col0
        dh_tile = dh + row.to(gl.int64) * width + col0
        a_tile = a + row.to(gl.int64) * F + col0
        weight0 = route_weights(weight_RK, route_N + row, rows, stop)
        weight1 = route_weights(weight_RK, route_N + row, rows + SLICE_M, stop)
        weight2 = route_weights(weight_RK, route_N + row, rows + 2 * SLICE_M, stop)
        weight3 = route_weights(weight_RK, route_N + row, rows + 3 * SLICE_M, stop)
        g, u = load_h(h_tile, ho, F, (rows < stop)[:, None] & (columns < left)[None, :], GATED)
        _, start, end, base = read_tile(tiles_M4, t + gl.num_programs(0), num_tiles, column_tiles)
        acc0, acc1, step = multiply(a_ring, b_ring, full, empty, step, gl.cdiv(D, BLOCK_K), HALF, False, False, True)

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
                b = buffers.index(2 * HALF + c)
                hp = h_tile + off
                dp = dh_tile + off
                ap = a_tile + off
                rest = left - off
                # fmt: off
                ds, g, u = finish_slice(b, g, u, weight0, hp, dp, ap, ho, ao, width, F, rows, stop, columns, rest, 0,
                                        CURVE, GATED)
                ds0 += ds
                ds, g, u = finish_slice(b, g, u, weight1, hp, dp, ap, ho, ao, width, F, rows, stop, columns, rest, 1,
                                        CURVE, GATED)
                ds1 += ds
                ds, g, u = finish_slice(b, g, u, weight2, hp, dp, ap, ho, ao, width, F, rows, stop, columns, rest, 2,
                                        CURVE, GATED)
                ds2 += ds
                ds, g, u = finish_slice(b, g, u, weight3, hp, dp, ap, ho, ao, width, F, rows, stop, columns, rest, 3,
                                        CURVE, GATED)
                ds3 += ds
                # fmt: on
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
    h,
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
        D8, F8: D / 8 and F / 8, see rows_kernel. D is a multiple of 64.
    """
    dtype: gl.constexpr = a.dtype.element_ty
    D = D8 * 8
    F = F8 * 8
    a_ring = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, BLOCK_K], SWIZZLED)
    b_ring = gl.allocate_shared_memory(dtype, [2 * STAGES, BLOCK_K, BLOCK_N], SWIZZLED)
    buffers = gl.allocate_shared_memory(dtype, [4, HALF_M, SLICE_N], SWIZZLED)
    full, empty = make_barriers(129)
    # fmt: off
    gl.warp_specialize([
        (consume_dgated, (a_ring, b_ring, buffers, full, empty, weight_RK, route_N, tiles_M4, num_tiles_1, h, dh, a,
                          ds_PN, num_routes, column_tiles, D, F, 0, CURVE, GATED)),
        (consume_dgated, (a_ring, b_ring, buffers, full, empty, weight_RK, route_N, tiles_M4, num_tiles_1, h, dh, a,
                          ds_PN, num_routes, column_tiles, D, F, 1, CURVE, GATED)),
        (produce, (dout_RD, w_desc, w_desc, row_N, tiles_M4, num_tiles_1, a_ring, b_ring, full, empty, column_tiles, D,
                   D, 0, True, False, False, False, True)),
    ], [4, 4], [CONSUMER_REGS, PRODUCER_REGS])
    # fmt: on
