# SPDX-License-Identifier: GPL-3.0-or-later
"""Every layer in the comparison, by key: how to build it over shared weights, and what its row is called.

A builder takes a `Bench` and returns a `Layer`. It imports its package itself, so that a missing one costs its own row
and no other. Rivals are in deepspeed_layers.py, torch_layer.py, triton_layers.py and sonic_layer.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from shapes import Shape
from torch import Tensor, nn
from torch_layer import grouped_mm_moe
from weights import Weights, leaf


@dataclass(frozen=True)
class Bench:
    """What builders may use.

    Attributes:
        weights: shared by all layers; wrap with `leaf` before use.
        max_load: most tokens that one expert got in a sample of this routing.
        tune: "off", "short" or "full": how long rivals with an autotuner may search.
    """

    shape: Shape
    weights: Weights
    dtype: torch.dtype
    device: torch.device
    max_load: int
    tune: str


@dataclass(frozen=True)
class Layer:
    """A built layer.

    Attributes:
        run: x_TD -> out_TD.
        parameters: whose gradients a step leaves behind.
        note: what the reader of the row has to know.
        exact: False for a layer that drops tokens by design: its error is shown, not judged.
    """

    run: Callable[[Tensor], Tensor]
    parameters: list[nn.Parameter] = field(default_factory=list)
    note: str = ""
    exact: bool = True


@dataclass(frozen=True)
class Entry:
    """A line of the registry: `build` makes the layer; `graph` times it as a captured CUDA graph."""

    title: str
    build: Callable[[Bench], Layer]
    cuda_only: bool = True
    graph: bool = False

    @property
    def ours(self) -> bool:
        return self.build is ours or getattr(self.build, "func", None) is ours


def ours(bench: Bench, recompute: bool = False, compiled: bool = False, gemm_backend: str | None = None) -> Layer:
    """MoELayer, built on the meta device so that its weights exist once, then given the shared ones."""
    from flashfusemoe_ds import MoELayer

    shape, weights = bench.shape, bench.weights
    with torch.device("meta"):
        layer = MoELayer(
            shape.D,
            2 * shape.F,
            shape.E,
            shape.K,
            gating="softmax_topk",
            recompute_activations=recompute,
            gemm_backend=gemm_backend,
        )
    layer.router.weight = leaf(weights.gate)
    layer.experts.gate_up_proj = leaf(weights.gate_up)
    layer.experts.down_proj = leaf(weights.down)
    unset = [name for name, tensor in layer.state_dict(keep_vars=True).items() if tensor.is_meta]
    assert not unset, f"MoELayer has tensors that this benchmark does not know: {unset}"
    call = torch.compile(layer, dynamic=False) if compiled else layer
    return Layer(lambda x_TD: call(x_TD)[0], list(layer.parameters()))


def grouped_mm(bench: Bench, compiled: bool = False) -> Layer:
    params = [leaf(bench.weights.gate), leaf(bench.weights.gate_up), leaf(bench.weights.down)]
    call = torch.compile(grouped_mm_moe, dynamic=False) if compiled else grouped_mm_moe
    return Layer(lambda x_TD: call(x_TD, *params, bench.shape.K), params)


def _late(module: str, name: str, **options: object) -> Callable[[Bench], Layer]:
    """The builder `name` of a module beside this one, imported when it is needed."""

    def build(bench: Bench) -> Layer:
        from importlib import import_module

        return getattr(import_module(module), name)(bench, **options)

    return build


REGISTRY: dict[str, Entry] = {
    "ours": Entry("flashfusemoe_ds", ours, cuda_only=False),
    "ours-compile": Entry("flashfusemoe_ds, torch.compile", partial(ours, compiled=True)),
    "ours-graph": Entry("flashfusemoe_ds, CUDA graph", partial(ours), graph=True),
    "ours-recompute": Entry("flashfusemoe_ds, recompute_activations", partial(ours, recompute=True), cuda_only=False),
    "grouped_mm": Entry("torch._grouped_mm, eager", grouped_mm, cuda_only=False),
    "grouped_mm-compile": Entry("torch._grouped_mm, torch.compile", partial(grouped_mm, compiled=True)),
    "autoep": Entry("DeepSpeed AutoEP, gate_up separate", _late("deepspeed_layers", "autoep", gate_up="separate")),
    "autoep-fused": Entry("DeepSpeed AutoEP, gate_up fused", _late("deepspeed_layers", "autoep", gate_up="fused")),
    "deepspeed": Entry("deepspeed MoE, drop_tokens=False", _late("deepspeed_layers", "stock", drop=False), False),
    "deepspeed-capacity": Entry("deepspeed MoE, capacity 1.0", _late("deepspeed_layers", "stock", drop=True), False),
    "liger": Entry("Liger-Kernel fused MoE", _late("triton_layers", "liger")),
    "scattermoe": Entry("ScatterMoE", _late("triton_layers", "scattermoe")),
    "flashfusedmoe": Entry("FlashFusedMoE", _late("triton_layers", "flashfusedmoe")),
    "flashfusedmoe-calibrated": Entry(
        "FlashFusedMoE, calibrated buffers", _late("triton_layers", "flashfusedmoe", calibrated=True)
    ),
    "sonicmoe": Entry("SonicMoE", _late("sonic_layer", "sonicmoe")),
}
SLOW_TO_IMPORT = ("deepspeed", "deepspeed-capacity")  # seconds, so on CPUs they run only when asked for


def with_backends(backends: list[str]) -> dict[str, Entry]:
    """The registry, and a row of ours for every named gemm_backend."""
    rows = {
        f"ours-{name}": Entry(f"flashfusemoe_ds, gemm_backend={name}", partial(ours, gemm_backend=name), False)
        for name in backends
    }
    return {"ours": REGISTRY["ours"], **rows, **{key: e for key, e in REGISTRY.items() if key != "ours"}}
