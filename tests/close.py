# SPDX-License-Identifier: GPL-3.0-or-later
"""How fast paths are compared with the float64 reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """max|a - b| / max|b|, 0 for two empty or two all-zero tensors, inf for a NaN or a nonzero against zeros."""
    if expected.numel() == 0:
        return 0.0
    error = float((actual.detach().double() - expected.detach().double()).abs().max())
    scale = float(expected.detach().double().abs().max())
    if error == 0:
        return 0.0
    return error / scale if scale and error == error else float("inf")


def rms_error(actual: Tensor, expected: Tensor) -> float:
    """|a - b| / |b| in the Euclidean norm: for comparing rounding, where one unlucky element decides a maximum."""
    difference = float((actual.detach().double() - expected.detach().double()).norm())
    return difference / float(expected.detach().double().norm())


def value_and_grads(fn: Callable[..., Tensor], inputs: Sequence[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """fn's output and the gradient of every input, for one fixed random direction, everything in `dtype`."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in inputs]
    out = fn(*leaves)
    direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    grads = torch.autograd.grad(out, leaves, direction.to(out.dtype).to(out.device))
    return [out.detach(), *grads]
