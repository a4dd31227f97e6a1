# SPDX-License-Identifier: GPL-3.0-or-later
"""MoE under an mpu with tensor parallelism, on gloo ranks in fp32: stock's layer in the same layout beside ours, and
the layer on one rank, with all experts whole."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed import comm as dist
from deepspeed.moe.layer import MoE as StockMoE
from deepspeed.utils import groups
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import flashfusemoe_ds
from flashfusemoe_ds import MoE, replace_moe
from flashfusemoe_ds.ds.fused_experts import FusedExperts
from flashfusemoe_ds.nn.experts import ModuleExperts
from tests.distributed import run_ranks
from tests.ds import tiny
from tests.ds.compare import assert_all_near, assert_near
from tests.ds.experts_zoo import EXPERTS
from tests.ds.layouts import SplitMLP, TensorParallelMpu, WholeMLP, fresh_groups, split, stock_gathers_on_gloo
from tests.ds.stock_grads import stock_grads

D, FFN, NUM_EXPERTS, WORLD = 16, 32, 8, 4
AUX_WEIGHT = 0.3
EXPERT_KEY = re.compile(r"(.*deepspeed_moe\.experts\.deepspeed_experts\.)(\d+)(\..*)")


@dataclass(frozen=True)
class Case:
    """One layer in one layout. `stock` says whether DeepSpeed's own layer can run it."""

    name: str
    tp: int = 2
    ep: int = 2
    k: int = 2
    experts: str = "swiglu"
    num_tokens: int = 32
    expert_tp: bool = False
    data_first: bool = False
    drop_tokens: bool = True
    drops: bool = True  # whether routes must, or must not, overflow: it is asserted
    stock: bool = True
    beside: int = 0  # ep_size of another layer before this one, which has tensor-parallel experts; 0: no other layer
    kwargs: tuple[tuple[str, Any], ...] = ()

    def build(self, moe_class: type[nn.Module], ep_size: int, expert: nn.Module) -> nn.Module:
        return moe_class(
            D, expert, num_experts=NUM_EXPERTS, ep_size=ep_size, k=self.k, drop_tokens=self.drop_tokens,
            enable_expert_tensor_parallelism=self.expert_tp, **dict(self.kwargs),
        )  # fmt: skip


def _cases() -> list[Case]:
    cases = [
        Case("top1", k=1),
        Case("top1_two_replicas_of_tp4", k=1, tp=4, ep=1),
        Case("top1_jitter_residual", k=1, kwargs=(("noisy_gate_policy", "Jitter"), ("use_residual", True))),
        Case("top2", k=2),
        Case("top2_ep1", k=2, ep=1),
        Case("top2_ep4", k=2, ep=4),
        Case("top2_tp4_ep2", k=2, tp=4),
        Case("top2_data_first", k=2, data_first=True),
        Case("top2_modules", k=2, experts="custom"),
        Case("top4", k=4),
        Case("top4_ep1_low_capacity", k=4, ep=1, kwargs=(("capacity_factor", 0.5),)),
        # Stock rounds a dropless capacity up to a multiple of the ranks.
        *(Case(f"top{k}_dropless_ep{ep}", k=k, ep=ep, drop_tokens=False, drops=False) for k in (1, 2, 4)
          for ep in (1, 2)),
        # Its drop_tokens asserts that they divide the capacity: 7 and 5 here.
        Case("top1_odd_capacity", k=1, stock=False, kwargs=(("min_capacity", 5),)),
        Case("top2_odd_tokens", k=2, num_tokens=27, stock=False),
        Case("top4_fewer_tokens_than_ranks", k=4, tp=4, num_tokens=3, drops=False, stock=False),
    ]  # fmt: skip
    for k in (1, 2, 4):
        cases += [
            Case(f"expert_tp_top{k}", k=k, expert_tp=True, experts="split"),
            Case(f"expert_tp_top{k}_ep1", k=k, expert_tp=True, experts="split", ep=1),
            # Here stock does not round the capacity, and mostly asserts.
            Case(f"expert_tp_top{k}_dropless", k=k, expert_tp=True, experts="split", drop_tokens=False, drops=False,
                 stock=False),
        ]  # fmt: skip
    cases += [
        Case("expert_tp4_ep1", tp=4, ep=1, expert_tp=True, experts="split"),
        Case("expert_tp_residual", expert_tp=True, experts="split", kwargs=(("use_residual", True),)),
        Case("expert_tp_data_first", expert_tp=True, experts="split", data_first=True),
        Case("expert_tp_odd_tokens", num_tokens=27, expert_tp=True, experts="split", stock=False),
        Case("expert_tp_experts_not_split", expert_tp=True, experts="gelu_bias"),
        # DeepSpeed has one set of groups per ep_size, whichever layer creates it.
        Case("in_the_groups_of_expert_tp", beside=2),
        Case("in_the_groups_of_expert_tp_ep1", ep=1, beside=1),
        # Stock then gathers in this layer too, by a global, and adds other experts' tokens to its gradients.
        Case("beside_expert_tp_of_another_ep_size", beside=1, stock=False),
    ]
    return cases


CASES = _cases()


def compare(rank: int, world_size: int, case: Case) -> None:
    """Ours against stock in the same layout, and both against all experts whole on this rank without an mpu."""
    mpu = TensorParallelMpu(case.tp)
    with fresh_groups():
        torch.manual_seed(1)
        whole = case.build(StockMoE, 1, _expert(case, None))
        _spread(whole)
        expected = _step(whole, case, mpu, whole)
        for name, grad in expected.items():
            if name.startswith("grad deepspeed_moe.experts"):
                dist.all_reduce(grad)  # every token is on tp ranks
                grad /= world_size
        assert _overflows(whole, case) == case.drops
    with fresh_groups(mpu), stock_gathers_on_gloo():
        if case.beside:
            StockMoE(
                D, WholeMLP(D, FFN), NUM_EXPERTS, case.beside, enable_expert_tensor_parallelism=True
            ).set_deepspeed_parallelism(case.data_first)
        for moe_class in (StockMoE, MoE) if case.stock else (MoE,):
            moe = case.build(moe_class, case.ep, _expert(case, mpu))
            moe.set_deepspeed_parallelism(case.data_first)
            held = moe.num_local_experts
            first = groups._get_expert_parallel_rank(moe.expert_group_name) * held
            moe.load_state_dict(_local(whole.state_dict(), first, held, mpu, case), strict=True)
            for _ in range(2):  # the first forward also compares the ranks
                moe.zero_grad()
                actual = _step(moe, case, mpu, moe)
            _add_up_experts(actual, moe, mpu)
            assert_all_near(actual, _local(expected, first, held, mpu, case))
        if case.experts in ("swiglu", "gelu_bias"):
            assert isinstance(moe.deepspeed_moe.experts, FusedExperts) != case.expert_tp


def _expert(case: Case, mpu: TensorParallelMpu | None) -> nn.Module:
    if case.experts != "split":
        return EXPERTS[case.experts](D, FFN)
    return WholeMLP(D, FFN) if mpu is None else SplitMLP(D, FFN, case.tp, mpu.tp_group)


def _spread(moe: nn.Module) -> None:
    state = moe.state_dict()
    for name, value in state.items():
        state[name] = torch.randn_like(value) * (0.8 if "gate.wg" in name else value.shape[-1] ** -0.5)
    moe.load_state_dict(state)


def _step(
    run: Callable[[Tensor], tuple[Tensor, Tensor, Tensor]], case: Case, mpu: TensorParallelMpu, moe: nn.Module
) -> dict[str, Tensor]:
    """Forward and backward of `moe` on the tokens of this rank's tensor-parallel group."""
    torch.manual_seed(100 + mpu.get_data_parallel_rank())
    x = torch.randn(case.num_tokens, D, requires_grad=True)
    g = torch.randn(case.num_tokens, D)
    out, l_aux, counts = run(x)
    ((out * g).sum() + AUX_WEIGHT * l_aux).backward()
    grads = stock_grads(moe)
    zeros = {name: torch.zeros_like(p) for name, p in moe.named_parameters() if p.grad is None}
    return {
        "output": out.detach(), "l_aux": l_aux.detach(), "counts": counts.float(), "input gradient": x.grad,
        **{f"grad {name}": grad.clone() for name, grad in (zeros | grads).items()},
    }  # fmt: skip


def _local(whole: dict[str, Tensor], first: int, held: int, mpu: TensorParallelMpu, case: Case) -> dict[str, Tensor]:
    """Of tensors under global expert ids, those of experts first, ..., first + held - 1, and of split ones the part
    of this rank."""
    local = {}
    for name, value in whole.items():
        match = EXPERT_KEY.fullmatch(name)
        if match:
            i = int(match[2]) - first
            if not 0 <= i < held:
                continue
            name = f"{match[1]}{i}{match[3]}"
        if case.experts == "split":
            value = split(name, value, case.tp, mpu.get_model_parallel_rank())
        local[name] = value
    return local


def _add_up_experts(result: dict[str, Tensor], moe: nn.Module, mpu: TensorParallelMpu) -> None:
    """What the engine does with experts' gradients at stage 0 (DeepSpeedEngine._reduce_expert_gradients)."""
    group = groups._get_expert_data_parallel_group(moe.expert_group_name)
    for name in sorted(name for name in result if name.startswith("grad deepspeed_moe.experts")):
        dist.all_reduce(result[name], group=group)
        result[name] /= mpu.get_data_parallel_world_size()


def _overflows(whole: nn.Module, case: Case) -> bool:
    gate = whole.deepspeed_moe.gate
    capacity = max(math.ceil(case.num_tokens / NUM_EXPERTS * gate.capacity_factor * case.k), gate.min_capacity)
    return case.drop_tokens and int(whole.deepspeed_moe.exp_counts.max()) > capacity


def _all(rank: int, world_size: int, cases: list[Case]) -> dict[str, str]:
    failures = {}
    for case in cases:
        try:
            compare(rank, world_size, case)
        except AssertionError as error:
            failures[case.name] = str(error)
    return failures


@pytest.mark.parametrize("replaced", [False, True])
def test_tensor_parallel_experts_stay_modules(replaced: bool) -> None:
    """Even those that look whole now: their exchanges may depend on groups that do not exist yet."""
    case = Case("", expert_tp=True, experts="swiglu")
    moe = case.build(StockMoE if replaced else MoE, 1, _expert(case, None))
    moe = replace_moe(moe) if replaced else moe
    assert type(moe) is MoE and type(moe.deepspeed_moe.experts) is ModuleExperts


@pytest.fixture(scope="module")
def failures() -> dict[str, str]:
    found: dict[str, str] = {}
    for rank, mine in enumerate(run_ranks(WORLD, _all, CASES)):
        for name, message in mine.items():
            found[name] = f"{found.get(name, '')}\nrank {rank}: {message}"
    return found


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_stock_and_the_whole_layer(failures: dict[str, str], case: Case) -> None:
    assert case.name not in failures, failures[case.name]


def test_two_ranks() -> None:
    cases = [Case("ep2"), Case("ep1", ep=1), Case("expert_tp", ep=1, expert_tp=True, experts="split")]
    assert run_ranks(2, _all, cases) == [{}, {}]


class Net(nn.Module):
    """Linear -> x + MoE -> Linear; dense layers alike on the ranks of a tensor-parallel group."""

    def __init__(self, moe: nn.Module) -> None:
        super().__init__()
        self.embed, self.moe, self.head = nn.Linear(tiny.D_IN, D), moe, nn.Linear(D, tiny.D_OUT)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        x = self.embed(x)
        out, l_aux, _ = self.moe(x)
        return (self.head(x + out) - target).square().mean() + 0.1 * l_aux


def _train(rank: int, world_size: int, case: Case, stage: int) -> None:
    """A few steps of stock and ours; every rank's weights must stay equal."""
    mpu = TensorParallelMpu(case.tp)
    ep_rank = (rank // case.tp if case.expert_tp else rank) % case.ep
    torch.manual_seed(2)
    whole = Net(case.build(StockMoE, 1, _expert(case, None)))
    _spread(whole.moe)
    weights = _local(whole.state_dict(), ep_rank * NUM_EXPERTS // case.ep, NUM_EXPERTS // case.ep, mpu, case)
    curves, states = [], []
    for moe_class, initialize in ((StockMoE, deepspeed.initialize), (MoE, flashfusemoe_ds.initialize)):
        with fresh_groups(), stock_gathers_on_gloo():
            model = Net(case.build(moe_class, case.ep, _expert(case, mpu)))
            model.load_state_dict(weights)
            engine = tiny.start(functools.partial(initialize, mpu=mpu), model, tiny.config(stage))
            dp_rank = mpu.get_data_parallel_rank()
            curves.append([_train_step(engine, dp_rank, step) for step in range(3)])
            states.append({name: value.clone() for name, value in engine.module.state_dict().items()})
            engine.destroy()
    stock, ours = states
    assert_all_near(ours, stock)
    assert_near("loss", torch.tensor(curves[1]), torch.tensor(curves[0]))
    for name, value in weights.items():
        assert not torch.equal(value, ours[name]), f"{name} did not move"


def _train_step(engine: Any, rank: int, step: int) -> float:
    total = 0.0
    for micro in range(engine.gradient_accumulation_steps()):
        torch.manual_seed(1000 * step + 10 * rank + micro)
        loss = engine(*tiny.batch(rank, step, micro))
        engine.backward(loss)
        engine.step()
        total += float(loss.detach())
    return total


def _train_all(rank: int, world_size: int, cases: list[tuple[Case, int]]) -> None:
    for case, stage in cases:
        try:
            _train(rank, world_size, case, stage)
        except AssertionError as error:
            raise AssertionError(f"{case.name}, stage {stage}") from error


@pytest.mark.slow
def test_engine_equals_stock() -> None:
    ep2, ep1 = Case("ep2", experts="gelu_bias"), Case("ep1", ep=1, k=1)
    expert_tp = Case("expert_tp", expert_tp=True, experts="split")
    run_ranks(WORLD, _train_all, [(ep2, 0), (ep2, 1), (ep2, 2), (ep1, 0), (ep1, 2), (expert_tp, 0), (expert_tp, 2)])


MISTAKES = {
    "tokens": "the mpu's tensor-parallel size is 2: MoE expects the same tokens on all ranks of such a group, but "
    "they have different ones",
    "lengths": "MoE expects the same tokens on all ranks of such a group, but they have 32, 31",
    "seeds": "the ranks of such a group route the same tokens to different experts",
    "forgotten sum": "the experts' outputs differ between the ranks of such a group",
    "forgotten sum, ep 1": "the experts' outputs differ between the ranks of such a group",
    "groups without it": "enable_expert_tensor_parallelism is True, but the process groups ep_size_2 were created by "
    "a layer where it is False",
    "too few data-parallel ranks": "ep_size is 4, but there are 4 ranks per pipeline stage, in tensor-parallel groups "
    "of 2 under enable_expert_tensor_parallelism; ep_size must divide both them and num_experts (8). Valid here: 1, 2",
    "groups of another mpu": "the process groups ep_size_2 cover 2 of 4 ranks, but the mpu's tensor-parallel size is "
    "1",
}


def _make_mistakes(rank: int, world_size: int) -> dict[str, str]:
    mpu = TensorParallelMpu(2)
    said = {}
    for name in MISTAKES:
        with fresh_groups(mpu):
            try:
                _make(name, rank, mpu)
                said[name] = "nothing"
            except ValueError as error:
                said[name] = str(error)
    return said


def _make(name: str, rank: int, mpu: TensorParallelMpu) -> None:
    ep, seed, num_tokens, moe = 2, 7, 32, None
    if name.startswith("forgotten sum"):
        ep = 1 if name.endswith("1") else 2
        torch.manual_seed(rank)
        moe = MoE(D, SplitMLP(D, FFN, 2, None), NUM_EXPERTS, ep, enable_expert_tensor_parallelism=True)
    elif name == "groups without it":
        MoE(D, WholeMLP(D, FFN), NUM_EXPERTS, 2).set_deepspeed_parallelism()
        moe = MoE(D, WholeMLP(D, FFN), NUM_EXPERTS, 2, enable_expert_tensor_parallelism=True)
    elif name == "too few data-parallel ranks":
        moe = MoE(D, WholeMLP(D, FFN), NUM_EXPERTS, 4, enable_expert_tensor_parallelism=True)
    elif name == "groups of another mpu":
        MoE(D, WholeMLP(D, FFN), NUM_EXPERTS, 2, enable_expert_tensor_parallelism=True).set_deepspeed_parallelism()
        groups.mpu = None
    torch.manual_seed(seed)
    moe = moe or MoE(D, WholeMLP(D, FFN), NUM_EXPERTS, ep)
    with torch.no_grad():
        moe.deepspeed_moe.gate.wg.weight.copy_(torch.linspace(-1, 1, NUM_EXPERTS * D).view(NUM_EXPERTS, D))
    moe.set_deepspeed_parallelism()
    if name == "lengths":
        num_tokens -= mpu.get_model_parallel_rank()
    if name == "tokens":
        torch.manual_seed(rank)
    x = torch.randn(num_tokens, D)
    torch.manual_seed(rank if name == "seeds" else seed)
    moe(x)


def test_mistakes_raise_on_every_rank() -> None:
    for said in run_ranks(WORLD, _make_mistakes):
        for name, message in MISTAKES.items():
            assert message in said[name], name


def _other_ways(rank: int, world_size: int, ways: list[str]) -> None:
    """The same layer, recomputed, compiled, timed or without gradients, against itself run plainly."""
    mpu = TensorParallelMpu(2)
    for case in (Case("fused"), Case("expert_tp", expert_tp=True, experts="split")):
        with fresh_groups(mpu):
            torch.manual_seed(3)
            moe = case.build(MoE, case.ep, _expert(case, mpu))
            moe.set_deepspeed_parallelism()
            expected = _step(moe, case, mpu, moe)
            for way in ways:
                moe.zero_grad()
                assert_all_near(_step(_run_by(way, moe), case, mpu, moe), expected)
            moe.zero_grad()
            torch.manual_seed(100 + mpu.get_data_parallel_rank())
            with torch.no_grad():
                assert_near("output", moe(torch.randn(case.num_tokens, D))[0], expected["output"])


def _run_by(way: str, moe: nn.Module) -> Callable[[Tensor], tuple[Tensor, Tensor, Tensor]]:
    if way == "compiled":
        return torch.compile(moe, backend="aot_eager")
    if way == "timed":
        moe.deepspeed_moe.wall_clock_breakdown = moe.deepspeed_moe.gate.wall_clock_breakdown = True
        return moe
    return functools.partial(checkpoint, moe, use_reentrant=way == "recomputed, reentrant")


def test_other_ways() -> None:
    run_ranks(WORLD, _other_ways, ["recomputed", "recomputed, reentrant", "compiled", "timed"])
