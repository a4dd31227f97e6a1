# SPDX-License-Identifier: GPL-3.0-or-later
"""What the Hopper kernels share: the tile, its schedule, and the multiply loop between two barriers. Written in Gluon.

A program is three partitions of four warps each, and runs one per multiprocessor, over many tiles:

    producer    fills a ring of STAGES buffers with the operands of one step of K: TMA for rows that lie together,
                cp.async for rows that are gathered
    consumers   two, each multiplying its half of the tile's rows with wgmma and finishing its half by itself

`full[s]` counts what a stage waits for (TMA's bytes, and the producer's cp.async where rows are gathered); `empty[s]`
waits for both consumers. The halves drift apart by STAGES steps at most, so one finishes a tile while the other still
multiplies, and the producer is already loading the next tile for both.

The result is 128 x 256, a consumer's share 64 x 256 in one accumulator, which leaves `multiply` as two halves of 128
columns: neighbours, or gate and up of the same 128. A step reads 48 KiB for 2 * 128 * 256 * 64 operations, 85 a byte.
128 x 128 would be 64 a byte; 9.2 TB/s, the most that L2 was seen to give, would then be a ceiling of 590 TFLOP/s.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.ampere import async_copy
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from flashfusemoe_ds.kernels import triton_curves

# The names are Triton 3.9's; 3.6 to 3.8 have those on the right.
tma_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
tma_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global
cp_async = getattr(async_copy, "async_load", None) or async_copy.async_copy_global_to_shared


@builtin
def reinterpret(block, dtype, shape, layout, _semantic=None):
    """The same shared memory as another shape; Triton 3.6 to 3.8 have the method under a private name."""
    method = getattr(type(block), "reinterpret", None) or type(block)._reinterpret
    return method(block, dtype, shape, layout, _semantic=_semantic)


BLOCK_M = gl.constexpr(128)
HALF_M = gl.constexpr(64)
BLOCK_N = gl.constexpr(128)  # of each accumulator
BLOCK_K = gl.constexpr(64)
STAGES = gl.constexpr(4)  # 192 KiB; 3 cost 4 % (dX, K = 28672) to 15 % (dW_up, K = 2048)
GROUP = gl.constexpr(16)  # row tiles that walk the columns together, so that L2 serves both operands

# Registers per thread. wgmma's accumulators take 128 of a consumer's; the producers need no more than this.
PRODUCER_REGS = gl.constexpr(64)
CONSUMER_REGS = gl.constexpr(224)

# Of an accumulator.
MMA = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 128, 16]))

# 16-bit operands in 128-byte swizzled rows of 64: what TMA writes and wgmma reads without bank conflicts.
SWIZZLED = gl.constexpr(gl.NVMMASharedLayout(128, 16))

# How a consumer reads and writes global memory: 16 bytes a thread, whole rows of 128 or 64 columns.
WIDE = gl.constexpr(gl.BlockedLayout([1, 8], [2, 16], [4, 1], [1, 0]))
NARROW = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))

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
def publish(full, step):
    """The producer's word that the cp.async of the stage before `step` have landed, so that wgmma may read them: one
    of the arrivals that complete that stage. What was copied for `step` may still be under way.

    The fence is here and not with the consumers (FENCE of multiply): a MEMBAR, it would wait for the loads of routing
    weights that are under way when a tile begins.
    """
    async_copy.commit_group()
    async_copy.wait_group(1)
    fence_async_shared()
    mbarrier.arrive(full.index((step + STAGES - 1) % STAGES), pred=step > 0)


@gluon.jit
def publish_last(full, step):
    """As publish, after the last step, for which it counts too."""
    async_copy.wait_group(0)
    fence_async_shared()
    mbarrier.arrive(full.index((step + STAGES - 1) % STAGES), pred=step > 0)


@gluon.jit
def add_step(
    acc,
    narrow,
    pairs,
    full,
    empty,
    step,
    k,
    HALF: gl.constexpr,
    A_TRANSPOSED: gl.constexpr,
    B_TRANSPOSED: gl.constexpr,
    FENCE: gl.constexpr,
    DEPTH: gl.constexpr,
):
    """Adds the stage at ring position `step`, a tile's k-th, or the first DEPTH of its 64 along K. This product may
    still run when it returns; the one before has left its stage."""
    s = step % STAGES
    mbarrier.wait(full.index(s), (step // STAGES) & 1)
    if FENCE:
        fence_async_shared()
    a = narrow.index(s)
    b = pairs.index(s)
    if DEPTH < BLOCK_K:
        gl.static_assert(A_TRANSPOSED and not B_TRANSPOSED, "K must run down the rows of both")
        a = a.slice(0, DEPTH, 0)
        b = b.slice(0, DEPTH, 0)
    if A_TRANSPOSED:
        a = a.slice(HALF * HALF_M, HALF_M, 1).permute((1, 0))
    else:
        a = a.slice(HALF * HALF_M, HALF_M, 0)
    if B_TRANSPOSED:
        b = b.permute((1, 0))
    acc = warpgroup_mma(a, b, acc, is_async=True)
    acc = warpgroup_mma_wait(1, deps=(acc,))
    mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), pred=k > 0)
    return acc


@gluon.jit
def multiply(
    narrow,
    wide,
    full,
    empty,
    step,
    k_steps,
    HALF: gl.constexpr,
    A_TRANSPOSED: gl.constexpr,
    B_TRANSPOSED: gl.constexpr,
    FENCE: gl.constexpr,
    last=BLOCK_K,
    SHORT: gl.constexpr = BLOCK_K,
):
    """Sums k_steps stages from ring position `step`, this consumer's 64 rows by 256 columns. Returns the left and the
    right 128 columns, [64, 128] float32 each, and the new position.

    narrow is A, one block of 128 rows a stage, [STAGES, 128, 64], or [STAGES, 64, 128] if A_TRANSPOSED; wide is B, two
    blocks of 128 columns a stage, [2 * STAGES, 128, 64] if B_TRANSPOSED, else [2 * STAGES, 64, 128]. The two blocks
    are one operand of wgmma: it reads A once for 256 columns, not twice for 128 each.
    FENCE: cp.async wrote part of a stage, which wgmma must be told, and the producer does not (publish).
    last, SHORT: where the last step holds no more than SHORT of 64 along K, that many are multiplied.
    """
    ACC: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * BLOCK_N, 16])
    if B_TRANSPOSED:
        pairs = reinterpret(wide, wide.dtype, [STAGES, 2 * BLOCK_N, BLOCK_K], SWIZZLED)
    else:
        pairs = reinterpret(wide, wide.dtype, [STAGES, BLOCK_K, 2 * BLOCK_N], SWIZZLED)
    acc = gl.zeros((HALF_M, 2 * BLOCK_N), gl.float32, ACC)
    whole = k_steps
    if SHORT < BLOCK_K:
        whole = gl.where(last <= SHORT, k_steps - 1, k_steps)
    for k in range(whole):
        acc = add_step(acc, narrow, pairs, full, empty, step, k, HALF, A_TRANSPOSED, B_TRANSPOSED, FENCE, BLOCK_K)
        step += 1
    if whole < k_steps:
        acc = add_step(acc, narrow, pairs, full, empty, step, whole, HALF, A_TRANSPOSED, B_TRANSPOSED, FENCE, SHORT)
        step += 1
    acc = warpgroup_mma_wait(0, deps=(acc,))
    mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), pred=k_steps > 0)
    left, right = column_halves(acc, 2 * BLOCK_N)
    left = gl.convert_layout(left, MMA, assert_trivial=True)
    right = gl.convert_layout(right, MMA, assert_trivial=True)
    return left, right, step


@gluon.jit
def column_halves(x, N: gl.constexpr):
    """[64, N] -> two [64, N / 2], the left and the right columns; no data moves."""
    return gl.split(gl.permute(gl.reshape(x, (HALF_M, 2, N // 2)), (0, 2, 1)))


@gluon.jit
def store_block(desc, buffer, acc, row, column):
    """Stores [64, 128] at (row, column) through one buffer and returns while the copy runs."""
    tma.store_wait(0)
    buffer.store(acc.to(buffer.dtype))
    fence_async_shared()
    tma_store(desc, [row, column], buffer)


@gluon.jit
def through_shared(buffer, acc, LAYOUT: gl.constexpr):
    """The accumulator in the buffer's 16-bit dtype, laid out for 16-byte stores of whole rows."""
    buffer.store(acc.to(buffer.dtype))
    return buffer.load(LAYOUT)
