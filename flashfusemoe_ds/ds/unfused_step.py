# SPDX-License-Identifier: GPL-3.0-or-later
"""The step of FP16_UnfusedOptimizer, with one operator for many parameters where DeepSpeed's has one for each.

ZeRO stage 0 in float16 or bfloat16 takes FP16_UnfusedOptimizer, unless the optimizer is one of DeepSpeed's Adam
kernels. Its step converts every gradient to float32, takes a norm, divides by the loss scale and clips, lets the
user's optimizer update float32 copies of the weights, and rounds those back. DeepSpeed 0.19.8 does each of these
parameter by parameter, so that a GPU waits for the host, and its norm leaves the experts out. Here they go through
torch's foreach operators, with the arithmetic the same to the bit, and the norm is the caller's.

Left to DeepSpeed: the agreement of ranks about an overflow, the loss scale, the factor of unscaling and clipping, and
what a skipped step does.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

GradNorm = Callable[[Iterable[tuple[nn.Parameter, Tensor | None]]], Tensor]


class UnfusedStep:
    """Takes the place of an FP16_UnfusedOptimizer's step; not of the one that legacy fused LAMB has.

    Args:
        optimizer: the FP16_UnfusedOptimizer; its `step` is replaced on the instance.
        grad_norm: from every parameter of this rank with its float32 gradient, the norm to clip by; may be a
            collective. The same on every rank: a step is skipped where it is not finite.
    """

    def __init__(self, optimizer: Any, grad_norm: GradNorm) -> None:
        self.optimizer, self.grad_norm = optimizer, grad_norm
        optimizer.step = self.step

    def step(self, closure: None = None) -> bool:
        """One step, or none where gradients overflowed. Returns whether they did. A closure is not supported."""
        optimizer = self.optimizer
        optimizer.overflow = optimizer.overflow_checker.check()
        if optimizer.overflow:
            return optimizer._skip_invalid_grad_norm()

        params = [p for group in optimizer.fp16_groups for p in group]
        masters = [p for group in optimizer.fp32_groups for p in group]
        convert_gradients(params, masters)
        norm = float(self.grad_norm((p, m.grad) for p, m in zip(params, masters, strict=True)))
        if not math.isfinite(norm):
            return optimizer._skip_invalid_grad_norm()

        optimizer._update_scale(False)
        optimizer._global_grad_norm = norm / optimizer.loss_scale_config.cur_scale
        scale = optimizer.unscale_and_clip_grads(norm, apply_scale=False)
        if scale != 1.0 and masters:  # foreach refuses an empty list
            torch._foreach_mul_([m.grad.data for m in masters], 1.0 / scale)
        optimizer.optimizer.step()
        for master in masters:
            master.grad = None
        # Through .data, as DeepSpeed does: a graph that still holds a weight may be run again after the step.
        copy_all([p.data for p in params], [m.data for m in masters])
        return optimizer.overflow


def convert_gradients(params: Sequence[nn.Parameter], masters: Sequence[nn.Parameter]) -> None:
    """Gives each master weight its parameter's gradient in the master's dtype; zeros where there is none."""
    targets: list[Tensor] = []
    sources: list[Tensor] = []
    for param, master in zip(params, masters, strict=True):
        grad = param.grad
        if grad is None:
            master.grad = torch.zeros_like(master)
        elif grad.is_sparse or grad.dtype == master.dtype:
            master.grad = grad.to(master.dtype)
        else:
            # The gradient's strides, which keep the copy on its fast path.
            master.grad = torch.empty_like(grad, dtype=master.dtype)
            targets.append(master.grad)
            sources.append(grad.data)
    copy_all(targets, sources)


def copy_all(targets: Sequence[Tensor], sources: Sequence[Tensor]) -> None:
    """Copies each source into the target of its shape, with one operator for each pair of devices and of dtypes."""
    # By the targets' dtype as well: versions of torch's CUDA kernel take the first target's for all of them.
    alike: defaultdict[tuple[Any, ...], tuple[list[Tensor], list[Tensor]]] = defaultdict(lambda: ([], []))
    for target, source in zip(targets, sources, strict=True):
        kind = alike[target.device, target.dtype, source.device, source.dtype]
        kind[0].append(target)
        kind[1].append(source)
    for kind in alike.values():
        torch._foreach_copy_(*kind)
