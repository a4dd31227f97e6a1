# SPDX-License-Identifier: GPL-3.0-or-later
"""Recognises MLP experts, and maps one expert's own tensors to and from the stacked layout.

A user's expert is any module. It is fused only if it provably is an MLP that the kernels compute: its parameters are
those of two or three plain nn.Linear, and a copy of it with random weights agrees with one of the formulas on random
inputs of three magnitudes: in value, in evaluation and in training mode, and in the gradient of the input and of every
weight. Names decide nothing. Dropout that is on, a clamp, a layer norm, a detach, a LoRA wrapper: each fails the
comparison or the inventory, and the expert runs as it is.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flashfusemoe_ds.kernels.activation import ACTIVATIONS
from flashfusemoe_ds.kernels.reference import activate

# Inputs near 0, around the knee of every activation, and far beyond any clamp in use.
PROBE_SCALES = (0.3, 3.0, 100.0)
# float64 formulas agree to 1e-12; modules that cast to float32 inside to 1e-6; erf and tanh GELU differ by 1e-4.
PROBE_RTOL = 1e-5
# How one Linear may hold gate and up rows; the first is also the stacked parameters' own order.
PACKINGS = ("gate_up", "up_gate", "gate_up_interleaved", "up_gate_interleaved")
HOOKS = (
    "_forward_hooks",
    "_forward_pre_hooks",
    "_backward_hooks",
    "_backward_pre_hooks",
    "_state_dict_hooks",
    "_state_dict_pre_hooks",
    "_load_state_dict_pre_hooks",
    "_load_state_dict_post_hooks",
)


@dataclass(frozen=True)
class ExpertLayout:
    """How one expert's own Linears make up a row of the stacked parameters.

    Attributes:
        activation: name in kernels.activation.
        up: names of the Linears whose rows form the up-projection, in stacked order: (gate, up), or one that is plain
            or holds both.
        down: name of the down-projection.
        packing: order of the rows of a single gated Linear, one of PACKINGS.
        bias: whether the up-projection and the down-projection have biases.
        leaves: all tensor names of one expert, in its own order.
    """

    activation: str
    up: tuple[str, ...]
    down: str
    packing: str
    bias: tuple[bool, bool]
    leaves: tuple[str, ...]

    @property
    def gated(self) -> bool:
        return ACTIVATIONS[self.activation].gated

    @property
    def up_name(self) -> str:
        return "gate_up_proj" if self.gated else "up_proj"

    def sources(self) -> dict[str, tuple[str, ...]]:
        """Stacked parameter name -> the expert's own tensors it is made of."""
        parts = {self.up_name: tuple(f"{n}.weight" for n in self.up), "down_proj": (f"{self.down}.weight",)}
        if self.bias[0]:
            parts[f"{self.up_name}_bias"] = tuple(f"{n}.bias" for n in self.up)
        if self.bias[1]:
            parts["down_proj_bias"] = (f"{self.down}.bias",)
        return parts

    def stack(self, leaves: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """One expert's own tensors -> its slices of the stacked parameters."""
        out = {}
        for name, parts in self.sources().items():
            rows = torch.cat([leaves[p] for p in parts]) if len(parts) > 1 else leaves[parts[0]]
            out[name] = self._to_gate_up(rows) if name.startswith(self.up_name) else rows
        return out

    def unstack(self, stacked: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The inverse of `stack`, in the expert's own order. Views, but for packings other than "gate_up"."""
        own: dict[str, Tensor] = {}
        for name, parts in self.sources().items():
            rows = self._from_gate_up(stacked[name]) if name.startswith(self.up_name) else stacked[name]
            own.update(zip(parts, rows.chunk(len(parts)), strict=True))
        return {leaf: own[leaf] for leaf in self.leaves}

    def _to_gate_up(self, rows: Tensor) -> Tensor:
        if self.packing.endswith("_interleaved"):
            rows = torch.cat([rows[0::2], rows[1::2]])
        return torch.cat(rows.chunk(2)[::-1]) if self.packing.startswith("up_gate") else rows

    def _from_gate_up(self, rows: Tensor) -> Tensor:
        if self.packing.startswith("up_gate"):
            rows = torch.cat(rows.chunk(2)[::-1])
        if self.packing.endswith("_interleaved"):
            rows = torch.stack(rows.chunk(2), dim=1).flatten(0, 1)
        return rows

    def forward(self, leaves: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """What an expert of this layout computes, in plain PyTorch."""
        stacked = self.stack(leaves)
        h = F.linear(x, stacked[self.up_name], stacked.get(f"{self.up_name}_bias"))
        return F.linear(activate(h, self.activation), stacked["down_proj"], stacked.get("down_proj_bias"))


def recognise(experts: Sequence[nn.Module], hidden_size: int) -> tuple[ExpertLayout | None, str]:
    """The layout that all of these experts share, or None and why they cannot be fused."""
    expert = experts[0]
    if any(_structure(other) != _structure(expert) for other in experts[1:]):
        return None, "they differ in structure, or in which parameters are trained"
    linears = {name: m for name, m in expert.named_modules() if type(m) is nn.Linear}
    if len(linears) not in (2, 3):
        return None, f"one has {len(linears)} plain nn.Linear modules, not 2 or 3"
    owned = [id(p) for m in linears.values() for p in m.parameters()]
    everywhere = [id(p) for e in experts for p in e.parameters()]
    if {id(p) for p in expert.parameters()} != set(owned) or len(set(everywhere)) != len(owned) * len(experts):
        return None, "they have parameters outside their nn.Linear modules, or share them"
    if any(True for _ in expert.buffers()):
        return None, "one has buffers"
    if any(has_hooks(m) for e in experts for m in e.modules()) or any(
        p._backward_hooks or p._post_accumulate_grad_hooks for e in experts for p in e.parameters()
    ):
        return None, "one has hooks"
    if any(p.is_meta for e in experts for p in e.parameters()):
        return None, "their parameters are on the meta device"

    candidates = list(_candidates(linears, hidden_size, tuple(expert.state_dict())))
    if not candidates:
        return None, "the shapes of the nn.Linear modules are not those of an MLP, or only some of them are frozen"
    layout, reason = _match(expert, candidates, hidden_size)
    for other in experts[1:]:
        if layout is not None and not _same_settings(expert, other):
            layout, reason = _match(other, [layout], hidden_size)
    return layout, reason


def has_hooks(module: nn.Module) -> bool:
    """Whether anything is registered that a replacement of this module would not call."""
    return any(getattr(module, name, None) for name in HOOKS)


def _structure(expert: nn.Module) -> tuple[object, ...]:
    """What must be equal for two experts to be rows of one stacked parameter."""
    modules = tuple((name, type(m)) for name, m in expert.named_modules())
    return modules, tuple((name, p.shape, p.dtype, p.requires_grad) for name, p in expert.named_parameters())


def _same_settings(a: nn.Module, b: nn.Module) -> bool:
    """Whether two experts of one structure provably compute alike: all their own attributes are equal."""
    internal = vars(nn.Module()).keys() - {"training"}

    def plain(module: nn.Module) -> list[dict[str, object]]:
        return [{k: v for k, v in vars(m).items() if k not in internal} for m in module.modules()]

    try:
        return bool(plain(a) == plain(b))
    except Exception:  # attributes of any type: arrays and the like do not compare to a bool
        return False


def _candidates(linears: Mapping[str, nn.Linear], hidden_size: int, leaves: tuple[str, ...]) -> Iterator[ExpertLayout]:
    for *ups, down in itertools.permutations(linears):
        first, last = linears[ups[0]], linears[down]
        # What is stacked into one parameter must agree in shape, in having a bias, and in being trained.
        kinds = {tuple((name, p.shape, p.requires_grad) for name, p in linears[n].named_parameters()) for n in ups}
        if len(kinds) > 1:
            continue
        if first.in_features != hidden_size or last.out_features != hidden_size:
            continue
        ratio, remainder = divmod(first.out_features * len(ups), last.in_features)
        if remainder or ratio not in (1, 2):
            continue
        bias = (first.bias is not None, last.bias is not None)
        packings = PACKINGS if len(ups) == 1 and ratio == 2 else PACKINGS[:1]
        for activation, packing in itertools.product(ACTIVATIONS.values(), packings):
            if activation.gated == (ratio == 2):
                yield ExpertLayout(activation.name, tuple(ups), down, packing, bias, leaves)


@dataclass(frozen=True)
class _Probe:
    """What a float64 copy of an expert computed: tensors by name, input, output, and the gradients of both."""

    leaves: dict[str, Tensor]
    x: Tensor
    y: Tensor
    grads: tuple[Tensor | None, ...]


def _match(expert: nn.Module, candidates: Sequence[ExpertLayout], hidden_size: int) -> tuple[ExpertLayout | None, str]:
    """The candidate that the expert computes, or None and why there is none."""
    try:
        probe = _probe(expert, hidden_size)
    except Exception as error:  # a user's module may raise anything; then it just runs as it is
        return None, f"one does not run on a small float64 input on the CPU ({type(error).__name__}: {error})"
    if probe is None:
        return None, "one computes differently in training and in evaluation"
    for layout in candidates:
        with torch.no_grad():
            same = _near(probe.y, layout.forward(probe.leaves, probe.x))
        if same and _same_gradients(layout, probe):
            return layout, "recognised"
        if same:
            return None, "one has gradients other than its formula's"
    return None, "the output differs from every activation that can be fused"


def _probe(expert: nn.Module, hidden_size: int) -> _Probe | None:
    """Runs a float64 copy with random weights on the CPU. None if its output depends on the mode."""
    generator = torch.Generator().manual_seed(0)
    # The module may draw random numbers (dropout): the caller's generator must not notice. Nor may a default device
    # or a surrounding no_grad reach in here.
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.inference_mode(False), torch.enable_grad():
        scale = torch.tensor(PROBE_SCALES, dtype=torch.float64).repeat_interleave(3)
        x = torch.randn(len(scale), hidden_size, generator=generator, dtype=torch.float64) * scale[:, None]
        clone = copy.deepcopy(expert).to(device="cpu", dtype=torch.float64).requires_grad_(True)
        with torch.no_grad():
            for param in clone.parameters():
                # Uniform of variance 1 / fan_in: wide experts have 10^8 weights, and normal draws cost ten times more.
                bound = (3 / (param.shape[-1] if param.dim() > 1 else 1)) ** 0.5
                param.uniform_(-bound, bound, generator=generator)
            evaluated = _run(clone.eval(), x)
        y = _run(clone.train(), x.requires_grad_())
        leaves = dict(clone.named_parameters())
        grads = torch.autograd.grad(y, [x, *leaves.values()], _direction(y), allow_unused=True)
        return _Probe(leaves, x, y.detach(), grads) if _near(y.detach(), evaluated) else None


def _run(expert: nn.Module, x: Tensor) -> Tensor:
    out = expert(x.view(1, 1, *x.shape))
    return (out[0] if isinstance(out, tuple) else out).reshape(len(x), -1).double()


def _direction(y: Tensor) -> Tensor:
    return torch.linspace(-1, 1, y.numel(), dtype=y.dtype, device=y.device).view_as(y)


def _same_gradients(layout: ExpertLayout, probe: _Probe) -> bool:
    with torch.inference_mode(False), torch.enable_grad():
        y = layout.forward(probe.leaves, probe.x)
        expected = torch.autograd.grad(y, [probe.x, *probe.leaves.values()], _direction(y))
    return all(
        a is not None and bool((a - b).abs().max() <= PROBE_RTOL * b.abs().max())
        for a, b in zip(probe.grads, expected, strict=True)
    )


def _near(y: Tensor, expected: Tensor) -> bool:
    """Row by row, so that the rows of large magnitude do not hide the others."""
    if y.shape != expected.shape:
        return False
    return bool(((y - expected).abs().amax(1) <= PROBE_RTOL * expected.abs().amax(1)).all())
