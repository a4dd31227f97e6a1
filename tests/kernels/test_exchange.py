# SPDX-License-Identifier: GPL-3.0-or-later
"""Rows for an all-to-all: the kernels against the PyTorch twins, bit for bit, and the twins against plain loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashfusemoe_ds.kernels import exchange, triton_exchange

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random_routes(
    tokens: int, top_k: int, num_experts: int, dropped: float = 0.2, dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids without order and, unlike a router's, sometimes twice in a token; weights of all bit patterns but NaN."""
    g = torch.Generator().manual_seed(seed)
    idx = torch.randint(num_experts, (tokens, top_k), generator=g)
    idx = torch.where(torch.rand(tokens, top_k, generator=g) < dropped, -1, idx)
    return idx, torch.randn(tokens, top_k, generator=g, dtype=dtype) * 1e-3


def by_loops(idx: list[list[int]], num_local: int, num_ranks: int) -> tuple[list, list, list]:
    """Rows in the order of the contract: counts per rank, slots per token, and (token, local ids) per row."""
    columns = min(len(idx[0]), num_ranks) if idx else 0
    counts, slots, rows = [], [[] for _ in idx], []
    for rank in range(num_ranks):
        first, routes = len(rows), 0
        for token, ids in enumerate(idx):
            local = [i - rank * num_local if i >= 0 and i // num_local == rank else -1 for i in ids]
            if max(local) >= 0:
                slots[token].append(len(rows))
                rows.append((token, local))
                routes += sum(i >= 0 for i in local)
        counts.append([len(rows) - first, routes])
    return counts, [s + [len(idx) * columns] * (columns - len(s)) for s in slots], rows


def check(idx: torch.Tensor, weight: torch.Tensor, num_local: int, num_ranks: int, width: int = 24) -> None:
    """The kernels give what the twins give, and the twins what the loops give."""
    counts, slots, rows = by_loops(idx.tolist(), num_local, num_ranks)
    x = torch.randn(len(idx), width, generator=torch.Generator().manual_seed(1)).bfloat16()
    num_rows, tokens = len(rows), [token for token, _ in rows]

    expected_counts = exchange.count_rows_torch(idx, num_local, num_ranks)
    slot, words = exchange.place_rows_torch(idx, weight, num_local, num_ranks)
    assert expected_counts.tolist() == [counts, [[0, 0]] * num_ranks]
    assert slot.tolist() == slots
    weight_words = words.shape[1] - idx.shape[1]
    assert words[:num_rows, weight_words:].tolist() == [local for _, local in rows]
    assert torch.equal(words[:num_rows, :weight_words], weight[tokens].view(torch.int32))
    sent = words[:num_rows].contiguous()
    for taken in (exchange.take_apart_torch, triton_exchange.take_apart):
        line = sent.to(DEVICE if taken is triton_exchange.take_apart else "cpu")
        taken_idx, taken_weight = (t.cpu() for t in taken(line, idx.shape[1], weight.dtype))
        assert taken_idx.dtype is torch.int64 and taken_idx.tolist() == [local for _, local in rows]
        assert taken_weight.dtype is weight.dtype and torch.equal(taken_weight, weight[tokens])
    for size in (num_rows, slot.numel()):
        assert torch.equal(exchange.spread_rows_torch(x, slot, size)[:num_rows], x[tokens])

    ids, weights, rows_x = (t.to(DEVICE) for t in (idx, weight, x))
    actual_counts, blocks = triton_exchange.count_rows(ids, num_local, num_ranks)
    actual_slot, actual_words = triton_exchange.place_rows(ids, weights, num_local, num_ranks, blocks)
    assert actual_counts.dtype is expected_counts.dtype and torch.equal(actual_counts.cpu(), expected_counts)
    assert actual_slot.dtype is slot.dtype and torch.equal(actual_slot.cpu(), slot)
    assert actual_words.dtype is words.dtype and actual_words.shape == words.shape
    assert torch.equal(actual_words.cpu()[:num_rows], words[:num_rows])
    for size in (num_rows, slot.numel()):
        spread = triton_exchange.spread_rows(rows_x, actual_slot, size)
        assert spread.shape == (size, width) and torch.equal(spread.cpu()[:num_rows], x[tokens])


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(0, 50),
    top_k=st.integers(1, 9),
    num_local=st.integers(1, 6),
    num_ranks=st.integers(2, 9),
    dropped=st.sampled_from([0.0, 0.3, 1.0]),
    double=st.booleans(),
    width=st.sampled_from([1, 8, 17, 40]),
    seed=st.integers(0, 1000),
)
def test_any_shape(tokens, top_k, num_local, num_ranks, dropped, double, width, seed) -> None:
    dtype = torch.float64 if double else torch.float32
    check(*random_routes(tokens, top_k, num_local * num_ranks, dropped, dtype, seed), num_local, num_ranks, width)


@pytest.mark.parametrize(
    ("tokens", "top_k", "num_local", "num_ranks"),
    [(0, 2, 4, 2), (1, 1, 1, 2), (40, 32, 16, 64), (40, 8, 16, 64), (9, 32, 512, 2), (300, 2, 1, 3), (70, 4, 32, 5)],
)
def test_corners(tokens: int, top_k: int, num_local: int, num_ranks: int) -> None:
    check(*random_routes(tokens, top_k, num_local * num_ranks), num_local, num_ranks)


def test_long_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few blocks, so that each walks over several chunks of tokens; and sums of blocks in several pieces."""
    monkeypatch.setattr(triton_exchange, "MAX_BLOCKS", 3)
    monkeypatch.setattr(triton_exchange, "COUNT_TILE", 4)
    check(*random_routes(1000, 2, 8), num_local=2, num_ranks=4)


def test_all_to_one_rank() -> None:
    idx, weight = random_routes(200, 4, 8, dropped=0.0)
    check(idx, weight, num_local=8, num_ranks=4)
    check(torch.where(idx >= 0, idx + 24, -1), weight, num_local=8, num_ranks=4)


def test_ids_that_no_rank_owns_go_nowhere() -> None:
    idx = torch.tensor([[0, 8], [3, -9], [8, 9]])
    weight = torch.ones(3, 2)
    counts, blocks = triton_exchange.count_rows(idx.to(DEVICE), 4, 2)
    slot, _ = triton_exchange.place_rows(idx.to(DEVICE), weight.to(DEVICE), 4, 2, blocks)
    assert counts[0].tolist() == exchange.count_rows_torch(idx, 4, 2)[0].tolist() == [[2, 2], [0, 0]]
    assert slot.tolist() == exchange.place_rows_torch(idx, weight, 4, 2)[0].tolist() == [[0, 6], [1, 6], [6, 6]]


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_rows_of_other_dtypes_keep_their_bits(dtype: torch.dtype) -> None:
    idx, weight = random_routes(30, 3, 8)
    slot, _ = exchange.place_rows_torch(idx, weight, 2, 4)
    sent = int(exchange.count_rows_torch(idx, 2, 4)[0, :, 0].sum())
    x = torch.randn(30, 12).to(dtype)
    x[3, 5], x[4, 0], x[5, 1] = float("nan"), float("-inf"), -0.0
    actual = triton_exchange.spread_rows(x.to(DEVICE), slot.to(DEVICE), sent).cpu()
    expected = exchange.spread_rows_torch(x, slot, sent)
    assert torch.equal(actual.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.gpu
def test_more_than_2_to_the_31_elements() -> None:
    """Two rows of each of 33,000 tokens of 32,768 numbers: the last lie past 2^31."""
    idx = torch.tensor([[0, 1]], device="cuda").expand(33_000, 2)
    slot, _ = exchange.place_rows(idx, torch.ones(idx.shape, device="cuda"), 1, 2, exchange.count_rows(idx, 1, 2)[1])
    x = torch.randn(len(idx), 32_768, device="cuda", dtype=torch.bfloat16)
    rows = exchange.spread_rows(x, slot, 2 * len(idx))
    assert torch.equal(rows[: len(idx)], x) and torch.equal(rows[len(idx) :], x)
