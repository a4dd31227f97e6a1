# SPDX-License-Identifier: GPL-3.0-or-later
"""NaN and infinity in the input: they reach the output where they reach stock's, and nothing hangs or goes astray."""

from __future__ import annotations

import pytest
import torch
from deepspeed.moe.layer import MoE as StockMoE
from torch import nn

from flashfusemoe_ds import MoE, MoELayer
from tests.distributed import run_ranks
from tests.ds.experts_zoo import GatedMLP

D, TOKENS = 8, 24


def pair(ep_size: int = 1, **settings) -> tuple[nn.Module, nn.Module]:
    """Stock and ours with equal weights; capacity 0.5 drops most routes."""
    torch.manual_seed(0)
    settings = dict(num_experts=4, ep_size=ep_size, capacity_factor=0.5, min_capacity=1, **settings)
    stock, ours = StockMoE(D, GatedMLP(D, 16), **settings), MoE(D, GatedMLP(D, 16), **settings)
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def broken_rows(moe: nn.Module, x: torch.Tensor) -> list[int]:
    torch.manual_seed(1)
    leaf = x.clone().requires_grad_()
    out, l_aux, _ = moe(leaf)
    (out.sum() + l_aux).backward()
    return (~torch.isfinite(out)).any(1).nonzero()[:, 0].tolist()


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("drop_tokens", [True, False])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_broken_rows_are_those_of_stock(k: int, drop_tokens: bool, bad: float) -> None:
    stock, ours = pair(k=k, drop_tokens=drop_tokens)
    x = torch.randn(TOKENS, D)
    x[[3, 11, 12]] = bad
    rows = broken_rows(stock, x)
    assert set(rows) >= {3, 11, 12}
    assert broken_rows(ours, x) == rows


def over_two_ranks(rank: int, world: int) -> list[list[int]]:
    """Rank 1's input is all NaN. Both ranks finish forward and backward."""
    found = []
    for k in (1, 2, 4):
        for drop_tokens in (True, False):
            moe = pair(ep_size=2, k=k, drop_tokens=drop_tokens)[1]
            moe.set_deepspeed_parallelism()
            x = torch.full((TOKENS, D), float("nan")) if rank else torch.randn(TOKENS, D)
            found.append(broken_rows(moe, x))
    return found


def test_a_rank_full_of_nan_neither_hangs_nor_spoils_the_others_output() -> None:
    clean, broken = run_ranks(2, over_two_ranks, timeout=60)
    assert clean == [[]] * 6
    assert broken == [list(range(TOKENS))] * 6


def test_limits_of_a_moe_layer_let_nan_through() -> None:
    layer = MoELayer(D, 16, 4, 1, max_tokens_per_expert=1, allow_dropped_tokens=True)
    x = torch.randn(TOKENS, D)
    x[[3, 11, 12]] = float("nan")
    out, _ = layer(x)
    assert torch.isnan(out).any(1).nonzero()[:, 0].tolist() == [3, 11, 12]
