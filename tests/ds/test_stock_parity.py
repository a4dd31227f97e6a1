# SPDX-License-Identifier: GPL-3.0-or-later
"""Our MoE against deepspeed.moe.layer.MoE, one process, fp32: same weights, same seed, same numbers, same draws.

On a GPU, where there is one. The gate's fused kernels, which are asked for, run there too, elsewhere in Triton's
interpreter: `test_equals_stock_by_the_fused_gate`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from deepspeed.moe.layer import MoE as StockMoE
from deepspeed.moe.utils import is_moe_param
from torch import Tensor, nn

from flashfusemoe_ds import MoE
from flashfusemoe_ds.kernels import routing
from flashfusemoe_ds.nn import deepspeed_gating
from tests.distributed import run_ranks
from tests.ds.compare import assert_all_near, assert_near
from tests.ds.experts_zoo import EXPERTS, FUSED
from tests.ds.stock_grads import stock_grads
from tests.kernels.test_order import DEVICE

AUX_WEIGHT = 0.3  # large enough that a wrong gradient of the auxiliary loss shows


@dataclass(frozen=True)
class Case:
    """One layer and one input. `drops` says whether routes must, or must not, overflow: it is asserted."""

    name: str
    k: int = 1
    experts: str = "gelu_bias"
    num_tokens: int = 64
    num_experts: int = 8
    d_model: int = 16
    ffn_dim: int = 32
    train: bool = True
    drops: bool = True
    batch_shape: tuple[int, ...] | None = None  # default: (num_tokens,)
    mask_tokens: bool = False
    kwargs: dict[str, Any] = field(default_factory=dict)

    def build(self, moe_class: type[nn.Module]) -> nn.Module:
        return moe_class(
            self.d_model,
            EXPERTS[self.experts](self.d_model, self.ffn_dim),
            num_experts=self.num_experts,
            ep_size=1,
            k=self.k,
            **self.kwargs,
        )


def _gating_cases() -> list[Case]:
    cases = [
        Case("top1_rts_drops"),
        Case("top1_rts_no_overflow", drops=False, kwargs={"capacity_factor": 8.0}),
        Case("top1_no_rts_no_overflow", drops=False, kwargs={"capacity_factor": 8.0, "use_rts": False}),
        Case("top1_dropless_no_rts", drops=False, kwargs={"drop_tokens": False, "use_rts": False}),
        Case("top1_min_capacity_in_force", num_tokens=48, kwargs={"capacity_factor": 0.5, "min_capacity": 7}),
        Case("top1_used_token", mask_tokens=True),
        Case("top1_used_token_dropless", mask_tokens=True, drops=False, kwargs={"drop_tokens": False}),
        Case("top1_rsample", kwargs={"noisy_gate_policy": "RSample"}),
        Case("top1_rsample_eval", train=False, kwargs={"noisy_gate_policy": "RSample"}),
        Case("top1_fewer_tokens_than_experts", num_tokens=3, drops=False, kwargs={"min_capacity": 3}),
        Case("top1_one_expert", num_experts=1, drops=False),
        Case("top2_sampling_drops", k=2),
        Case("top2_no_sampling_drops", k=2, kwargs={"top2_2nd_expert_sampling": False}),
        Case(
            "top2_dropless_no_sampling",
            k=2,
            drops=False,
            kwargs={"drop_tokens": False, "top2_2nd_expert_sampling": False},
        ),
        Case("top4_low_capacity", k=4, kwargs={"capacity_factor": 0.4}),
        Case("top8_every_expert", k=8, drops=False),
    ]
    for k in (1, 2, 4):
        cases += [
            Case(f"top{k}_drops_3d", k=k, batch_shape=(4, 16)),
            Case(f"top{k}_eval_capacity", k=k, train=False, kwargs={"eval_capacity_factor": 0.5}),
            Case(f"top{k}_dropless", k=k, drops=False, kwargs={"drop_tokens": False}),
            Case(f"top{k}_min_capacity", k=k, drops=False, kwargs={"min_capacity": 48, "capacity_factor": 0.1}),
            Case(f"top{k}_jitter", k=k, kwargs={"noisy_gate_policy": "Jitter"}),
            Case(f"top{k}_jitter_eval", k=k, train=False, kwargs={"noisy_gate_policy": "Jitter"}),
            Case(f"top{k}_residual", k=k, kwargs={"use_residual": True}),
            Case(f"top{k}_odd_token_count", k=k, num_tokens=61),
            Case(f"top{k}_three_tokens", k=k, num_tokens=3, drops=False, kwargs={"min_capacity": 2 if k == 1 else 4}),
        ]
    return cases


def _expert_cases() -> list[Case]:
    return [
        Case(f"{experts}_top{k}", k=k, experts=experts, batch_shape=(2, 32), kwargs={"use_residual": k == 2})
        for experts in EXPERTS
        for k in (1, 2, 4)
    ]


CASES = _gating_cases() + _expert_cases()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_equals_stock(case: Case) -> None:
    compare(case)


@pytest.mark.parametrize("case", _gating_cases(), ids=lambda case: case.name)
def test_equals_stock_by_the_fused_gate(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deepspeed_gating, "runs_fused", routing.covers)
    compare(case)


@pytest.mark.parametrize("experts", EXPERTS)
def test_parameters_are_what_the_engine_expects(experts: str) -> None:
    moe = Case("", experts=experts, kwargs={"use_residual": True}).build(MoE)
    assert isinstance(moe, StockMoE)
    routed = dict(moe.deepspeed_moe.experts.named_parameters())
    assert routed
    for name, parameter in moe.named_parameters():
        expected = name.startswith("deepspeed_moe.experts.")
        assert is_moe_param(parameter) == expected, name
        assert getattr(parameter, "group_name", None) == ("ep_size_1" if expected else None), name
    if experts in FUSED:
        # One stacked tensor per matrix, never one per expert, however many experts there are.
        assert len(routed) <= 6 and all(parameter.shape[0] == 8 for parameter in routed.values())
        assert any(parameter.dim() == 3 for parameter in routed.values())
    else:
        stock_names = {
            f"deepspeed_experts.{i}.{leaf}"
            for i in range(8)
            for leaf, _ in EXPERTS[experts](16, 32).named_parameters()
        }
        assert set(routed) == stock_names


def test_fresh_experts_are_copies_of_the_one_given() -> None:
    expert = EXPERTS["swiglu"](16, 32)
    state = MoE(16, expert, num_experts=4).state_dict()
    for leaf, weight in expert.state_dict().items():
        for i in range(4):
            assert torch.equal(state[f"deepspeed_moe.experts.deepspeed_experts.{i}.{leaf}"], weight)


def test_same_seed_gives_the_same_initial_weights() -> None:
    for kwargs in ({}, {"use_residual": True}):
        torch.manual_seed(5)
        stock = Case("", kwargs=kwargs).build(StockMoE)
        after = torch.get_rng_state()
        torch.manual_seed(5)
        ours = Case("", kwargs=kwargs).build(MoE)
        assert torch.equal(torch.get_rng_state(), after)
        assert_all_near(ours.state_dict(), stock.state_dict(), rtol=0.0)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_no_tokens(k: int) -> None:
    moe = Case("", k=k, kwargs={"min_capacity": 0}).build(MoE).to(DEVICE)
    x = torch.randn(0, 16, device=DEVICE, requires_grad=True)
    out, _, counts = moe(x)
    out.sum().backward()
    assert out.shape == (0, 16) and x.grad is not None and x.grad.shape == (0, 16)
    assert torch.equal(counts.cpu(), torch.zeros(8, dtype=counts.dtype))
    for name, parameter in moe.deepspeed_moe.experts.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_experts_without_tokens_get_a_zero_gradient() -> None:
    """ZeRO and the engine's reduction deadlock, or differ between ranks, where a gradient is None."""
    for experts in ("gelu_bias", "swiglu", "custom"):
        moe = Case("", experts=experts).build(MoE)
        with torch.no_grad():
            moe.deepspeed_moe.gate.wg.weight.zero_()
            moe.deepspeed_moe.gate.wg.weight[2, 0] = 10.0  # positive first feature: every token goes to expert 2
        x = torch.randn(32, 16)
        x[:, 0] = x[:, 0].abs() + 1.0
        moe(x)[0].square().sum().backward()
        for name, parameter in moe.deepspeed_moe.experts.named_parameters():
            if name.endswith("unused_bias"):
                continue  # part of the expert's second result, which DeepSpeed ignores: no gradient in stock either
            assert parameter.grad is not None, name
        for name, grad in stock_grads(moe).items():
            if ".deepspeed_experts." in name and not name.endswith("unused_bias"):
                assert bool(grad.any()) == (".deepspeed_experts.2." in name), name


@pytest.mark.parametrize(
    "case",
    [
        Case("top1", drops=False, kwargs={"drop_tokens": False, "use_rts": False}),
        Case("top1_rts", drops=False, kwargs={"drop_tokens": False}),
        Case("top2", k=2, drops=False, kwargs={"drop_tokens": False, "top2_2nd_expert_sampling": False}),
        Case("top4", k=4, drops=False, kwargs={"drop_tokens": False}),
        Case("top4_swiglu", k=4, experts="swiglu", drops=False, kwargs={"drop_tokens": False}),
    ],
    ids=lambda case: case.name,
)
def test_dropless_equals_the_dense_sum_in_float64(case: Case) -> None:
    """Stock is one oracle; this one shares no code with it: every expert on every token, in float64."""
    torch.manual_seed(3)
    ours = case.build(MoE)
    _spread(ours)
    x_TD = torch.randn(64, 16, requires_grad=True)
    g_TD = torch.randn(64, 16)
    out, _, counts = ours(x_TD)
    (out * g_TD).sum().backward()

    weights = {name: value.double().requires_grad_() for name, value in ours.state_dict().items()}
    x64_TD = x_TD.detach().double().requires_grad_()
    # fp32 logits decide, as in the layer: a float64 router could choose another expert at a near tie.
    idx_TK = (x_TD.detach() @ ours.deepspeed_moe.gate.wg.weight.detach().T).topk(case.k, dim=1).indices
    probs_TE = (x64_TD @ weights["deepspeed_moe.gate.wg.weight"].T).softmax(dim=1)
    chosen_TE = torch.zeros_like(probs_TE).scatter_(1, idx_TK, 1.0)
    weight_TE = probs_TE * chosen_TE
    if case.k > 1:
        weight_TE = weight_TE / weight_TE.sum(dim=1, keepdim=True)
    expert = EXPERTS[case.experts](16, 32).double()
    dense_TD = torch.zeros_like(x64_TD)
    for i in range(8):
        prefix = f"deepspeed_moe.experts.deepspeed_experts.{i}."
        leaves = {name.removeprefix(prefix): value for name, value in weights.items() if name.startswith(prefix)}
        dense_TD = dense_TD + weight_TE[:, i : i + 1] * torch.func.functional_call(expert, leaves, (x64_TD,))
    (dense_TD * g_TD).sum().backward()

    assert torch.equal(counts, chosen_TE.sum(dim=0).to(counts.dtype))
    assert_near("output", out.double(), dense_TD)
    assert_near("input gradient", x_TD.grad.double(), x64_TD.grad)
    assert_all_near(
        {name: grad.double() for name, grad in stock_grads(ours).items()},
        {name: value.grad for name, value in weights.items()},
    )


def _in_a_group_of_one(rank: int, world_size: int) -> int:
    cases = [
        case
        for case in CASES
        if case.name in ("top1_dropless", "top2_sampling_drops", "top4_dropless", "custom_top2", "top2_residual")
    ]
    for case in cases:
        compare(case, bind_groups=True, device="cpu")  # gloo's group
    return len(cases)


def test_equals_stock_in_a_process_group_of_one() -> None:
    assert run_ranks(1, _in_a_group_of_one) == [5]


def compare(case: Case, bind_groups: bool = False, device: str = DEVICE) -> None:
    """Two forward and backward passes, so that accumulation into .grad counts as well."""
    torch.manual_seed(11)
    stock, ours = case.build(StockMoE).to(device), case.build(MoE).to(device)
    if bind_groups:
        stock.set_deepspeed_parallelism()
        ours.set_deepspeed_parallelism()
    _spread(stock)
    ours.load_state_dict(stock.state_dict(), strict=True)
    again = case.build(StockMoE).to(device)
    again.load_state_dict(ours.state_dict(), strict=True)
    assert_all_near(again.state_dict(), stock.state_dict(), rtol=0.0)

    stock.train(case.train)
    ours.train(case.train)
    for step in range(2):
        x = torch.randn(*(case.batch_shape or (case.num_tokens,)), case.d_model, device=device)
        g = torch.randn_like(x)
        used_token = (torch.rand(case.num_tokens, device=device) < 0.7).long() if case.mask_tokens else None
        expected = _forward_backward(stock, x, g, used_token, seed=100 + step)
        actual = _forward_backward(ours, x, g, used_token, seed=100 + step)
        assert _overflows(stock, case) == case.drops, f"the case must{'' if case.drops else ' not'} drop routes"
        assert torch.equal(actual.pop("rng"), expected.pop("rng")), "the layer drew other random numbers than stock"
        assert torch.equal(actual["counts"], expected["counts"])
        assert_all_near(actual, expected)
        # A tensor that the loss does not depend on has no gradient in stock; zero is as good, the engine fills it in.
        grads = dict(stock_grads(ours))
        for name, parameter in stock.named_parameters():
            grad = grads.pop(name, None)
            if parameter.grad is None:
                assert grad is None or not grad.any(), name
            else:
                assert grad is not None, f"{name}: no gradient"
                assert_near(f"gradient of {name}", grad, parameter.grad)
        assert not grads, f"gradients of unknown names: {sorted(grads)}"


def _spread(moe: nn.Module) -> None:
    """Experts that differ from each other and a gate that prefers some: a swapped expert or slot cannot hide."""
    state = moe.state_dict()
    for name, value in state.items():
        state[name] = torch.randn_like(value) * (0.8 if "gate.wg" in name else value.shape[-1] ** -0.5)
    moe.load_state_dict(state)


def _forward_backward(moe: nn.Module, x: Tensor, g: Tensor, used_token: Tensor | None, seed: int) -> dict[str, Tensor]:
    x = x.clone().requires_grad_()
    torch.manual_seed(seed)
    out, l_aux, counts = moe(x, used_token)
    rng = torch.cuda.get_rng_state() if x.is_cuda else torch.get_rng_state()
    ((out * g).sum() + AUX_WEIGHT * l_aux).backward()
    return {"output": out.detach(), "l_aux": l_aux.detach(), "counts": counts, "rng": rng, "input gradient": x.grad}


def _overflows(stock: nn.Module, case: Case) -> bool:
    """Whether any expert was chosen more often than its capacity allows (sharded_moe._capacity)."""
    gate = stock.deepspeed_moe.gate
    counts = stock.deepspeed_moe.exp_counts
    if not gate.drop_tokens:
        return False
    factor = gate.capacity_factor if case.train else gate.eval_capacity_factor
    num_tokens = math.prod(case.batch_shape or (case.num_tokens,))
    capacity = max(math.ceil(num_tokens / case.num_experts * factor * case.k), gate.min_capacity)
    return int(counts.max()) > capacity


def test_a_floating_point_mask_where_stock_raises() -> None:
    """Stock 0.19.8, top-1 without drops: a float mask makes its capacity a float, which torch.topk refuses."""
    stock = StockMoE(16, EXPERTS["gelu_bias"](16, 32), num_experts=8, drop_tokens=False, use_rts=False)
    ours = MoE(16, EXPERTS["gelu_bias"](16, 32), num_experts=8, drop_tokens=False, use_rts=False)
    ours.load_state_dict(stock.state_dict())
    x, mask = torch.randn(12, 16), (torch.arange(12) % 3 > 0)
    expected, l_aux, counts = stock(x, mask.long())
    with pytest.raises(TypeError, match="topk"):
        stock(x, mask.float())
    for dtype in (torch.float32, torch.bool, torch.int32):
        out, ours_l_aux, ours_counts = ours(x, mask.to(dtype))
        assert_near("output", out, expected)
        assert_near("l_aux", ours_l_aux, l_aux)
        assert torch.equal(ours_counts, counts)
