# SPDX-License-Identifier: GPL-3.0-or-later
"""A byte-level transformer whose MLPs, after the first layer, are Mixture-of-Experts layers.

Shape suffixes: B sequences, S bytes per sequence, D hidden size, H heads, C channels of a head, V = 256 byte values,
L MoE layers, E experts of a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from deepspeed.moe.utils import is_moe_param
from torch import Tensor, nn

from flashfusemoe_ds import MoE
from lm.layers import VOCAB, CausalAttention, SwiGLU, rope_tables


@dataclass(frozen=True)
class LMConfig:
    """Sizes of the model; `ep_size` is the number of ranks that share one set of experts."""

    num_layers: int
    hidden_size: int
    num_heads: int
    mlp_size: int
    num_experts: int
    expert_size: int
    top_k: int
    ep_size: int
    context: int
    rope_base: float = 10_000.0

    def __post_init__(self) -> None:
        if self.num_layers < 2:
            raise ValueError(f"num_layers={self.num_layers}: must be at least 2, the first layer is dense")
        if self.num_heads < 1 or self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"hidden_size={self.hidden_size}: must be a multiple of 2 * num_heads = {2 * self.num_heads}, "
                "rotary embeddings turn pairs of channels"
            )
        if not 1 <= self.top_k <= self.num_experts:
            raise ValueError(f"top_k={self.top_k}: must be from 1 to num_experts={self.num_experts}")
        if self.ep_size < 1 or self.num_experts % self.ep_size:
            divisors = [n for n in range(1, self.num_experts + 1) if self.num_experts % n == 0]
            raise ValueError(
                f"ep_size={self.ep_size}: must divide num_experts={self.num_experts}, so be one of {divisors}"
            )


class LMOutput(NamedTuple):
    logits_BSV: Tensor  # float32
    l_aux: Tensor  # load-balancing loss, mean over the MoE layers; 1 when the load is even
    counts_LE: Tensor  # routes that this rank sent to each expert of each MoE layer


def dropless_moe(cfg: LMConfig, expert: nn.Module | None = None) -> MoE:
    """Every byte reaches its top_k experts, SwiGLUs unless told otherwise, and no choice is random."""
    return MoE(
        cfg.hidden_size,
        SwiGLU(cfg.hidden_size, cfg.expert_size) if expert is None else expert,
        num_experts=cfg.num_experts,
        ep_size=cfg.ep_size,
        k=cfg.top_k,
        drop_tokens=False,
        use_rts=False,
        top2_2nd_expert_sampling=False,
    )


class Block(nn.Module):
    def __init__(self, cfg: LMConfig, moe: nn.Module | None) -> None:
        super().__init__()
        self.is_moe = moe is not None
        self.attention_norm = nn.RMSNorm(cfg.hidden_size, eps=1e-5)
        self.attention = CausalAttention(cfg.hidden_size, cfg.num_heads)
        self.mlp_norm = nn.RMSNorm(cfg.hidden_size, eps=1e-5)
        self.mlp = SwiGLU(cfg.hidden_size, cfg.mlp_size) if moe is None else moe

    def forward(self, x_BSD: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), rope)
        normed_BSD = self.mlp_norm(x_BSD)
        if not self.is_moe:
            return x_BSD + self.mlp(normed_BSD), None, None
        y_BSD, l_aux, counts_E = self.mlp(normed_BSD)
        return x_BSD + y_BSD, l_aux, counts_E


class ByteLM(nn.Module):
    """Next-byte prediction: int64 [B, S] in, `LMOutput` out.

    Args:
        moe: makes the MoE layer of a block; a layer with the interface of deepspeed.moe.layer.MoE.
    """

    def __init__(self, cfg: LMConfig, moe: Callable[[LMConfig], nn.Module] = dropless_moe) -> None:
        super().__init__()
        self.cfg = cfg
        # torch's default of unit variance stays: with 0.02 the untrained attention drowns which byte is where, and
        # learning starts later.
        self.embedding = nn.Embedding(VOCAB, cfg.hidden_size)
        self.blocks = nn.ModuleList(Block(cfg, moe(cfg) if i else None) for i in range(cfg.num_layers))
        self.norm = nn.RMSNorm(cfg.hidden_size, eps=1e-5)
        # Zero weights: training starts at exactly ln(256) nats per byte, the loss of a uniform guess.
        self.head = nn.Linear(cfg.hidden_size, VOCAB, bias=False)
        nn.init.zeros_(self.head.weight)

    def forward(self, bytes_BS: Tensor) -> LMOutput:
        head_dim = self.cfg.hidden_size // self.cfg.num_heads
        rope = rope_tables(bytes_BS.shape[1], head_dim, self.cfg.rope_base, bytes_BS.device)
        x_BSD = self.embedding(bytes_BS)
        aux: list[Tensor] = []
        counts: list[Tensor] = []
        for block in self.blocks:
            x_BSD, l_aux, counts_E = block(x_BSD, rope)
            if l_aux is not None and counts_E is not None:
                aux.append(l_aux)
                counts.append(counts_E.detach())
        logits_BSV = self.head(self.norm(x_BSD)).float()
        return LMOutput(logits_BSV, torch.stack(aux).float().mean(), torch.stack(counts))


def parameter_groups(model: nn.Module) -> list[dict[str, object]]:
    """Weight decay for matrices, none for norms. DeepSpeed splits the experts off into groups of their own by name."""
    params = list(model.parameters())
    return [
        {"name": "matrices", "params": [p for p in params if p.ndim > 1]},
        {"name": "norms", "params": [p for p in params if p.ndim <= 1], "weight_decay": 0.0},
    ]


def parameter_counts(model: ByteLM) -> dict[str, int]:
    """Parameters of the whole model, over all ranks, and those that one byte's forward pass touches."""
    cfg = model.cfg
    experts = sum(p.numel() for p in model.parameters() if is_moe_param(p)) * cfg.ep_size
    dense = sum(p.numel() for p in model.parameters() if not is_moe_param(p))
    return {"total": dense + experts, "active": dense + experts * cfg.top_k // cfg.num_experts}
