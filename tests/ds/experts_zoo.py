# SPDX-License-Identifier: GPL-3.0-or-later
"""Expert modules that the tests hand to MoE: those it fuses, and those it must run as they are."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PlainMLP(nn.Module):
    """fc2(act(fc1(x))), with or without biases."""

    def __init__(self, d_model: int, ffn_dim: int, act: Callable[[Tensor], Tensor], bias: bool) -> None:
        super().__init__()
        self.fc1 = nn.Linear(d_model, ffn_dim, bias=bias)
        self.act = act
        self.fc2 = nn.Linear(ffn_dim, d_model, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class GatedMLP(nn.Module):
    """down_proj(silu(gate_proj(x)) * up_proj(x)), LLaMA's names."""

    def __init__(self, d_model: int, ffn_dim: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(d_model, ffn_dim, bias=False)
        self.up_proj = nn.Linear(d_model, ffn_dim, bias=False)
        self.down_proj = nn.Linear(ffn_dim, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class PackedGatedMLP(nn.Module):
    """The same with gate and up stacked in one Linear."""

    def __init__(self, d_model: int, ffn_dim: int) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(d_model, 2 * ffn_dim, bias=False)
        self.down_proj = nn.Linear(ffn_dim, d_model, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class InterleavedMLP(nn.Module):
    """One Linear with up and gate rows in turn, and biases."""

    def __init__(self, d_model: int, ffn_dim: int) -> None:
        super().__init__()
        self.down = nn.Linear(ffn_dim, d_model)  # registered first: then the stacked order is another
        self.both = nn.Linear(d_model, 2 * ffn_dim)

    def forward(self, x: Tensor) -> Tensor:
        h = self.both(x)
        return self.down(h[..., 0::2] * F.silu(h[..., 1::2]))


class CustomExpert(nn.Module):
    """No plain MLP: normalises first and returns (output, bias), of which DeepSpeed uses the output alone."""

    def __init__(self, d_model: int, ffn_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d_model)
        self.inner = nn.Linear(d_model, ffn_dim)
        self.dropout = nn.Dropout(p=0.0)
        self.outer = nn.Linear(ffn_dim, d_model, bias=False)
        self.unused_bias = nn.Parameter(torch.zeros(d_model))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self.outer(self.dropout(F.gelu(self.inner(self.norm(x))))), self.unused_bias


class LooksLikeMLP(nn.Module):
    """The parameters of PlainMLP, but another function: to fuse it by its names alone would be wrong."""

    def __init__(self, d_model: int, ffn_dim: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(d_model, ffn_dim)
        self.act = nn.ReLU()
        self.fc2 = nn.Linear(ffn_dim, d_model)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x))) + 0.5 * x


# Recognised, so stored as stacked 3-D parameters; the value is a factory (d_model, ffn_dim) -> nn.Module.
FUSED: dict[str, Callable[[int, int], nn.Module]] = {
    "relu": lambda d, f: PlainMLP(d, f, nn.ReLU(), bias=False),
    "relu_bias": lambda d, f: PlainMLP(d, f, nn.ReLU(), bias=True),
    "gelu": lambda d, f: PlainMLP(d, f, nn.GELU(), bias=False),
    "gelu_bias": lambda d, f: PlainMLP(d, f, nn.GELU(), bias=True),
    "gelu_tanh_bias": lambda d, f: PlainMLP(d, f, nn.GELU(approximate="tanh"), bias=True),
    "silu": lambda d, f: PlainMLP(d, f, nn.SiLU(), bias=False),
    "silu_bias": lambda d, f: PlainMLP(d, f, nn.SiLU(), bias=True),
    "sequential_bias": lambda d, f: nn.Sequential(nn.Linear(d, f), nn.GELU(), nn.Linear(f, d)),
    "swiglu": GatedMLP,
    "swiglu_packed": PackedGatedMLP,
}
OTHER: dict[str, Callable[[int, int], nn.Module]] = {
    "custom": CustomExpert,
    "lookalike": LooksLikeMLP,
    "linear": lambda d, f: nn.Linear(d, d),
    "three_layers": lambda d, f: nn.Sequential(
        nn.Linear(d, f), nn.ReLU(), nn.Linear(f, f), nn.ReLU(), nn.Linear(f, d)
    ),
}
EXPERTS = FUSED | OTHER
