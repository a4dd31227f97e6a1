# SPDX-License-Identifier: GPL-3.0-or-later
"""The experts' activations: value and derivative, gated and plain, in one registry.

A gated activation takes H = [gate | up] of width 2F and returns f(gate) * up; a plain one takes H of width F and
returns f(H). The backward never needs more than H: value and derivative are recomputed from it together.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

Derivative = Callable[[Tensor], tuple[Tensor, Tensor]]


def _silu(g: Tensor) -> tuple[Tensor, Tensor]:
    sigmoid = torch.sigmoid(g)
    value = g * sigmoid
    return value, sigmoid + value * (1 - sigmoid)


def _gelu(g: Tensor) -> tuple[Tensor, Tensor]:
    cdf = 0.5 * (1 + torch.erf(g * math.sqrt(0.5)))
    pdf = torch.exp(-0.5 * g * g) * (1 / math.sqrt(2 * math.pi))
    return g * cdf, cdf + g * pdf


def _gelu_tanh(g: Tensor) -> tuple[Tensor, Tensor]:
    scale = math.sqrt(2 / math.pi)
    tanh = torch.tanh(scale * (g + 0.044715 * g**3))
    inner = scale * (1 + 3 * 0.044715 * g * g)
    return 0.5 * g * (1 + tanh), 0.5 * (1 + tanh) + 0.5 * g * (1 - tanh * tanh) * inner


def _relu(g: Tensor) -> tuple[Tensor, Tensor]:
    return F.relu(g), (g > 0).to(g.dtype)


def _relu_squared(g: Tensor) -> tuple[Tensor, Tensor]:
    positive = F.relu(g)
    return positive * positive, 2 * positive


@dataclass(frozen=True)
class Activation:
    """One activation. `curve(g)` returns f(g) and f'(g) elementwise, in g's dtype."""

    name: str
    gated: bool
    curve: Derivative

    def up_width(self, intermediate: int) -> int:
        """Width of the up-projection's output for an expert of this intermediate size."""
        return 2 * intermediate if self.gated else intermediate

    def forward(self, h_NH: Tensor) -> Tensor:
        """[N, H] -> [N, F], in h's dtype."""
        if not self.gated:
            return self.curve(h_NH)[0]
        gate, up = h_NH.chunk(2, dim=-1)
        return self.curve(gate)[0] * up

    def backward(self, h_NH: Tensor, da_NF: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the recomputed value [N, F] and the gradient with respect to H [N, H]."""
        if not self.gated:
            value, slope = self.curve(h_NH)
            return value, da_NF * slope
        gate, up = h_NH.chunk(2, dim=-1)
        value, slope = self.curve(gate)
        return value * up, torch.cat([da_NF * up * slope, da_NF * value], dim=-1)


ACTIVATIONS: dict[str, Activation] = {
    a.name: a
    for a in (
        Activation("swiglu", True, _silu),
        Activation("geglu", True, _gelu),
        Activation("geglu_tanh", True, _gelu_tanh),
        Activation("reglu", True, _relu),
        Activation("relu_squared", True, _relu_squared),
        Activation("silu", False, _silu),
        Activation("gelu", False, _gelu),
        Activation("gelu_tanh", False, _gelu_tanh),
        Activation("relu", False, _relu),
    )
}


def get_activation(name: str) -> Activation:
    """Looks an activation up by name; ValueError lists the valid names."""
    if name not in ACTIVATIONS:
        raise ValueError(f"activation {name!r} is unknown; valid: {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]
