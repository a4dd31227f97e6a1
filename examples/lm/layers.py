# SPDX-License-Identifier: GPL-3.0-or-later
"""What a decoder over bytes has beside Mixture-of-Experts layers: attention with rotary embeddings, SwiGLU, the loss.

Shape suffixes as in model.py.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VOCAB = 256


class SwiGLU(nn.Module):
    """w_down(silu(w_gate x) * w_up x): the dense MLP of the first layer, and the expert of all others."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.w_gate = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.w_up = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.w_down = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.w_down(F.silu(self.w_gate(x)) * self.w_up(x))


def rope_tables(length: int, head_dim: int, base: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [S, C / 2]. Not buffers: a bf16 engine would round buffers, and with them the positions."""
    inv_freq = base ** (-torch.arange(0, head_dim, 2, device=device, dtype=torch.float32) / head_dim)
    angle = torch.outer(torch.arange(length, device=device, dtype=torch.float32), inv_freq)
    return angle.cos(), angle.sin()


def apply_rope(x_BHSC: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    cos, sin = rope
    first, second = x_BHSC.float().chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x_BHSC.dtype)


class CausalAttention(nn.Module):
    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(hidden_size, 3 * hidden_size, bias=False)
        self.out = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, x_BSD: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        B, S, D = x_BSD.shape
        q, k, v = self.qkv(x_BSD).view(B, S, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        mixed_BHSC = F.scaled_dot_product_attention(apply_rope(q, rope), apply_rope(k, rope), v, is_causal=True)
        return self.out(mixed_BHSC.transpose(1, 2).reshape(B, S, D))


def cross_entropy(logits_BSV: Tensor, window_BS: Tensor) -> Tensor:
    """Nats per byte; position i of the window is answered by byte i + 1."""
    return F.cross_entropy(logits_BSV.flatten(0, 1), window_BS[:, 1:].flatten())
