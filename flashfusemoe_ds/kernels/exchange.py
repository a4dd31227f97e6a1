# SPDX-License-Identifier: GPL-3.0-or-later
"""What an all-to-all transport does to tokens before it sends them, and none of it needs the host.

    count_rows   how many rows go to each rank: all that the ranks must tell each other
    place_rows   where each token's rows lie in the send buffer, and what is said in them of its routes
    spread_rows  the rows themselves
    take_apart   what was said of a row's routes, on the rank that it was sent to

A token has one row for each rank that owns one of its experts, J = min(K, P) at most. The send buffer is ordered by
destination rank, then by token. How many rows there are is known only on the device, so that buffers are sized for
T * J of them; the rest is never written, and never sent.

Rows that come home are added up by `gather_sum`, which takes slot_TJ as it is.

Kernels on CUDA (triton_exchange.py), PyTorch elsewhere; both give the same integers and the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor


def count_rows(idx_TK: Tensor, num_local_experts: int, num_ranks: int) -> tuple[Tensor, Tensor | None]:
    """Rows and routes for each rank.

    Args:
        idx_TK: int [T, K], global expert ids; -1, or anything else that no rank owns, goes nowhere.
        num_local_experts: e; rank p owns experts [p * e, (p + 1) * e).
        num_ranks: P.

    Returns:
        int64 [2, P, 2]: in its first half rows and routes for each rank; its second half, zeros, is room for those
        that come from each rank. And what `place_rows` needs of it.
    """
    if idx_TK.is_cuda:
        from flashfusemoe_ds.kernels import triton_exchange  # not at the top: machines without CUDA may lack triton

        return triton_exchange.count_rows(idx_TK, num_local_experts, num_ranks)
    return count_rows_torch(idx_TK, num_local_experts, num_ranks), None


def place_rows(
    idx_TK: Tensor, weight_TK: Tensor, num_local_experts: int, num_ranks: int, blocks_BP: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Slots of the send buffer, and its int32 words.

    Args:
        weight_TK: float32 or float64 [T, K].
        blocks_BP: as `count_rows` returned it for these ids.

    Returns:
        slot_TJ: int32 [T, J], where a token's rows lie, in rank order; T * J where it has fewer.
        words: int32 [T * J, W + K], one line for each row: its token's weights, bit for bit in W words, and its
        expert ids, local to the row's rank, -1 for other ranks' experts. Lines that are no row's hold anything.
    """
    if idx_TK.is_cuda:
        from flashfusemoe_ds.kernels import triton_exchange

        return triton_exchange.place_rows(idx_TK, weight_TK, num_local_experts, num_ranks, blocks_BP)
    return place_rows_torch(idx_TK, weight_TK, num_local_experts, num_ranks)


def spread_rows(x_TD: Tensor, slot_TJ: Tensor, num_rows: int) -> Tensor:
    """[T, D] -> [num_rows, D]: each token's row at each of its slots; a slot past the end is none.

    Args:
        num_rows: the number of rows if the host knows it, else T * J; lines that are no row's hold anything.
    """
    if x_TD.is_cuda:
        from flashfusemoe_ds.kernels import triton_exchange

        return triton_exchange.spread_rows(x_TD, slot_TJ, num_rows)
    return spread_rows_torch(x_TD, slot_TJ, num_rows)


def take_apart(words: Tensor, top_k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Lines of `place_rows`, int32 [R, W + K] contiguous -> expert ids int64 [R, K] and weights [R, K] in `dtype`."""
    if words.is_cuda:
        from flashfusemoe_ds.kernels import triton_exchange

        return triton_exchange.take_apart(words, top_k, dtype)
    return take_apart_torch(words, top_k, dtype)


def _ranks_of(idx_TK: Tensor, num_local_experts: int, num_ranks: int) -> Tensor:
    """bool [T, K, P]: the rank that owns each route's expert."""
    rank_TK = torch.where(idx_TK >= 0, idx_TK // num_local_experts, -1)
    return rank_TK.unsqueeze(2) == torch.arange(num_ranks, device=idx_TK.device)


def as_words(weight_TK: Tensor) -> Tensor:
    """[T, K] -> int32 [T, W], the same bits."""
    words = weight_TK.reshape(-1).view(torch.int32)
    return words.view(weight_TK.shape[0], weight_TK.shape[1] * weight_TK.element_size() // 4)


def count_rows_torch(idx_TK: Tensor, num_local_experts: int, num_ranks: int) -> Tensor:
    """The twin of the count."""
    owner_TKP = _ranks_of(idx_TK, num_local_experts, num_ranks)
    sent_P2 = torch.stack([owner_TKP.any(1).sum(0), owner_TKP.sum((0, 1))], dim=1)
    return torch.stack([sent_P2, torch.zeros_like(sent_P2)])


def place_rows_torch(
    idx_TK: Tensor, weight_TK: Tensor, num_local_experts: int, num_ranks: int
) -> tuple[Tensor, Tensor]:
    """The twin of the places."""
    columns = min(idx_TK.shape[1], num_ranks)
    none = idx_TK.shape[0] * columns
    hit_PT = _ranks_of(idx_TK, num_local_experts, num_ranks).any(1).t().contiguous()
    place_PT = torch.where(hit_PT, hit_PT.reshape(-1).cumsum(0).view_as(hit_PT) - 1, none)
    # Slots grow with the rank and "none" is largest: sorted, the used ones come first, still in rank order.
    slot_TJ, dest_TJ = (side[:, :columns] for side in place_PT.t().sort(dim=1, stable=True))

    dest_TJ1 = dest_TJ.unsqueeze(2)
    idx_T1K = idx_TK.unsqueeze(1)
    mine_TJK = (idx_T1K >= 0) & (idx_T1K // num_local_experts == dest_TJ1)
    idx_TJK = torch.where(mine_TJK, idx_T1K - dest_TJ1 * num_local_experts, -1).to(torch.int32)
    weights_TW = as_words(weight_TK)
    words_TJW = torch.cat([weights_TW.unsqueeze(1).expand(-1, columns, -1), idx_TJK], dim=2)
    # Every "none" writes to one more line, which is cut off.
    words = words_TJW.new_zeros(none + 1, words_TJW.shape[2])
    words[slot_TJ.reshape(-1)] = words_TJW.flatten(0, 1)
    return slot_TJ.to(torch.int32).contiguous(), words[:none]


def spread_rows_torch(x_TD: Tensor, slot_TJ: Tensor, num_rows: int) -> Tensor:
    """The twin of the spread."""
    rows = x_TD.new_zeros(num_rows + 1, x_TD.shape[1])  # the last line takes what has no slot
    for slot_T in slot_TJ.long().clamp(max=num_rows).unbind(1):
        rows.index_copy_(0, slot_T, x_TD)
    return rows[:num_rows]


def take_apart_torch(words: Tensor, top_k: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The twin of taking apart."""
    # A view as a wider type needs words without gaps.
    weight_RK = words[:, :-top_k].flatten().view(dtype).view(-1, top_k)
    return words[:, -top_k:].long(), weight_RK
