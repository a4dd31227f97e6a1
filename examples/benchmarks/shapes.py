# SPDX-License-Identifier: GPL-3.0-or-later
"""The shapes that layers are compared at, by name or by numbers."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Shape:
    """One MoE layer's sizes.

    Attributes:
        name: what tables call it.
        T: tokens; D: hidden size; F: intermediate size of one expert (gate and up are 2F wide together);
        E: experts; K: experts per token.
    """

    name: str
    T: int
    D: int
    F: int
    E: int
    K: int

    @property
    def N(self) -> int:
        """Routed rows, T * K."""
        return self.T * self.K

    @property
    def forward_flops(self) -> int:
        """Of the experts' products, 2 per multiply-add; router and activation are not counted."""
        return 6 * self.N * self.D * self.F

    @property
    def step_flops(self) -> int:
        """Forward and backward: the backward has two products for each of the forward's."""
        return 3 * self.forward_flops

    def __str__(self) -> str:
        return f"{self.name} (T={self.T}, D={self.D}, F={self.F}, E={self.E}, K={self.K})"


NAMED = {
    shape.name: shape
    for shape in (
        Shape("seed", 8192, 1024, 2048, 8, 2),
        Shape("qwen3", 16384, 2048, 768, 128, 8),  # Qwen3-30B-A3B
        Shape("mixtral", 8192, 4096, 14336, 8, 2),  # Mixtral 8x7B
        Shape("dsv3", 8192, 7168, 2048, 256, 8),  # DeepSeek-V3, all experts on one GPU
    )
}


def parse_shape(text: str) -> Shape:
    """A name, or T,D,F,E,K. ValueError says what is wrong with the text."""
    if text in NAMED:
        return NAMED[text]
    try:
        T, D, F, E, K = (int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"shape {text!r}: must be one of {', '.join(NAMED)}, or five numbers T,D,F,E,K") from None
    if min(T, D, F, E, K) < 1:
        raise ValueError(f"shape {text!r}: every number must be positive")
    if K > E:
        raise ValueError(f"shape {text!r}: K is {K}, more than the {E} experts")
    if E > D:
        raise ValueError(f"shape {text!r}: E is {E}, more than D={D}; inputs can steer at most D experts")
    return Shape(text.replace(",", "-"), T, D, F, E, K)
