# SPDX-License-Identifier: GPL-3.0-or-later
"""Experts that are not fused, over two ranks, against stock DeepSpeed: also when a rank receives nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from deepspeed import comm as dist
from deepspeed.moe.layer import MoE as StockMoE
from torch import nn

from flashfusemoe_ds import MoE
from flashfusemoe_ds.nn.experts import ModuleExperts
from tests.close import relative_error
from tests.distributed import run_ranks
from tests.ds.experts_zoo import GatedMLP
from tests.ds.stock_grads import stock_grads

D = 8


class NormMLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(D), nn.Linear(D, D)

    def forward(self, x):
        return torch.tanh(self.fc(self.norm(x))), None


def compare(rank: int, world: int, kind: str, where: str) -> dict[str, float]:
    torch.manual_seed(rank)
    expert = NormMLP() if kind == "custom" else GatedMLP(D, 16)
    stock = StockMoE(D, expert, num_experts=4, ep_size=2, k=2, drop_tokens=False, top2_2nd_expert_sampling=False)
    ours = MoE(D, copy.deepcopy(expert), num_experts=4, ep_size=2, k=2, drop_tokens=False,
               top2_2nd_expert_sampling=False)  # fmt: skip
    assert isinstance(ours.deepspeed_moe.experts, ModuleExperts) == (kind == "custom")
    with torch.no_grad():
        for p in stock.parameters():
            p.normal_(std=0.3)
        if where != "both ranks":
            gate = stock.deepspeed_moe.gate.wg.weight
            gate.copy_(torch.tensor([[2.0], [1.0], [-1.0], [-2.0]]).expand(4, D))
            dist.broadcast(gate, 0)
    ours.load_state_dict(stock.state_dict())
    x = torch.rand(0 if where == "no tokens here" and rank == 1 else 6, D)
    results = []
    for moe in (stock, ours):
        if moe is stock and where == "no tokens here":
            continue  # stock cannot: its l_aux is NaN and its capacity selection fails
        moe.set_deepspeed_parallelism()
        leaf = x.clone().requires_grad_()
        out, l_aux, _ = moe(leaf)
        (out.sin().sum() + l_aux).backward()
        results.append({"out": out, "l_aux": l_aux, "dx": leaf.grad, **stock_grads(moe)})
    names = {name for name, _ in stock.named_parameters()}
    assert names <= set(results[-1]), "a parameter without a gradient"
    return {n: relative_error(results[-1][n], results[0][n]) for n in results[0]}


@pytest.mark.parametrize("where", ["both ranks", "all to rank 0", "no tokens here"])
@pytest.mark.parametrize("kind", ["custom", "mlp"])
def test_equals_stock(kind: str, where: str) -> None:
    for errors in run_ranks(2, compare, kind, where, timeout=60):
        assert {n: e for n, e in errors.items() if not e < 1e-5} == {}
