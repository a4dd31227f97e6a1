# SPDX-License-Identifier: GPL-3.0-or-later
"""Rivals written in Triton: Liger-Kernel, ScatterMoE and FlashFusedMoE."""

from __future__ import annotations

import tuning
from layers import Bench, Layer
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
    """Its function as its MoELayer calls it. Padded buffers: twice the mean load by default, or 1.1 x the observed
    maximum when calibrated, which is how its own benchmark runs."""
    from flashfusemoe import fused_moe

    weights, shape = bench.weights, bench.shape
    params = [leaf(weights.gate), leaf(weights.gate_up), leaf(weights.down)]
    limit = int(1.1 * bench.max_load) if calibrated else None
    default_limit = 2 * -(-shape.N // shape.E)
    overflows = not calibrated and bench.max_load > default_limit

    def run(x_TD: Tensor) -> Tensor:
        gate, gate_up, down = params
        return fused_moe(x_TD, gate, gate_up, down, shape.K, max_tokens_per_expert=limit, allow_dropped_tokens=True)[0]

    note = f"{limit if calibrated else default_limit} rows per expert" + (", which overflow here" if overflows else "")
    return Layer(run, params, note, exact=not overflows)
