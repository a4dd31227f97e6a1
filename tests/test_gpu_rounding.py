# SPDX-License-Identifier: GPL-3.0-or-later
"""How exact the layer is on a GPU, at any size: no worse than the one that a user writes by hand.

Errors are measured against float64; the eager layer in the same dtype is the yardstick. A sweep compiles new kernels
for every activation and width and takes minutes (`-k over_shapes`), everything else takes seconds.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, note, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional as F

from flashfusemoe_ds import MoELayer, fused_moe
from flashfusemoe_ds.kernels import reference
from flashfusemoe_ds.kernels.activation import ACTIVATIONS
from flashfusemoe_ds.kernels.select import select_products, why_not_hopper
from flashfusemoe_ds.nn.experts import GroupedExperts
from flashfusemoe_ds.nn.router import GATINGS, Gating, get_gating

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
RESULTS = ("y", "dx", "dgate", "dw_up", "dw_down", "db_up", "db_down")
POOLED = 128  # tokens over which an error is averaged: of few numbers, chance decides which of two errors is larger


@pytest.fixture(autouse=True)
def no_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


# ---- rounding


@dataclass(frozen=True)
class Case:
    """One layer and its input. `steer`: logits of a gate that looks at little else, and so decides who goes where."""

    tokens: int
    d: int
    f: int
    experts: int
    top_k: int
    activation: str = "swiglu"
    gating: str | Gating = "softmax_topk"
    bias: bool = False
    recompute: bool = False
    steer: tuple[float, ...] = ()

    @property
    def up_width(self) -> int:
        return ACTIVATIONS[self.activation].up_width(self.f)

    @property
    def weights_are_constant(self) -> bool:
        """Whether a token's weights do not depend on its logits, so that the gate's gradient is 0."""
        gating = get_gating(self.gating)
        if gating.score == "softmax" and (self.experts == 1 or (self.top_k == 1 and gating.order == "after_topk")):
            return True
        return self.top_k == 1 and gating.renormalize

    def layer(self) -> MoELayer:
        with torch.device(DEVICE):
            layer = MoELayer(
                self.d, self.up_width, self.experts, self.top_k, self.activation, self.gating,
                recompute_activations=self.recompute,
            )  # fmt: skip
            if self.bias:
                layer.experts = GroupedExperts(
                    self.experts, self.d, self.f, self.activation, up_bias=True, down_bias=True,
                    recompute_activations=self.recompute,
                )  # fmt: skip
        return layer

    def inputs(self, seed: int) -> list[Tensor]:
        """x, gate, w_up, w_down, and the biases if there are any, in float64; logits are of size 1."""
        g = torch.Generator(DEVICE).manual_seed(seed)

        def normal(*shape: int, scale: float = 1.0) -> Tensor:
            return torch.randn(shape, generator=g, dtype=torch.float64, device=DEVICE) * scale

        x, gate = normal(self.tokens, self.d), normal(self.experts, self.d, scale=self.d**-0.5)
        if self.steer:
            x[:, 0] = 1
            gate *= 0.1
            gate[:, 0] = torch.tensor(self.steer)
        weights = [
            normal(self.experts, self.up_width, self.d, scale=self.d**-0.5),
            normal(self.experts, self.d, self.f, scale=self.f**-0.5),
        ]
        biases = [normal(self.experts, self.up_width), normal(self.experts, self.d)] if self.bias else []
        return [x, gate, *weights, *biases]


def parameter_names(layer: MoELayer) -> list[str]:
    """The layer's parameters in the order of Case.inputs, from the gate on."""
    up = layer.experts.up_name
    names = ["router.weight", f"experts.{up}", "experts.down_proj", f"experts.{up}_bias", "experts.down_proj_bias"]
    existing = dict(layer.named_parameters())
    return [name for name in names if name in existing]


def as_function(layer: MoELayer) -> Callable[..., Tensor]:
    """The layer's output as a function of x and its parameters, in the order of Case.inputs."""
    names = parameter_names(layer)

    def run(x: Tensor, *parameters: Tensor) -> Tensor:
        return functional_call(layer, dict(zip(names, parameters, strict=True)), (x,))[0]

    return run


def routing_weights(logits: Tensor, idx: Tensor, gating: Gating) -> Tensor:
    """The weights of the chosen experts, by the formulas of the `Gating` docstring."""
    scores = torch.softmax(logits, 1) if gating.score == "softmax" else torch.sigmoid(logits)
    chosen = (logits if gating.order == "after_topk" else scores).gather(1, idx)
    if gating.order == "after_topk":
        chosen = torch.softmax(chosen, 1) if gating.score == "softmax" else torch.sigmoid(chosen)
    if gating.renormalize:
        chosen = chosen / chosen.sum(1, keepdim=True)
    return chosen * gating.scaling_factor


def by_hand(case: Case, idx: Tensor, dtype: torch.dtype) -> Callable[..., Tensor]:
    """The eager layer: a float32 router, and the experts one by one in `dtype`."""

    def run(x: Tensor, gate: Tensor, w_up: Tensor, w_down: Tensor, *biases: Tensor) -> Tensor:
        with torch.autocast(DEVICE, enabled=False):
            weight = routing_weights(F.linear(x.float(), gate.float()), idx, get_gating(case.gating)).to(dtype)
        ups, downs = w_up.unbind(), w_down.unbind()
        b_ups, b_downs = (b.unbind() for b in biases) if biases else ([None] * case.experts,) * 2
        out = torch.zeros(x.shape, dtype=dtype, device=x.device)
        for e in idx.unique().tolist():
            token, k = (idx == e).nonzero(as_tuple=True)
            h = F.linear(x[token], ups[e], b_ups[e])
            y = F.linear(reference.activate(h, case.activation), downs[e], b_downs[e])
            out = out.index_add(0, token, y * weight[token, k, None])
        return out

    return run


def in_float64(case: Case, idx: Tensor) -> Callable[..., Tensor]:
    def run(x: Tensor, gate: Tensor, w_up: Tensor, w_down: Tensor, *biases: Tensor) -> Tensor:
        weight = routing_weights(x @ gate.T, idx, get_gating(case.gating))
        return reference.experts(x, idx, weight, w_up, w_down, case.activation, *biases)

    return run


def value_and_grads(
    fn: Callable[..., Tensor], inputs: Sequence[Tensor], dtypes: Sequence[torch.dtype], rounded_to: torch.dtype
) -> list[Tensor]:
    """fn's output and the gradient of every input, for one fixed random direction, rounded like everybody's."""
    leaves = [t.to(dtype).detach().requires_grad_() for t, dtype in zip(inputs, dtypes, strict=True)]
    out = fn(*leaves)
    g = torch.Generator(DEVICE).manual_seed(1)
    direction = torch.randn(out.shape, generator=g, dtype=torch.float64, device=DEVICE)
    return [out.detach(), *torch.autograd.grad(out, leaves, direction.to(rounded_to).to(out.dtype))]


@dataclass
class Error:
    """Of one tensor, over all draws of its inputs: in the Euclidean norm, and the largest element's."""

    squared: float = 0.0
    size: float = 0.0
    largest: float = 0.0
    range: float = 0.0

    def add(self, actual: Tensor, expected: Tensor) -> None:
        assert actual.shape == expected.shape
        assert torch.isfinite(actual).all()
        difference = actual.double() - expected
        self.squared += float(difference.square().sum())
        self.size += float(expected.square().sum())
        self.largest = max(self.largest, float(difference.abs().max()))
        self.range = max(self.range, float(expected.abs().max()))

    @property
    def rms(self) -> float:
        return (self.squared / self.size) ** 0.5

    @property
    def relative(self) -> float:
        return self.largest / self.range


@dataclass
class Errors:
    """Ours and the eager layer's, by name of the result."""

    ours: dict[str, Error] = field(default_factory=dict)
    eager: dict[str, Error] = field(default_factory=dict)

    def ratios(self) -> dict[str, float]:
        """Ours over the eager layer's. A bias's gradient may be a sum of one, and both exact."""
        ratios = {}
        for name, error in self.ours.items():
            eager = self.eager[name].rms
            ratios[name] = error.rms / eager if eager else 0.0 if not error.rms else float("inf")
        return ratios


def measure(
    case: Case,
    dtype: torch.dtype,
    *,
    gate_dtype: torch.dtype | None = None,
    autocast: torch.dtype | None = None,
    chosen: list[Tensor] | None = None,
) -> Errors:
    """Errors over at least POOLED tokens. All three sides start from the same rounded numbers and the same experts.

    A gate's gradient that is 0 is left out, after a check that it is 0 up to float32's rounding.

    Args:
        dtype: of x and all parameters; gate_dtype: of the gate, if another.
        autocast: run under it; results are then rounded as often as in this dtype.
        chosen: filled with each draw's experts.
    """
    layer = case.layer()
    names = parameter_names(layer)
    dtypes = [dtype] * (len(names) + 1)
    dtypes[1] = gate_dtype or dtype
    compute = autocast or dtype
    if why_not_hopper(torch.device(DEVICE, 0)) is None:
        probe = torch.empty(0, dtype=compute, device=DEVICE)
        assert type(select_products(None, probe, (8,), 1)).__name__ == "HopperProducts"

    def cast() -> contextlib.AbstractContextManager[None]:
        return torch.autocast(DEVICE, autocast) if autocast else contextlib.nullcontext()

    def run(fn: Callable[..., Tensor]) -> list[Tensor]:
        def cast_fn(*leaves: Tensor) -> Tensor:
            with cast():
                return fn(*leaves)

        return value_and_grads(cast_fn, inputs, dtypes, compute)

    errors = Errors()
    for seed in range(-(-POOLED // case.tokens)):
        inputs = [t.to(kind).double() for t, kind in zip(case.inputs(seed), dtypes, strict=True)]
        with torch.no_grad(), cast():
            x, gate = inputs[0].to(dtypes[0]), inputs[1].to(dtypes[1])
            idx = functional_call(layer.router, {"weight": gate}, (x,)).idx_TK
        assert ((idx >= 0) & (idx < case.experts)).all()
        if chosen is not None:
            chosen.append(idx)
        expected = value_and_grads(in_float64(case, idx), inputs, [torch.float64] * len(inputs), compute)
        actual, eager = run(as_function(layer)), run(by_hand(case, idx, compute))
        assert actual[0].dtype is compute
        assert [grad.dtype for grad in actual[1:]] == dtypes
        if case.weights_are_constant:
            # Each token's share is at most |dy| |y| |x|, and what is left of it the rounding of float32's sums.
            y_T, x_T = expected[0].norm(dim=1), inputs[0].abs().amax(1)
            most = 2 * case.d**0.5 * float((y_T * x_T).sum())
            assert float(actual[2].abs().max()) <= 2e-6 * most
        for name, a, y, e in zip(RESULTS, actual, eager, expected, strict=False):
            if name == "dgate" and case.weights_are_constant:
                continue
            errors.ours.setdefault(name, Error()).add(a, e)
            errors.eager.setdefault(name, Error()).add(y, e)
    return errors


def assert_no_worse_than_eager(errors: Errors) -> None:
    ratios = errors.ratios()
    assert {"y", "dx", "dw_up", "dw_down"} <= set(ratios)
    assert {name: ratio for name, ratio in ratios.items() if not ratio <= 1.5} == {}


SIZES = st.integers(1, 50).map(lambda n: 8 * n)
SCALED = Gating(score="sigmoid", renormalize=True, scaling_factor=2.5)


@st.composite
def cases(draw: st.DrawFn, activations: Sequence[str] = tuple(ACTIVATIONS)) -> Case:
    experts = draw(st.integers(1, 40))
    return Case(
        tokens=draw(st.integers(1, 600)),
        d=draw(SIZES),
        f=draw(SIZES),
        experts=experts,
        top_k=draw(st.integers(1, min(4, experts))),
        activation=draw(st.sampled_from(activations)),
        gating=draw(st.sampled_from([*GATINGS, SCALED])),
        bias=draw(st.booleans()),
        recompute=draw(st.booleans()),
    )


def sweep(examples: int) -> Callable:
    """Settings of a sweep: always the same cases, and no search for smaller ones, as each compiles for seconds."""
    return settings(
        max_examples=examples,
        deadline=None,
        derandomize=True,
        database=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )


@pytest.mark.timeout(1200)
@sweep(20)
@given(case=cases())
def test_rounding_of_bf16_over_shapes(case: Case) -> None:
    note(str(case))
    assert_no_worse_than_eager(measure(case, BF16))


@pytest.mark.timeout(600)
@sweep(6)
@given(case=cases())
def test_rounding_of_fp16_over_shapes(case: Case) -> None:
    note(str(case))
    assert_no_worse_than_eager(measure(case, FP16))


@pytest.mark.timeout(600)
@sweep(6)
# Without relu's step in the derivative: of a million elements, one is so near 0 that float32 has the other sign.
@given(case=cases([name for name in ACTIVATIONS if name not in ("relu", "reglu")]))
def test_fp32_over_shapes(case: Case) -> None:
    note(str(case))
    errors = measure(case, FP32)
    assert {name: e.relative for name, e in errors.ours.items() if not e.relative <= 1e-5} == {}


@pytest.mark.parametrize("dtype", [BF16, FP16])
def test_fp32_parameters_under_autocast(dtype: torch.dtype) -> None:
    case = Case(513, 128, 96, 8, 2, "swiglu", "softmax_renorm", bias=True)
    assert_no_worse_than_eager(measure(case, FP32, autocast=dtype))


def test_bf16_with_a_float32_gate() -> None:
    assert_no_worse_than_eager(measure(Case(513, 128, 96, 8, 2), BF16, gate_dtype=FP32))


def test_fused_moe_is_the_layer() -> None:
    case = Case(513, 128, 96, 8, 2, "geglu", "sigmoid_renorm")

    def by_function(x: Tensor, gate: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
        return fused_moe(x, gate, w_up, w_down, top_k=2, activation="geglu", gating="sigmoid_renorm")[0]

    inputs = case.inputs(0)
    results = [value_and_grads(fn, inputs, [BF16] * 4, BF16) for fn in (as_function(case.layer()), by_function)]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# ---- odd sizes and odd numbers


@pytest.mark.parametrize(
    "case",
    [
        Case(1, 2880, 1416, 3, 2),
        Case(7, 1416, 2880, 3, 3, "geglu"),
        Case(513, 2880, 1416, 8, 2, "swiglu", "softmax"),
        Case(8191, 1416, 2880, 3, 2, bias=True),
        Case(8191, 128, 64, 8, 4, "gelu_tanh", "sigmoid"),
        Case(8191, 320, 288, 8, 2),  # widths that end in half a tile of 128
        Case(513, 256, 128, 1, 1, "swiglu", "sigmoid"),
        Case(513, 128, 64, 1024, 8),
        Case(1, 128, 64, 1024, 8, "relu_squared", "softmax_renorm"),
    ],
    ids=lambda case: f"T={case.tokens},D={case.d},F={case.f},E={case.experts}",
)
def test_odd_sizes(case: Case) -> None:
    assert_no_worse_than_eager(measure(case, BF16))


def test_an_expert_without_tokens() -> None:
    chosen: list[Tensor] = []
    case = Case(300, 136, 72, 4, 2, bias=True, steer=(1.0, 1.0, -4.0, 1.0))
    assert_no_worse_than_eager(measure(case, BF16, chosen=chosen))
    assert not (chosen[0] == 2).any()
    results = value_and_grads(as_function(case.layer()), case.inputs(0), [BF16] * 6, BF16)
    for grad in results[RESULTS.index("dw_up") :]:
        assert torch.count_nonzero(grad[2]) == 0
        assert torch.count_nonzero(grad[0]) > 0


@pytest.mark.parametrize("tokens", [300, 8191])
def test_all_tokens_to_one_expert(tokens: int) -> None:
    chosen: list[Tensor] = []
    case = Case(tokens, 136, 72, 4, 1, gating="sigmoid", steer=(-2.0, 2.0, -2.0, -2.0))
    assert_no_worse_than_eager(measure(case, BF16, chosen=chosen))
    assert (chosen[0] == 1).all()


@pytest.mark.parametrize("gating", ["softmax", "softmax_topk", "sigmoid_renorm"])
def test_nan_and_inf_logits_stay_with_their_tokens(gating: str) -> None:
    """A row with a NaN or an infinity makes such logits. Its output is NaN, and nobody else's differs by a bit."""
    case = Case(513, 136, 72, 16, 2, gating=gating)
    layer = case.layer().to(BF16)
    clean = case.inputs(0)[0].to(BF16)
    broken = torch.tensor([0, 5, 17, 511], device=DEVICE)
    x = clean.clone()
    x[5] = float("nan")
    x[17, 3] = float("inf")
    x[0, 9] = float("-inf")
    x[511, 0] = float("nan")
    others = torch.ones(case.tokens, dtype=torch.bool, device=DEVICE)
    others[broken] = False

    with torch.no_grad():
        idx = layer.router(x).idx_TK
    assert ((idx >= 0) & (idx < case.experts)).all()
    assert (idx.sort(1)[0].diff(dim=1) > 0).all()
    results = []
    for rows in (x, clean):
        leaf = rows.clone().requires_grad_()
        layer.zero_grad()
        out, _ = layer(leaf)
        out.backward(torch.ones_like(out))
        results.append((out.detach(), leaf.grad, [p.grad.clone() for p in layer.experts.parameters()]))
    (out, dx, grads), (clean_out, clean_dx, clean_grads) = results
    assert torch.isnan(out[broken]).all()
    assert torch.isfinite(clean_out).all() and torch.isfinite(clean_dx).all()
    assert torch.equal(out[others], clean_out[others])
    assert torch.equal(dx[others], clean_dx[others])
    # Experts that saw none of the broken tokens, now or before, have the same gradients as before.
    with torch.no_grad():
        seen = torch.cat([idx[broken], layer.router(clean).idx_TK[broken]]).unique().tolist()
    untouched = [e for e in range(case.experts) if e not in seen]
    assert untouched
    for grad, clean_grad in zip(grads, clean_grads, strict=True):
        assert torch.isnan(grad[idx[5, 0]]).any()
        for e in untouched:
            assert torch.equal(grad[e], clean_grad[e])
