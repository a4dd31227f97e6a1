# SPDX-License-Identifier: GPL-3.0-or-later
"""Checks of what a user passes in, with messages that name the setting, its value and the valid ones.

They look at shapes, dtypes and devices alone: no device synchronisation, and before any collective.
"""

from __future__ import annotations

import math
from numbers import Integral

from torch import Tensor


def check_positive(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, Integral) or value < 1:
        raise ValueError(f"{name} is {value!r}; it must be a positive integer")


def check_coefficient(name: str, value: float) -> None:
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} is {value!r}; it must be 0 or a positive number")


def check_hidden(layer: str, hidden_states: Tensor, d_model: int, parameter: Tensor) -> None:
    """Raises ValueError unless hidden_states is a floating-point [*, d_model] on the parameter's device."""
    if hidden_states.dim() < 1 or hidden_states.shape[-1] != d_model:
        raise ValueError(f"{layer}: input has shape {tuple(hidden_states.shape)}; expected [*, {d_model}]")
    if not hidden_states.is_floating_point():
        raise ValueError(f"{layer}: input is {hidden_states.dtype}; expected a floating-point dtype")
    if hidden_states.device != parameter.device:
        raise ValueError(
            f"{layer}: input is on {hidden_states.device}, the layer's parameters on {parameter.device}; "
            "move one to the other"
        )
