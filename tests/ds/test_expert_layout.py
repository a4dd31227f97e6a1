# SPDX-License-Identifier: GPL-3.0-or-later
"""Which expert modules are fused, which are not, and that both directions of the layout are inverse."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from flashfusemoe_ds.ds import expert_layout
from flashfusemoe_ds.ds.expert_layout import _match as match
from flashfusemoe_ds.ds.expert_layout import recognise

D, I = 6, 10


class Gated(nn.Module):
    """Names that say the opposite of what they are, so that nothing can go by names."""

    def __init__(self, act=F.silu, bias: bool = False) -> None:
        super().__init__()
        self.up = nn.Linear(I, D, bias=bias)  # the down-projection
        self.down = nn.Linear(D, I, bias=bias)  # the gate
        self.gate = nn.Linear(D, I, bias=bias)  # the up-projection
        self.act = act

    def forward(self, x):
        return self.up(self.act(self.down(x)) * self.gate(x))


class Packed(nn.Module):
    def __init__(self, split, act=F.silu) -> None:
        super().__init__()
        self.wi, self.wo, self.split, self.act = nn.Linear(D, 2 * I), nn.Linear(I, D), split, act

    def forward(self, x):
        gate, up = self.split(self.wi(x))
        return self.wo(self.act(gate) * up), None  # a tuple, as Megatron's MLPs return


class Sequential(nn.Module):
    """Linear, something, Linear."""

    def __init__(self, middle, bias: bool = True) -> None:
        super().__init__()
        self.a, self.b, self.middle = nn.Linear(D, I, bias=bias), nn.Linear(I, D, bias=bias), middle

    def forward(self, x):
        return self.b(self.middle(self.a(x)))


class Scaled(Sequential):
    def __init__(self) -> None:
        super().__init__(F.relu)
        self.register_buffer("scale", torch.ones(1))


class Residual(Sequential):
    def forward(self, x):
        return x + super().forward(x)


def quick_gelu(x):
    return x * torch.sigmoid(1.702 * x)


FUSED = {
    "gelu": (lambda: Sequential(F.gelu), "gelu", ("a",), "gate_up"),
    "gelu, tanh": (lambda: Sequential(nn.GELU(approximate="tanh")), "gelu_tanh", ("a",), "gate_up"),
    "relu": (lambda: Sequential(nn.ReLU(), bias=False), "relu", ("a",), "gate_up"),
    "silu": (lambda: Sequential(nn.SiLU()), "silu", ("a",), "gate_up"),
    "dropout off": (lambda: Sequential(nn.Sequential(nn.GELU(), nn.Dropout(0.0))), "gelu", ("a",), "gate_up"),
    "computes in float32": (lambda: Sequential(lambda h: F.gelu(h.float()).to(h.dtype)), "gelu", ("a",), "gate_up"),
    "swiglu": (lambda: Gated(), "swiglu", ("down", "gate"), "gate_up"),
    "swiglu, bias": (lambda: Gated(bias=True), "swiglu", ("down", "gate"), "gate_up"),
    "geglu": (lambda: Gated(F.gelu), "geglu", ("down", "gate"), "gate_up"),
    "reglu": (lambda: Gated(F.relu), "reglu", ("down", "gate"), "gate_up"),
    "relu squared": (lambda: Gated(lambda x: F.relu(x) ** 2), "relu_squared", ("down", "gate"), "gate_up"),
    "packed": (lambda: Packed(lambda h: h.chunk(2, -1)), "swiglu", ("wi",), "gate_up"),
    "packed, up first": (lambda: Packed(lambda h: h.chunk(2, -1)[::-1]), "swiglu", ("wi",), "up_gate"),
    "interleaved": (lambda: Packed(lambda h: (h[..., ::2], h[..., 1::2])), "swiglu", ("wi",), "gate_up_interleaved"),
    "interleaved, up first": (lambda: Packed(lambda h: (h[..., 1::2], h[..., ::2])), "swiglu", ("wi",),
                              "up_gate_interleaved"),
}  # fmt: skip


@pytest.mark.parametrize("name", FUSED)
def test_recognised(name: str) -> None:
    make, activation, up, packing = FUSED[name]
    torch.manual_seed(0)
    expert = make()
    before = torch.get_rng_state()
    layout, reason = recognise([expert], D)
    assert layout is not None, reason
    assert (layout.activation, layout.up, layout.packing) == (activation, up, packing)
    assert torch.equal(torch.get_rng_state(), before), "the probe drew from the user's generator"
    assert expert.training and next(expert.parameters()).dtype is torch.float32
    leaves = {n: p.detach() for n, p in expert.named_parameters()}
    back = layout.unstack(layout.stack(leaves))
    assert list(back) == list(leaves) and all(torch.equal(back[n], leaves[n]) for n in leaves)


def with_hook() -> nn.Module:
    expert = Sequential(F.gelu)
    expert.a.register_forward_hook(lambda *_: None)
    return expert


def tied() -> nn.Module:
    expert = Gated()
    expert.gate.weight = expert.down.weight
    return expert


def half_frozen() -> nn.Module:
    expert = Gated()
    expert.down.weight.requires_grad_(False)
    return expert


NOT_FUSED = {
    "dropout on": (lambda: Sequential(nn.Sequential(nn.GELU(), nn.Dropout(0.1))), "in training and in evaluation"),
    "quick gelu": (lambda: Sequential(quick_gelu), "differs from every activation"),
    "clamp at 50": (lambda: Sequential(lambda h: F.silu(h).clamp(max=50)), "differs from every activation"),
    "residual inside": (lambda: Residual(F.gelu), "differs from every activation"),
    "tanh": (lambda: Sequential(torch.tanh), "differs from every activation"),
    "layer norm": (lambda: nn.Sequential(nn.LayerNorm(D), Sequential(F.gelu)), "parameters outside"),
    "buffer": (Scaled, "one has buffers"),
    "hook": (with_hook, "one has hooks"),
    "shared weight": (tied, "or share them"),
    "half frozen": (half_frozen, "only some of them are frozen"),
    "one linear": (lambda: nn.Linear(D, D), "one has 1 plain nn.Linear"),
    "shapes": (lambda: nn.Sequential(nn.Linear(D, 5), nn.Linear(7, D)), "shapes"),
    "raises": (lambda: nn.Sequential(nn.Linear(D, I), nn.Flatten(0, 5), nn.Linear(I, D)), "does not run on a small"),
    "meta": (lambda: Sequential(F.gelu).to("meta"), "meta device"),
}


@pytest.mark.parametrize("name", NOT_FUSED)
def test_left_alone(name: str) -> None:
    make, why = NOT_FUSED[name]
    layout, reason = recognise([make()], D)
    assert layout is None and why in reason


class Detached(Sequential):
    def forward(self, x):
        return super().forward(0.1 * x + 0.9 * x.detach())


class NoGradUp(Sequential):
    def forward(self, x):
        with torch.no_grad():
            h = self.a(x)
        return self.b(self.middle(h))


class DetachedWeight(Sequential):
    """The gradient of the input is right, that of a weight is not."""

    def forward(self, x):
        weight = self.b.weight
        return F.linear(self.middle(self.a(x)), 0.5 * weight + 0.5 * weight.detach(), self.b.bias)


class TenfoldGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        return 10 * grad


@pytest.mark.parametrize(
    "expert",
    [
        Detached(F.gelu),
        NoGradUp(F.gelu),
        DetachedWeight(F.gelu),
        Sequential(lambda h: TenfoldGradient.apply(F.gelu(h))),
    ],
)
def test_gradients_count_too(expert: nn.Module) -> None:
    layout, reason = recognise([expert], D)
    assert layout is None and ("gradients other than" in reason or "does not run" in reason)


@pytest.mark.parametrize("surroundings", [torch.device("meta"), torch.no_grad(), torch.inference_mode()])
def test_the_surroundings_do_not_matter(surroundings) -> None:
    expert = Sequential(F.gelu)
    with surroundings:
        assert recognise([expert], D)[0] is not None


def test_experts_that_differ_in_a_setting_are_left_alone() -> None:
    experts = [Sequential(F.gelu), Sequential(F.gelu)]
    assert recognise(experts, D)[0] is not None
    experts[1].middle = F.relu
    assert recognise(experts, D)[0] is None
    experts = [Sequential(nn.GELU()), Sequential(nn.GELU(approximate="tanh"))]
    assert recognise(experts, D)[0] is None
    experts = [Sequential(nn.GELU()), Sequential(nn.GELU())]
    experts[0].config, experts[1].config = object(), object()  # equal or not, one cannot tell: it is run
    assert recognise(experts, D)[0] is not None


def test_equal_settings_are_not_run_again(monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    monkeypatch.setattr(expert_layout, "_match", lambda *args: (runs.append(1), match(*args))[1])
    recognise([Sequential(nn.GELU()) for _ in range(8)], D)
    assert len(runs) == 1


def test_experts_that_share_a_linear_are_left_alone() -> None:
    experts = [Sequential(F.gelu), Sequential(F.gelu)]
    experts[1].a = experts[0].a
    layout, reason = recognise(experts, D)
    assert layout is None and "or share them" in reason


@pytest.mark.parametrize("hook", ["register_full_backward_pre_hook", "register_full_backward_hook",
                                  "register_forward_pre_hook"])  # fmt: skip
def test_every_kind_of_hook_counts(hook: str) -> None:
    expert = Sequential(F.gelu)
    getattr(expert.a, hook)(lambda *_: None)
    assert recognise([expert], D) == (None, "one has hooks")
    expert = Sequential(F.gelu)
    expert.a.weight.register_hook(lambda grad: grad)
    assert recognise([expert], D) == (None, "one has hooks")
    expert = Sequential(F.gelu)
    expert.a.weight.register_post_accumulate_grad_hook(lambda param: None)
    assert recognise([expert], D) == (None, "one has hooks")


def test_experts_that_differ_are_left_alone() -> None:
    frozen = Sequential(F.gelu).requires_grad_(False)
    for odd in (Gated(), Sequential(F.gelu, bias=False), Sequential(F.gelu).double(), frozen):
        layout, reason = recognise([Sequential(F.gelu), odd], D)
        assert layout is None and "differ in structure, or in which parameters are trained" in reason
    assert recognise([frozen, copy.deepcopy(frozen)], D)[0] is not None


def test_another_hidden_size_is_no_mlp() -> None:
    assert recognise([Sequential(F.gelu)], D + 1)[0] is None
