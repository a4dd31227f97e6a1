# SPDX-License-Identifier: GPL-3.0-or-later
"""The fused router against its PyTorch twin in float64: choice, weights, losses, counts and both gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashfusemoe_ds.kernels import routing, triton_logits
from flashfusemoe_ds.nn.losses import load_balancing_loss, router_z_loss
from flashfusemoe_ds.nn.router import (
    GATINGS,
    Gating,
    count_routes,
    fused_rule,
    route,
    route_fused,
    route_with_losses,
    router_logits,
)
from tests.close import relative_error
from tests.kernels.test_order import DEVICE
from tests.nn.test_router import VARIANTS


def make_case(tokens: int, experts: int, width: int, dtype: torch.dtype, gate_dtype: torch.dtype, seed: int = 0):
    """x and the gate, whose logits spread over about [-3, 3]."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, width, generator=g, dtype=torch.float64)
    gate = torch.randn(experts, width, generator=g, dtype=torch.float64) * width**-0.5
    return x.to(DEVICE, dtype), gate.to(DEVICE, gate_dtype)


def truth(x, gate, gating: Gating, top_k: int, idx):
    """Weights and losses in float64 for the experts in `idx`, by the same formulas as `nn.router.route`."""
    logits = x @ gate.T
    scores = torch.softmax(logits, 1) if gating.score == "softmax" else torch.sigmoid(logits)
    chosen = (logits if gating.order == "after_topk" else scores).gather(1, idx)
    if gating.order == "after_topk":
        chosen = torch.softmax(chosen, 1) if gating.score == "softmax" else torch.sigmoid(chosen)
    if gating.renormalize:
        chosen = chosen / chosen.sum(1, keepdim=True)
    counts = count_routes(idx, gate.shape[0])
    probs = scores / scores.sum(1, keepdim=True)
    return chosen * gating.scaling_factor, load_balancing_loss(probs, counts, top_k), router_z_loss(logits)


def assert_best(x, gate, gating: Gating, top_k: int, bias, idx) -> None:
    """Every token has the experts of `route` in float64, but where two scores are closer than float32 tells apart."""
    logits = x.double() @ gate.double().T
    expected = route(logits, gating, top_k, None if bias is None else bias.double())[0]
    scores = torch.softmax(logits, 1) if gating.score == "softmax" else torch.sigmoid(logits)
    choice = (logits if gating.order == "after_topk" else scores) + (0 if bias is None else bias.double())
    differs = idx != expected
    if gating.num_groups:
        assert not differs.any()  # the cases are small enough to be free of near ties
    gap = (choice.gather(1, idx) - choice.gather(1, expected)).abs()
    assert (gap[differs] < 1e-6).all()
    assert ((idx >= 0) & (idx < gate.shape[0])).all()
    assert all(len(set(row)) == top_k for row in idx.tolist())


def check(
    tokens: int,
    experts: int,
    top_k: int,
    gating: Gating,
    *,
    width: int = 24,
    dtype: torch.dtype = torch.float32,
    gate_dtype: torch.dtype = torch.float32,
    aux: float = 0.5,
    z: float = 0.25,
    bias: bool = False,
    count: bool = False,
    seed: int = 0,
) -> None:
    x, gate = make_case(tokens, experts, width, dtype, gate_dtype, seed)
    bias_E = torch.linspace(-0.3, 0.3, experts, device=DEVICE) if bias else None
    fast = [t.clone().requires_grad_() for t in (x, gate)]
    exact = [t.double().requires_grad_() for t in (x, gate)]

    idx, weight, counts, aux_loss, z_loss = routing.route(*fast, fused_rule(gating, top_k), aux, z, bias_E, count)
    assert idx.dtype is torch.int64 and weight.dtype is torch.float32
    assert_best(x, gate, gating, top_k, bias_E, idx)
    expected = truth(*exact, gating, top_k, idx)
    assert relative_error(weight, expected[0]) < 2e-6
    if count or aux:
        assert torch.equal(counts, count_routes(idx, experts))
    else:
        assert counts is None

    g = torch.Generator().manual_seed(1)
    direction = torch.randn(tokens, top_k, generator=g, dtype=torch.float64).to(DEVICE)
    total, exact_total = (weight * direction.float()).sum(), (expected[0] * direction).sum()
    for coeff, loss, exact_loss in ((aux, aux_loss, expected[1]), (z, z_loss, expected[2])):
        if coeff:
            assert relative_error(loss, coeff * exact_loss) < 2e-6
            total, exact_total = total + 3 * loss, exact_total + 3 * coeff * exact_loss
        else:
            assert loss is None
    grads = torch.autograd.grad(total, fast)
    exact_grads = torch.autograd.grad(exact_total, exact)
    # One expert that always weighs 1: the terms of its gradient, of size 1, cancel to rounding noise.
    cancels = (gating.score == "softmax" and experts == 1) or (
        top_k == 1 and (gating.renormalize or (gating.score == "softmax" and gating.order == "after_topk"))
    )
    for name, grad, exact_grad, of in zip(("dx", "dgate"), grads, exact_grads, (x, gate), strict=True):
        assert grad.dtype is of.dtype
        # Beside the rounding to its own dtype (the interpreter's to bf16 is towards zero), nothing but float32's.
        rounding = 0 if of.dtype is torch.float32 else torch.finfo(of.dtype).eps
        scale = max(float(exact_grad.abs().max()), 1.0 if cancels else 0.0)
        error = float((grad.double() - exact_grad).abs().max())
        assert error <= (3e-6 + rounding) * scale, f"{name}: {error:.1e} of {scale:.1e}"


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant(name: str, bias: bool) -> None:
    check(70, 12, 3, VARIANTS[name], bias=bias)


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 80),
    experts=st.integers(1, 40),
    top_k=st.integers(1, 9),
    name=st.sampled_from(sorted(GATINGS)),
    scaling=st.sampled_from([1.0, 2.5]),
    aux=st.sampled_from([0.0, 0.5]),
    z=st.sampled_from([0.0, 0.25]),
    bias=st.booleans(),
    count=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape(tokens, experts, top_k, name, scaling, aux, z, bias, count, seed) -> None:
    gating = replace(GATINGS[name], scaling_factor=scaling)
    check(tokens, experts, min(top_k, experts), gating, aux=aux, z=z, bias=bias, count=count, seed=seed)


@pytest.mark.parametrize(
    ("tokens", "experts", "top_k"), [(1, 1, 1), (7, 3, 3), (7, 1024, 8), (9, 1000, 2), (33, 32, 32), (600, 4, 1)]
)
@pytest.mark.parametrize("name", ["softmax_topk", "sigmoid_renorm"])
def test_corners(tokens: int, experts: int, top_k: int, name: str) -> None:
    check(tokens, experts, top_k, GATINGS[name])


@pytest.mark.parametrize(
    ("groups", "top_groups", "group_score"), [(3, 2, "top2_sum"), (5, 1, "max"), (15, 4, "top2_sum")]
)
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_groups_of_any_number(groups: int, top_groups: int, group_score: str, score: str) -> None:
    gating = Gating(score, num_groups=groups, top_groups=top_groups, group_score=group_score)
    check(40, 15, 3, gating, bias=True)


def test_partial_sums_of_many_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few programs, so that each walks over several tiles of tokens."""
    monkeypatch.setattr(triton_logits, "MAX_PARTIALS", 3)
    check(500, 6, 2, GATINGS["softmax"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gate_dtype", ["same", torch.float32])
@pytest.mark.parametrize("name", ["softmax_topk", "sigmoid"])
def test_16_bit_tokens(dtype: torch.dtype, gate_dtype: torch.dtype | str, name: str) -> None:
    """The gate in the tokens' dtype and in float32, whose bf16 parts must give float32 results."""
    gate_dtype = dtype if gate_dtype == "same" else gate_dtype
    check(50, 9, 3, GATINGS[name], width=64, dtype=dtype, gate_dtype=gate_dtype)


def test_no_tokens() -> None:
    x, gate = make_case(0, 5, 8, torch.float32, torch.float32)
    x.requires_grad_(), gate.requires_grad_()
    idx, weight, counts, aux_loss, z_loss = routing.route(x, gate, fused_rule(GATINGS["softmax"], 2), 1.0, 1.0)
    assert idx.shape == weight.shape == (0, 2)
    assert counts.tolist() == [0] * 5 and aux_loss.item() == z_loss.item() == 0
    (weight.sum() + aux_loss + z_loss).backward()
    assert x.grad.shape == x.shape and torch.count_nonzero(gate.grad) == 0


@pytest.mark.parametrize(("aux", "z", "count"), [(0.0, 0.0, False), (0.5, 0.0, False), (0.5, 0.25, True)])
def test_the_layers_router_gets_the_twins_routing(aux: float, z: float, count: bool) -> None:
    x, gate = make_case(30, 10, 16, torch.float32, torch.float32)
    gating = GATINGS["softmax_renorm"]
    fused = route_fused(x, gate, gating, 3, aux, z, count=count)
    twin = route_with_losses(router_logits(x, gate), gating, 3, aux, z)
    assert torch.equal(fused.idx_TK, twin.idx_TK) and torch.equal(fused.counts_E, twin.counts_E)
    assert fused.counts_E is fused.counts_E  # counted once
    assert relative_error(fused.weight_TK, twin.weight_TK) < 1e-6
    assert fused.losses.keys() == twin.losses.keys()
    assert all(relative_error(fused.losses[name], twin.losses[name]) < 1e-6 for name in twin.losses)


def choose(logits: torch.Tensor, gating: Gating, top_k: int, bias: torch.Tensor | None = None):
    """idx and weights of given logits, on the CPU."""
    _, idx, weight, *_ = routing.choose(logits.to(DEVICE), False, bias, fused_rule(gating, top_k), 0.0, 0.0, False)
    return idx.cpu(), weight.cpu()


@pytest.mark.parametrize("name", ["softmax", "softmax_topk", "sigmoid"])
def test_of_equal_scores_the_lower_expert_wins(name: str) -> None:
    g = torch.Generator().manual_seed(0)
    logits = torch.randint(-2, 3, (50, 13), generator=g).float()
    logits[0] = 0.0
    logits[0, ::2] = -0.0
    idx, _ = choose(logits, GATINGS[name], 5)
    assert torch.equal(idx, torch.argsort(logits, dim=1, descending=True, stable=True)[:, :5])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", VARIANTS)
def test_broken_logits_stay_in_bounds(name: str, bad: float) -> None:
    """And end up in the weights just where the twin has them."""
    logits = torch.randn(40, 12, generator=torch.Generator().manual_seed(0))
    logits[3, 5] = bad
    logits[7] = bad
    idx, weight = choose(logits, VARIANTS[name], 3)
    assert ((idx >= 0) & (idx < 12)).all()
    assert all(len(set(row)) == 3 for row in idx.tolist())
    _, expected, _ = route(logits, VARIANTS[name], 3)
    assert torch.equal(torch.isnan(weight), torch.isnan(expected))
    clean = [t for t in range(40) if t not in (3, 7)]
    assert torch.isfinite(weight[clean]).all()


def test_kept_for_backward() -> None:
    """x, the gate, the logits and the indices, and no second tensor [T, E]."""
    x, gate = make_case(32, 16, 8, torch.float32, torch.float32)
    x.requires_grad_(), gate.requires_grad_()
    kept: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        routing.route(x, gate, fused_rule(GATINGS["softmax"], 2), 1.0, 1.0)
    assert sum(kept.values()) == 32 * 8 * 4 + 16 * 8 * 4 + 32 * 16 * 4 + 32 * 2 * 8 + 16 * 8


def test_equal_inputs_give_equal_bits() -> None:
    def run() -> list[torch.Tensor]:
        x, gate = (t.requires_grad_() for t in make_case(200, 24, 16, torch.float32, torch.float32))
        idx, weight, counts, aux_loss, z_loss = routing.route(x, gate, fused_rule(GATINGS["softmax"], 4), 1.0, 1.0)
        return [
            idx,
            weight,
            counts,
            aux_loss,
            z_loss,
            *torch.autograd.grad(weight.sin().sum() + aux_loss + z_loss, (x, gate)),
        ]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))
