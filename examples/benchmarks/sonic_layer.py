# SPDX-License-Identifier: GPL-3.0-or-later
"""SonicMoE: CuTe-DSL kernels for Hopper and Blackwell (sonic-moe 0.1.2.post1 with quack-kernels 0.3.11)."""

from __future__ import annotations

import torch
import tuning
from layers import Bench, Layer
from torch import Tensor
from weights import leaf


def sonicmoe(bench: Bench) -> Layer:
    from quack import gemm_interface
    from sonicmoe import moe_TC_softmax_topk_layer
    from sonicmoe.enums import ActivationType

    note = tuning.tune_sonic(gemm_interface, bench.tune, bench.device)
    weights = bench.weights
    params = [leaf(weights.gate), leaf(weights.interleaved), leaf(weights.down)]
    stream = torch.cuda.current_stream().cuda_stream

    def run(x_TD: Tensor) -> Tensor:
        gate, w1, w2 = params
        return moe_TC_softmax_topk_layer(
            x_TD,
            gate,
            w1.permute(1, 2, 0),
            None,
            w2.permute(1, 2, 0),
            None,
            bench.shape.K,
            stream,
            ActivationType.SWIGLU,
            is_inference_mode_enabled=False,
        )[0]

    return Layer(run, params, note)
