# SPDX-License-Identifier: GPL-3.0-or-later
"""Gradients reduced during backward inside a DeepSpeed engine: which way this engine's configuration allows.

| engine                       | who reduces, and when                                                               |
|------------------------------|-------------------------------------------------------------------------------------|
| ZeRO stage 0                 | `stage0_overlap`: our buckets, during backward                                      |
| ZeRO stages 1, 2             | `zero_overlap`: our buckets, during backward, in place of DeepSpeed's               |
| the same, special features   | DeepSpeed's own overlap_comm                                                        |
| anything else                | as the engine does without us; the reason is logged                                 |
"""

from __future__ import annotations

from typing import Any

from deepspeed.moe.utils import is_moe_param
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.pipe.engine import PipelineEngine
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from flashfusemoe_ds.ds.grad_buckets import GradReducer
from flashfusemoe_ds.ds.stage0_overlap import Stage0Overlap
from flashfusemoe_ds.ds.zero_overlap import ZeroOverlap, why_deepspeed_keeps_buckets


def overlap_gradients(engine: Any, wanted: bool) -> str:
    """Takes over the engine's gradient reduction where it can overlap with backward.

    Args:
        engine: a DeepSpeedEngine that has not run a backward yet.
        wanted: the section's `overlap_dense_grads`.

    Returns:
        When gradients are reduced, by whom, and, where it is not during backward by us, why: the end of a sentence.
    """
    optimizer, stage = engine.optimizer, int(engine.zero_optimization_stage())
    by_deepspeed = getattr(optimizer, "overlap_comm", False)
    as_configured = "during backward by DeepSpeed's overlap_comm" if by_deepspeed else "after backward"
    reason = _why_not(engine, wanted, stage)
    if not reason and stage in (1, 2):
        reason = why_deepspeed_keeps_buckets(optimizer)
    if reason:
        return f"{as_configured}: {reason}"
    overlap = Stage0Overlap(engine) if stage == 0 else ZeroOverlap(engine)
    return f"during backward in {_described(overlap.reducer)}"


def _why_not(engine: Any, wanted: bool, stage: int) -> str:
    """Why we leave the reduction to the engine; empty if we need not."""
    optimizer = engine.optimizer
    if not wanted:
        return "overlap_dense_grads is false"
    if optimizer is None:
        return "the engine has no optimizer"
    if isinstance(engine, PipelineEngine):  # which switches enable_backward_allreduce off itself
        return "the pipeline engine reduces when its last micro batch is through"
    if not engine.enable_backward_allreduce:
        return "enable_backward_allreduce is off"
    if engine.is_deepcompile_enabled():
        return "DeepCompile reduces inside its compiled graphs"
    if isinstance(optimizer, BF16_Optimizer):
        return "BF16_Optimizer accumulates and reduces float32 copies of the gradients"
    if stage == 3:
        return "ZeRO-3 reduces in its own hooks"
    folding = getattr(engine, "_autoep_folding_spec", None)
    if folding is not None and folding.tp_size > 1:
        return "AutoEP folded with tensor parallelism corrects gradients before their reduction"
    if stage in (1, 2):
        if not isinstance(optimizer, DeepSpeedZeroOptimizer):
            return f"{type(optimizer).__name__} is not DeepSpeed's ZeRO optimizer of stages 1 and 2"
        return "" if optimizer.overlap_comm else "zero_optimization.overlap_comm is off"
    if ".onebit." in type(_inner(optimizer)).__module__:
        return f"{type(_inner(optimizer)).__name__} compresses and reduces gradients itself"
    return ""


def _inner(optimizer: Any) -> Any:
    """The optimizer inside DeepSpeed's half-precision wrappers."""
    return getattr(optimizer, "optimizer", optimizer)


def _described(reducer: GradReducer) -> str:
    experts = sum(is_moe_param(bucket.params[0]) for bucket in reducer.buckets)
    return f"{len(reducer.buckets) - experts} + {experts} buckets of dense and expert gradients"
