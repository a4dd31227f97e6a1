# SPDX-License-Identifier: GPL-3.0-or-later
"""DeepSpeed's gate by fused kernels: against its PyTorch twin in float64, and against stock's own functions."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch
from deepspeed.moe.sharded_moe import top1gating, top2gating, topkgating
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashfusemoe_ds import FlashFuseMoEConfig, MoE
from flashfusemoe_ds.kernels import deepspeed_routing, routing, triton_logits
from flashfusemoe_ds.nn import deepspeed_gating as gating_module
from flashfusemoe_ds.nn.deepspeed_gating import DeepSpeedGating, deepspeed_gating, route_fused
from tests.close import relative_error
from tests.ds.experts_zoo import GatedMLP
from tests.kernels.test_order import DEVICE

TOLERANCE = 1e-6
AUX_WEIGHT = 0.3


def make_gating(k: int, **changes) -> DeepSpeedGating:
    dropless = DeepSpeedGating(
        k, 1.0, 1, drop_tokens=False, use_rts=False, top2_2nd_expert_sampling=False, rsample=False
    )
    return replace(dropless, **changes)


# Every path through the kernels and every draw. A capacity of half of what is chosen drops routes.
VARIANTS = {
    "top1": make_gating(1),
    "top1 rts": make_gating(1, use_rts=True),
    "top1 rsample": make_gating(1, rsample=True),
    "top1 drops by rts": make_gating(1, use_rts=True, drop_tokens=True, capacity_factor=0.5),
    "top1 rsample drops by rts": make_gating(1, rsample=True, use_rts=True, drop_tokens=True, capacity_factor=0.5),
    "top2": make_gating(2),
    "top2 sampling": make_gating(2, top2_2nd_expert_sampling=True),
    "top2 drops": make_gating(2, drop_tokens=True, capacity_factor=0.5),
    "top2 sampling drops": make_gating(2, top2_2nd_expert_sampling=True, drop_tokens=True, capacity_factor=0.5),
    "top3": make_gating(3),
    "top3 drops": make_gating(3, drop_tokens=True, capacity_factor=0.5),
}


def make_logits(tokens: int, experts: int, seed: int = 0) -> Tensor:
    """Spread over about [-3, 3], some experts more wanted than others."""
    g = torch.Generator().manual_seed(seed)
    return (torch.randn(tokens, experts, generator=g) + torch.linspace(-1, 1, experts)).to(DEVICE)


def make_used(tokens: int) -> Tensor:
    return (torch.rand(tokens, generator=torch.Generator().manual_seed(5)) < 0.7).to(DEVICE)


def random_state() -> Tensor:
    return torch.cuda.get_rng_state() if DEVICE == "cuda" else torch.get_rng_state()


@dataclass
class Result:
    """A gate's outputs in the [T, K] form, the gradient of its logits, and the generator's state afterwards."""

    idx: Tensor
    weight: Tensor
    counts: Tensor
    l_aux: Tensor
    dlogits: Tensor
    state: Tensor


def direction(shape: torch.Size) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64).to(DEVICE)


def result(logits: Tensor, idx: Tensor, weight: Tensor, counts: Tensor, l_aux: Tensor, state: Tensor) -> Result:
    total = (weight * direction(weight.shape).to(weight.dtype)).sum() + AUX_WEIGHT * l_aux
    (dlogits,) = torch.autograd.grad(total, logits)
    return Result(idx, weight.detach(), counts, l_aux.detach(), dlogits, state)


def fused(logits: Tensor, gating: DeepSpeedGating, used: Tensor | None = None) -> Result:
    """The kernels on exactly these logits: the gate's weight is the identity."""
    leaf = logits.clone().requires_grad_()
    torch.manual_seed(7)
    routed, l_aux = route_fused(leaf, torch.eye(logits.shape[1], device=DEVICE), gating, used)
    assert (routed.idx_TK.dtype, routed.weight_TK.dtype) == (torch.int64, torch.float32)
    return result(leaf, routed.idx_TK, routed.weight_TK, routed.counts_E, l_aux, random_state())


def twin(logits: Tensor, gating: DeepSpeedGating, used: Tensor | None = None) -> Result:
    leaf = logits.double().requires_grad_()
    torch.manual_seed(7)
    routed, l_aux = deepspeed_gating(leaf, gating, used)
    return result(leaf, routed.idx_TK, routed.weight_TK, routed.counts_E, l_aux, random_state())


def stock(logits: Tensor, gating: DeepSpeedGating, used: Tensor | None = None) -> Result:
    leaf = logits.clone().requires_grad_()
    factor, least, drop = gating.capacity_factor, gating.min_capacity, gating.drop_tokens
    torch.manual_seed(7)
    if gating.k == 1:
        noise = "RSample" if gating.rsample else None
        used = None if used is None else used.long()
        outputs = top1gating(leaf, factor, least, used, noise, drop, gating.use_rts, sparse_routes=True)
    elif gating.k == 2:
        sampling = gating.top2_2nd_expert_sampling
        outputs = top2gating(  # it adds noise to the logits that it is given
            leaf.clone(), factor, least, drop, top2_2nd_expert_sampling=sampling, sparse_routes=True
        )
    else:
        outputs = topkgating(leaf, gating.k, factor, least, drop, sparse_routes=True)
    l_aux, _, _, idx, _, weight, counts = outputs
    return result(leaf, idx.T.long(), weight.T, counts, l_aux, random_state())


def assert_same(actual: Result, expected: Result, tolerance: float = TOLERANCE, terms: float = 0.0) -> None:
    """`terms`: size of the gradient's terms, where they may cancel: their rounding is what is left of them."""
    assert torch.equal(actual.state, expected.state), "other random numbers were drawn"
    assert torch.equal(actual.idx, expected.idx)
    assert torch.equal(actual.counts, expected.counts) and actual.counts.dtype is torch.int64
    for name in ("weight", "l_aux"):
        error = relative_error(getattr(actual, name), getattr(expected, name))
        assert error <= tolerance, f"{name}: {error:.1e}"
    error = float((actual.dlogits.double() - expected.dlogits.double()).abs().max())
    scale = max(float(expected.dlogits.abs().max()), terms)
    assert error <= tolerance * scale, f"dlogits: {error:.1e} of {scale:.1e}"


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_stock_and_the_twin(name: str) -> None:
    gating, logits = VARIANTS[name], make_logits(70, 12)
    actual = fused(logits, gating)
    assert_same(actual, stock(logits, gating))
    assert_same(actual, twin(logits, gating))
    assert bool((actual.idx < 0).any()) == gating.drop_tokens


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.float32])
@pytest.mark.parametrize("name", [name for name in VARIANTS if name.startswith("top1")])
def test_unused_tokens(name: str, dtype: torch.dtype) -> None:
    gating, logits, used = VARIANTS[name], make_logits(70, 12), make_used(70)
    actual = fused(logits, gating, used.to(dtype))
    assert_same(actual, stock(logits, gating, used))
    assert_same(actual, twin(logits, gating, used.to(dtype)))
    assert (actual.idx[~used] == -1).all() and int(actual.counts.sum()) == int(used.sum())


def test_other_choices_ignore_the_mask() -> None:
    for k in (2, 3):
        logits = make_logits(20, 6)
        assert_same(fused(logits, make_gating(k), make_used(20)), fused(logits, make_gating(k)), tolerance=0)


@settings(max_examples=25, deadline=None)
@given(
    tokens=st.integers(1, 90),
    experts=st.integers(1, 40),
    name=st.sampled_from(sorted(VARIANTS)),
    top_k=st.integers(3, 8),
    factor=st.sampled_from([0.1, 0.5, 1.0, 8.0]),
    masked=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape(tokens, experts, name, top_k, factor, masked, seed) -> None:
    gating = replace(VARIANTS[name], capacity_factor=factor)
    gating = replace(gating, k=top_k) if gating.k > 2 else gating
    experts = max(experts, gating.k)
    logits, used = make_logits(tokens, experts, seed), make_used(tokens) if masked else None
    actual, expected = fused(logits, gating, used), stock(logits, gating, used)
    # A weight that is 1 whatever the logits, of the only expert or of the only route that was left.
    assert_same(actual, expected, tolerance=2e-6, terms=1.0)


@pytest.mark.parametrize(("tokens", "experts", "k"), [(5, 1, 1), (7, 2, 2), (9, 1024, 2), (6, 1000, 8), (300, 8, 8)])
@pytest.mark.parametrize("drop_tokens", [False, True])
def test_corners(tokens: int, experts: int, k: int, drop_tokens: bool) -> None:
    gating = make_gating(k, drop_tokens=drop_tokens, use_rts=True, top2_2nd_expert_sampling=True, capacity_factor=0.5)
    logits = make_logits(tokens, experts)
    actual, expected = fused(logits, gating), twin(logits, gating)
    assert_same(actual, expected, terms=1.0 if experts == 1 else 0.0)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_many_tiles_in_few_programs(k: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each program walks over several tiles of tokens, and places go on from one to the next."""
    monkeypatch.setattr(triton_logits, "MAX_PARTIALS", 3)
    logits = make_logits(500, 6)
    for drop_tokens in (False, True):
        gating = make_gating(k, drop_tokens=drop_tokens, use_rts=True, capacity_factor=0.7)
        assert_same(fused(logits, gating), stock(logits, gating), tolerance=2e-6)


@pytest.mark.parametrize(("tokens", "experts", "limit"), [(120, 5, 1), (120, 5, 25), (40, 600, 4), (40, 600, 12)])
def test_first_come_first_served(tokens: int, experts: int, limit: int) -> None:
    """Said once more in Python, without a sum over tokens. With many experts, each token is a program's only one."""
    logits = make_logits(tokens, experts)
    logits[:, :5] += 6.0
    gating = make_gating(2, drop_tokens=True, capacity_factor=0.0, min_capacity=limit)
    chosen, actual = fused(logits, make_gating(2)), fused(logits, gating)
    left = dict.fromkeys(range(experts), limit)
    expected = torch.full((tokens, 2), -1)
    for rank in (0, 1):
        for token, expert in enumerate(chosen.idx[:, rank].tolist()):
            if left[expert]:
                left[expert] -= 1
                expected[token, rank] = expert
    assert torch.equal(actual.idx.cpu(), expected)
    assert torch.equal(actual.weight == 0, actual.idx < 0)
    assert (expected < 0).any() and bool((expected[:, 1] >= 0).any()) == (limit > tokens // 5)


@pytest.mark.parametrize("name", ["top2 drops", "top3 drops"])
def test_survivors_that_hardly_weigh(name: str) -> None:
    """Where what is left of a token's probabilities is below eps, DeepSpeed divides by eps."""
    logits = make_logits(70, 12)
    logits[:, 0] += 20.0  # everybody's first choice, which few get
    actual = fused(logits, VARIANTS[name])
    total = actual.weight.sum(1)
    assert ((total > 0) & (total < 0.9)).any()
    assert_same(actual, stock(logits, VARIANTS[name]), tolerance=3e-6)


@pytest.mark.parametrize("name", VARIANTS)
def test_no_tokens(name: str) -> None:
    gating = VARIANTS[name]
    x = torch.zeros(0, 8, device=DEVICE, requires_grad=True)
    gate = torch.randn(5, 8, device=DEVICE, requires_grad=True)
    routed, l_aux = route_fused(x, gate, gating)
    assert routed.idx_TK.shape == routed.weight_TK.shape == (0, gating.k)
    assert routed.counts_E.tolist() == [0] * 5 and l_aux.item() == 0
    (routed.weight_TK.sum() + l_aux).backward()
    assert x.grad.shape == x.shape and torch.count_nonzero(gate.grad) == 0


@pytest.mark.parametrize("k", [1, 2, 3])
def test_of_equal_probabilities_the_lower_expert_wins(k: int) -> None:
    """So it is in torch.argmax. In torch.topk it is not documented, and on CPUs it is not so."""
    logits = make_logits(60, 7)
    logits = torch.round(logits)
    logits[0] = 0.0
    logits[0, ::2] = -0.0
    idx = fused(logits, make_gating(k)).idx
    assert torch.equal(idx, torch.argsort(logits, dim=1, descending=True, stable=True)[:, :k])
    if k < 3:
        assert_same(fused(logits, make_gating(k)), stock(logits, make_gating(k)))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", VARIANTS)
def test_broken_logits_stay_in_bounds(name: str, bad: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """And show where they show in the twin: in the weights of their own tokens."""
    gating, logits = VARIANTS[name], make_logits(70, 12)
    logits[3, 5] = bad
    logits[7] = bad
    logits[9, 1:] = bad
    # In a product with the identity, a NaN would spread over its row.
    monkeypatch.setattr(deepspeed_routing, "gate_product", lambda x, gate: (x.clone(), False))
    used = make_used(70) if gating.k == 1 else None
    assert used is None or not used[[3, 7, 9]].all()  # a NaN shows even where the token is not used
    actual, expected = fused(logits, gating, used), twin(logits, gating, used)
    assert ((actual.idx >= -1) & (actual.idx < 12)).all()
    assert torch.equal(actual.weight.isnan(), expected.weight.isnan())
    assert torch.equal(actual.counts.sum(), expected.counts.sum())
    if gating.k < 3:  # of NaN, torch.topk takes any
        assert torch.equal(actual.idx, expected.idx) and torch.equal(actual.counts, expected.counts)


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("gate_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["top1 rts", "top2 sampling drops"])
def test_gate_product_and_its_gradients(name: str, x_dtype: torch.dtype, gate_dtype: torch.dtype) -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(50, 64, generator=g).to(DEVICE, x_dtype)
    gate = (torch.randn(9, 64, generator=g) / 8).to(DEVICE, gate_dtype)
    fast, exact = [t.clone().requires_grad_() for t in (x, gate)], [t.double().requires_grad_() for t in (x, gate)]
    torch.manual_seed(7)
    routed, l_aux = route_fused(*fast, VARIANTS[name])
    torch.manual_seed(7)
    expected, expected_l_aux = deepspeed_gating(exact[0] @ exact[1].T, VARIANTS[name])
    assert torch.equal(routed.idx_TK, expected.idx_TK)
    assert relative_error(routed.weight_TK, expected.weight_TK) < 2e-6
    assert relative_error(l_aux, expected_l_aux) < TOLERANCE
    along = direction(routed.weight_TK.shape)
    grads = torch.autograd.grad((routed.weight_TK * along.float()).sum() + l_aux, fast)
    exact_grads = torch.autograd.grad((expected.weight_TK * along).sum() + expected_l_aux, exact)
    for grad, exact_grad, of in zip(grads, exact_grads, (x, gate), strict=True):
        assert grad.dtype is of.dtype
        # Beside the rounding to its own dtype (the interpreter's to bf16 is towards zero), nothing but float32's.
        rounding = 0 if of.dtype is torch.float32 else torch.finfo(of.dtype).eps
        assert relative_error(grad, exact_grad) < 3e-6 + rounding


@pytest.mark.parametrize("name", ["top1", "top2 drops", "top3"])
def test_one_of_the_outputs_is_enough(name: str) -> None:
    logits, gating = make_logits(30, 6), VARIANTS[name]
    for pick in (lambda routed, l_aux: l_aux, lambda routed, l_aux: routed.weight_TK.square().sum()):
        leaf, exact = logits.clone().requires_grad_(), logits.double().requires_grad_()
        (grad,) = torch.autograd.grad(pick(*route_fused(leaf, torch.eye(6, device=DEVICE), gating)), leaf)
        (expected,) = torch.autograd.grad(pick(*deepspeed_gating(exact, gating)), exact)
        assert relative_error(grad, expected) < 2e-6


def test_kept_for_backward() -> None:
    """x, the gate, the logits, the indices and the counts of first choices, and no second tensor [T, E]."""
    x, gate = (t.to(DEVICE).requires_grad_() for t in (torch.randn(32, 8), torch.randn(16, 8)))
    kept: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        route_fused(x, gate, VARIANTS["top2 drops"])
    assert sum(kept.values()) == 32 * 8 * 4 + 16 * 8 * 4 + 32 * 16 * 4 + 32 * 2 * 8 + 16 * 8


@pytest.mark.parametrize("name", ["top1 drops by rts", "top2 sampling drops", "top3 drops"])
def test_equal_inputs_give_equal_bits(name: str) -> None:
    first, second = (fused(make_logits(200, 24), VARIANTS[name]) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(vars(first).values(), vars(second).values(), strict=True))


def test_the_layer_takes_this_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """On CUDA unless told not to; here the question of the device is answered for it. And takes the twin for what the
    kernels do not cover."""
    monkeypatch.setattr(gating_module, "runs_fused", routing.covers)
    calls: list[int] = []

    def note(x: Tensor, gate: Tensor, top_k: int, *rest: object) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        calls.append(top_k)
        return original(x, gate, top_k, *rest)

    original = deepspeed_routing.route
    monkeypatch.setattr(deepspeed_routing, "route", note)
    asked, refused = (FlashFuseMoEConfig.from_section({"gating_backend": name}) for name in ("triton", "torch"))
    for k in (1, 2, 4):
        moe = MoE(16, GatedMLP(16, 24), 8, k=k).to(DEVICE)
        moe(torch.randn(20, 16, device=DEVICE))
        assert calls.pop() == k
        moe.configure(refused)
        moe(torch.randn(20, 16, device=DEVICE))
        assert calls == []
        moe.configure(asked)
        moe(torch.randn(20, 16, device=DEVICE))
        assert calls.pop() == k
    moe = MoE(4, GatedMLP(4, 8), routing.MAX_EXPERTS + 1, min_capacity=0).to(DEVICE)
    moe.configure(asked)
    gate = moe.deepspeed_moe.gate
    assert gate(torch.randn(3, 4, device=DEVICE))[0].idx_TK.shape == (3, 1)
    assert calls == []
