# SPDX-License-Identifier: GPL-3.0-or-later
"""Every layer in the comparison, by key: how to build it over shared weights, and what its row is called.

A builder takes a `Bench` and returns a `Layer`. It imports its package itself, so that a missing one costs its own row
and no other. Rivals are in deepspeed_layers.py, torch_layer.py, triton_layers.py and sonic_layer.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from ranks import ALONE
from shapes import Shape
from torch import Tensor, nn
from torch_layer import grouped_mm_moe
from weights import Weights, leaf

if TYPE_CHECKING:
    from flashfusemoe_ds import MoELayer


class CannotRun(RuntimeError):
    """A builder's word that its layer cannot run here, the same on every rank. Its row is skipped, not failed."""


@dataclass(frozen=True)
class Bench:
    """What builders may use.

    Attributes:
        weights: shared by all layers; wrap with `leaf` before use.
        max_load: most tokens that one expert got in a sample of this routing.
        tune: "off", "short" or "full": how long rivals with an autotuner may search.
        group: ranks that share the experts; None where there is but one.
        meet: to be called before a builder's first collective: raises if another rank has failed on its way there.
    """

    shape: Shape
    weights: Weights
    dtype: torch.dtype
    device: torch.device
    max_load: int
    tune: str
    group: dist.ProcessGroup | None = None
    meet: Callable[[], None] = ALONE.meet

    @property
    def ep_size(self) -> int:
        return 1 if self.group is None else dist.get_world_size(self.group)

    @property
    def ep_rank(self) -> int:
        return 0 if self.group is None else dist.get_rank(self.group)

    @property
    def own_experts(self) -> range:
        """This rank's, of [0, E)."""
        local = self.shape.E // self.ep_size
        return range(self.ep_rank * local, (self.ep_rank + 1) * local)


@dataclass(frozen=True)
class Parts:
    """What a training loop has to know of a layer's parameters.

    Attributes:
        router: [E, D].
        experts: this rank's own experts'; all others of the layer are the same on every rank.
        averaged: its backward has divided the experts' gradients by ep_size.
        room: routes that an expert has room for; those beyond are not computed. None: all are.
        shared: holds the parameters of the shared expert of `Weights.shared`, where the layer computes that too; they
            are the same on every rank.
    """

    router: nn.Parameter
    experts: list[nn.Parameter]
    averaged: bool = False
    room: int | None = None
    shared: nn.Module | None = None


@dataclass(frozen=True)
class Layer:
    """A built layer.

    Attributes:
        run: x_TD -> out_TD.
        parameters: whose gradients a step leaves behind.
        note: what the reader of the row has to know.
        exact: False for a layer that drops tokens by design: its error is shown, not judged.
        exchange: x_TD -> a function that does what one step does between ranks, for the routing of x, and nothing
            else; None where that cannot be told.
        close: frees what the layer shares with other ranks; collective. After it the layer cannot be used. It should
            not hold the layer.
        parts: of layers that a model can be trained with.
    """

    run: Callable[[Tensor], Tensor]
    parameters: list[nn.Parameter] = field(default_factory=list)
    note: str = ""
    exact: bool = True
    exchange: Callable[[Tensor], Callable[[], object]] | None = None
    close: Callable[[], object] | None = None
    parts: Parts | None = None


@dataclass(frozen=True)
class Entry:
    """A line of the registry: `build` makes the layer; `graph` times it as a captured CUDA graph; an entry of `ours`
    stands out in tables, and the run fails if it does."""

    title: str
    build: Callable[[Bench], Layer]
    cuda_only: bool = True
    graph: bool = False
    ours: bool = False


def moe_layer(bench: Bench, **options: Any) -> MoELayer:
    """MoELayer, built on the meta device so that its weights exist once, then given the benchmark's, a shared expert's
    among them if there are any."""
    from flashfusemoe_ds import MoELayer

    shape, weights = bench.shape, bench.weights
    if weights.shared is not None:
        options["num_shared_experts"] = 1
    with torch.device("meta"):
        layer = MoELayer(shape.D, 2 * shape.F, shape.E, shape.K, gating="softmax_topk", **options)
    layer.router.weight = leaf(weights.gate)
    layer.experts.gate_up_proj = leaf(weights.gate_up)
    layer.experts.down_proj = leaf(weights.down)
    if weights.shared is not None:
        layer.shared_experts.gate_up_proj, layer.shared_experts.down_proj = map(leaf, weights.shared)
    elif layer.shared_experts is not None:
        layer.shared_experts.to_empty(device=bench.device).to(bench.dtype).reset_parameters()
    unset = [name for name, tensor in layer.state_dict(keep_vars=True).items() if tensor.is_meta]
    assert not unset, f"MoELayer has tensors that this benchmark does not know: {unset}"
    return layer


def ours(bench: Bench, recompute: bool = False, compiled: bool = False, gemm_backend: str | None = None) -> Layer:
    layer = moe_layer(bench, recompute_activations=recompute, gemm_backend=gemm_backend)
    call = torch.compile(layer, dynamic=False) if compiled else layer
    parts = Parts(layer.router.weight, layer.expert_params, shared=layer.shared_experts)
    return Layer(lambda x_TD: call(x_TD)[0], list(layer.parameters()), parts=parts)


def grouped_mm(bench: Bench, compiled: bool = False) -> Layer:
    params = [leaf(bench.weights.gate), leaf(bench.weights.gate_up), leaf(bench.weights.down)]
    call = torch.compile(grouped_mm_moe, dynamic=False) if compiled else grouped_mm_moe
    return Layer(lambda x_TD: call(x_TD, *params, bench.shape.K), params)


def late(module: str, name: str, **options: object) -> Callable[[Bench], Layer]:
    """The builder `name` of a module beside this one, imported when it is needed."""

    def build(bench: Bench) -> Layer:
        from importlib import import_module

        return getattr(import_module(module), name)(bench, **options)

    return build


REGISTRY: dict[str, Entry] = {
    "ours": Entry("flashfusemoe_ds", ours, cuda_only=False, ours=True),
    "ours-compile": Entry("flashfusemoe_ds, torch.compile", partial(ours, compiled=True), ours=True),
    "ours-graph": Entry("flashfusemoe_ds, CUDA graph", ours, graph=True, ours=True),
    "ours-recompute": Entry(
        "flashfusemoe_ds, recompute_activations", partial(ours, recompute=True), cuda_only=False, ours=True
    ),
    "grouped_mm": Entry("torch._grouped_mm, eager", grouped_mm, cuda_only=False),
    "grouped_mm-compile": Entry("torch._grouped_mm, torch.compile", partial(grouped_mm, compiled=True)),
    "autoep": Entry("DeepSpeed AutoEP, gate_up separate", late("deepspeed_layers", "autoep", gate_up="separate")),
    "autoep-fused": Entry("DeepSpeed AutoEP, gate_up fused", late("deepspeed_layers", "autoep", gate_up="fused")),
    "deepspeed": Entry("deepspeed MoE, drop_tokens=False", late("deepspeed_layers", "stock", drop=False), False),
    "deepspeed-capacity": Entry("deepspeed MoE, capacity 1.0", late("deepspeed_layers", "stock", drop=True), False),
    "liger": Entry("Liger-Kernel fused MoE", late("triton_layers", "liger")),
    "scattermoe": Entry("ScatterMoE", late("triton_layers", "scattermoe")),
    "flashfusedmoe": Entry("FlashFusedMoE", late("triton_layers", "flashfusedmoe")),
    "flashfusedmoe-calibrated": Entry(
        "FlashFusedMoE, calibrated buffers", late("triton_layers", "flashfusedmoe", calibrated=True)
    ),
    "sonicmoe": Entry("SonicMoE", late("sonic_layer", "sonicmoe")),
}
SLOW_TO_IMPORT = ("deepspeed", "deepspeed-capacity")  # seconds, so on CPUs they run only when asked for


def with_backends(backends: list[str]) -> dict[str, Entry]:
    """The registry, and a row of ours for every named gemm_backend."""
    rows = {
        f"ours-{name}": Entry(
            f"flashfusemoe_ds, gemm_backend={name}", partial(ours, gemm_backend=name), cuda_only=False, ours=True
        )
        for name in backends
    }
    return {"ours": REGISTRY["ours"], **rows, **{key: e for key, e in REGISTRY.items() if key != "ours"}}
