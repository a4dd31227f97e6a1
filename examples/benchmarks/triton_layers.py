# SPDX-License-Identifier: GPL-3.0-or-later
"""Rivals written in Triton: Liger-Kernel, ScatterMoE and FlashFusedMoE."""

from __future__ import annotations

import torch
import tuning
from layers import Bench, CannotRun, Layer, Parts
from torch import Tensor
from torch.nn import functional as F
from weights import leaf


def _route(x_TD: Tensor, gate_ED: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    """The router that a model brings along for layers without one: weight_TK float32, idx_TK int64."""
    logits_TK, idx_TK = F.linear(x_TD, gate_ED).float().topk(top_k, dim=1)
    return logits_TK.softmax(dim=1), idx_TK


def liger(bench: Bench) -> Layer:
    from liger_kernel.ops import fused_moe, fused_moe_kernels

    note = tuning.tune_liger(fused_moe_kernels, bench.tune)
    weights = bench.weights
    params = [leaf(weights.gate), leaf(weights.gate_up), leaf(weights.down)]

    def run(x_TD: Tensor) -> Tensor:
        gate, gate_up, down = params
        weight_TK, idx_TK = _route(x_TD, gate, bench.shape.K)
        return fused_moe.LigerFusedMoEFunction.apply(x_TD, gate_up, down, idx_TK.int(), weight_TK)

    return Layer(run, params, note)


def scattermoe(bench: Bench) -> Layer:
    """scattermoe.mlp.GLUMLP, with the gate's half of the up-projection before the up's, as everybody else has it."""
    from scattermoe.parallel_experts import flatten_sort_count, parallel_linear

    weights, shape = bench.weights, bench.shape
    params = [leaf(weights.gate), leaf(weights.gate_up), leaf(weights.down)]

    def run(x_TD: Tensor) -> Tensor:
        gate_ED, gate_up, down = params
        weight_TK, idx_TK = _route(x_TD, gate_ED, shape.K)
        expert_N, route_N, ends_E = flatten_sort_count(idx_TK, num_experts=shape.E)
        h = parallel_linear(x_TD, gate_up.permute(0, 2, 1), shape.K, expert_N, route_N, ends_E, grouped_out=True)
        gate, up = h.chunk(2, dim=-1)
        return parallel_linear(
            F.silu(gate) * up,
            down.permute(0, 2, 1),
            1,
            expert_N,
            route_N,
            ends_E,
            gates=weight_TK.to(x_TD.dtype),
            grouped_in=True,
        )

    return Layer(run, params)


def flashfusedmoe(bench: Bench, calibrated: bool = False) -> Layer:
    """Its MoELayer. Padded buffers: twice the mean load by default, or 1.1 x the observed maximum when calibrated,
    which is how its own benchmark runs. Between ranks the buffers are ep_size times as large, as the load is.

    Its exchange sends expert ids as bfloat16, which is exact up to 256 experts. Between ranks its backward leaves out
    what the experts' input gets, so only the output can be exact.

    Between ranks it computes the weights' shared expert itself, beside its exchange. On one GPU its own is three plain
    products after the layer, so that the model's, of two, stays."""
    from flashfusemoe import MoELayer

    weights, shape, parallel = bench.weights, bench.shape, bench.ep_size > 1
    if parallel and shape.E > 256:
        raise CannotRun(f"sends expert ids as bfloat16, exact up to 256 experts; here are {shape.E}")
    default = 2 * -(-shape.N // shape.E)
    room = (int(1.1 * bench.max_load) if calibrated else default) * bench.ep_size
    with torch.device("meta"):
        layer = MoELayer(
            shape.D,
            2 * shape.F,
            shape.E,
            shape.K,
            max_tokens_per_expert=room if calibrated else None,
            allow_dropped_tokens=True,
            num_shared_experts=int(parallel and weights.shared is not None),
        )
    layer.gate.weight = leaf(weights.gate)
    layer.w_up, layer.w_down = leaf(weights.gate_up), leaf(weights.down)
    if layer.shared_expert is not None:
        (gate_up,), (down,) = weights.shared
        gate, up = gate_up.chunk(2)
        layer.shared_expert.w_gate.weight, layer.shared_expert.w_up.weight = leaf(gate), leaf(up)
        layer.shared_expert.w_down.weight = leaf(down)
    bench.meet()
    if parallel:
        layer.shard_experts(bench.group)
    overflows = bench.max_load * bench.ep_size > room
    note = f"{room} rows per expert" + (", which overflow here" if overflows else "")
    note += "; omits the experts' part of the input's gradient" if parallel else ""
    return Layer(
        lambda x_TD: layer(x_TD)[0],
        list(layer.parameters()),
        note,
        exact=not (overflows or parallel),
        parts=Parts(layer.gate.weight, layer.expert_params, averaged=parallel, room=room, shared=layer.shared_expert),
    )
