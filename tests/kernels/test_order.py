# SPDX-License-Identifier: GPL-3.0-or-later
"""The order of routes: the kernels against the PyTorch twin, entry by entry, and the twin against sorted()."""

from __future__ import annotations

from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashfusemoe_ds.kernels import triton_order
from flashfusemoe_ds.kernels.order import TILE_ROWS, ExpertOrder, max_tiles, sort_by_expert_torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def random_ids(
    rows: int, top_k: int, num_experts: int, dropped: float = 0.2, seed: int = 0, dtype: torch.dtype = torch.int64
) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    idx = torch.randint(num_experts, (rows, top_k), generator=g)
    return torch.where(torch.rand(rows, top_k, generator=g) < dropped, -1, idx).to(dtype)


def sort_by_kernels(idx_RK: torch.Tensor, num_experts: int, num_routes: int) -> ExpertOrder:
    tiles = max_tiles(num_routes, num_experts)
    return ExpertOrder(*triton_order.sort_routes(idx_RK.to(DEVICE), num_experts, num_routes, TILE_ROWS, tiles))


def check(idx_RK: torch.Tensor, num_experts: int, num_routes: int | None = None) -> None:
    """Equal to the twin in every entry of every field."""
    num_routes = idx_RK.numel() if num_routes is None else num_routes
    expected = sort_by_expert_torch(idx_RK, num_experts, num_routes)
    actual = sort_by_kernels(idx_RK, num_experts, num_routes)
    for field in fields(ExpertOrder):
        a, e = getattr(actual, field.name).cpu(), getattr(expected, field.name)
        assert a.dtype is e.dtype is torch.int32, field.name
        assert torch.equal(a, e), f"{field.name}: {a.tolist()} is not {e.tolist()}"


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(0, 60),
    top_k=st.integers(1, 9),
    num_experts=st.integers(1, 20),
    dropped=st.sampled_from([0.0, 0.3, 1.0]),
    tight=st.booleans(),
    dtype=st.sampled_from([torch.int32, torch.int64]),
    seed=st.integers(0, 1000),
)
def test_any_shape(rows, top_k, num_experts, dropped, tight, dtype, seed) -> None:
    idx = random_ids(rows, top_k, num_experts, dropped, seed, dtype)
    check(idx, num_experts, int((idx >= 0).sum()) if tight else None)


@pytest.mark.parametrize(
    ("rows", "top_k", "num_experts"),
    [(0, 2, 3), (1, 1, 1), (7, 32, 1024), (300, 2, 64), (130, 1, 1024), (513, 8, 3), (700, 4, 129)],
)
def test_corners(rows: int, top_k: int, num_experts: int) -> None:
    check(random_ids(rows, top_k, num_experts), num_experts)


def test_long_stretches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few blocks, so that each walks over several chunks, of the count and of the scatter."""
    monkeypatch.setattr(triton_order, "MAX_BLOCKS", 3)
    check(random_ids(1100, 4, 6), 6)
    check(random_ids(1100, 4, 6), 6, num_routes=3600)


def test_all_routes_to_one_expert() -> None:
    """Its tiles are more than a step of the loop that writes them, and the other experts have none."""
    idx = torch.full((3000, 2), 5)
    check(idx, 9)
    assert sort_by_kernels(idx, 9, idx.numel()).tiles_M4[:, 0].count_nonzero() == -(-idx.numel() // TILE_ROWS)


def test_ids_out_of_range_are_dropped_not_followed() -> None:
    idx = torch.tensor([[0, 7], [3, -9]])
    order = sort_by_kernels(idx, 3, 4)
    assert order.ends_e.tolist() == [1, 1, 1]
    assert order.pos_RK.tolist() == [[0, 4], [4, 4]]


def test_the_twin_sorts_stably_and_puts_drops_last() -> None:
    idx = random_ids(40, 3, 5)
    order = sort_by_expert_torch(idx, 5, idx.numel())
    flat = idx.reshape(-1).tolist()
    expected = sorted(range(len(flat)), key=lambda i: (flat[i] if flat[i] >= 0 else 5, i))
    assert order.route_N.tolist() == expected
    assert order.row_N.tolist() == [i // 3 for i in expected]
    for route, place in enumerate(order.pos_RK.reshape(-1).tolist()):
        assert place == (expected.index(route) if flat[route] >= 0 else len(flat))
    sizes = [flat.count(e) for e in range(5)]
    assert order.by_size_e3[:, 0].tolist() == sorted(range(5), key=lambda e: -sizes[e])
    assert order.ends_e.diff(prepend=torch.zeros(1, dtype=torch.int32)).tolist() == sizes
