# SPDX-License-Identifier: GPL-3.0-or-later
"""In which precision things are computed: elementwise arithmetic, products, and keeping autocast out of them."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

import torch
from torch import Tensor, nn


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Elementwise arithmetic runs in float32 for 16-bit tensors and in the tensor's own precision otherwise."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def without_autocast(device_type: str) -> contextlib.AbstractContextManager[None]:
    """A context in which autocast casts nothing. A backward may be called inside autocast, a forward often is."""
    # While a graph is traced, always: a backward is looked at in its forward's context, but runs outside of it.
    # The meta device, on which `plan` runs models, has no autocast, and raises when it is asked for.
    if torch.compiler.is_compiling() or (device_type != "meta" and torch.is_autocast_enabled(device_type)):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()  # 10 us cheaper, four times a step


def cast_to(dtype: torch.dtype, *tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors in this dtype, without a copy of those that are."""
    return tuple(t if t is None or t.dtype is dtype else t.to(dtype) for t in tensors)


def to_keep(weights: Sequence[Tensor | None], cast: Sequence[Tensor | None]) -> list[Tensor | None]:
    """What a node keeps of weights that it has cast: those that live anyway, to be cast again in the backward. Of a
    weight that was computed, LoRA's for example, the cast is the smaller."""
    return [w if w is None or _lives_anyway(w) else c for w, c in zip(weights, cast, strict=True)]


def _lives_anyway(w: Tensor) -> bool:
    return isinstance(w, nn.Parameter) or (w.is_leaf and w.requires_grad)


def mm32(a: Tensor, b: Tensor) -> Tensor:
    """Product of 16-bit matrices accumulated and returned in float32."""
    if a.is_cuda and a.numel() and b.numel():
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()
