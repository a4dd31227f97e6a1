# SPDX-License-Identifier: GPL-3.0-or-later
"""ZeRO stage 0: the engine's reduction of dense and expert gradients, moved from the end of backward into it.

DeepSpeedEngine calls `allreduce_gradients` when a backward is over, and in `step` where the caller owns the
accumulation boundary. It does so here too; but at an accumulation boundary the hooks have launched most buckets by
then, and what the call does is wait for them. Groups, factors, the dtype on the wire, zeros for unused parameters and
sparse gradients are the engine's own (deepspeed/runtime/engine.py: buffered_allreduce_fallback and what it calls).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.moe.utils import is_moe_param
from deepspeed.runtime.sparse_tensor import SparseTensor
from deepspeed.utils import groups, logger
from torch import nn

from flashfusemoe_ds.ds.grad_buckets import GradReducer, Reduction

# Elements. Large enough for a collective to run at the links' full rate, small enough that the last one, which no
# backward is left to hide, is short.
FIRST_BUCKET_NUMEL = 1 << 20
BUCKET_NUMEL = 1 << 25


class Stage0Overlap:
    """Hooks on an engine's parameters, and its `allreduce_gradients` replaced on the instance."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine
        self._sparse = _sparse_weights(engine.module)
        self._hooks: list[Any] = []
        self._cover()
        self._stock_allreduce, engine.allreduce_gradients = engine.allreduce_gradients, self.allreduce_gradients
        self._stock_destroy, engine.destroy = engine.destroy, self.destroy

    def allreduce_gradients(self, bucket_size: int | None = None) -> None:
        """In place of DeepSpeedEngine.allreduce_gradients; bucket_size is the engine's way and has no effect."""
        engine = self.engine
        if engine.is_deepcompile_active():
            self._stock_allreduce()
            return
        if not engine.is_gradient_accumulation_boundary():
            return
        if engine._is_compiled_autograd_enabled:
            logger.warning_once("compiled autograd runs no gradient hooks: gradients are reduced after backward")
        self.reducer.finish()
        self._reduce_sparse()
        thawed = [p for p in self._frozen if p.requires_grad]
        if thawed:
            self._reduce_now(thawed)
            self._cover()

    def destroy(self) -> None:
        self._remove_hooks()
        self._stock_destroy()

    def _cover(self) -> None:
        """Buckets for what is trainable now, in the order in which a backward finishes it."""
        self._remove_hooks()
        sparse = set(self._sparse)
        dense = [p for p in self.engine.module.parameters() if p.numel() and p not in sparse]
        self._frozen = [p for p in dense if not p.requires_grad]
        self.reducer = GradReducer(
            ((p, self._reduction(p)) for p in reversed(dense) if p.requires_grad),
            first_numel=FIRST_BUCKET_NUMEL,
            bucket_numel=BUCKET_NUMEL,
            comm=dist,
            everyone=groups._get_sequence_data_parallel_group(),
        )
        self._hooks = [p.register_post_accumulate_grad_hook(self._on_grad) for p in self.reducer.params]

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _on_grad(self, param: nn.Parameter) -> None:
        engine = self.engine
        # Asked at every gradient: each may change between backwards, and all are plain attributes. A backward that
        # the engine does not run (inside a forward, say) only accumulates, as without us.
        if (
            engine._running_engine_backward
            and engine.enable_backward_allreduce
            and not engine.inside_no_sync_ctxt
            and engine.is_gradient_accumulation_boundary()
            and not torch.compiler.is_compiling()
        ):
            self.reducer.ready(param)

    def _reduction(self, param: nn.Parameter) -> Reduction:
        group, divisor = _group_and_divisor(self.engine, param)
        before, after = scaling(self.engine, divisor)
        return Reduction(group, before, after, self.engine.communication_data_type)

    def _reduce_now(self, params: Iterable[nn.Parameter]) -> None:
        GradReducer(
            ((p, self._reduction(p)) for p in params),
            first_numel=BUCKET_NUMEL,
            bucket_numel=BUCKET_NUMEL,
            comm=dist,
        ).finish_only()

    def _reduce_sparse(self) -> None:
        """Embeddings made with sparse=True, by the engine's own gather of indices and values."""
        dense = []
        for param in self._sparse:
            if not param.requires_grad:
                continue
            if param.grad is None:
                param.grad = torch.sparse_coo_tensor(
                    torch.empty(1, 0, dtype=torch.long, device=param.device),
                    torch.empty(0, *param.shape[1:], dtype=param.dtype, device=param.device),
                    param.shape,
                )
            if not param.grad.is_sparse:  # a weight that an output layer shares
                dense.append(param)
                continue
            group, divisor = _group_and_divisor(self.engine, param)
            self.engine.sparse_allreduce_no_retain([SparseTensor(param.grad)], dp_group=group, dp_world_size=divisor)
        if dense:
            self._reduce_now(dense)


def scaling(engine: Any, divisor: float) -> tuple[float, float]:
    """Factors before and after the sum, from gradient_allreduce_op, prescale_gradients, gradient_predivide_factor."""
    if not engine.gradient_average:
        return 1.0, 1.0
    if not engine.postscale_gradients():
        return 1.0 / divisor, 1.0
    predivide = engine.gradient_predivide_factor()
    return 1.0 / predivide, predivide / divisor


def _group_and_divisor(engine: Any, param: nn.Parameter) -> tuple[Any, float]:
    """Dense: the average over the (sequence-)data-parallel ranks. Experts: the sum over the ranks that hold the same
    ones, divided by all data-parallel ranks, because the exchange between ranks has summed over the others."""
    if is_moe_param(param):
        data_parallel = dist.get_world_size(groups._get_data_parallel_group())
        return groups._get_expert_data_parallel_group(param.group_name), float(data_parallel)
    group = groups._get_sequence_data_parallel_group()
    return group, dist.get_world_size(group) / float(engine.sequence_parallel_size)


def _sparse_weights(module: nn.Module) -> list[nn.Parameter]:
    """Weights of the embeddings that make sparse gradients, each once."""
    kinds = (nn.Embedding, nn.EmbeddingBag)
    return list(dict.fromkeys(m.weight for m in module.modules() if isinstance(m, kinds) and m.sparse))
