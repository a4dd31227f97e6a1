# SPDX-License-Identifier: GPL-3.0-or-later
"""What the Hopper kernels share: the tile, its schedule, and the multiply loop between two barriers. Written in Gluon.

A program is three partitions of four warps each, and runs one per multiprocessor, over many tiles:

    producer    fills a ring of STAGES buffers with the operands of one step of K: TMA for rows that lie together,
                cp.async for rows that are gathered
    consumers   two, each multiplying its half of the tile's rows with wgmma and finishing its half by itself

`full[s]` counts what a stage waits for (TMA's bytes, and 128 cp.async threads where rows are gathered); `empty[s]`
waits for both consumers. The halves drift apart by up to STAGES steps, so one finishes a tile while the other still
multiplies, and the producer is already loading the next tile for both.

The result is 128 x 256, as two accumulators of 128 columns: the two halves of the columns, or gate and up of the same
128. A step reads 48 KiB for 2 * 128 * 256 * 64 operations, 85 a byte; 128 x 128 would be 64 a byte, which L2 (about
8.5 TB/s to the multiprocessors) turns into a ceiling of 540 TFLOP/s.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from flashfusemoe_ds.kernels import triton_curves

BLOCK_M = gl.constexpr(128)
HALF_M = gl.constexpr(64)
BLOCK_N = gl.constexpr(128)  # of each accumulator
BLOCK_K = gl.constexpr(64)
STAGES = gl.constexpr(4)  # 192 KiB; 3 cost 4 % (dX, K = 28672) to 15 % (dW_up, K = 2048)
GROUP = gl.constexpr(16)  # row tiles that walk the columns together, so that L2 serves both operands

# Registers per thread. wgmma's accumulators take 128 of a consumer's; the producers need no more than this.
PRODUCER_REGS = gl.constexpr(64)
CONSUMER_REGS = gl.constexpr(224)

# 16-bit operands in 128-byte swizzled rows of 64: what TMA writes and wgmma reads without bank conflicts.
SWIZZLED = gl.constexpr(gl.NVMMASharedLayout(128, 16))

_curve = gluon.jit(triton_curves.curve.fn)
_curve_and_slope = gluon.jit(triton_curves.curve_and_slope.fn)


@gluon.jit
def sigmoid(x):
    """In float32, with the two approximate instructions (2 ulp each) and no care for denormals: results are 16 bit."""
    e = gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;", "=f,f", [x * -1.4426950408889634], dtype=gl.float32, is_pure=True, pack=1
    )
    return gl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=f,f", [1 + e], dtype=gl.float32, is_pure=True, pack=1
    )


@gluon.jit
def curve(g, CURVE: gl.constexpr):
    """f(g), see triton_curves."""
    if CURVE == "silu":
        return g * sigmoid(g)
    else:
        return _curve(g, CURVE)


@gluon.jit
def curve_and_slope(g, CURVE: gl.constexpr):
    """f(g) and f'(g), see triton_curves."""
    if CURVE == "silu":
        s = sigmoid(g)
        value = g * s
        return value, s + value - value * s
    else:
        return _curve_and_slope(g, CURVE)


@gluon.jit
def grouped(local, row_tiles, column_tiles):
    """The local-th tile of a grid walked down its rows in groups of GROUP: (row tile, column tile)."""
    first = local // (GROUP * column_tiles) * GROUP
    size = gl.minimum(row_tiles - first, GROUP)
    rest = local - first * column_tiles
    return first + rest % size, rest // size


@gluon.jit
def make_barriers(FULL_COUNT: gl.constexpr):
    """Rings of barriers (full, empty), initialised; FULL_COUNT arrivals complete a stage."""
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(full.index(s), FULL_COUNT)
        mbarrier.init(empty.index(s), 2)
    fence_async_shared()
    return full, empty


@gluon.jit
def wait_empty(empty, step):
    """Waits until both consumers have left the stage of this step of the ring. Returns the stage."""
    s = step % STAGES
    mbarrier.wait(empty.index(s), ((step // STAGES) & 1) ^ 1)
    return s


@gluon.jit
def multiply(
    a_ring,
    b_ring,
    full,
    empty,
    step,
    k_steps,
    HALF: gl.constexpr,
    A_TRANSPOSED: gl.constexpr,
    B_TRANSPOSED: gl.constexpr,
    FENCE: gl.constexpr,
):
    """Sums k_steps stages from ring position `step`. Returns two [64, 128] float32 accumulators and the new position.

    a_ring [STAGES, 128, 64], or [STAGES, 64, 128] if A_TRANSPOSED; b_ring [2 * STAGES, 64, 128], or [., 128, 64] if
    B_TRANSPOSED. FENCE: cp.async wrote part of it, which wgmma must be told.
    """
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    acc0 = gl.zeros((HALF_M, BLOCK_N), gl.float32, LAYOUT)
    acc1 = gl.zeros((HALF_M, BLOCK_N), gl.float32, LAYOUT)
    for k in range(k_steps):
        s = step % STAGES
        mbarrier.wait(full.index(s), (step // STAGES) & 1)
        if FENCE:
            fence_async_shared()
        if A_TRANSPOSED:
            a = a_ring.index(s).slice(HALF * HALF_M, HALF_M, 1).permute((1, 0))
        else:
            a = a_ring.index(s).slice(HALF * HALF_M, HALF_M, 0)
        b0 = b_ring.index(2 * s)
        b1 = b_ring.index(2 * s + 1)
        if B_TRANSPOSED:
            b0 = b0.permute((1, 0))
            b1 = b1.permute((1, 0))
        acc0 = warpgroup_mma(a, b0, acc0, is_async=True)
        acc1 = warpgroup_mma(a, b1, acc1, is_async=True)
        # This step's two products may still run; the step before has read its stage.
        acc0, acc1 = warpgroup_mma_wait(2, deps=(acc0, acc1))
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), pred=k > 0)
        step += 1
    acc0, acc1 = warpgroup_mma_wait(0, deps=(acc0, acc1))
    mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), pred=k_steps > 0)
    return acc0, acc1, step


@gluon.jit
def through_shared(buffer, acc, LAYOUT: gl.constexpr):
    """The accumulator in the buffer's 16-bit dtype, laid out for 16-byte stores of whole rows."""
    buffer.store(acc.to(buffer.dtype))
    return buffer.load(LAYOUT)
