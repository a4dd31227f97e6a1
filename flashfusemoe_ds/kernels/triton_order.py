# SPDX-License-Identifier: GPL-3.0-or-later
"""The order of routes by expert in two launches: a counting sort without scan, host synchronisation or float atomics.

    count    block b counts its own stretch of routes by expert:                     counts_BE [B, e + 1]
    scatter  block b adds up the counts of all blocks, hence knows where each expert starts and how many of its routes
             stand in earlier blocks, and places its own. Further programs write what is said per expert.

Every scatter block reads all of counts_BE. MAX_BLOCKS keeps that small: 128 blocks read 66 KB each at 128 experts,
where one more launch for a scan would cost more. Routes beyond that make the stretches longer, not the blocks more.

The entry points are plain functions of tensors and integers; `order.sort_by_expert` is what callers use.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashfusemoe_ds.kernels.launch import Bound, launch
from flashfusemoe_ds.kernels.sizes import cdiv, next_power_of_2

MAX_BLOCKS = 128
COUNT_CHUNK = 1024  # routes that the count takes at a time
SCATTER_CHUNK = 128  # routes that the scatter ranks among themselves, by comparing all pairs
RANK_COLUMNS = 32  # pairs are compared in [SCATTER_CHUNK, RANK_COLUMNS] at a time
PAIRS = 8192  # comparisons of experts' sizes in one program of those that write what is said per expert
COUNT_TILE = 8192  # entries of counts_BE in registers at a time


@triton.jit
def _load_keys(idx_ptr, offsets, end, NUM_EXPERTS: tl.constexpr):
    """Experts of routes; NUM_EXPERTS for a dropped route (or an id out of range), one more past the end."""
    idx = tl.load(idx_ptr + offsets, mask=offsets < end, other=0).to(tl.int32)
    key = tl.where((idx >= 0) & (idx < NUM_EXPERTS), idx, NUM_EXPERTS)
    return tl.where(offsets < end, key, NUM_EXPERTS + 1)


@triton.jit(do_not_specialize=["num_entries"])
def _count_kernel(
    idx_ptr,
    counts_ptr,
    num_entries,
    per_block,
    NUM_EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    block = tl.program_id(0)
    # Routes may number up to 2^31 - 1, and the last chunk reaches past them.
    start = block.to(tl.int64) * per_block
    end = tl.minimum(start + per_block, num_entries)
    lanes = tl.arange(0, CHUNK)
    bins = tl.arange(0, BINS)
    count = tl.zeros([BINS], dtype=tl.int32)
    for offset in range(0, per_block, CHUNK):
        count += tl.histogram(_load_keys(idx_ptr, start + offset + lanes, end, NUM_EXPERTS), BINS)
    tl.store(counts_ptr + block * (NUM_EXPERTS + 1) + bins, count, mask=bins <= NUM_EXPERTS)


@triton.jit
def _sum_blocks(counts_ptr, columns, num_blocks, block, NUM_EXPERTS: tl.constexpr, ROWS: tl.constexpr):
    """For some columns of counts_BE: the sum over all blocks, and over those before `block`."""
    total = tl.zeros_like(columns)
    before = tl.zeros_like(columns)
    for first in range(0, num_blocks, ROWS):
        rows = (first + tl.arange(0, ROWS))[:, None]
        mask = (rows < num_blocks) & (columns[None, :] <= NUM_EXPERTS)
        count = tl.load(counts_ptr + rows * (NUM_EXPERTS + 1) + columns[None, :], mask=mask, other=0)
        total += tl.sum(count, axis=0)
        before += tl.sum(tl.where(rows < block, count, 0), axis=0)
    return total, before


@triton.jit
def _place_routes(
    idx_ptr,
    row_ptr,
    route_ptr,
    pos_ptr,
    next_place,
    start,
    end,
    per_block,
    num_routes,
    top_k,
    NUM_EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
    RANK_COLUMNS: tl.constexpr,
):
    """Places one block's routes. next_place [BINS] is where each expert's next route goes."""
    lanes = tl.arange(0, CHUNK)
    for offset in range(0, per_block, CHUNK):
        routes = start + offset + lanes
        key = _load_keys(idx_ptr, routes, end, NUM_EXPERTS)
        rank = tl.zeros([CHUNK], dtype=tl.int32)
        for first in range(0, CHUNK, RANK_COLUMNS):
            others = first + tl.arange(0, RANK_COLUMNS)
            other_key = _load_keys(idx_ptr, start + offset + others, end, NUM_EXPERTS)
            earlier_equal = (other_key[None, :] == key[:, None]) & (others[None, :] < lanes[:, None])
            rank += tl.sum(earlier_equal.to(tl.int32), axis=1)
        place = tl.gather(next_place, key, axis=0) + rank
        next_place += tl.histogram(key, BINS)
        sorted_here = (routes < end) & (place < num_routes)
        tl.store(row_ptr + place, routes.to(tl.int32) // top_k, mask=sorted_here)
        tl.store(route_ptr + place, routes.to(tl.int32), mask=sorted_here)
        tl.store(pos_ptr + routes, tl.where(key < NUM_EXPERTS, place, num_routes), mask=routes < end)


@triton.jit
def _describe_experts(
    counts_ptr,
    ends_ptr,
    num_tiles_ptr,
    tiles_ptr,
    by_size_ptr,
    total,
    part,
    num_parts,
    num_blocks,
    max_tiles,
    NUM_EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    """Writes ends, tiles and sizes of the experts of one part. total [BINS] counts everybody's routes."""
    everyone = tl.arange(0, BINS)
    total = tl.where(everyone < NUM_EXPERTS, total, 0)
    tiles = tl.cdiv(total, TILE_ROWS)
    num_tiles = tl.sum(tiles, axis=0)
    if part == 0:
        tl.store(ends_ptr + everyone, tl.cumsum(total, 0), mask=everyone < NUM_EXPERTS)
        tl.store(num_tiles_ptr, num_tiles)

    mine = part * PART + tl.arange(0, PART)
    my_total, _ = _sum_blocks(counts_ptr, mine, num_blocks, 0, NUM_EXPERTS, ROWS)
    larger = (total[None, :] > my_total[:, None]) | (
        (total[None, :] == my_total[:, None]) & (everyone[None, :] < mine[:, None])
    )
    place = tl.sum((larger & (everyone[None, :] < NUM_EXPERTS)).to(tl.int32), axis=1)
    before = everyone[None, :] < mine[:, None]
    my_start = tl.sum(tl.where(before, total[None, :], 0), axis=1)
    my_end = my_start + my_total
    tl.store(by_size_ptr + 3 * place, mine, mask=mine < NUM_EXPERTS)
    tl.store(by_size_ptr + 3 * place + 1, my_start, mask=mine < NUM_EXPERTS)
    tl.store(by_size_ptr + 3 * place + 2, my_end, mask=mine < NUM_EXPERTS)

    my_tiles = tl.where(mine < NUM_EXPERTS, tl.cdiv(my_total, TILE_ROWS), 0)
    my_base = tl.sum(tl.where(before, tiles[None, :], 0), axis=1)
    step = tl.arange(0, 32)[None, :]
    for first in range(0, tl.max(my_tiles, axis=0), 32):
        tile = my_base[:, None] + first + step
        mask = (first + step) < my_tiles[:, None]
        tl.store(tiles_ptr + 4 * tile, tl.broadcast_to(mine[:, None], tile.shape), mask=mask)
        tl.store(tiles_ptr + 4 * tile + 1, tl.broadcast_to(my_start[:, None], tile.shape), mask=mask)
        tl.store(tiles_ptr + 4 * tile + 2, tl.broadcast_to(my_end[:, None], tile.shape), mask=mask)
        tl.store(tiles_ptr + 4 * tile + 3, tl.broadcast_to(my_base[:, None], tile.shape), mask=mask)
    unused = tl.arange(0, 256)
    for first in range(4 * num_tiles + part * 256, 4 * max_tiles, num_parts * 256):
        tl.store(tiles_ptr + first + unused, tl.zeros_like(unused), mask=first + unused < 4 * max_tiles)


@triton.jit(do_not_specialize=["num_entries", "num_blocks", "num_routes", "max_tiles"])
def _scatter_kernel(
    idx_ptr,
    counts_ptr,
    row_ptr,
    route_ptr,
    pos_ptr,
    ends_ptr,
    num_tiles_ptr,
    tiles_ptr,
    by_size_ptr,
    num_entries,
    per_block,
    num_blocks,
    num_routes,
    max_tiles,
    top_k,
    NUM_EXPERTS: tl.constexpr,
    BINS: tl.constexpr,
    CHUNK: tl.constexpr,
    RANK_COLUMNS: tl.constexpr,
    PARTS: tl.constexpr,
    PART: tl.constexpr,
    ROWS: tl.constexpr,
    PART_ROWS: tl.constexpr,
    TILE_ROWS: tl.constexpr,
):
    # The programs that describe the experts come first: with many experts they take longest.
    block = tl.program_id(0) - PARTS
    total, before = _sum_blocks(counts_ptr, tl.arange(0, BINS), num_blocks, block, NUM_EXPERTS, ROWS)
    if block < 0:
        _describe_experts(
            counts_ptr, ends_ptr, num_tiles_ptr, tiles_ptr, by_size_ptr, total, block + PARTS, PARTS, num_blocks,
            max_tiles, NUM_EXPERTS, BINS, PART, PART_ROWS, TILE_ROWS,
        )  # fmt: skip
    else:
        start = block.to(tl.int64) * per_block
        _place_routes(
            idx_ptr, row_ptr, route_ptr, pos_ptr, tl.cumsum(total, 0) - total + before, start,
            tl.minimum(start + per_block, num_entries), per_block, num_routes, top_k,
            NUM_EXPERTS, BINS, CHUNK, RANK_COLUMNS,
        )  # fmt: skip


@functools.cache
def _order_bound(num_experts: int, tile_rows: int) -> tuple[Bound, Bound, int]:
    """The two kernels, and by how many programs the second describes the experts."""
    bins = max(32, next_power_of_2(num_experts + 2))
    part = min(64, max(16, PAIRS // bins))
    parts = max(1, cdiv(num_experts, part))
    count = Bound(_count_kernel, NUM_EXPERTS=num_experts, BINS=bins, CHUNK=COUNT_CHUNK, num_warps=4)
    scatter = Bound(
        _scatter_kernel,
        NUM_EXPERTS=num_experts,
        BINS=bins,
        CHUNK=SCATTER_CHUNK,
        RANK_COLUMNS=RANK_COLUMNS,
        PARTS=parts,
        PART=part,
        ROWS=max(1, COUNT_TILE // bins),
        PART_ROWS=COUNT_TILE // part,
        TILE_ROWS=tile_rows,
        num_warps=8,
    )
    return count, scatter, parts


def sort_routes(
    idx_RK: Tensor, num_experts: int, num_routes: int, tile_rows: int, max_tiles: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The fields of `order.ExpertOrder`, in its order, all int32.

    Args:
        idx_RK: int32 or int64 [R, K]; anything outside [0, num_experts) counts as dropped.
        num_routes: N, at most R * K.
        tile_rows: rows of a tile.
        max_tiles: length of tiles_M4.
    """
    idx_RK = idx_RK.contiguous()
    num_entries = idx_RK.numel()
    num_blocks = max(1, min(MAX_BLOCKS, cdiv(num_entries, SCATTER_CHUNK)))
    per_block = cdiv(cdiv(num_entries, num_blocks), SCATTER_CHUNK) * SCATTER_CHUNK
    count, scatter, parts = _order_bound(num_experts, tile_rows)
    device = idx_RK.device

    def ints(*shape: int) -> Tensor:
        return torch.empty(*shape, dtype=torch.int32, device=device)  # a tuple of sizes takes longer to parse

    counts_BE = ints(num_blocks, num_experts + 1)
    fields = (
        ints(num_routes), ints(num_routes), ints(*idx_RK.shape), ints(num_experts), ints(1),
        ints(max_tiles, 4), ints(num_experts, 3),
    )  # fmt: skip
    launch(count, (num_blocks,), idx_RK, counts_BE, num_entries, per_block)
    launch(
        scatter,
        (parts + num_blocks,),
        idx_RK,
        counts_BE,
        *fields,
        num_entries,
        per_block,
        num_blocks,
        num_routes,
        max_tiles,
        max(idx_RK.shape[1], 1),
    )
    return fields
