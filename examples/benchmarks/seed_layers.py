# SPDX-License-Identifier: GPL-3.0-or-later
"""The MoE layers that `seed_lm.py` trains the seed's model with, each built by the code of the layer benchmarks.

What surrounds a layer is the same for all: attention, norms, and the cast of the layer's input to autocast's dtype. So
is the shared expert, in plain PyTorch, but for layers that compute it themselves: ours, and FlashFusedMoE's between
ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import deepspeed_layers
import ep_layers
import layers
import torch
import triton_layers
from layers import Bench, Layer
from ranks import Ranks
from seed_model import SeedConfig, SeedLM, make_model, moe_weights
from shapes import Shape
from torch import Tensor, nn
from weights import Weights

CALIBRATIONS = 3  # random inputs that FlashFusedMoE's own benchmark sizes its buffers by


@dataclass(frozen=True)
class Variant:
    """One way to train the model.

    Attributes:
        build: the layer.
        compiled: torch.compile around the whole model.
        rival: "stock" or "flashfusedmoe", in whose multiples the others are given.
    """

    title: str
    build: Callable[[Bench], Layer]
    compiled: bool = False
    ours: bool = False
    cuda_only: bool = False
    rival: str = ""


class Transport(NamedTuple):
    """Our transport between ranks: "symm_mem:2" has room for twice the mean of routes, so that no host waits, and
    "nccl+again" sends rows again in the backward instead of keeping what was received (recompute_dispatch)."""

    ep_backend: str
    capacity_factor: float | None
    again: bool


def transport(name: str) -> Transport:
    """Reads a name of one.

    Raises:
        ValueError: another transport than symm_mem with room, or room that is no positive number.
    """
    whole, again = name.removesuffix("+again"), name.endswith("+again")
    ep_backend, colon, room = whole.partition(":")
    if not colon:
        return Transport(ep_backend, None, again)
    try:
        capacity_factor = float(room)
    except ValueError:
        capacity_factor = 0.0
    if ep_backend != "symm_mem" or not capacity_factor > 0:
        raise ValueError(f"--ep_backend {name}: only symm_mem takes a capacity_factor, a positive number: symm_mem:2")
    return Transport(ep_backend, capacity_factor, again)


def ours(bench: Bench, ep_backend: str) -> Layer:
    if bench.group is None:
        return layers.ours(bench)
    name, capacity_factor, again = transport(ep_backend)
    return ep_layers.ours(bench, name, capacity_factor=capacity_factor, recompute_dispatch=again)


def variants(ep_backends: Sequence[str] = ("nccl",)) -> dict[str, Variant]:
    """By key; the first of `ep_backends` is our transport between expert-parallel ranks, others get rows of their
    own."""
    own = [partial(ours, ep_backend=name) for name in ep_backends]
    flash = partial(triton_layers.flashfusedmoe, calibrated=True)
    return {
        "stock": Variant("deepspeed MoE", partial(deepspeed_layers.stock, drop=False), rival="stock"),
        "autoep": Variant("DeepSpeed AutoEP", deepspeed_layers.autoep_parallel),
        "flashfusedmoe": Variant("FlashFusedMoE", flash, cuda_only=True, rival="flashfusedmoe"),
        "flashfusedmoe-compile": Variant(
            "FlashFusedMoE, torch.compile", flash, compiled=True, cuda_only=True, rival="flashfusedmoe"
        ),
        "ours": Variant("flashfusemoe_ds", own[0], ours=True),
        "ours-compile": Variant("flashfusemoe_ds, torch.compile", own[0], compiled=True, ours=True),
        **{
            f"ours-{name}": Variant(f"flashfusemoe_ds, {name}", build, ours=True)
            for name, build in zip(ep_backends[1:], own[1:], strict=True)
        },
    }


class RoutedLayer(nn.Module):
    """A layer of the benchmarks as a module with the interface of deepspeed.moe.layer.MoE; no auxiliary loss, no
    counts."""

    def __init__(self, layer: Layer, top_k: int) -> None:
        super().__init__()
        assert layer.parts is not None, "a layer that cannot be trained"
        self.run, self.note, self.parts, self.top_k = layer.run, layer.note, layer.parts, top_k
        self.brings_shared_expert = layer.parts.shared is not None
        self.weights = nn.ParameterList(layer.parameters)
        for param in self.parts.experts:
            param.allreduce = False  # as DeepSpeed marks what must not be averaged over all ranks

    def forward(self, x_BSD: Tensor) -> tuple[Tensor, None, None]:
        device = x_BSD.device.type
        if torch.is_autocast_enabled(device):
            x_BSD = x_BSD.to(torch.get_autocast_dtype(device))
        return self.run(x_BSD.flatten(0, 1)).view_as(x_BSD), None, None


def build_model(
    variant: Variant,
    cfg: SeedConfig,
    seed: int,
    batch: int,
    device: torch.device,
    dtype: torch.dtype,
    ep_group: Any,
    ranks: Ranks,
) -> SeedLM:
    """The model around this variant's layers, its parameters in `dtype`. Collective.

    Args:
        batch: sequences per rank and step.
        ep_group: the ranks that share the experts.
        ranks: to meet before a layer's first collective.
    """
    shape = Shape("seed", batch * cfg.context, cfg.hidden_size, cfg.expert_size, cfg.num_experts, cfg.top_k)
    group = ep_group if cfg.ep_size > 1 else None

    def make_moe(block: int) -> RoutedLayer:
        weights = moe_weights(cfg, block, seed, device, dtype)
        load = fullest_expert(weights, shape, seed + block)
        bench = Bench(shape, weights, dtype, device, load, "off", group, ranks.meet)
        return RoutedLayer(variant.build(bench), cfg.top_k)

    ep_rank = 0 if group is None else torch.distributed.get_rank(group)
    return make_model(cfg, seed, ep_rank, device, dtype, make_moe)


def fullest_expert(weights: Weights, shape: Shape, seed: int) -> int:
    """Most routes of one expert for a few random inputs, as FlashFusedMoE's benchmark looks for them."""
    generator = torch.Generator(weights.gate.device).manual_seed(seed)
    most = 0
    for _ in range(CALIBRATIONS):
        x_TD = torch.randn(shape.T, shape.D, device=weights.gate.device, generator=generator).to(weights.gate.dtype)
        most = max(most, int(_load(x_TD, weights.gate, shape.K).max()))
    return most


def routed_layers(model: nn.Module) -> list[RoutedLayer]:
    return [module for module in model.modules() if isinstance(module, RoutedLayer)]


@torch.no_grad()
def expert_loads(model: nn.Module, forward: Callable[[], object]) -> Tensor:
    """int64 [L, E]: routes of this rank's tokens to each expert of each layer, by the layers' own gates."""
    loads: list[Tensor] = []

    def count(layer: RoutedLayer, inputs: tuple[Tensor]) -> None:
        gate = layer.parts.router
        loads.append(_load(inputs[0].flatten(0, 1).to(gate.dtype), gate, layer.top_k))

    hooks = [layer.register_forward_pre_hook(count) for layer in routed_layers(model)]
    try:
        with torch.compiler.set_stance("force_eager"):  # else a compiled model would be compiled again
            forward()
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(loads)


def kept_bytes(model: nn.Module, step: Callable[[], object]) -> list[int]:
    """What each MoE layer's forward leaves allocated on the GPU for the backward, during one step.

    As in measure.py this counts the output and not the input, two tensors of one size, of which the backward needs the
    input. Without the shared expert: what a layer's own leaves behind is subtracted. FlashFusedMoE's between ranks
    cannot be told apart; it leaves at most copies of its weights.
    """
    kept: list[int] = []
    of_shared: list[int] = []

    def measured(run: Callable[[Tensor], Tensor], x_TD: Tensor) -> Tensor:
        of_shared.clear()
        before = torch.cuda.memory_allocated()
        out_TD = run(x_TD)
        kept.append(torch.cuda.memory_allocated() - before - sum(of_shared))
        return out_TD

    def before_shared(shared: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        of_shared.append(-torch.cuda.memory_allocated())

    def after_shared(shared: nn.Module, inputs: tuple[Tensor, ...], out_TD: Tensor) -> None:
        # Its output is added to the layer's: in place, or it is gone when the layer returns.
        new = 0 if any(out_TD is given for given in inputs) else out_TD.nbytes
        of_shared.append(torch.cuda.memory_allocated() - new)

    found = routed_layers(model)
    plain = [layer.run for layer in found]
    hooks = []
    for layer, run in zip(found, plain, strict=True):
        layer.run = partial(measured, run)
        if layer.parts.shared is not None:
            hooks.append(layer.parts.shared.register_forward_pre_hook(before_shared))
            hooks.append(layer.parts.shared.register_forward_hook(after_shared))
    try:
        step()
    finally:
        for layer, run in zip(found, plain, strict=True):
            layer.run = run
        for hook in hooks:
            hook.remove()
    return kept


def _load(x_TD: Tensor, gate_ED: Tensor, top_k: int) -> Tensor:
    idx_TK = nn.functional.linear(x_TD, gate_ED).topk(top_k, dim=1)[1]
    return idx_TK.flatten().bincount(minlength=len(gate_ED))
