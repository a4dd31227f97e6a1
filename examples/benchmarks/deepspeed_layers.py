# SPDX-License-Identifier: GPL-3.0-or-later
"""DeepSpeed's two MoE layers: the stock `deepspeed.moe.layer.MoE`, and AutoEP's functions without an engine around."""

from __future__ import annotations

import tempfile

import torch
from layers import Bench, Layer
from torch import Tensor, nn
from torch.nn import functional as F
from weights import leaf


def _join_alone() -> None:
    """torch.distributed and DeepSpeed's groups with this process as the only one; no network, nothing exchanged."""
    import deepspeed
    import torch.distributed as dist

    if not dist.is_initialized():
        with tempfile.NamedTemporaryFile(delete=False) as store:
            dist.init_process_group("gloo", init_method=f"file://{store.name}", rank=0, world_size=1)
    # On CPUs DeepSpeed would first compile a shared-memory all-reduce, which nothing here calls.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if not deepspeed.comm.is_initialized():
        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)


class _SwiGLU(nn.Module):
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

    _join_alone()
    shape, weights = bench.shape, bench.weights
    with torch.device("meta"):
        layer = MoE(
            shape.D,
            _SwiGLU(shape.D, shape.F),
            num_experts=shape.E,
            ep_size=1,
            k=shape.K,
            capacity_factor=1.0,
            drop_tokens=drop,
            use_rts=False,
            top2_2nd_expert_sampling=False,  # else the second expert is drawn at random
        )
    layer.set_deepspeed_parallelism()
    layer.deepspeed_moe.gate.wg.weight = leaf(weights.gate)
    for e, expert in enumerate(layer.deepspeed_moe.experts.deepspeed_experts):
        expert.gate_up.weight, expert.down.weight = leaf(weights.gate_up[e]), leaf(weights.down[e])
    # With one expert per token it weighs by the softmax over all logits, not over the chosen one.
    exact = not drop and shape.K > 1
    note = "drops tokens" if drop else ("" if exact else "weighs its one expert by the softmax over all")
    return Layer(lambda x_TD: layer(x_TD)[0], list(layer.parameters()), note, exact)


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
