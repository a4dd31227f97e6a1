# SPDX-License-Identifier: GPL-3.0-or-later
"""MoELayer and fused_moe against a dense float64 layer made of the reference's pieces; limits; initialisation."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from flashfusemoe_ds import Gating, MoELayer, fused_moe
from flashfusemoe_ds.kernels import dense_mlp, reference
from flashfusemoe_ds.nn import functional
from flashfusemoe_ds.nn.router import route
from tests.close import relative_error
from tests.kept import is_a_copy_of_weights, kept_for_backward
from tests.kernels.test_order import DEVICE

WIDE = Gating(score="sigmoid", renormalize=True, scaling_factor=1.5, num_groups=4, top_groups=2, expert_bias=True)


def make_layer(**changes) -> MoELayer:
    torch.manual_seed(0)
    settings = dict(d_model=16, ffn_dim=24, num_experts=8, top_k=2, aux_loss_coeff=0.1, z_loss_coeff=0.01)
    layer = MoELayer(**{**settings, **changes}).double()
    with torch.no_grad():
        layer.router.weight.mul_(100)  # as initialised, all logits are nearly equal
    return layer


def dense_forward(layer: MoELayer, x: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The same layer with every expert on every token."""
    flat, activation = x.reshape(-1, layer.d_model), layer.experts.activation.name
    logits = flat @ layer.router.weight.T
    bias = layer.router.expert_bias if layer.router.gating.expert_bias else None
    idx, weight, probs = route(logits, layer.router.gating, layer.top_k, bias)
    rows = flat if layer.latent_down is None else flat @ layer.latent_down.weight.T
    up = getattr(layer.experts, layer.experts.up_name)
    y = reference.experts(rows, idx, weight, up, layer.experts.down_proj, activation)
    if layer.latent_up is not None:
        y = y @ layer.latent_up.weight.T
    if layer.shared_experts is not None:
        shared = layer.shared_experts
        for w_up, w_down in zip(getattr(shared, shared.up_name), shared.down_proj, strict=True):
            y = y + reference.activate(flat @ w_up.T, activation) @ w_down.T
    losses = {
        "aux_loss": layer.router.aux_loss_coeff * reference.switch_aux_loss(probs, idx),
        "z_loss": layer.router.z_loss_coeff * reference.z_loss(logits),
    }
    return y.reshape(x.shape), losses


CASES = {
    "plain": {},
    "gelu": {"activation": "gelu"},
    "recompute": {"recompute_activations": True},
    "shared": {"num_shared_experts": 1},
    "two shared, plain": {"num_shared_experts": 2, "activation": "relu"},
    "shared, limit out of reach": {"num_shared_experts": 1, "max_tokens_per_expert": 1000},
    "latent": {"latent_dim": 8},
    "all of it": {"latent_dim": 8, "num_shared_experts": 2, "gating": WIDE, "top_k": 3, "activation": "geglu"},
    "one expert": {"num_experts": 1, "top_k": 1},
    "every expert": {"top_k": 8},
}


@pytest.mark.parametrize("shape", [(5, 7, 16), (3, 16), (0, 16), (2, 1, 3, 16)])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_dense_layer(case: str, shape: tuple[int, ...]) -> None:
    layer = make_layer(**CASES[case])
    x = torch.randn(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    direction = torch.randn(shape, dtype=torch.float64)
    results = []
    for fn in (layer, lambda t: dense_forward(layer, t)):
        leaf = x.clone().requires_grad_()
        out, losses = fn(leaf)
        layer.zero_grad()
        total = (out * direction).sum() + (sum(losses.values()) if x.numel() else 0)
        total.backward()
        grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in layer.parameters()]
        results.append([out.detach(), *(losses.values() if x.numel() else ()), leaf.grad, *grads])
        assert x.numel() == 0 or set(losses) == {"aux_loss", "z_loss"}
    for a, b in zip(*results, strict=True):
        assert relative_error(a, b) < 1e-12


def test_fused_moe_equals_the_layer() -> None:
    layer = make_layer(gating="softmax_renorm")
    x = torch.randn(4, 5, 16, dtype=torch.float64)
    out, losses = fused_moe(
        x, layer.router.weight, layer.experts.gate_up_proj, layer.experts.down_proj, top_k=2, gating="softmax_renorm",
        aux_loss_coeff=0.1, z_loss_coeff=0.01,
    )  # fmt: skip
    expected, expected_losses = layer(x)
    assert torch.equal(out, expected)
    assert {k: v.item() for k, v in losses.items()} == {k: v.item() for k, v in expected_losses.items()}


def test_fused_moe_under_autocast() -> None:
    """The experts in bf16, the router in float32, as in the layer."""
    layer = make_layer(gating="softmax_renorm").float()
    x = torch.randn(64, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        expected, expected_losses = layer(x)
        out, losses = fused_moe(
            x, layer.router.weight, layer.experts.gate_up_proj, layer.experts.down_proj, top_k=2,
            gating="softmax_renorm", aux_loss_coeff=0.1, z_loss_coeff=0.01,
        )  # fmt: skip
    assert out.dtype is torch.bfloat16 and torch.equal(out, expected)
    assert losses["z_loss"].item() == expected_losses["z_loss"].item()


def test_autocast_leaves_float64_alone() -> None:
    layer, x = make_layer(), torch.randn(8, 16, dtype=torch.float64)
    expected, _ = layer(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out, _ = layer(x)
    assert torch.equal(out, expected)


def test_losses_are_absent_without_a_coefficient() -> None:
    assert make_layer(aux_loss_coeff=0.0, z_loss_coeff=0.0)(torch.randn(3, 16, dtype=torch.float64))[1] == {}


def test_nothing_is_dropped_without_a_limit() -> None:
    layer = make_layer(top_k=1, aux_loss_coeff=0.0, z_loss_coeff=0.0)
    x = torch.rand(64, 16, dtype=torch.float64)
    with torch.no_grad():
        layer.router.weight.fill_(-1.0)[3] = 1.0  # every token to expert 3
    out, _ = layer(x)
    w_up, w_down = layer.experts.gate_up_proj[3], layer.experts.down_proj[3]
    assert relative_error(out, reference.activate(x @ w_up.T, "swiglu") @ w_down.T) < 1e-12


@pytest.mark.parametrize(
    ("limit", "allowed"), [({"max_tokens_per_expert": 5}, 5), ({"capacity_factor": 0.625}, 5),
                           ({"max_tokens_per_expert": 5, "capacity_factor": 2.0}, 5)]
)  # fmt: skip
def test_overflow_raises_or_drops_the_smallest_weights(limit: dict, allowed: int) -> None:
    x = torch.rand(64, 16, dtype=torch.float64)  # 64 tokens, 8 experts, top-1: 8 per expert if balanced
    strict = make_layer(top_k=1, gating="softmax", **limit)
    with torch.no_grad():
        strict.router.weight.fill_(-1.0)[3] = 1.0
    with pytest.raises(
        RuntimeError, match=rf"expert 3 was chosen 64 times on one rank, where its limit is {allowed} "
    ):
        strict(x)

    lenient = make_layer(top_k=1, gating="softmax", allow_dropped_tokens=True, **limit)
    lenient.load_state_dict(strict.state_dict())
    out, _ = lenient(x)
    kept = out.abs().sum(1) > 0
    weight = F.softmax(x @ strict.router.weight.T, 1)[:, 3]
    assert kept.sum() == allowed
    assert set(kept.nonzero()[:, 0].tolist()) == set(weight.topk(allowed)[1].tolist())


def test_capacity_covers_all_k_routes() -> None:
    """ceil(T * K / E * factor): with factor 1 and perfectly balanced routing nothing overflows at any K."""
    layer = make_layer(num_experts=4, top_k=4, capacity_factor=1.0, d_model=16)
    layer(torch.randn(10, 16, dtype=torch.float64))


def test_capacity_is_exact() -> None:
    """ceil(100 * 1.1 / 10) is 11; in floating point 100 * 1.1 is a little over 110."""
    layer = make_layer(num_experts=10, top_k=1, capacity_factor=1.1, allow_dropped_tokens=True)
    with torch.no_grad():
        layer.router.weight.fill_(-1.0)[3] = 1.0
    out, _ = layer(torch.rand(100, 16, dtype=torch.float64))
    assert (out.abs().sum(1) > 0).sum() == 11


def test_a_huge_limit_is_no_limit() -> None:
    make_layer(max_tokens_per_expert=3 * 10**9)(torch.randn(4, 16, dtype=torch.float64))


def test_materialising_from_meta() -> None:
    with torch.device("meta"):
        layer = MoELayer(16, 24, 8, 2, gating=Gating(expert_bias=True))
    layer.to_empty(device="cpu")
    assert layer.router.expert_bias.dtype is torch.float32 and layer.router.expert_bias.device.type == "cpu"


def test_backward_inside_autocast_is_the_same() -> None:
    layer = make_layer().float()
    x = torch.randn(32, 16)
    grads = []
    for inside in (False, True):
        layer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = layer(x)[0].float().sin().sum()
            if inside:
                loss.backward()
        if not inside:
            loss.backward()
        grads.append([p.grad.clone() for p in layer.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_initialisation() -> None:
    torch.manual_seed(0)
    layer = MoELayer(64, 256, 8, 2, num_shared_experts=2)
    # kaiming_uniform(a=sqrt(5)) has bound 1/sqrt(fan_in), and each expert's own fan-in: D for up, F for down.
    for weight, bound in (
        (layer.router.weight, 0.01 / 8),
        (layer.experts.gate_up_proj, 1 / 8),
        (layer.experts.down_proj, 1 / math.sqrt(128)),
        (layer.shared_experts.gate_up_proj, 1 / 8),
    ):
        assert 0.95 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    assert not torch.equal(layer.experts.gate_up_proj[0], layer.experts.gate_up_proj[1])


def test_bf16_and_autocast() -> None:
    layer = make_layer(num_shared_experts=1)
    x = torch.randn(32, 16, dtype=torch.float64)
    expected, _ = layer(x)
    half, _ = copy.deepcopy(layer).bfloat16()(x.bfloat16())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        auto, losses = copy.deepcopy(layer).float()(x.float())
    assert half.dtype is torch.bfloat16 and auto.dtype is torch.bfloat16
    assert losses["z_loss"].dtype is torch.float32
    # bf16 has 8 bits; the router's float32 keeps the choice of experts, so only rounding differs.
    assert relative_error(half, expected) < 2e-2
    assert relative_error(auto, expected) < 2e-2


@pytest.mark.parametrize("recompute", [False, True])
def test_casts_of_weights_are_not_kept(recompute: bool) -> None:
    """Under autocast the backward casts again; its gradients are those of weights that were cast beforehand."""
    layer = make_layer(num_shared_experts=1, recompute_activations=recompute).float()
    half, x = copy.deepcopy(layer), torch.randn(30, 16)
    for part in (half.experts, half.shared_experts):
        part.bfloat16()
    results = []
    for which in (layer, half):
        with kept_for_backward() as kept, torch.autocast("cpu", dtype=torch.bfloat16):
            out = which(x)[0]
        assert not [t.shape for t in kept if is_a_copy_of_weights(t, which)]
        out.float().sin().sum().backward()
        results.append([out, *(p.grad for p in which.parameters())])
    assert all(p.grad.dtype is torch.float32 for p in layer.parameters())
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(*results, strict=True))


class _Merged(nn.Module):
    """A weight plus something trained, as LoRA has it."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.added, self.times = nn.Parameter(torch.zeros_like(weight)), 0

    def forward(self, weight: Tensor) -> Tensor:
        self.times += 1
        return weight + self.added


def merge_weights(layer: MoELayer) -> list[_Merged]:
    parts = [(layer.experts, "gate_up_proj"), (layer.experts, "down_proj")]
    parts += [(layer.shared_experts, "gate_up_proj"), (layer.shared_experts, "down_proj")]
    for part, name in parts:
        parametrize.register_parametrization(part, name, _Merged(getattr(part, name)))
    return [getattr(part.parametrizations, name)[0] for part, name in parts]


def test_computed_weights_are_computed_once() -> None:
    layer = make_layer(num_shared_experts=1)
    merged = merge_weights(layer)
    before = [m.times for m in merged]
    layer(torch.randn(30, 16, dtype=torch.float64))
    assert [m.times - b for m, b in zip(merged, before, strict=True)] == [1, 1, 1, 1]


@pytest.mark.parametrize("which", range(4))
def test_computed_weights_of_another_dtype_are_refused(which: int) -> None:
    layer = make_layer(num_shared_experts=1).float()
    with torch.no_grad():
        merged = merge_weights(layer)[which]
    merged.added = nn.Parameter(merged.added.double())
    with pytest.raises(ValueError, match="float64; cast one"):
        layer(torch.randn(30, 16))


def test_computed_weights_are_kept_as_their_casts() -> None:
    """A merged weight lives no longer than the graph: kept in 16 bit, not in the 32 of what it was computed from."""
    layer = make_layer(num_shared_experts=1).float()
    plain = copy.deepcopy(layer)
    merged = merge_weights(layer)
    x, grads = torch.randn(30, 16), []
    for which in (layer, plain):
        with kept_for_backward() as kept, torch.autocast("cpu", dtype=torch.bfloat16):
            out = which(x)[0]
        copies = {t.dtype for t in kept if is_a_copy_of_weights(t, which)}
        assert copies == ({torch.bfloat16} if which is layer else set())
        out.float().sin().sum().backward()
        grads.append([out])
    grads[0] += [m.added.grad for m in merged]
    grads[1] += [p.grad for part in (plain.experts, plain.shared_experts) for p in part.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("part", ["experts.gate_up_proj", "experts.down_proj", "shared_experts.down_proj"])
@pytest.mark.parametrize("autocast", [False, True])
def test_weights_of_another_dtype_are_refused(part: str, autocast: bool) -> None:
    layer = make_layer(num_shared_experts=1).float()
    module, name = part.split(".")
    setattr(getattr(layer, module), name, nn.Parameter(layer.get_parameter(part).double()))
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast), pytest.raises(ValueError, match="float64; cast one"):
        layer(torch.randn(32, 16))


@pytest.mark.parametrize("num", [1, 2])
def test_shared_experts_under_autocast(num: int) -> None:
    """Computed in bf16 with float32 parameters and gradients, the backward inside autocast or outside of it."""
    shared = make_layer(num_shared_experts=num).shared_experts
    x = torch.randn(32, 16, dtype=torch.float64)
    direction = torch.randn(32, 16, dtype=torch.float64)
    results = []
    for dtype, inside in ((torch.float64, False), (torch.float32, False), (torch.float32, True)):
        layer, leaf = copy.deepcopy(shared).to(dtype), x.to(dtype).requires_grad_()
        inputs = [leaf, *layer.parameters()]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = layer(leaf)
            if inside:
                grads = torch.autograd.grad(out, inputs, direction.to(out.dtype))
        if not inside:
            grads = torch.autograd.grad(out, inputs, direction.to(out.dtype))
        assert out.dtype is (dtype if dtype is torch.float64 else torch.bfloat16)
        assert all(grad.dtype is dtype for grad in grads)
        results.append([out, *grads])
    for exact, outside, within in zip(*results, strict=True):
        assert relative_error(outside, exact) < 2e-2 and torch.equal(outside, within)


def test_shared_experts_added_to_what_the_kernels_of_cuda_return(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place, to an output of the node of router and experts, twice; interpreted where there is no GPU."""
    layer = make_layer(num_shared_experts=2, gemm_backend="triton").float().to(DEVICE)
    exact = copy.deepcopy(layer).double()
    x = torch.randn(20, 16, dtype=torch.float64).to(DEVICE)
    monkeypatch.setattr(functional, "runs_fused", lambda x_TD, *_: x_TD.dtype is torch.float32)
    monkeypatch.setattr(dense_mlp, "_runs_fused", lambda h: h.dtype is torch.float32)
    results = []
    for fn, leaf in ((layer, x.float()), (lambda t: dense_forward(exact, t), x)):
        out, losses = fn(leaf.requires_grad_())
        inputs = [leaf, *(layer if fn is layer else exact).parameters()]
        total = out.sin().sum() + sum(losses.values())
        first = torch.autograd.grad(total, inputs, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(first, torch.autograd.grad(total, inputs), strict=True))
        results.append([out, *first])
    assert results[0][0].grad_fn.name() == "_DenseMLPBackward"
    for actual, expected in zip(*results, strict=True):
        assert relative_error(actual, expected) < 1e-5


@pytest.mark.parametrize("options", [{}, {"latent_dim": 8}, {"capacity_factor": 2.0, "allow_dropped_tokens": True}])
def test_hooks_beside_shared_experts_see_what_modules_return(options: dict[str, Any]) -> None:
    """Backward hooks make a module's inputs views; forward hooks may keep its outputs."""
    layer = make_layer(num_shared_experts=1, **options)
    x = torch.randn(12, 16, dtype=torch.float64)

    def gradients() -> list[Tensor]:
        leaf = x.clone().requires_grad_()
        return list(torch.autograd.grad(layer(leaf)[0].sin().sum(), [leaf, *layer.parameters()]))

    expected, kept = gradients(), []

    def keep(module: nn.Module, inputs: Any, out: Any) -> None:
        kept.extend(
            (t, t.detach().clone()) for t in (out if isinstance(out, tuple) else (out,)) if isinstance(t, Tensor)
        )

    for module in layer.modules():
        module.register_full_backward_hook(lambda *_: None)
        module.register_forward_hook(keep)
    for a, b in zip(gradients(), expected, strict=True):
        assert relative_error(a, b) < 1e-13
    assert kept and all(torch.equal(t, value) for t, value in kept)


def test_frozen_experts_get_no_gradient_and_the_rest_does() -> None:
    layer = make_layer()
    for p in layer.expert_params:
        p.requires_grad_(False)
    x = torch.randn(8, 16, dtype=torch.float64, requires_grad=True)
    layer(x)[0].sum().backward()
    assert all(p.grad is None for p in layer.expert_params)
    assert torch.count_nonzero(x.grad) and torch.count_nonzero(layer.router.weight.grad)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_broken_input_reaches_the_output_and_nothing_else(bad: float) -> None:
    layer = make_layer()
    x = torch.randn(8, 16, dtype=torch.float64)
    x[2, 3] = bad
    out, _ = layer(x)
    assert not torch.isfinite(out[2]).all()
    assert torch.isfinite(out[[0, 1, 3, 4, 5, 6, 7]]).all()


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing(reentrant: bool) -> None:
    layer = make_layer(num_shared_experts=1)
    x = torch.randn(12, 16, dtype=torch.float64)
    grads = []

    def flat(t: Tensor) -> tuple[Tensor, ...]:
        # Reentrant checkpointing carries gradients of tensors in a tuple alone, not of those inside a dict.
        out, losses = layer(t)
        return (out, *losses.values())

    for run in (flat, lambda t: torch.utils.checkpoint.checkpoint(flat, t, use_reentrant=reentrant)):
        leaf = x.clone().requires_grad_()
        layer.zero_grad()
        out, *losses = run(leaf)
        (out.sin().sum() + sum(losses)).backward()
        grads.append([leaf.grad, *(p.grad.clone() for p in layer.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_it_trains() -> None:
    torch.manual_seed(0)
    layer, teacher = MoELayer(8, 32, 4, 2, aux_loss_coeff=0.01), nn.Linear(8, 8)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    x = torch.randn(256, 8)
    target = teacher(x).detach()
    history = []
    for _ in range(100):
        out, losses = layer(x)
        loss = F.mse_loss(out, target)
        optimizer.zero_grad()
        (loss + losses["aux_loss"]).backward()
        optimizer.step()
        history.append(loss.item())
    assert history[-1] < 0.1 * history[0]
