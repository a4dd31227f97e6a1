# SPDX-License-Identifier: GPL-3.0-or-later
"""Gradient norms under expert parallelism, where DeepSpeed 0.19.8 has them wrong: ZeRO stage 0.

The norm of a model whose experts are spread over ranks is one number,

    norm^2 = sum over dense parameters |g|^2 + sum over the ranks of the expert-parallel group, sum over experts |g|^2,

and the same at every ep_size. DeepSpeed's FP16_Optimizer, BF16_Optimizer and ZeRO optimizers compute it. Two others do
not:

- float32 at stage 0 (deepspeed.runtime.utils.clip_grad_norm_) clips by the average over ranks of local norms, each
  over the rank's own experts, and leaves `get_global_grad_norm()` None;
- FP16_UnfusedOptimizer, which stage 0 uses for float16 and bfloat16 with other optimizers than Adam kernels, leaves
  the experts out. Its step becomes `unfused_step`'s, which computes no other norm than this one.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.moe.utils import is_moe_param
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.pipe.module import PipelineModule
from deepspeed.runtime.utils import is_model_parallel_parameter
from deepspeed.utils import groups
from torch import Tensor, nn

from flashfusemoe_ds.ds.unfused_step import UnfusedStep


def use_exact_grad_norm(engine: Any) -> None:
    """Replaces the wrong norms on this engine's instances; does nothing where DeepSpeed's are right."""
    if engine.zero_optimization_stage() != 0 or isinstance(engine.module, PipelineModule):
        return
    optimizer = engine.optimizer
    if isinstance(optimizer, FP16_UnfusedOptimizer):
        if not optimizer.fused_lamb_legacy:
            UnfusedStep(optimizer, partial(global_grad_norm, mpu=engine.mpu))
    elif not (engine.fp16_enabled() or engine.bfloat16_enabled()):
        _clip_float32_exactly(engine)


def _clip_float32_exactly(engine: Any) -> None:
    def clip_fp32_gradients() -> None:
        params = list(engine.module.parameters())
        norm = global_grad_norm(((p, p.grad) for p in params), engine.mpu)
        torch.nn.utils.clip_grads_with_norm_(params, engine.gradient_clipping(), norm)
        engine._global_grad_norm = norm

    engine.clip_fp32_gradients = clip_fp32_gradients


@torch.no_grad()
def global_grad_norm(grads: Iterable[tuple[nn.Parameter, Tensor | None]], mpu: Any = None) -> Tensor:
    """The L2 norm of the whole model's gradient: a float32 scalar, the same on every rank. A collective.

    Args:
        grads: every parameter of this rank with its reduced gradient, or None.
        mpu: Megatron's model-parallel unit, as DeepSpeed takes it; replicated parameters then count once.
    """
    dense: list[Tensor] = []
    # By name of the expert-parallel group, and whether tensor parallelism splits the experts as well.
    experts: dict[tuple[str, bool], list[Tensor]] = {}
    for param, grad in grads:
        split = is_model_parallel_parameter(param)
        # Before anything is left out: all ranks of a group must see its name.
        mine = experts.setdefault((param.group_name, split), []) if is_moe_param(param) else dense
        counted = is_moe_param(param) or split or mpu is None or mpu.get_model_parallel_rank() == 0
        if grad is not None and counted:
            mine.append((grad.coalesce().values() if grad.is_sparse else grad).float())

    device = get_accelerator().current_device_name()
    square, whole_experts = _square(dense, device), torch.zeros((), device=device)
    for (name, split), tensors in sorted(experts.items(), key=lambda item: item[0]):
        part = _square(tensors, device)
        dist.all_reduce(part, group=groups._get_expert_parallel_group(name))
        (square if split else whole_experts).add_(part)
    if mpu is not None:
        dist.all_reduce(square, group=mpu.get_model_parallel_group())
    return (square + whole_experts).sqrt()


def _square(tensors: list[Tensor], device: str) -> Tensor:
    return torch.nn.utils.get_total_norm(tensors).to(device).square() if tensors else torch.zeros((), device=device)
