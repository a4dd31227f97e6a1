# SPDX-License-Identifier: GPL-3.0-or-later
"""Every layer that `ep_layer.py` compares, by key: ours per transport, with and without overlap, and DeepSpeed's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import layers
import torch
from layers import Bench, CannotRun, Entry, Layer, Parts, late, moe_layer
from report import EP1
from torch import Tensor

ROUTES_OF_ROOM = 1.25  # times the mean, for the row whose host never waits
OFF = {"shared_experts": False, "input_grad": False, "router_grad": False}


def ours(
    bench: Bench,
    ep_backend: str,
    overlap: bool = True,
    capacity_factor: float | None = None,
    num_shared_experts: int = 0,
    recompute_dispatch: bool = False,
) -> Layer:
    """MoELayer over the ranks of `bench.group`. Every rank draws its own shared experts, unless the weights hold
    one."""
    from flashfusemoe_ds.dispatch.select import close_dispatcher

    buffers = {"max_tokens_per_rank": bench.shape.T}
    room = {} if capacity_factor is None else {"capacity_factor": capacity_factor}
    layer = moe_layer(bench, num_shared_experts=num_shared_experts, recompute_dispatch=recompute_dispatch)
    bench.meet()
    try:
        layer.shard_experts(
            bench.group, ep_backend, overlap={} if overlap else OFF, deep_ep=buffers, symm_mem={**buffers, **room}
        )
    except ValueError as refusal:
        if ep_backend == "nccl":  # nothing may refuse it
            raise
        raise CannotRun(str(refusal)) from refusal

    def exchange(x_TD: Tensor) -> Callable[[], None]:
        return _exchange(layer, x_TD)

    return Layer(
        lambda x_TD: layer(x_TD)[0],
        list(layer.parameters()),
        f"takes {layer.dispatcher.name}" if ep_backend == "hybrid" else "",
        exchange=exchange,
        close=partial(close_dispatcher, layer.dispatcher),
        parts=Parts(layer.router.weight, layer.expert_params, shared=layer.shared_experts),
    )


@torch.no_grad()
def _exchange(layer: torch.nn.Module, x_TD: Tensor) -> Callable[[], None]:
    """The four exchanges of a step, each waited for before the next."""
    dispatcher, routing, rows_TD = layer.dispatcher, layer.router(x_TD), x_TD.detach()
    weight_TK = routing.weight_TK.detach()
    first = dispatcher.start_dispatch(rows_TD, routing.idx_TK, weight_TK).wait()
    y_RD, dweight_RK = first.x_RD.clone(), torch.where(first.idx_RK >= 0, first.weight_RK, 0)

    def one_step() -> None:
        sent = dispatcher.start_dispatch(rows_TD, routing.idx_TK, weight_TK).wait()
        dispatcher.start_combine(y_RD, sent.handle).rows.wait()
        dispatcher.start_redispatch(rows_TD, sent.handle).wait()
        home = dispatcher.start_combine(y_RD, sent.handle, dweight_RK)
        home.weights.wait()
        home.rows.wait()

    return one_step


def _ours(title: str, ep_backend: str, graph: bool = False, **options: object) -> Entry:
    build = partial(ours, ep_backend=ep_backend, **options)
    return Entry(f"flashfusemoe_ds, {title}", build, cuda_only=ep_backend != "nccl", graph=graph, ours=True)


REGISTRY: dict[str, Entry] = {
    EP1: Entry("flashfusemoe_ds, EP=1", layers.ours, cuda_only=False, ours=True),
    "ours-nccl": _ours("nccl", "nccl"),
    "ours-nccl-serial": _ours("nccl, no overlap", "nccl", overlap=False),
    "ours-symm_mem": _ours("symm_mem", "symm_mem"),
    "ours-symm_mem-serial": _ours("symm_mem, no overlap", "symm_mem", overlap=False),
    "ours-symm_mem-capacity": _ours(
        f"symm_mem, capacity_factor {ROUTES_OF_ROOM}", "symm_mem", capacity_factor=ROUTES_OF_ROOM
    ),
    "ours-symm_mem-graph": _ours(
        f"symm_mem, capacity_factor {ROUTES_OF_ROOM}, CUDA graph",
        "symm_mem",
        graph=True,
        capacity_factor=ROUTES_OF_ROOM,
    ),
    "ours-deep_ep": _ours("deep_ep", "deep_ep"),
    "ours-deep_ep-serial": _ours("deep_ep, no overlap", "deep_ep", overlap=False),
    "ours-hybrid": _ours("hybrid", "hybrid"),
    "autoep": Entry("DeepSpeed AutoEP, comm", late("deepspeed_layers", "autoep_parallel"), cuda_only=False),
    "autoep-sync": Entry(
        "DeepSpeed AutoEP, comm, no async_split_plan",
        late("deepspeed_layers", "autoep_parallel", async_split_plan=False),
    ),
    "autoep-fused": Entry(
        "DeepSpeed AutoEP, comm, gate_up fused", late("deepspeed_layers", "autoep_parallel", gate_up="fused")
    ),
    "autoep-deepep": Entry(
        "DeepSpeed AutoEP, deepep", late("deepspeed_layers", "autoep_parallel", comm_backend="deepep")
    ),
    "deepspeed": Entry("deepspeed MoE, drop_tokens=False", late("deepspeed_layers", "stock", drop=False), False),
    "flashfusedmoe": Entry(
        "FlashFusedMoE, calibrated buffers", late("triton_layers", "flashfusedmoe", calibrated=True)
    ),
}
# Run only when asked for.
ON_REQUEST = ("ours-symm_mem-graph", "autoep-sync", "autoep-fused", "flashfusedmoe")
SLOW_TO_IMPORT = ("autoep", "deepspeed")  # on CPUs likewise
