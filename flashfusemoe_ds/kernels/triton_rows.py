# SPDX-License-Identifier: GPL-3.0-or-later
"""Kernels over the sorted routes [N, .]: up, down and dx (one kernel), dgated, and the down bias's share of dS.

    up_kernel       X[row] W_up' + b    -> H, A = weight * f(H)         gathers X, stores the activation with H
    project_kernel  A W' + weight * b   -> Y;   dH W -> dX              both operands where they lie
    dgated_kernel   dY[row] W_down      -> dH, A, dS                    gathers dY, recomputes A from H
    bias_dot_kernel dY[row] . b_down    -> one more row of dS

All are persistent: the grid fills the GPU once, and each program walks tiles `t = pid, pid + programs, ...` up to a
total that it reads on the device. `locate` turns t into an expert, its rows and a block of columns.

Memory. Rows past an expert's end inside its last tile are computed like others, from whichever valid row a clamped
index names, and not stored: an output row depends on its own operand row alone, so a NaN there goes nowhere. K, unlike
rows, is summed over, so widths that BK does not divide are masked (zero-filled by TMA). Row and expert offsets are
int64: N * H passes 2^31 elements at 75,000 routes of H = 28672.

Weights come through TMA where USE_TMA says so (16-bit dtypes from Hopper on): `W` is then a descriptor over
[e, O, I], of rank three so that what lies outside one expert reads as zero, not as its neighbour.
"""

from __future__ import annotations

import triton
import triton.language as tl

from flashfusemoe_ds.kernels.triton_curves import curve, curve_and_slope


@triton.jit
def locate(t, tiles_M4, COLS: tl.constexpr, BM: tl.constexpr, MAP: tl.constexpr, GROUP: tl.constexpr):
    """Tile t -> (expert, first row, end of the expert's rows, block of columns).

    An expert's tiles are neighbours in t, and those of up to GROUP row tiles are walked rows first: programs that run
    at the same time then share a few blocks of weights and a few of rows, and L2 holds both. Columns first would read
    every weight from HBM once per row tile wherever an expert's weights exceed L2 (D = 4096, F = 14336). The groups of
    an expert are of even size, so that 17 row tiles are 9 and 8 and not 16 and a lonely 1.
    MAP is the map's rows per tile; a BM of half that takes each map tile in two, the second perhaps empty.
    """
    SPLIT: tl.constexpr = MAP // BM
    record = tiles_M4 + t // (SPLIT * COLS) * 4
    expert = tl.load(record)
    start = tl.load(record + 1)
    end = tl.load(record + 2)
    base = tl.load(record + 3)
    tiles = tl.cdiv(end - start, MAP) * SPLIT

    local = t - base * (SPLIT * COLS)
    size = tl.cdiv(tiles, tl.cdiv(tiles, GROUP))
    first = local // (size * COLS) * size
    within = local - first * COLS
    here = tl.minimum(size, tiles - first)
    return expert, start + (first + within % here) * BM, end, within // here


@triton.jit
def weight_block(
    W, expert, row, col, O: tl.constexpr, I: tl.constexpr, BO: tl.constexpr, BI: tl.constexpr, USE_TMA: tl.constexpr
):
    """[BO, BI] of W[expert] [O, I] at (row, col); zero outside of it."""
    if USE_TMA:
        block = W.load([expert, row, col]).reshape(BO, BI)
    else:
        o = row + tl.arange(0, BO)
        i = col + tl.arange(0, BI)
        at = W + expert.to(tl.int64) * (O * I) + o[:, None].to(tl.int64) * I + i[None, :]
        if O % BO == 0 and I % BI == 0:
            block = tl.load(at)
        elif I % BI == 0:
            block = tl.load(at, mask=(o < O)[:, None], other=0.0)
        elif O % BO == 0:
            block = tl.load(at, mask=(i < I)[None, :], other=0.0)
        else:
            block = tl.load(at, mask=(o < O)[:, None] & (i < I)[None, :], other=0.0)
    return block


@triton.jit
def row_block(at, k, K: tl.constexpr, BK: tl.constexpr):
    """[BM, BK] at column k of the rows that start at the pointers `at` [BM, 1]; zero past column K."""
    i = k + tl.arange(0, BK)
    if K % BK == 0:
        block = tl.load(at + i[None, :])
    else:
        block = tl.load(at + i[None, :], mask=(i < K)[None, :], other=0.0)
    return block


@triton.jit
def halves(x, M: tl.constexpr, N: tl.constexpr):
    """[M, N] -> its left and right [M, N // 2], without leaving registers."""
    return tl.split(tl.permute(tl.reshape(x, (M, 2, N // 2)), (0, 2, 1)))


@triton.jit
def slices_of(x, M: tl.constexpr, N: tl.constexpr, SUB: tl.constexpr):
    """[M, N] -> a tuple of SUB (1, 2 or 4) tiles [M, N // SUB], left to right."""
    tl.static_assert(SUB == 1 or SUB == 2 or SUB == 4, "SUB is 1, 2 or 4")
    if SUB == 1:
        slices = (x,)
    elif SUB == 2:
        slices = halves(x, M, N)
    else:
        left, right = halves(x, M, N)
        q0, q1 = halves(left, M, N // 2)
        q2, q3 = halves(right, M, N // 2)
        slices = (q0, q1, q2, q3)
    return slices


@triton.jit
def up_kernel(
    X,
    W,
    B,
    weight,
    row_N,
    route_N,
    tiles_M4,
    num_tiles_1,
    H,
    A,
    D: tl.constexpr,
    F: tl.constexpr,
    GATED: tl.constexpr,
    CURVE: tl.constexpr,
    BIAS: tl.constexpr,
    USE_TMA: tl.constexpr,
    MAP: tl.constexpr,
    GROUP: tl.constexpr,
    SUB: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """X [R, D], W [e, H, D], B [e, H], weight [R * K] -> H [N, H], A [N, F]. BN columns of A at a time: where GATED,
    two accumulators, and 2 BN columns of H."""
    COLS: tl.constexpr = (F + BN - 1) // BN
    WIDTH: tl.constexpr = 2 * F if GATED else F
    SLICE: tl.constexpr = BN // SUB
    total = tl.load(num_tiles_1) * (MAP // BM * COLS)
    for t in tl.range(tl.program_id(0), total, tl.num_programs(0)):
        expert, first, end, nt = locate(t, tiles_M4, COLS, BM, MAP, GROUP)
        if first < end:
            rows = first + tl.arange(0, BM)
            inside = rows < end
            at = X + tl.load(row_N + rows, mask=inside, other=0).to(tl.int64)[:, None] * D
            acc = tl.zeros((BM, BN), tl.float32)
            acc_up = acc
            for k in tl.range(0, D, BK):
                x = row_block(at, k, D, BK)
                w = weight_block(W, expert, nt * BN, k, WIDTH, D, BN, BK, USE_TMA)
                acc = tl.dot(x, w.T, acc, input_precision="ieee")
                if GATED:
                    w_up = weight_block(W, expert, F + nt * BN, k, WIDTH, D, BN, BK, USE_TMA)
                    acc_up = tl.dot(x, w_up.T, acc_up, input_precision="ieee")

            scale = tl.load(weight + tl.load(route_N + rows, mask=inside, other=0), mask=inside, other=0.0)
            scale = scale.to(tl.float32)[:, None]
            at_row = rows[:, None].to(tl.int64)
            slices = slices_of(acc, BM, BN, SUB)
            slices_up = slices_of(acc_up, BM, BN, SUB)
            for i in tl.static_range(SUB):
                cols = nt * BN + i * SLICE + tl.arange(0, SLICE)
                stored = inside[:, None]
                if F % BN != 0:
                    stored = stored & (cols < F)[None, :]
                at_h = H + at_row * WIDTH + cols[None, :]
                if BIAS:
                    at_b = B + expert.to(tl.int64) * WIDTH + cols
                h = slices[i]
                if BIAS:
                    h += tl.load(at_b, mask=cols < F, other=0.0).to(tl.float32)[None, :]
                tl.store(at_h, h.to(H.dtype.element_ty), mask=stored)
                value = curve(h, CURVE)
                if GATED:
                    h_up = slices_up[i]
                    if BIAS:
                        h_up += tl.load(at_b + F, mask=cols < F, other=0.0).to(tl.float32)[None, :]
                    tl.store(at_h + F, h_up.to(H.dtype.element_ty), mask=stored)
                    value = value * h_up
                tl.store(A + at_row * F + cols[None, :], (value * scale).to(A.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=["num_rows"])
def project_kernel(
    A,
    W,
    B,
    weight,
    route_N,
    tiles_M4,
    num_tiles_1,
    Y,
    num_rows,
    K: tl.constexpr,
    O: tl.constexpr,
    FORWARD: tl.constexpr,
    BIAS: tl.constexpr,
    USE_TMA: tl.constexpr,
    MAP: tl.constexpr,
    GROUP: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """A [N, K] (a descriptor where USE_TMA) -> Y [N, O].

    FORWARD: W is [e, O, K] and Y = A W' + weight * B. Otherwise W is [e, K, O] and Y = A W.
    """
    COLS: tl.constexpr = (O + BN - 1) // BN
    total = tl.load(num_tiles_1) * (MAP // BM * COLS)
    for t in tl.range(tl.program_id(0), total, tl.num_programs(0)):
        expert, first, end, nt = locate(t, tiles_M4, COLS, BM, MAP, GROUP)
        if first < end:
            rows = first + tl.arange(0, BM)
            inside = rows < end
            if not USE_TMA:
                at = A + tl.minimum(rows, num_rows - 1)[:, None].to(tl.int64) * K
            acc = tl.zeros((BM, BN), tl.float32)
            for k in tl.range(0, K, BK):
                if USE_TMA:
                    a = A.load([first, k])
                else:
                    a = row_block(at, k, K, BK)
                if FORWARD:
                    w = weight_block(W, expert, nt * BN, k, O, K, BN, BK, USE_TMA).T
                else:
                    w = weight_block(W, expert, k, nt * BN, K, O, BK, BN, USE_TMA)
                acc = tl.dot(a, w, acc, input_precision="ieee")

            cols = nt * BN + tl.arange(0, BN)
            stored = inside[:, None]
            if O % BN != 0:
                stored = stored & (cols < O)[None, :]
            if BIAS:
                scale = tl.load(weight + tl.load(route_N + rows, mask=inside, other=0), mask=inside, other=0.0)
                bias = tl.load(B + expert.to(tl.int64) * O + cols, mask=cols < O, other=0.0)
                acc += scale.to(tl.float32)[:, None] * bias.to(tl.float32)[None, :]
            at_y = Y + rows[:, None].to(tl.int64) * O + cols[None, :]
            tl.store(at_y, acc.to(Y.dtype.element_ty), mask=stored)


@triton.jit(do_not_specialize=["num_rows"])
def dgated_kernel(
    DOUT,
    W,
    H,
    weight,
    row_N,
    route_N,
    tiles_M4,
    num_tiles_1,
    DH,
    A,
    DS,
    num_rows,
    D: tl.constexpr,
    F: tl.constexpr,
    GATED: tl.constexpr,
    CURVE: tl.constexpr,
    IN_PLACE: tl.constexpr,
    USE_TMA: tl.constexpr,
    MAP: tl.constexpr,
    GROUP: tl.constexpr,
    SUB: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """DOUT [R, D], W [e, D, F], H [N, H] -> DH [N, H], A [N, F], DS [blocks of columns, N] float32.

    With dA = DOUT[row] W: DH = weight * d(act)/dH dA, A = weight * act(H), DS = sum of dA * act(H) over the block's
    columns. DH may be H (IN_PLACE): a program reads and writes the same elements.

    The epilogue keeps five tiles alive beside the accumulator. It runs over SUB (1, 2 or 4) slices of the columns:
    at 128 x 128 and 8 warps it spills a kilobyte a thread in one piece, and nothing in four.
    """
    COLS: tl.constexpr = (F + BN - 1) // BN
    WIDTH: tl.constexpr = 2 * F if GATED else F
    SLICE: tl.constexpr = BN // SUB
    total = tl.load(num_tiles_1) * (MAP // BM * COLS)
    for t in tl.range(tl.program_id(0), total, tl.num_programs(0)):
        expert, first, end, nt = locate(t, tiles_M4, COLS, BM, MAP, GROUP)
        if first < end:
            rows = first + tl.arange(0, BM)
            inside = rows < end
            at = DOUT + tl.load(row_N + rows, mask=inside, other=0).to(tl.int64)[:, None] * D
            acc = tl.zeros((BM, BN), tl.float32)
            for k in tl.range(0, D, BK):
                dy = row_block(at, k, D, BK)
                w = weight_block(W, expert, k, nt * BN, D, F, BK, BN, USE_TMA)
                acc = tl.dot(dy, w, acc, input_precision="ieee")

            slices = slices_of(acc, BM, BN, SUB)
            scale = tl.load(weight + tl.load(route_N + rows, mask=inside, other=0), mask=inside, other=0.0)
            scale = scale.to(tl.float32)[:, None]
            ds = tl.zeros((BM,), tl.float32)
            for i in tl.static_range(SUB):
                cols = nt * BN + i * SLICE + tl.arange(0, SLICE)
                stored = inside[:, None]
                if F % BN != 0:
                    stored = stored & (cols < F)[None, :]
                da = slices[i]
                at_row = rows[:, None].to(tl.int64)
                at_h = H + at_row * WIDTH + cols[None, :]
                at_dh = DH + at_row * WIDTH + cols[None, :]
                g = tl.load(at_h, mask=stored, other=0.0).to(tl.float32)
                value, slope = curve_and_slope(g, CURVE)
                if GATED:
                    up = tl.load(at_h + F, mask=stored, other=0.0).to(tl.float32)
                    if IN_PLACE:
                        # A thread may store what another loads: all loads of the slice come before its stores.
                        tl.debug_barrier()
                    a = value * up
                    ds += tl.sum(da * a, 1)
                    da = da * scale
                    tl.store(at_dh, (da * up * slope).to(DH.dtype.element_ty), mask=stored)
                    tl.store(at_dh + F, (da * value).to(DH.dtype.element_ty), mask=stored)
                else:
                    if IN_PLACE:
                        tl.debug_barrier()
                    a = value
                    ds += tl.sum(da * a, 1)
                    tl.store(at_dh, (da * scale * slope).to(DH.dtype.element_ty), mask=stored)
                tl.store(A + at_row * F + cols[None, :], (a * scale).to(A.dtype.element_ty), mask=stored)
            tl.store(DS + nt.to(tl.int64) * num_rows + rows, ds, mask=inside)


@triton.jit
def bias_dot_kernel(
    DOUT,
    B,
    row_N,
    tiles_M4,
    num_tiles_1,
    DS,
    D: tl.constexpr,
    MAP: tl.constexpr,
    BM: tl.constexpr,
    BK: tl.constexpr,
):
    """DOUT [R, D], B [e, D] -> DS [N] float32: DS[n] = DOUT[row[n]] . B[expert of n]."""
    total = tl.load(num_tiles_1) * (MAP // BM)
    for t in tl.range(tl.program_id(0), total, tl.num_programs(0)):
        expert, first, end, _ = locate(t, tiles_M4, 1, BM, MAP, 1)
        rows = first + tl.arange(0, BM)
        inside = rows < end
        at = DOUT + tl.load(row_N + rows, mask=inside, other=0).to(tl.int64)[:, None] * D
        ds = tl.zeros((BM,), tl.float32)
        for k in tl.range(0, D, BK):
            cols = k + tl.arange(0, BK)
            b = tl.load(B + expert.to(tl.int64) * D + cols, mask=cols < D, other=0.0).to(tl.float32)
            ds += tl.sum(row_block(at, k, D, BK).to(tl.float32) * b[None, :], 1)
        tl.store(DS + rows, ds, mask=inside)
