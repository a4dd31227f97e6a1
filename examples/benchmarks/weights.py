# SPDX-License-Identifier: GPL-3.0-or-later
"""One set of weights for all layers of a comparison, in the layouts that they want.

Layers with the same layout share memory: DeepSeek-V3's experts are 21 GiB, and a dozen copies fit nowhere.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from routing import make_gate
from shapes import Shape
from torch import Tensor, nn


def leaf(tensor: Tensor) -> nn.Parameter:
    """A parameter over the same memory, with a gradient of its own."""
    return nn.Parameter(tensor.detach())


@dataclass
class Weights:
    """gate [E, D], gate_up [E, 2F, D] with gate rows above up rows, down [E, D, F].

    Attributes:
        shared: gate_up [1, 2S, D] and down [1, D, S] of a shared expert, for layers that compute it as well; None in
            comparisons without one.
    """

    gate: Tensor
    gate_up: Tensor
    down: Tensor
    shared: tuple[Tensor, Tensor] | None = None

    @classmethod
    def random(cls, shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> Weights:
        """Entries of variance 1 / fan-in, and a gate with which inputs can be steered (routing.py)."""

        def normal(*size: int) -> Tensor:
            empty = torch.empty(size, dtype=dtype, device=generator.device)
            return empty.normal_(std=size[-1] ** -0.5, generator=generator)

        gate = make_gate(shape, dtype, generator)
        return cls(gate, normal(shape.E, 2 * shape.F, shape.D), normal(shape.E, shape.D, shape.F))

    @cached_property
    def separate(self) -> tuple[Tensor, Tensor]:
        """gate and up [E, F, D] each, contiguous: AutoEP's w1 and w3."""
        gate, up = self.gate_up.chunk(2, dim=1)
        return gate.contiguous(), up.contiguous()

    @cached_property
    def interleaved(self) -> Tensor:
        """[E, 2F, D], gate and up rows in turn: SonicMoE's."""
        E, H, D = self.gate_up.shape
        return self.gate_up.view(E, 2, H // 2, D).transpose(1, 2).reshape(E, H, D)
