# SPDX-License-Identifier: GPL-3.0-or-later
"""torch.compile: a layer on one rank becomes one graph and computes what eager mode does; one whose experts are spread
over ranks breaks the graph there and nowhere else."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

from flashfusemoe_ds import Gating, MoELayer, fused_moe
from flashfusemoe_ds.kernels import operators, routing
from flashfusemoe_ds.kernels.products import TorchProducts
from flashfusemoe_ds.nn import compiled as nn_compiled
from flashfusemoe_ds.nn import router
from flashfusemoe_ds.nn.router import fused_rule, route_fused
from tests.close import relative_error
from tests.distributed import run_ranks
from tests.kernels.test_experts import make_case
from tests.kernels.test_order import DEVICE

SHAPE = dict(d_model=16, ffn_dim=48, num_experts=8, top_k=2)
LOSSES = dict(aux_loss_coeff=0.1, z_loss_coeff=0.01)
WIDE = Gating(score="sigmoid", renormalize=True, scaling_factor=1.5, num_groups=4, top_groups=2, expert_bias=True)
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "losses": LOSSES,
    "recompute": {"recompute_activations": True, "activation": "gelu", **LOSSES},
    "reference products": {"gemm_backend": "reference"},
    "shared, latent, biased groups": {
        "latent_dim": 8, "num_shared_experts": 2, "gating": WIDE, "top_k": 3, "activation": "geglu", **LOSSES,
    },
    "drops": {"capacity_factor": 1.1, "allow_dropped_tokens": True, **LOSSES},
    "limit in reach": {"max_tokens_per_expert": 60, "capacity_factor": 7.9},
}  # fmt: skip


@pytest.fixture(autouse=True)
def forget_graphs() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def make_layer(**changes: Any) -> MoELayer:
    torch.manual_seed(0)
    layer = MoELayer(**{**SHAPE, **changes})
    with torch.no_grad():
        layer.router.weight.mul_(100)  # as initialised, all logits are nearly equal
    return layer


def step(
    fn: Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]], layer: nn.Module, x: Tensor
) -> dict[str, Tensor | None]:
    """One forward and backward of fn, which is some form of `layer`: everything that comes out of it."""
    leaf = x.clone().requires_grad_()
    layer.zero_grad()
    out, losses = fn(leaf)
    (out.sin().sum() + sum(losses.values())).backward()
    grads = {f"d{name}": p.grad for name, p in layer.named_parameters()}
    buffers = {name: b.clone() for name, b in layer.named_buffers()}
    return {"out": out.detach(), **losses, "dx": leaf.grad, **grads, **buffers}


def differences(actual: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> list[str]:
    """Names whose bits differ; None equals None alone. Of what passes through shared experts backward, names that
    differ by more than rounding: a graph has their slopes from autograd, eager mode from a node of its own."""
    assert actual.keys() == expected.keys()
    through = {n for n in expected if n.endswith(("shared_experts.gate_up_proj", "shared_experts.up_proj"))}
    through |= {"dx"} if through else set()
    return [name for name in expected if not _same(actual[name], expected[name], 1e-6 if name in through else 0.0)]


def _same(a: Tensor | None, b: Tensor | None, tolerance: float) -> bool:
    if a is None or b is None:
        return a is b
    return torch.equal(a, b) or relative_error(a, b) < tolerance


@pytest.mark.parametrize("case", CASES)
def test_one_graph_equals_eager(case: str) -> None:
    layer, twin = make_layer(**CASES[case]), make_layer(**CASES[case])
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for seed in (0, 1):
        x = torch.randn(4, 15, 16, generator=torch.Generator().manual_seed(seed))
        assert differences(step(compiled, layer, x), step(twin, twin, x)) == []


@pytest.mark.parametrize("case", ["losses", "shared, latent, biased groups"])
def test_dynamo_alone_equals_eager(case: str) -> None:
    layer, twin = make_layer(**CASES[case]), make_layer(**CASES[case])
    x = torch.randn(60, 16)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    assert differences(step(compiled, layer, x), step(twin, twin, x)) == []


def test_in_evaluation() -> None:
    layer = make_layer(**CASES["shared, latent, biased groups"]).eval()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(60, 16)
    for context in (torch.no_grad, torch.inference_mode):
        with context():
            assert torch.equal(compiled(x)[0], layer(x)[0])
    assert layer.router.routed_counts.sum() == 0


def test_fused_moe() -> None:
    layer = make_layer(**LOSSES)

    def run(fn: Callable[..., Any]) -> Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]:
        weights = (layer.router.weight, layer.experts.gate_up_proj, layer.experts.down_proj)
        return lambda x: fn(x, *weights, top_k=2, **LOSSES)

    x = torch.randn(60, 16)
    compiled = torch.compile(fused_moe, fullgraph=True, backend="aot_eager")
    assert differences(step(run(compiled), layer, x), step(run(fused_moe), layer, x)) == []


@pytest.mark.parametrize(
    "changes",
    [LOSSES, CASES["drops"], {"max_tokens_per_expert": 200, "capacity_factor": 7.9}],
    ids=lambda c: next(iter(c)),
)
def test_one_graph_for_any_number_of_tokens(changes: dict[str, Any]) -> None:
    """But for 0 and 1, of which torch.compile makes graphs of their own."""
    layer, twin = make_layer(**changes), make_layer(**changes)
    backend = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, fullgraph=True, backend=backend)

    def marked(x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        torch._dynamo.mark_dynamic(x, 0)
        return compiled(x)

    for num_tokens, graphs in ((60, 1), (33, 1), (300, 1), (3, 1), (1, 2), (0, 3)):
        x = torch.randn(num_tokens, 16)
        assert differences(step(marked, layer, x), step(twin, twin, x)) == [], num_tokens
        assert backend.frame_count == graphs, num_tokens


def test_a_changed_coefficient_counts() -> None:
    layer, twin = make_layer(**LOSSES), make_layer(**LOSSES)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(60, 16)
    for coeff in (0.1, 0.2, 0.0, 0.3):
        layer.router.aux_loss_coeff = twin.router.aux_loss_coeff = coeff
        assert differences(step(compiled, layer, x), step(twin, twin, x)) == []


@pytest.mark.parametrize("where", ["around the step", "around the layer"])
def test_autocast(where: str) -> None:
    layer, twin = make_layer(**LOSSES), make_layer(**LOSSES)

    def casting(module: nn.Module) -> Callable[[Tensor], tuple[Tensor, dict[str, Tensor]]]:
        def run(x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            with torch.autocast("cpu", torch.bfloat16):
                return module(x)

        return run

    x = torch.randn(60, 16)
    if where == "around the layer":
        compiled = torch.compile(casting(layer), fullgraph=True, backend="aot_eager")
        actual, expected = step(compiled, layer, x), step(casting(twin), twin, x)
    else:
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        with torch.autocast("cpu", torch.bfloat16):
            actual, expected = step(compiled, layer, x), step(twin, twin, x)
    assert actual["out"].dtype is torch.bfloat16 and differences(actual, expected) == []


def test_under_activation_checkpointing() -> None:
    layer, twin = make_layer(**LOSSES), make_layer(**LOSSES)

    def run(module: nn.Module) -> Callable[[Tensor], Any]:
        return lambda x: checkpoint(module, x, use_reentrant=False)

    x = torch.randn(60, 16)
    compiled = torch.compile(run(layer), fullgraph=True, backend="aot_eager")
    assert differences(step(compiled, layer, x), step(run(twin), twin, x)) == []


def test_gradients_that_nobody_needs_are_not_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("computed a gradient that nobody needs")

    layer, twin = make_layer(**LOSSES), make_layer(**LOSSES)
    for module in (layer, twin):
        module.experts.requires_grad_(False)
    monkeypatch.setattr(TorchProducts, "dw_up", refuse)
    monkeypatch.setattr(TorchProducts, "dw_down", refuse)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(60, 16)
    actual = step(compiled, layer, x)
    assert differences(actual, step(twin, twin, x)) == [] and actual["dexperts.down_proj"] is None


def test_an_exceeded_limit_raises_from_the_graph() -> None:
    layer = make_layer(max_tokens_per_expert=5)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(60, 16)
    messages = []
    for fn in (compiled, layer):
        with pytest.raises(RuntimeError, match=r"was chosen \d+ times on one rank, where its limit is 5 ") as raised:
            fn(x)
        messages.append(str(raised.value))
    assert messages[0] == messages[1]


@pytest.mark.parametrize("case", ["losses", "shared, latent, biased groups"])
def test_with_the_kernels_of_cuda(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused router and triton products, interpreted where there is no GPU."""
    settings = {**CASES[case], "gemm_backend": "triton"}
    monkeypatch.setattr(router, "gate_and_route", router.route_fused)
    layer, twin = make_layer(**settings).to(DEVICE), make_layer(**settings).to(DEVICE)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = torch.randn(20, 16, device=DEVICE)
    assert differences(step(compiled, layer, x), step(twin, twin, x)) == []


# ---- the operators


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("gemm_backend", "dtype"), [("grouped_mm", torch.float32), ("reference", torch.float64)])
def test_experts_operators(gemm_backend: str, dtype: torch.dtype, bias: bool, recompute: bool) -> None:
    inputs, idx = make_case(37, 3, 6, 8, 12, "swiglu")
    # No dropped routes: the rows that they leave unused in H hold anything, which would not compare as equal.
    idx = idx.clamp(min=0)
    operands = [t.to(dtype) for t in inputs[: 6 if bias else 4]] + [None] * (0 if bias else 2)
    leaves = [None if t is None else t.requires_grad_() for t in operands]
    torch.library.opcheck(operators.experts, (*leaves, idx, idx.numel(), "swiglu", gemm_backend, recompute))

    x, *rest = (None if t is None else t.detach() for t in leaves)
    out, h, *order = operators.experts(x, *rest, idx, idx.numel(), "swiglu", gemm_backend, recompute)
    for needs in ([True] * 4 + [bias] * 2, [False, True, True, False, False, False]):
        arguments = (out.sin(), x, None if recompute else h, *rest, order, "swiglu", gemm_backend, needs)
        torch.library.opcheck(operators.experts_backward, arguments)


RULES = {
    "plain": (Gating(), 2, 0.0, 0.0, False),
    "losses": (Gating(order="after_topk"), 2, 0.1, 0.01, False),
    "z-loss, counts": (Gating(renormalize=True), 3, 0.0, 0.01, True),
    "groups": (WIDE, 3, 0.1, 0.0, True),
}


@pytest.mark.parametrize("case", RULES)
def test_route_operators(case: str) -> None:
    gating, top_k, aux, z, count = RULES[case]
    rule = (*fused_rule(gating, top_k), aux, z)
    g = torch.Generator().manual_seed(0)
    x, gate = torch.randn(21, 16, generator=g).to(DEVICE), torch.randn(8, 16, generator=g).to(DEVICE)
    bias = torch.linspace(-0.01, 0.01, 8).to(DEVICE) if gating.expert_bias else None
    leaves = x.clone().requires_grad_(), gate.clone().requires_grad_()
    torch.library.opcheck(operators.route, (*leaves, bias, count, *rule))

    weight, idx, counts, aux_loss, z_loss, logits = operators.route(x, gate, bias, count, *rule)
    upstream = (weight.sin(), torch.ones_like(aux_loss) if aux else None, torch.ones_like(z_loss) if z else None)
    arguments = (x, gate, logits, idx, counts if aux else None, *upstream)
    for needs in ((True, True), (False, True), (True, False)):
        torch.library.opcheck(operators.route_backward, (*arguments, *needs, *rule))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", RULES)
def test_fused_router_in_one_graph(case: str, dtype: torch.dtype) -> None:
    gating, top_k, aux, z, count = RULES[case]
    bias = torch.linspace(-0.01, 0.01, 8).to(DEVICE) if gating.expert_bias else None

    def run(x: Tensor, gate: Tensor) -> tuple[Tensor | None, ...]:
        routed = route_fused(x, gate, gating, top_k, aux, z, bias, count)
        return routed.idx_TK, routed.weight_TK, *routed.losses.values(), routed.counts_E

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for num_tokens in (21, 34):  # the second time with a number of tokens that is a symbol
        g = torch.Generator().manual_seed(num_tokens)
        x, gate = (torch.randn(n, 16, generator=g).to(DEVICE, dtype) for n in (num_tokens, 8))
        assert routing.covers(x, gate, top_k)
        results = []
        for fn in (compiled, run):
            leaves = x.clone().requires_grad_(), gate.clone().requires_grad_()
            idx, weight, *losses, counts = fn(*leaves)
            (weight.sin().sum() + sum(losses)).backward()
            results.append([idx, weight.detach(), *losses, counts, *(leaf.grad for leaf in leaves)])
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_the_limit_operator() -> None:
    idx = torch.randint(0, 8, (30, 2))
    torch.library.opcheck(nn_compiled.refuse_overflow, (idx, torch.bincount(idx.flatten(), minlength=8), 30, "a=1"))


def test_eager_mode_does_not_load_the_compiler() -> None:
    """0.8 s of import, and the operators' slower path."""
    code = (
        "import sys, torch; from flashfusemoe_ds import MoELayer\n"
        "MoELayer(8, 16, 4, 2, max_tokens_per_expert=9)(torch.randn(3, 8))[0].sum().backward()\n"
        "print([m for m in ('torch._dynamo', 'flashfusemoe_ds.kernels.operators') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"


# ---- experts spread over ranks


class Block(nn.Module):
    """A layer between two others, so that there is something to compile on both sides of its graph break."""

    def __init__(self, moe: nn.Module) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.before, self.moe, self.after = nn.Linear(16, 16), moe, nn.Linear(16, 16)

    def forward(self, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        x = self.before(x).relu()
        y, losses = self.moe(x)
        return self.after(x + y).relu(), losses


def _sharded(rank: int, world_size: int) -> list[str]:
    """What is wrong, in words."""
    found = []
    for case in ("shared, latent, biased groups", "limit in reach"):
        torch._dynamo.reset()
        counters.clear()
        block, twin = (Block(make_layer(**CASES[case]).shard_experts(dist.group.WORLD)) for _ in range(2))
        x = torch.randn(20 + 10 * rank, 16, generator=torch.Generator().manual_seed(rank))
        backend = CompileCounterWithBackend("aot_eager")
        actual, expected = step(torch.compile(block, backend=backend), block, x), step(twin, twin, x)
        found += [
            f"{case}: {name} differs"
            for name in differences(actual, expected)
            # A tensor used in two graphs has its gradient added up in another order.
            if relative_error(actual[name], expected[name]) > 1e-6
        ]
        found += [
            f"{case}: {reason}" for reason in counters["graph_break"] if "flashfusemoe_ds: how many" not in reason
        ]
        if backend.frame_count < 2:
            found.append(f"{case}: nothing was compiled around the layer")
    return found


def test_experts_spread_over_ranks_break_the_graph_and_nothing_else() -> None:
    assert run_ranks(2, _sharded) == [[], []]


# ---- CUDA


@pytest.fixture
def syncs_raise() -> Iterator[None]:
    yield
    torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("recompute", [False, True])
def test_inductor_equals_eager_and_never_waits(recompute: bool, syncs_raise: None) -> None:
    settings = dict(
        d_model=256, ffn_dim=1024, num_experts=8, top_k=2, num_shared_experts=1, recompute_activations=recompute
    )
    layer, twin = (make_layer(**settings, **LOSSES).cuda().to(torch.bfloat16) for _ in range(2))
    compiled = torch.compile(layer, fullgraph=True)
    for num_tokens in (1000, 1000, 513, 300):  # the third compiles again, for any number of tokens
        x = torch.randn(num_tokens, 256, device="cuda", dtype=torch.bfloat16)
        actual, expected = step(compiled, layer, x), step(twin, twin, x)
        for name, value in expected.items():
            # The shared expert is fused by inductor, and rounds less often.
            assert relative_error(actual[name], value) < 2e-2, name
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    step(compiled, layer, x)
