# SPDX-License-Identifier: GPL-3.0-or-later
"""Counting, placing and spreading of rows for an all-to-all, one launch each.

    count   block b counts the rows and routes of its own stretch of tokens by rank: the stretch's rows go to
            blocks_BP, and both are added to the totals, as integers, whose sum no order changes
    place   block b adds up the rows of all stretches, hence knows where each rank starts and how many of its rows
            stand in earlier stretches, and places its own; it writes their ids and weights along
    spread  reads each row once and writes it to each of its slots

Count and place read the ids, a few percent of the rows' bytes; they are apart because nothing but the totals is needed
to start the exchange of counts, which then runs beside the other two.

The entry points are plain functions of tensors and integers; `exchange` is what callers use.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashfusemoe_ds.kernels.exchange import as_words
from flashfusemoe_ds.kernels.launch import launch
from flashfusemoe_ds.kernels.sizes import cdiv, next_power_of_2

MAX_BLOCKS = 128  # each reads all of blocks_BP
PAIRS = 1024  # (token, rank) pairs that a block looks at at a time: 8 a thread
COUNT_TILE = 4096  # entries of blocks_BP in registers at a time
WORDS = 1024  # that a program takes apart: 8 a thread
NUM_WARPS = 4


@triton.jit
def _load_experts(idx_ptr, tokens, k, end, K: tl.constexpr):
    return tl.load(idx_ptr + tokens * K + k, mask=tokens < end, other=-1).to(tl.int32)


@triton.jit
def _is_owner(expert, ranks, NUM_LOCAL: tl.constexpr, P: tl.constexpr):
    """[BLOCK_T] experts, [BLOCK_P] ranks -> [BLOCK_T, BLOCK_P]."""
    rank = tl.where(expert >= 0, expert // NUM_LOCAL, P)
    return (rank[:, None] == ranks[None, :]) & (ranks[None, :] < P)


@triton.jit(do_not_specialize=["num_tokens"])
def _count_kernel(
    idx_ptr,
    totals_ptr,
    blocks_ptr,
    num_tokens,
    per_block,
    K: tl.constexpr,
    P: tl.constexpr,
    NUM_LOCAL: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    block = tl.program_id(0)
    start = block.to(tl.int64) * per_block
    end = tl.minimum(start + per_block, num_tokens)
    ranks = tl.arange(0, BLOCK_P)
    rows = tl.zeros([BLOCK_P], dtype=tl.int32)
    routes = tl.zeros([BLOCK_P], dtype=tl.int32)
    for offset in range(0, per_block, BLOCK_T):
        tokens = start + offset + tl.arange(0, BLOCK_T)
        found = tl.zeros([BLOCK_T, BLOCK_P], dtype=tl.int32)
        for k in range(K):
            expert = _load_experts(idx_ptr, tokens, k, end, K)
            found += _is_owner(expert, ranks, NUM_LOCAL, P).to(tl.int32)
        routes += tl.sum(found, axis=0)
        rows += tl.sum((found > 0).to(tl.int32), axis=0)
    tl.store(blocks_ptr + block * P + ranks, rows, mask=ranks < P)
    tl.atomic_add(totals_ptr + 2 * ranks, rows.to(tl.int64), mask=ranks < P, sem="relaxed")
    tl.atomic_add(totals_ptr + 2 * ranks + 1, routes.to(tl.int64), mask=ranks < P, sem="relaxed")


@triton.jit
def _first_slots(blocks_ptr, block, num_blocks, ranks, P: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_B: tl.constexpr):
    """[BLOCK_P]: where this block's first row for each rank goes."""
    total = tl.zeros([BLOCK_P], dtype=tl.int32)
    before = tl.zeros([BLOCK_P], dtype=tl.int32)
    for first in range(0, num_blocks, BLOCK_B):
        others = first + tl.arange(0, BLOCK_B)[:, None]
        mask = (others < num_blocks) & (ranks[None, :] < P)
        rows = tl.load(blocks_ptr + others * P + ranks[None, :], mask=mask, other=0)
        total += tl.sum(rows, axis=0)
        before += tl.sum(tl.where(others < block, rows, 0), axis=0)
    return tl.cumsum(total, 0) - total + before


@triton.jit(do_not_specialize=["num_tokens", "num_blocks"])
def _place_kernel(
    idx_ptr,
    weights_ptr,
    blocks_ptr,
    slot_ptr,
    words_ptr,
    num_tokens,
    per_block,
    num_blocks,
    K: tl.constexpr,
    P: tl.constexpr,
    J: tl.constexpr,
    WEIGHT_WORDS: tl.constexpr,
    NUM_LOCAL: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_J: tl.constexpr,
):
    block = tl.program_id(0)
    start = block.to(tl.int64) * per_block
    end = tl.minimum(start + per_block, num_tokens)
    ranks = tl.arange(0, BLOCK_P)
    columns = tl.arange(0, BLOCK_J)[None, :]
    next_slot = _first_slots(blocks_ptr, block, num_blocks, ranks, P, BLOCK_P, BLOCK_B)
    for offset in range(0, per_block, BLOCK_T):
        tokens = start + offset + tl.arange(0, BLOCK_T)
        hit = tl.zeros([BLOCK_T, BLOCK_P], dtype=tl.int32)
        for k in range(K):
            expert = _load_experts(idx_ptr, tokens, k, end, K)
            hit |= _is_owner(expert, ranks, NUM_LOCAL, P).to(tl.int32)
        slot = next_slot[None, :] + tl.cumsum(hit, 0) - hit
        next_slot += tl.sum(hit, axis=0)

        column = tl.cumsum(hit, 1) - hit
        tl.store(slot_ptr + tokens[:, None] * J + column, slot, mask=hit > 0)
        unused = (columns >= tl.sum(hit, axis=1)[:, None]) & (columns < J) & (tokens < end)[:, None]
        none = tl.zeros([BLOCK_T, BLOCK_J], dtype=tl.int32) + num_tokens * J
        tl.store(slot_ptr + tokens[:, None] * J + columns, none, mask=unused)

        line = words_ptr + slot.to(tl.int64) * (WEIGHT_WORDS + K)
        for w in range(WEIGHT_WORDS):
            word = tl.load(weights_ptr + tokens * WEIGHT_WORDS + w, mask=tokens < end, other=0)
            tl.store(line + w, tl.broadcast_to(word[:, None], [BLOCK_T, BLOCK_P]), mask=hit > 0)
        for k in range(K):
            expert = _load_experts(idx_ptr, tokens, k, end, K)
            here = _is_owner(expert, ranks, NUM_LOCAL, P)
            local = tl.where(here, expert[:, None] - ranks[None, :] * NUM_LOCAL, -1)
            tl.store(line + WEIGHT_WORDS + k, local, mask=hit > 0)


@triton.jit(do_not_specialize=["num_tokens", "num_rows"])
def _spread_kernel(
    x_ptr,
    slot_ptr,
    out_ptr,
    num_tokens,
    num_rows,
    D: tl.constexpr,
    J: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    strips: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    program = tl.program_id(0)
    tokens = (program // strips).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    columns = (program % strips) * BLOCK_D + tl.arange(0, BLOCK_D)[None, :]
    here = tokens < num_tokens
    row = tl.load(x_ptr + tokens[:, None] * D + columns, mask=here[:, None] & (columns < D))
    for j in tl.static_range(J):
        slot = tl.load(slot_ptr + tokens * J + j, mask=here, other=num_rows).to(tl.int64)
        # D is a constant, so that the compiler sees the alignment of multiples of 8 and not only of 16.
        tl.store(out_ptr + slot[:, None] * D + columns, row, mask=(slot < num_rows)[:, None] & (columns < D))


@triton.jit(do_not_specialize=["num_words"])
def _take_apart_kernel(
    words_ptr, idx_ptr, weights_ptr, num_words, K: tl.constexpr, WEIGHT_WORDS: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    here = at < num_words
    word = tl.load(words_ptr + at, mask=here, other=0)
    row, column = at // (WEIGHT_WORDS + K), at % (WEIGHT_WORDS + K)
    tl.store(weights_ptr + row * WEIGHT_WORDS + column, word, mask=here & (column < WEIGHT_WORDS))
    tl.store(idx_ptr + row * K + column - WEIGHT_WORDS, word.to(tl.int64), mask=here & (column >= WEIGHT_WORDS))


def _stretches(num_tokens: int, num_ranks: int) -> tuple[int, int, int, int]:
    """How count and place share the tokens out: blocks, tokens per block, tokens at a time, and ranks rounded up."""
    block_p = next_power_of_2(num_ranks)
    block_t = max(16, min(128, PAIRS // block_p))
    num_blocks = min(MAX_BLOCKS, cdiv(num_tokens, block_t))
    per_block = cdiv(cdiv(num_tokens, max(num_blocks, 1)), block_t) * block_t
    return num_blocks, per_block, block_t, block_p


def count_rows(idx_TK: Tensor, num_local_experts: int, num_ranks: int) -> tuple[Tensor, Tensor]:
    """See `exchange.count_rows`. blocks_BP is int32 [B, P], the rows of each stretch of tokens."""
    num_tokens, top_k = idx_TK.shape
    num_blocks, per_block, block_t, block_p = _stretches(num_tokens, num_ranks)
    counts_2P2 = torch.zeros(2, num_ranks, 2, dtype=torch.int64, device=idx_TK.device)
    blocks_BP = torch.empty(num_blocks, num_ranks, dtype=torch.int32, device=idx_TK.device)
    launch(
        _count_kernel,
        (num_blocks,),
        idx_TK.contiguous(),
        counts_2P2,
        blocks_BP,
        num_tokens,
        per_block,
        K=top_k,
        P=num_ranks,
        NUM_LOCAL=num_local_experts,
        BLOCK_T=block_t,
        BLOCK_P=block_p,
        num_warps=NUM_WARPS,
    )
    return counts_2P2, blocks_BP


def place_rows(
    idx_TK: Tensor, weight_TK: Tensor, num_local_experts: int, num_ranks: int, blocks_BP: Tensor
) -> tuple[Tensor, Tensor]:
    """See `exchange.place_rows`."""
    num_tokens, top_k = idx_TK.shape
    columns = min(top_k, num_ranks)
    num_blocks, per_block, block_t, block_p = _stretches(num_tokens, num_ranks)
    weights_TW = as_words(weight_TK)
    weight_words = weights_TW.shape[1]
    slot_TJ = torch.empty(num_tokens, columns, dtype=torch.int32, device=idx_TK.device)
    words = torch.empty(num_tokens * columns, weight_words + top_k, dtype=torch.int32, device=idx_TK.device)
    launch(
        _place_kernel,
        (num_blocks,),
        idx_TK.contiguous(),
        weights_TW,
        blocks_BP,
        slot_TJ,
        words,
        num_tokens,
        per_block,
        num_blocks,
        K=top_k,
        P=num_ranks,
        J=columns,
        WEIGHT_WORDS=weight_words,
        NUM_LOCAL=num_local_experts,
        BLOCK_T=block_t,
        BLOCK_P=block_p,
        BLOCK_B=COUNT_TILE // block_p,
        BLOCK_J=next_power_of_2(columns),
        num_warps=NUM_WARPS,
    )
    return slot_TJ, words


def spread_rows(x_TD: Tensor, slot_TJ: Tensor, num_rows: int) -> Tensor:
    """See `exchange.spread_rows`."""
    (num_tokens, width), columns = x_TD.shape, slot_TJ.shape[1]
    out = torch.empty(num_rows, width, dtype=x_TD.dtype, device=x_TD.device)
    # One 16-byte load a thread, over as many tokens as that takes.
    elements = NUM_WARPS * 32 * 16 // x_TD.element_size()
    block_d = min(elements, max(16, next_power_of_2(width)))
    block_t = elements // block_d
    launch(
        _spread_kernel,
        (cdiv(num_tokens, block_t) * cdiv(width, block_d) if num_rows else 0,),
        x_TD.contiguous(),
        slot_TJ,
        out,
        num_tokens,
        num_rows,
        D=width,
        J=columns,
        BLOCK_T=block_t,
        BLOCK_D=block_d,
        num_warps=NUM_WARPS,
    )
    return out


def take_apart(words: Tensor, top_k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """See `exchange.take_apart`."""
    num_rows, width = words.shape
    idx_RK = torch.empty(num_rows, top_k, dtype=torch.int64, device=words.device)
    weight_RK = torch.empty(num_rows, top_k, dtype=dtype, device=words.device)
    launch(
        _take_apart_kernel,
        (cdiv(words.numel(), WORDS),),
        words,
        idx_RK,
        as_words(weight_RK),
        words.numel(),
        K=top_k,
        WEIGHT_WORDS=width - top_k,
        BLOCK=WORDS,
        num_warps=NUM_WARPS,
    )
    return idx_RK, weight_RK
