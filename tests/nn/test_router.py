# SPDX-License-Identifier: GPL-3.0-or-later
"""The modern router: weights, gradients and losses in float64, groups, bias, limits."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from flashfusemoe_ds.kernels import reference
from flashfusemoe_ds.nn.limits import limit_routes
from flashfusemoe_ds.nn.losses import balanced_bias, load_balancing_loss, router_z_loss
from flashfusemoe_ds.nn.router import GATINGS, Gating, Router, route, router_logits
from flashfusemoe_ds.types import Routing
from tests.close import relative_error

VARIANTS = {
    **GATINGS,
    "scaled": Gating(score="sigmoid", renormalize=True, scaling_factor=2.5),
    "groups_v3": Gating(score="sigmoid", renormalize=True, num_groups=4, top_groups=2),
    "groups_v2": Gating(num_groups=4, top_groups=2, group_score="max"),
    "sigmoid_after": Gating(score="sigmoid", order="after_topk"),
}


def logits_case(tokens: int = 40, experts: int = 12) -> torch.Tensor:
    return torch.randn(tokens, experts, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def plain_route(logits: torch.Tensor, gating: Gating, top_k: int, bias: torch.Tensor | None):
    """The same by loops over tokens and Python sorting: slow, and hard to get wrong."""
    scores = F.softmax(logits, 1) if gating.score == "softmax" else torch.sigmoid(logits)
    ids, weights = [], []
    for t in range(len(logits)):
        choice = (logits if gating.order == "after_topk" else scores)[t].detach().clone()
        choice = choice if bias is None else choice + bias
        allowed = range(len(choice))
        if gating.num_groups:
            size = len(choice) // gating.num_groups
            best = 2 if gating.group_score == "top2_sum" else 1
            rank = {
                g: sum(sorted(choice[g * size : (g + 1) * size].tolist())[-best:]) for g in range(gating.num_groups)
            }
            top = sorted(rank, key=lambda g: -rank[g])[: gating.top_groups]
            allowed = [e for e in allowed if e // size in top]
        chosen = sorted(allowed, key=lambda e: -choice[e].item())[:top_k]
        if gating.order == "after_topk":
            w = F.softmax(logits[t, chosen], 0) if gating.score == "softmax" else torch.sigmoid(logits[t, chosen])
        else:
            w = scores[t, chosen]
        weights.append((w / w.sum() if gating.renormalize else w) * gating.scaling_factor)
        ids.append(chosen)
    return torch.tensor(ids), torch.stack(weights)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("name", VARIANTS)
def test_choice_weights_and_gradient(name: str, with_bias: bool) -> None:
    gating, top_k = VARIANTS[name], 3
    bias = torch.linspace(-0.3, 0.3, 12, dtype=torch.float64) if with_bias else None
    grads, outs = [], []
    for fn in (lambda x: route(x, gating, top_k, bias)[:2], lambda x: plain_route(x, gating, top_k, bias)):
        logits = logits_case().requires_grad_()
        idx, weight = fn(logits)
        (weight * torch.arange(1, 4)).sin().sum().backward()
        outs.append((idx, weight.detach()))
        grads.append(logits.grad)
    assert torch.equal(outs[0][0], outs[1][0])
    assert relative_error(outs[0][1], outs[1][1]) < 1e-14
    assert relative_error(grads[0], grads[1]) < 1e-13


@pytest.mark.parametrize("name", VARIANTS)
def test_aux_loss_has_its_gradient(name: str) -> None:
    """Value and gradient against a one-hot form, and the gradient against finite differences."""
    gating, top_k = VARIANTS[name], 2

    def loss(x: torch.Tensor) -> torch.Tensor:
        idx, _, probs = route(x, gating, top_k)
        return load_balancing_loss(probs, torch.bincount(idx.reshape(-1), minlength=12), top_k)

    logits = logits_case().requires_grad_()
    value = loss(logits)
    idx, _, probs = route(logits, gating, top_k)
    assert relative_error(value, reference.switch_aux_loss(probs, idx)) < 1e-14
    assert torch.autograd.gradcheck(loss, (logits,), rtol=1e-6, atol=1e-8)
    (grad,) = torch.autograd.grad(value, logits)
    assert grad.abs().max() > 1e-4


def test_a_balanced_router_has_aux_loss_one() -> None:
    probs = torch.full((8, 4), 0.25)
    assert load_balancing_loss(probs, torch.tensor([4, 4, 4, 4]), 2).item() == pytest.approx(1.0)
    skewed = load_balancing_loss(F.one_hot(torch.zeros(8, dtype=torch.long), 4).float(), torch.tensor([8, 0, 0, 0]), 1)
    assert skewed.item() == pytest.approx(4.0)


def test_z_loss_value_and_gradient() -> None:
    logits = logits_case().requires_grad_()
    assert relative_error(router_z_loss(logits), reference.z_loss(logits)) < 1e-14
    assert torch.autograd.gradcheck(router_z_loss, (logits,), rtol=1e-6, atol=1e-8)


def test_losses_of_no_tokens_are_zero_and_connected() -> None:
    router = Router(8, 4, 2, aux_loss_coeff=1.0, z_loss_coeff=1.0)
    routing = router(torch.zeros(0, 8))
    total = sum(routing.losses.values())
    total.backward()
    assert total.item() == 0 and torch.count_nonzero(router.weight.grad) == 0


def test_losses_only_where_their_coefficient_is_positive() -> None:
    x = torch.randn(6, 8)
    assert set(Router(8, 4, 2)(x).losses) == set()
    assert set(Router(8, 4, 2, aux_loss_coeff=0.1)(x).losses) == {"aux_loss"}
    plain, scaled = Router(8, 4, 2, z_loss_coeff=1.0), Router(8, 4, 2, z_loss_coeff=0.25)
    scaled.load_state_dict(plain.state_dict())
    assert scaled(x).losses["z_loss"].item() == pytest.approx(plain(x).losses["z_loss"].item() / 4)


def test_logits_are_float32_for_bf16_models() -> None:
    torch.manual_seed(0)
    router = Router(64, 8, 2, gating="softmax").to(torch.bfloat16)
    x = torch.randn(32, 64, dtype=torch.bfloat16)
    _, expected, _ = route(x.float() @ router.weight.float().T, router.gating, 2)
    routing = router(x)
    assert routing.weight_TK.dtype is torch.float32
    assert relative_error(routing.weight_TK, expected) < 1e-6


def test_bias_moves_load_to_the_idle_experts() -> None:
    assert balanced_bias(torch.zeros(3), torch.tensor([10, 2, 6]), 0.5).tolist() == [-0.5, 0.5, 0.0]
    torch.manual_seed(0)
    router = Router(16, 8, 2, Gating(score="sigmoid", expert_bias=True, bias_update_rate=0.02))
    with torch.no_grad():
        router.weight.normal_(std=0.3)
        router.weight[0] += 0.2  # the router prefers expert 0 for these tokens
    x = torch.randn(512, 16).abs()
    first = router(x).counts_E
    router.update_expert_bias()
    for _ in range(100):
        last = router(x).counts_E
        router.update_expert_bias()
    assert first.max() > 2 * first.float().mean()
    assert last.max() < 1.25 * last.float().mean()
    assert "routed_counts" not in router.state_dict() and "expert_bias" in router.state_dict()


def test_the_bias_stays_float32_whatever_the_model_is_cast_to() -> None:
    router = Router(8, 4, 2, Gating(expert_bias=True, bias_update_rate=1e-3)).to(torch.bfloat16)
    assert router.weight.dtype is torch.bfloat16 and router.expert_bias.dtype is torch.float32
    with torch.no_grad():
        router.expert_bias.fill_(0.5)
    router.half().routed_counts += torch.tensor([300, 500, 0, 800])
    router.update_expert_bias()
    assert torch.allclose(router.expert_bias, torch.tensor([0.501, 0.499, 0.501, 0.499]), rtol=0, atol=1e-7)


def test_evaluation_does_not_count() -> None:
    router = Router(8, 4, 2, Gating(expert_bias=True)).eval()
    router(torch.randn(6, 8))
    assert router.routed_counts.sum() == 0


def test_limit_keeps_the_largest_weights() -> None:
    idx = torch.tensor([[0, 1], [0, 2], [0, 1], [-1, 0]])
    weight = torch.tensor([[0.1, 0.5], [0.4, 0.5], [0.3, 0.6], [0.9, 0.3]])
    limited = limit_routes(Routing(idx, weight, torch.tensor([4, 2, 1])), 2)
    # Expert 0 keeps 0.4 and, of the two 0.3, the earlier token's.
    assert limited.idx_TK.tolist() == [[-1, 1], [0, 2], [0, 1], [-1, -1]]
    assert torch.equal(limited.weight_TK > 0, limited.idx_TK >= 0)
    assert limited.counts_E.tolist() == [4, 2, 1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", VARIANTS)
def test_broken_logits_stay_in_bounds(name: str, bad: float) -> None:
    logits = logits_case().float()
    logits[3, 5] = bad
    logits[7] = bad
    idx, weight, _ = route(logits, VARIANTS[name], 3)
    assert ((idx >= 0) & (idx < 12)).all()
    assert torch.isfinite(weight[[0, 1, 2, 4, 5, 6]]).all()
    if bad != bad:
        assert torch.isnan(weight[7]).any()


def test_router_keeps_x_itself_and_not_a_float32_copy() -> None:
    x, weight = torch.randn(16, 8, dtype=torch.bfloat16), torch.randn(4, 8, dtype=torch.bfloat16)
    x.requires_grad_(), weight.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        logits = router_logits(x, weight)
    assert {t.data_ptr() for t in kept} == {x.data_ptr(), weight.data_ptr()}
    direction = torch.randn(16, 4)
    grads = torch.autograd.grad(logits, (x, weight), direction)
    exact = torch.autograd.grad(x.float() @ weight.float().T, (x, weight), direction)
    assert all(torch.equal(a, b) for a, b in zip(grads, exact, strict=True))


@pytest.mark.parametrize(
    ("gating", "top_k", "message"),
    [
        (Gating(score="relu"), 2, r"gating\.score is 'relu'; valid: softmax, sigmoid"),
        (Gating(order="never"), 2, r"gating\.order is 'never'; valid: before_topk, after_topk"),
        (Gating(num_groups=5, top_groups=1), 2, r"gating\.num_groups is 5; it must divide num_experts \(8\)"),
        (Gating(num_groups=4, top_groups=5), 2, r"gating\.top_groups is 5; valid: 1 to num_groups \(4\)"),
        (Gating(num_groups=4, top_groups=1), 3, r"top_k is 3, but gating\.top_groups=1 groups of 2 hold fewer"),
        (Gating(scaling_factor=0.0), 2, r"gating\.scaling_factor is 0\.0"),
        ("softmx", 2, r"gating 'softmx' is unknown; valid: softmax, "),
        ("softmax", 9, r"top_k is 9; valid: 1 to num_experts \(8\)"),
    ],
)
def test_wrong_settings_are_named(gating, top_k: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Router(16, 8, top_k, gating)
