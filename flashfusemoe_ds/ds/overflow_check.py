# SPDX-License-Identifier: GPL-3.0-or-later
"""Are there inf or NaN in the gradients: asked once for all of them, where DeepSpeed asks one by one.

| float16, bfloat16   | DeepSpeed 0.19.8 asks in                                       | for each gradient   |
|---------------------|----------------------------------------------------------------|---------------------|
| ZeRO stage 0        | `CheckOverflow.has_overflow_serial`                            | 6 operators, 1 wait |
| ZeRO stages 1 and 2 | `DeepSpeedZeroOptimizer.has_overflow_partitioned_grads_serial` | 7 operators         |

A wait is a read by the host of what the device computes. These two functions are replaced on the instance. What ranks
tell each other about the answer, and what a step does with it, stays DeepSpeed's own.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.utils import has_inf_or_nan
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor, nn

# torch's norm of many tensors takes 4 bytes of scratch memory for 65,536 elements of the largest, times the number of
# tensors: so many at a time, alike in size, take 32 MiB where the largest has 2**30 elements.
MOST_AT_ONCE = 512


def check_overflow_at_once(optimizer: Any) -> None:
    """Replaces the check on this optimizer's instance; does nothing where DeepSpeed has none that asks one by one."""
    if isinstance(optimizer, FP16_Optimizer | FP16_UnfusedOptimizer):
        optimizer.overflow_checker.has_overflow_serial = _has_overflow
    elif type(optimizer) is DeepSpeedZeroOptimizer:
        _check_partition_at_once(optimizer)


def _has_overflow(params: Iterable[nn.Parameter]) -> bool:
    return bool(any_nonfinite(p.grad for p in params if p.grad is not None))


def _check_partition_at_once(optimizer: Any) -> None:
    def has_overflow_partitioned_grads_serial() -> Tensor:
        """bool [1] on the accelerator, as DeepSpeed's has_overflow goes on with it."""
        groups = (optimizer.averaged_gradients[i] for i in range(len(optimizer.bit16_groups)))
        found = any_nonfinite(grad for group in groups for grad in group if grad is not None)
        return found.to(get_accelerator().current_device_name()).reshape(1)

    optimizer.has_overflow_partitioned_grads_serial = has_overflow_partitioned_grads_serial


def any_nonfinite(tensors: Iterable[Tensor]) -> Tensor:
    """Whether inf, -inf or NaN is in any of these tensors: a bool scalar, on the device of one of them.

    The host does not wait, unless they are on several devices. The largest magnitude answers it: a maximum is exact
    in every dtype, infinite where an element is, and NaN where one is. Tensors may differ in device, dtype and shape;
    empty ones hold nothing.
    """
    dense: list[Tensor] = []
    sparse: list[Tensor] = []
    for tensor in tensors:
        (sparse if tensor.is_sparse else dense).append(tensor)
    dense = [t for t in dense if t.numel()]  # a maximum over nothing is an error
    answers = [has_inf_or_nan(t) for t in sparse]
    dense.sort(key=Tensor.numel)
    for first in range(0, len(dense), MOST_AT_ONCE):
        some = dense[first : first + MOST_AT_ONCE]
        answers.append(torch.nn.utils.get_total_norm(some, norm_type=math.inf).isfinite().logical_not())
    if not answers:
        return torch.tensor(False)
    found, *others = answers
    for other in others:
        found = found.logical_or(other.to(found.device))
    return found
