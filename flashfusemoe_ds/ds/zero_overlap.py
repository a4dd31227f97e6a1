# SPDX-License-Identifier: GPL-3.0-or-later
"""ZeRO stages 1 and 2: DeepSpeed's gradient buckets replaced by ours; partitions, accumulation and step stay its own.

What DeepSpeed's overlap_comm does instead: one staging buffer of `reduce_bucket_size` for dense and expert gradients
alike, filled in the order in which gradients arrive; at each flush the compute stream waits for the flush before; and
at the end of every backward the whole device is synchronised. At stage 1 a parameter that the last micro batch did not
use keeps its accumulated gradient unreduced.

The optimizer's own hooks call `process_gradients` for each accumulated gradient, and the engine ends each backward
with `reduce_gradients` (stage 1) or `overlapping_partition_gradients_reduce_epilogue` (stage 2). These three are
replaced on the instance, and `overlap_comm` is switched off after the hooks exist, which drops the device-wide wait
and the second staging buffer. Once our buckets are reduced, `param.grad` is the average where this rank's partition
needs it: what DeepSpeed's epilogue finds after its own reduction.
"""

from __future__ import annotations

from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.moe.utils import is_moe_param
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from deepspeed.utils import logger
from torch import nn

from flashfusemoe_ds.ds.grad_buckets import GradReducer, Reduction
from flashfusemoe_ds.ds.stage0_overlap import BUCKET_NUMEL, FIRST_BUCKET_NUMEL, scaling


def why_deepspeed_keeps_buckets(optimizer: Any) -> str:
    """The feature of this ZeRO optimizer that needs DeepSpeed's own buckets; empty if there is none."""
    if type(optimizer) is not DeepSpeedZeroOptimizer:
        return f"{type(optimizer).__name__} has gradient handling of its own"
    if optimizer.cpu_offload:
        return "offload_optimizer moves gradients to the host from DeepSpeed's buckets"
    if optimizer.use_grad_accum_attribute or optimizer.gradient_accumulation_dtype != optimizer.dtype:
        return "gradients are accumulated in another dtype than the model's (data_types.grad_accum_dtype)"
    if not optimizer.use_multi_rank_bucket_allreduce:
        return "use_multi_rank_bucket_allreduce is false"
    if "muon" in type(optimizer.optimizer).__name__.lower():
        return "Muon gathers matrices that two partitions share"
    return ""


class ZeroOverlap:
    """Takes the place of a DeepSpeedZeroOptimizer's hook, bucket and flush functions."""

    def __init__(self, engine: Any) -> None:
        optimizer = engine.optimizer
        self.engine, self.optimizer = engine, optimizer
        self._every_backward = optimizer.partition_gradients  # stage 2; stage 1 reduces at accumulation boundaries
        self.reducer = self._make_reducer()
        self._left_to_deepspeed = False  # whether this backward goes through DeepSpeed's own buckets

        self._stock_process = optimizer.process_gradients
        self._stock_reduce = optimizer.reduce_gradients
        self._stock_epilogue = optimizer.overlapping_partition_gradients_reduce_epilogue
        optimizer.process_gradients = self.process_gradients
        optimizer.reduce_gradients = self.reduce_gradients
        optimizer.overlapping_partition_gradients_reduce_epilogue = self.epilogue
        optimizer.overlap_comm = False

    def process_gradients(self, param: nn.Parameter, i: int) -> None:
        """Called by the optimizer's hook: `param.grad` was accumulated; i is its parameter group."""
        optimizer = self.optimizer
        if optimizer._coalesce_grad_reduction:
            self._left_to_deepspeed = True
        elif not self.engine._running_engine_backward:
            # With reentrant checkpointing DeepSpeed ends such a backward several times, reducing what came so far.
            logger.warning_once("a backward that is not engine.backward(): DeepSpeed reduces it, at its end")
            self._left_to_deepspeed = True
        if self._left_to_deepspeed:
            self._stock_process(param, i)
            return
        optimizer.setup_buckets()
        if self._reduces_now() and getattr(param, "ds_grad_is_ready", True):
            self.reducer.ready(param)

    def reduce_gradients(self, pipeline_parallel: bool = False) -> None:
        """The engine's call at a stage-1 accumulation boundary."""
        if self._left_to_deepspeed:
            self._stock_reduce(pipeline_parallel=pipeline_parallel)
        else:
            self.epilogue()

    def epilogue(self) -> None:
        """The end of a backward (stage 2) or of an accumulation window (stage 1)."""
        if not self._left_to_deepspeed:
            self.optimizer.setup_buckets()  # a rank on which no hook ran
            self.reducer.finish()
        self._left_to_deepspeed = False
        self._stock_epilogue()

    def _reduces_now(self) -> bool:
        engine = self.engine
        return self._every_backward or (engine.is_gradient_accumulation_boundary() and not engine.inside_no_sync_ctxt)

    def _make_reducer(self) -> GradReducer:
        optimizer = self.optimizer
        groups_of = {p: i for i, group in enumerate(optimizer.bit16_groups) for p in group if p.requires_grad}
        backward_order = [p for p in self.engine.module.parameters() if p in groups_of][::-1]
        missing = set(groups_of) - set(backward_order)
        backward_order += [p for p in groups_of if p in missing]  # optimised, but not the module's
        return GradReducer(
            ((p, self._reduction(p)) for p in backward_order),
            first_numel=min(FIRST_BUCKET_NUMEL, optimizer.reduce_bucket_size),
            bucket_numel=min(BUCKET_NUMEL, optimizer.reduce_bucket_size),
            comm=dist,
            everyone=optimizer.dp_process_group,
            # At stage 1 a gradient outside of this rank's partition goes with the others, in the epilogue.
            keep=self._in_partition if optimizer.partition_gradients else None,
            # Stage 2 is chosen where all gradients at once do not fit, so no first round may hold them all.
            learn=not optimizer.partition_gradients,
        )

    def _in_partition(self, param: nn.Parameter) -> bool:
        return self.optimizer.is_param_in_current_partition[self.optimizer.get_param_id(param)]

    def _reduction(self, param: nn.Parameter) -> Reduction:
        """Groups, factors and dtype of DeepSpeedZeroOptimizer.average_tensor."""
        optimizer = self.optimizer
        group = optimizer.expert_dp_process_group[param.group_name] if is_moe_param(param) else (
            optimizer.dp_process_group
        )  # fmt: skip
        divisor = dist.get_world_size(optimizer.dp_process_group) / float(optimizer.sequence_parallel_size)
        if not optimizer.reduce_scatter:
            before, after = scaling(self.engine, divisor)
        else:
            before, after = (1.0 / divisor if optimizer.gradient_average else 1.0), 1.0
        split_sequence = optimizer.sequence_parallel_size > 1 and optimizer.reduce_scatter
        dtype = torch.float32 if split_sequence else optimizer.get_param_comm_dtype(param)
        return Reduction(group, before, after, dtype)
