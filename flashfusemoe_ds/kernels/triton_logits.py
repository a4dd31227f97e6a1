# SPDX-License-Identifier: GPL-3.0-or-later
"""What the kernels of routing.py, routing_backward.py and deepspeed_routing.py have in common: tiles of logits.

A tile is [tokens, experts] in registers, all experts of a token at once: its softmax, its largest entries one by one,
and the cut of a float32 into three bf16 numbers. And how large a tile is, and how many programs share the work.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from types import MappingProxyType

import torch
import triton
import triton.language as tl

from flashfusemoe_ds.kernels.sizes import next_power_of_2

# Logits in a program's registers at a time. The kernels hold a handful of tensors of this size: at 1024 that is some
# 64 registers, at 2048 up to 212, and the backward spills.
TILE = 1024
MAX_TOKENS = 32  # per tile, so that few experts do not leave a handful of programs
NUM_WARPS = 4
# Partial sums [programs, E] are added up by one program in the end: fewer programs where there are many experts, but
# about one per multiprocessor.
MAX_PARTIALS, PARTIALS = 512, 65536
COPY_BLOCK = 2048  # entries of a weight that a program cuts or copies
# torch's clamp of a sum of scores, router.py: the smallest normal float32.
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
# Below the key of every number, -inf (-0x7f800001) included: experts that do not exist or are taken, and above those
# experts of closed groups.
NEVER = tl.constexpr(-0x80000000)
CLOSED = tl.constexpr(-0x7FFFFFFF)


@functools.cache
def tile_of(num_experts: int) -> Mapping[str, int]:
    """The constexprs that say how much of the logits is in registers at a time."""
    experts = max(4, next_power_of_2(num_experts))
    return MappingProxyType({"EXPERTS": experts, "TOKENS": max(1, min(MAX_TOKENS, TILE // experts))})


def max_programs(tile: Mapping[str, int]) -> int:
    """Programs of a kernel that leaves one row of partial sums each."""
    return min(MAX_PARTIALS, max(128, PARTIALS // tile["EXPERTS"]))


@triton.jit
def ordered(x):
    """Integers in the order of the floats, NaN above all, as torch.topk has it."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)  # -0 equals +0
    return tl.where(x == x, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits), 0x7FFFFFFF)


@triton.jit
def unordered(key):
    """The float of such an integer."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def best_column(key, columns):
    """Each row's largest key, and its first column."""
    top = tl.max(key, axis=1)
    return top, tl.min(tl.where(key == top[:, None], columns, 0x7FFFFFFF), axis=1)


@triton.jit
def softmax_within(logits, inside):
    """Softmax over the columns that are inside, 0 elsewhere, and the log-partition. A NaN makes its row NaN."""
    largest = tl.max(tl.where(inside, logits, float("-inf")), axis=1)
    exponential = tl.where(inside, tl.exp(logits - largest[:, None]), 0.0)
    total = tl.sum(exponential, axis=1)
    return exponential / total[:, None], largest + tl.log(total)


@triton.jit
def at_least(total, floor):
    """torch.clamp(min=floor): unlike a maximum, it keeps NaN."""
    return tl.where(total < floor, floor, total)


@triton.jit
def at_least_tiny(total):
    """The divisor of weights that are renormalised, as `nn.router` has it."""
    return at_least(total, TINY)


@triton.jit
def split(x):
    """x = hi + mid + lo in bf16, 8 bits of the mantissa each."""
    hi = x.to(tl.bfloat16)
    rest = x - hi.to(tl.float32)
    mid = rest.to(tl.bfloat16)
    return hi, mid, (rest - mid.to(tl.float32)).to(tl.bfloat16)


@triton.jit
def load_logits(parts_ptr, logits_ptr, rows, columns, inside, NUM_EXPERTS: tl.constexpr, SPLIT: tl.constexpr):
    """A tile of the logits [T, E]. SPLIT: they are the sum of the products [T, 3E] with the three parts of the weight,
    and are stored on the way."""
    at = rows[:, None] * NUM_EXPERTS + columns
    if SPLIT:
        # The smallest are added first.
        part = parts_ptr + rows[:, None] * (3 * NUM_EXPERTS) + columns
        small = tl.load(part + 2 * NUM_EXPERTS, mask=inside, other=0.0)
        small += tl.load(part + NUM_EXPERTS, mask=inside, other=0.0)
        logits = small + tl.load(part, mask=inside, other=0.0)
        tl.store(logits_ptr + at, logits, mask=inside)
    else:
        logits = tl.load(logits_ptr + at, mask=inside, other=0.0)
    return logits
