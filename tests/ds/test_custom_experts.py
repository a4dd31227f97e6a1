# SPDX-License-Identifier: GPL-3.0-or-later
"""Experts that are not fused, over two ranks, against stock DeepSpeed: also when a rank receives nothing."""

from __future__ import annotations

import copy

import pytest
import torch
from deepspeed import comm as dist
from deepspeed.moe.layer import MoE as StockMoE
from torch import nn

from flashfusemoe_ds import FlashFuseMoEConfig, MoE
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
    x = torch.rand(6, D)
    results = []
    for moe in (stock, ours):
        moe.set_deepspeed_parallelism()
        leaf = x.clone().requires_grad_()
        out, l_aux, _ = moe(leaf)
        (out.sin().sum() + l_aux).backward()
        results.append({"out": out, "l_aux": l_aux, "dx": leaf.grad, **stock_grads(moe)})
    names = {name for name, _ in stock.named_parameters()}
    assert names <= set(results[-1]), "a parameter without a gradient"
    return {n: relative_error(results[-1][n], results[0][n]) for n in results[0]}


@pytest.mark.parametrize("where", ["both ranks", "all to rank 0"])
@pytest.mark.parametrize("kind", ["custom", "mlp"])
def test_equals_stock(kind: str, where: str) -> None:
    for errors in run_ranks(2, compare, kind, where, timeout=60):
        assert {n: e for n, e in errors.items() if not e < 1e-5} == {}


def one_rank_without_tokens(rank: int, world: int, kind: str) -> dict[str, float]:
    """Rank 1 has no tokens. Stock's l_aux is NaN there, so the reference is a stock layer with all experts, ep_size 1,
    on rank 0's tokens: rank r's experts must have the gradients of its experts 2r and 2r + 1."""
    torch.manual_seed(0)
    expert = NormMLP() if kind == "custom" else GatedMLP(D, 16)
    settings = dict(num_experts=4, k=2, drop_tokens=False, top2_2nd_expert_sampling=False)
    whole = StockMoE(D, expert, **settings)
    ours = MoE(D, copy.deepcopy(expert), ep_size=2, **settings)
    with torch.no_grad():
        for p in whole.parameters():
            p.normal_(std=0.3)
    prefix = "deepspeed_moe.experts.deepspeed_experts."

    def of_this_rank(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        local = {f"{prefix}{2 * rank + i}.": f"{prefix}{i}." for i in range(2)}
        own = {n.replace(a, b): t for n, t in tensors.items() for a, b in local.items() if n.startswith(a)}
        return {**{n: t for n, t in tensors.items() if not n.startswith(prefix)}, **own}

    ours.load_state_dict(of_this_rank(whole.state_dict()))
    ours.set_deepspeed_parallelism()
    x = torch.rand(6, D)
    results = []
    for moe, rows in ((whole, x), (ours, x[: 0 if rank else 6])):
        leaf = rows.clone().requires_grad_()
        out, l_aux, _ = moe(leaf)
        (out.sin().sum() + l_aux).backward()
        results.append({"out": out, "l_aux": l_aux, "dx": leaf.grad, **stock_grads(moe)})
    expected, actual = of_this_rank(results[0]), results[1]
    if rank == 1:
        assert actual["out"].shape == actual["dx"].shape == (0, D)
        # No tokens, no loss of its own; its experts' gradients come from rank 0.
        for name in ("out", "dx", "l_aux", "deepspeed_moe.gate.wg.weight"):
            assert not torch.count_nonzero(actual.pop(name))
            del expected[name]
    return {name: relative_error(actual[name], expected[name]) for name in expected}


@pytest.mark.parametrize("kind", ["custom", "mlp"])
def test_a_rank_without_tokens(kind: str) -> None:
    for errors in run_ranks(2, one_rank_without_tokens, kind, timeout=60):
        assert len(errors) > 4
        assert {n: e for n, e in errors.items() if not e < 1e-5} == {}


class LargestEntry(nn.Module):
    """Does not take an empty tensor: max() of nothing is an error."""

    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(D, D)

    def forward(self, x):
        return self.fc(x / (1 + x.abs().max()))


def empty_rank_in_bf16(rank: int, world: int, kind: str) -> list[bool]:
    """All tokens to rank 0, under autocast: rank 1 must answer in the dtype that rank 0 expects."""
    torch.manual_seed(0)
    moe = MoE(D, NormMLP() if kind == "norm" else LargestEntry(), 4, ep_size=2, k=1, drop_tokens=False)
    with torch.no_grad():
        moe.deepspeed_moe.gate.wg.weight.copy_(torch.tensor([[2.0], [1.0], [-1.0], [-2.0]]).expand(4, D))
    moe.set_deepspeed_parallelism()
    x = torch.rand(6, D, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, l_aux, _ = moe(x)
    (out.float().sum() + l_aux).backward()
    return [bool(torch.isfinite(p.grad).all()) for p in moe.parameters()]


@pytest.mark.parametrize("kind", ["norm", "max"])
def test_a_rank_that_receives_nothing_answers_in_kind(kind: str) -> None:
    for finite in run_ranks(2, empty_rank_in_bf16, kind, timeout=60):
        assert finite and all(finite)


def refused_before_any_exchange(rank: int, world: int) -> list[str]:
    said = []
    for settings in ({}, {"gemm_backend": "grouped_mm"}):
        moe = MoE(D, GatedMLP(D, 7), num_experts=4, ep_size=2)
        moe.set_deepspeed_parallelism()
        moe.configure(FlashFuseMoEConfig(**settings))
        moe.deepspeed_moe.dispatcher.comm = None  # a collective would raise AttributeError
        try:
            moe(torch.zeros(3, D, dtype=torch.float32 if settings else torch.bfloat16))
        except ValueError as error:
            said.append(str(error))
    dist.barrier()  # a rank that leaves while the other still connects to a new group would break its connection
    return said


def test_input_that_the_experts_cannot_take_is_refused_before_any_exchange() -> None:
    for said in run_ranks(2, refused_before_any_exchange):
        assert said[0].startswith("input is torch.bfloat16, the experts' parameters torch.float32")
        assert said[1].startswith("gemm_backend 'grouped_mm' cannot run here")
