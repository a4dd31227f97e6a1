# SPDX-License-Identifier: GPL-3.0-or-later
"""DeepSpeed's two MoE layers: the stock `deepspeed.moe.layer.MoE`, and AutoEP's.

AutoEP on one GPU is its functions without an engine around; between ranks it is its whole layer, `AutoEPMoELayer`.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
from layers import Bench, Layer, Parts
from torch import Tensor, nn
from torch.nn import functional as F
from weights import leaf


def _join() -> None:
    """DeepSpeed's groups over torch.distributed; if nobody has set that up, with this process as the only one: no
    network, nothing exchanged."""
    import deepspeed
    import torch.distributed as dist

    if not dist.is_initialized():
        with tempfile.NamedTemporaryFile(delete=False) as store:
            dist.init_process_group("gloo", init_method=f"file://{store.name}", rank=0, world_size=1)
    # On CPUs DeepSpeed would first compile a shared-memory all-reduce, which nothing here calls.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend=dist.get_backend(), auto_mpi_discovery=False, verbose=False)


class SwiGLU(nn.Module):
    """One expert, with gate and up in one product: the fastest way to write it for the stock layer."""

    def __init__(self, d_model: int, intermediate: int) -> None:
        super().__init__()
        self.gate_up = nn.Linear(d_model, 2 * intermediate, bias=False)
        self.down = nn.Linear(intermediate, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, dim=-1)
        return self.down(F.silu(gate) * up)


def stock(bench: Bench, drop: bool) -> Layer:
    """With `drop`, capacity_factor 1.0: some tokens lose experts, so its output differs from everybody's."""
    from deepspeed.moe.layer import MoE

    _join()
    shape, weights = bench.shape, bench.weights
    with torch.device("meta"):
        layer = MoE(
            shape.D,
            SwiGLU(shape.D, shape.F),
            num_experts=shape.E,
            ep_size=bench.ep_size,
            k=shape.K,
            capacity_factor=1.0,
            drop_tokens=drop,
            use_rts=False,
            top2_2nd_expert_sampling=False,  # else the second expert is drawn at random
        )
    bench.meet()
    layer.set_deepspeed_parallelism()
    layer.deepspeed_moe.gate.wg.weight = leaf(weights.gate)
    for e, expert in zip(bench.own_experts, layer.deepspeed_moe.experts.deepspeed_experts, strict=True):
        expert.gate_up.weight, expert.down.weight = leaf(weights.gate_up[e]), leaf(weights.down[e])
    # With one expert per token it weighs by the softmax over all logits, not over the chosen one.
    exact = not drop and shape.K > 1
    note = "drops tokens" if drop else ("" if exact else "weighs its one expert by the softmax over all")
    return Layer(
        lambda x_TD: layer(x_TD)[0],
        list(layer.parameters()),
        note,
        exact,
        exchange=None if bench.ep_size == 1 or drop else lambda x_TD: _stock_exchange(bench, x_TD),
        parts=Parts(layer.deepspeed_moe.gate.wg.weight, list(layer.deepspeed_moe.experts.parameters())),
    )


def _stock_exchange(bench: Bench, x_TD: Tensor) -> Callable[[], None]:
    """Without drops every expert gets the capacity of the fullest one on any rank; as many rows go each way."""
    import torch.distributed as dist
    from deepspeed.moe.sharded_moe import _AllToAll

    shape = bench.shape
    with torch.no_grad():
        load_E = (x_TD @ bench.weights.gate.T).topk(shape.K, dim=1)[1].flatten().bincount(minlength=shape.E)
    capacity = load_E.max()
    dist.all_reduce(capacity, dist.ReduceOp.MAX, group=bench.group)
    rows_ECD = x_TD.new_zeros(shape.E, int(capacity), shape.D)

    def one_step() -> None:
        for _ in range(4):  # there and back, forward and backward
            _AllToAll.apply(bench.group, rows_ECD)

    return one_step


def autoep(bench: Bench, gate_up: str) -> Layer:
    """AutoEPMoELayer._forward at ep_size 1, step by step, with combine_impl="fused_weighted_sum"."""
    from deepspeed.module_inject.auto_ep_layer import permute_by_local_expert, unpermute_by_local_expert
    from deepspeed.moe.ep_experts import GroupedExperts
    from deepspeed.moe.ep_router import TokenChoiceTopKRouter
    from deepspeed.ops.triton_ops import autoep_fused_token_ops as fused_token_ops

    shape, weights = bench.shape, bench.weights
    with torch.device("meta"):
        router = TokenChoiceTopKRouter(
            shape.D,
            shape.E,
            num_expert_groups=None,
            num_limited_groups=None,
            top_k=shape.K,
            score_func="softmax",
            route_norm=True,
            route_scale=1.0,
            gate_bias=False,
        )
        experts = GroupedExperts(
            shape.D, shape.F, shape.E, use_grouped_mm=True, disable_triton_grouped_mm=True, gate_up_impl=gate_up
        )
    router.gate.weight = leaf(weights.gate)
    gate, up = weights.separate
    experts.w1, experts.w2, experts.w3 = leaf(gate), leaf(weights.down), leaf(up)

    def run(x_TD: Tensor) -> Tensor:
        top_scores, selected, counts = router(x_TD, None)
        order = torch.argsort(selected.view(-1), stable=True)
        rows, indices, aligned_counts, num_rows = permute_by_local_expert(x_TD[order // shape.K], counts)
        rows = unpermute_by_local_expert(experts(rows, aligned_counts), indices, num_rows)
        out = fused_token_ops.fused_weighted_restore(
            rows,
            top_scores=top_scores,
            token_indices_sorted=order,
            top_k=shape.K,
            shape=(1, shape.T, shape.D),
        )
        return out.view(shape.T, shape.D)

    fused_token_ops.assert_supported(weights.gate, score_apply="post")
    return Layer(run, [*router.parameters(), *experts.parameters()], 'combine_impl="fused_weighted_sum"')


def autoep_parallel(
    bench: Bench, gate_up: str = "separate", comm_backend: str = "comm", async_split_plan: bool = True
) -> Layer:
    """AutoEPMoELayer over the ranks of `bench.group`, with its fastest settings; on CPUs with those that run there."""
    from deepspeed.module_inject.auto_ep_comm import _import_deep_ep, destroy_exchanges
    from deepspeed.module_inject.auto_ep_config import AutoEPConfig, MoELayerSpec
    from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer

    _join()
    deepep = comm_backend == "deepep"
    if deepep:
        _import_deep_ep()  # else it is missed in the first step
    shape, weights, cuda = bench.shape, bench.weights, bench.device.type == "cuda"
    spec = MoELayerSpec(
        moe_module_name="moe",
        model_family="mixtral",
        router_name="gate",
        experts_name="experts",
        expert_storage="fused_3d",
        expert_w1_name="gate_up_proj",
        expert_w2_name="down_proj",
        expert_w3_name=None,
        num_experts=shape.E,
        top_k=shape.K,
        hidden_size=shape.D,
        ffn_hidden_size=shape.F,
        score_func="softmax",
        score_apply="post",
        route_norm=True,
        gate_bias=False,
        return_router_logits=False,
        router_logits_capture_target="none",
        router_logits_capture_index=None,
        router_logits_capture_layer_name=None,
        has_shared_experts=False,
        shared_experts_name="",
    )
    settings: dict[str, Any] = {"comm_backend": comm_backend, "use_grouped_mm": cuda, "gate_up_impl": gate_up}
    if cuda:
        settings |= {"disable_triton_grouped_mm": True, "combine_impl": "fused_weighted_sum"}
    if deepep:
        settings |= {"row_weighting_impl": "fused" if cuda else "eager", "comm_max_tokens_per_rank": shape.T}
    else:
        settings["async_split_plan"] = async_split_plan and cuda
    source = SimpleNamespace(
        gate=SimpleNamespace(weight=leaf(weights.gate)),
        experts=SimpleNamespace(gate_up_proj=leaf(weights.gate_up), down_proj=leaf(weights.down)),
    )
    with torch.device(bench.device):
        layer = AutoEPMoELayer(spec, source, bench.ep_size, bench.ep_rank, AutoEPConfig(**settings))
    layer.ep_group = bench.group

    def exchange(x_TD: Tensor) -> Callable[[], None]:
        return _autoep_exchange(layer, x_TD)

    chosen = ", ".join(f"{name}={value}" for name, value in settings.items() if name.endswith(("_impl", "_plan")))
    return Layer(
        lambda x_TD: layer(x_TD.unsqueeze(0)).squeeze(0),
        list(layer.parameters()),
        chosen,
        exchange=None if deepep else exchange,
        close=(lambda: destroy_exchanges(layer)) if deepep else None,
        parts=Parts(layer.router.gate.weight, list(layer.experts.parameters())),
    )


def _autoep_exchange(layer: nn.Module, x_TD: Tensor) -> Callable[[], None]:
    """Counts and splits once, then a row per route there and back, in the backward the same again."""
    from deepspeed.module_inject.auto_ep_layer import _AllToAllV, compute_split_plan

    with torch.no_grad():
        _, idx_TK, counts_E = layer.router(x_TD, None)
    rows_ND = x_TD.new_zeros(idx_TK.numel(), x_TD.shape[1])

    def one_step() -> None:
        plan = compute_split_plan(
            idx_TK, layer.num_experts, layer.ep_size, layer.num_local_experts, layer.ep_group, counts_E
        )
        for _ in range(2):
            received = _AllToAllV.apply(layer.ep_group, rows_ND, plan.input_splits, plan.output_splits)
            _AllToAllV.apply(layer.ep_group, received, plan.output_splits, plan.input_splits)

    return one_step
