# SPDX-License-Identifier: GPL-3.0-or-later
"""FlashFusedMoE's published training workload as a plain PyTorch model around any MoE layer.

24 decoder layers of width 1024, the first with a dense MLP, the others with 8 routed experts (top-2) and a shared
one; 1.14 B parameters. The shape is that of the benchmark in AdaMLLab/FlashFusedMoE at f75f789 (`SeedConfig`'s
defaults). The weights are a function of the seed alone, whatever ep_size and the MoE layer are, so that all contenders
train the same model. Unless told otherwise the MoE layers are `deepspeed.moe.layer.MoE`, which
`flashfusemoe_ds.initialize` replaces in place.

Shape suffixes: B sequences, S tokens per sequence, T = B * S, D hidden size, H heads, C channels of a head, V words,
L MoE layers, E experts of a layer.
"""

from __future__ import annotations

import argparse
import re
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from deepspeed.moe.layer import MoE
from deepspeed.moe.utils import is_moe_param
from deepspeed_layers import SwiGLU
from torch import Tensor, nn
from weights import Weights

sys.path.append(str(Path(__file__).parents[1]))

from lm.layers import CausalAttention, rope_tables

NORM_EPS = 1e-6
INIT_STD = 0.02
_LOCAL_EXPERT = re.compile(r"(?<=\.deepspeed_experts\.)\d+")


@dataclass(frozen=True)
class SeedConfig:
    """Sizes of the model. The defaults are the published ones.

    Attributes:
        vocab: words; the embedding is the output layer as well.
        mlp_size, expert_size, shared_size: intermediate sizes of the SwiGLU of the first layer, of an expert, and of
            the shared expert that every token visits.
        ep_size: ranks that share one set of experts.
        capacity_factor: drop tokens beyond it, as DeepSpeed does; None drops none.
    """

    vocab: int = 50304
    num_layers: int = 24
    hidden_size: int = 1024
    num_heads: int = 16
    mlp_size: int = 4096
    num_experts: int = 8
    expert_size: int = 1536
    shared_size: int = 1536
    top_k: int = 2
    context: int = 1024
    ep_size: int = 1
    capacity_factor: float | None = None
    rope_base: float = 10_000.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None and value <= 0:
                raise ValueError(f"{field.name}={value}: must be positive")
        if self.num_layers < 2:
            raise ValueError(f"num_layers={self.num_layers}: must be at least 2, the first layer is dense")
        if self.hidden_size % (2 * self.num_heads):
            raise ValueError(
                f"hidden_size={self.hidden_size}: must be a multiple of 2 * num_heads = {2 * self.num_heads}, "
                "rotary embeddings turn pairs of channels"
            )
        if self.top_k > self.num_experts:
            raise ValueError(f"top_k={self.top_k}: must be at most num_experts={self.num_experts}")
        if self.num_experts % self.ep_size:
            divisors = [n for n in range(1, self.num_experts + 1) if self.num_experts % n == 0]
            raise ValueError(
                f"ep_size={self.ep_size}: must divide num_experts={self.num_experts}, so be one of {divisors}"
            )


SIZES = {
    "seed": SeedConfig(),
    "toy": SeedConfig(
        vocab=64,
        num_layers=3,
        hidden_size=32,
        num_heads=2,
        mlp_size=64,
        num_experts=4,
        expert_size=32,
        shared_size=32,
        context=32,
    ),
}


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--size", choices=SIZES, default="seed", help="the published sizes, or some for a CPU")
    for field in fields(SeedConfig):
        if field.name not in ("ep_size", "rope_base"):
            kind = float if field.name == "capacity_factor" else int
            group.add_argument(f"--{field.name}", type=kind, help="in place of --size's")
    group.add_argument("--ep_size", type=int, help="ranks that share one set of experts; default: all that can")


def model_config(args: argparse.Namespace, ep_size: int) -> SeedConfig:
    """ValueError where the sizes do not fit each other."""
    given = {field.name: getattr(args, field.name, None) for field in fields(SeedConfig)}
    given = {name: value for name, value in given.items() if value is not None}
    return replace(SIZES[args.size], **{**given, "ep_size": ep_size})


class LMOutput(NamedTuple):
    loss: Tensor  # cross-entropy, nats per token
    l_aux: Tensor | None  # load-balancing loss, mean over the MoE layers
    counts_LE: Tensor | None  # routes that this rank sent to each expert of each MoE layer


class Block(nn.Module):
    """A decoder layer.

    Args:
        moe: what deepspeed.moe.layer.MoE is: x in, (output, load-balancing loss, routes per expert) out; the latter
            two may be None. Without it the layer is dense. Where its `brings_shared_expert` is true, the shared
            expert's output is part of its own.
    """

    def __init__(self, cfg: SeedConfig, moe: nn.Module | None) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(cfg.hidden_size, eps=NORM_EPS)
        self.attention = CausalAttention(cfg.hidden_size, cfg.num_heads)
        self.mlp_norm = nn.RMSNorm(cfg.hidden_size, eps=NORM_EPS)
        # Beside a MoE layer, the shared expert.
        self.mlp = None
        if not getattr(moe, "brings_shared_expert", False):
            self.mlp = SwiGLU(cfg.hidden_size, cfg.mlp_size if moe is None else cfg.shared_size)
        self.moe = moe

    def forward(self, x_BSD: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor | None, Tensor | None]:
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), rope)
        normed_BSD = self.mlp_norm(x_BSD)
        if self.moe is None:
            return x_BSD + self.mlp(normed_BSD), None, None
        routed_BSD, l_aux, counts_E = self.moe(normed_BSD)
        x_BSD = x_BSD + routed_BSD
        return x_BSD if self.mlp is None else x_BSD + self.mlp(normed_BSD), l_aux, counts_E


class SeedLM(nn.Module):
    """Next-word prediction: int64 [B, S + 1] in, `LMOutput` out; word i + 1 answers position i.

    Args:
        make_moe: the MoE layer of the block of this number; None for DeepSpeed's.
    """

    def __init__(self, cfg: SeedConfig, make_moe: Callable[[int], nn.Module] | None = None) -> None:
        super().__init__()
        self.cfg = cfg
        make_moe = make_moe or (lambda block: stock_moe(cfg))
        self.embedding = nn.Embedding(cfg.vocab, cfg.hidden_size)
        self.blocks = nn.ModuleList(Block(cfg, make_moe(i) if i else None) for i in range(cfg.num_layers))
        self.norm = nn.RMSNorm(cfg.hidden_size, eps=NORM_EPS)

    def forward(self, words_BS: Tensor) -> LMOutput:
        inputs_BS, answers_BS = words_BS[:, :-1], words_BS[:, 1:]
        head_dim = self.cfg.hidden_size // self.cfg.num_heads
        rope = rope_tables(inputs_BS.shape[1], head_dim, self.cfg.rope_base, inputs_BS.device)
        x_BSD = self.embedding(inputs_BS)
        aux, counts = [], []
        for block in self.blocks:
            x_BSD, l_aux, counts_E = block(x_BSD, rope)
            if l_aux is not None and counts_E is not None:
                aux.append(l_aux)
                counts.append(counts_E.detach())
        logits_TV = F.linear(self.norm(x_BSD), self.embedding.weight).flatten(0, 1).float()
        loss = F.cross_entropy(logits_TV, answers_BS.flatten())
        if not aux:
            return LMOutput(loss, None, None)
        return LMOutput(loss, torch.stack(aux).float().mean(), torch.stack(counts))


def make_model(
    cfg: SeedConfig,
    seed: int,
    ep_rank: int,
    device: torch.device,
    dtype: torch.dtype,
    make_moe: Callable[[int], nn.Module] | None = None,
) -> SeedLM:
    """A model on `device`; expert e of a layer has the same weights on whichever rank it lives.

    Args:
        ep_rank: this rank's place in its expert-parallel group.
        make_moe: as in SeedLM. Its layers bring their weights: `moe_weights`, to train the same model.
    """
    with device:
        model = SeedLM(cfg, make_moe)
    num_local = cfg.num_experts // cfg.ep_size
    with torch.no_grad():
        for name, param in model.named_parameters():
            if param.ndim < 2 or (make_moe is not None and ".moe." in name):
                continue  # norms stay at one
            name = _LOCAL_EXPERT.sub(lambda local: str(int(local[0]) + ep_rank * num_local), name)
            _draw(param, name, seed)
    return model.to(dtype)


def moe_weights(cfg: SeedConfig, block: int, seed: int, device: torch.device, dtype: torch.dtype) -> Weights:
    """The weights that `make_model` gives this block's MoE layer, DeepSpeed's with all experts of it, and the shared
    expert beside it."""

    def drawn(name: str, *size: int) -> Tensor:
        return _draw(torch.empty(size, device=device), f"blocks.{block}.{name}.weight", seed).to(dtype)

    def stacked(name: str, *size: int) -> Tensor:
        experts = "moe.deepspeed_moe.experts.deepspeed_experts"
        return torch.stack([drawn(f"{experts}.{e}.{name}", *size) for e in range(cfg.num_experts)])

    D, F, S = cfg.hidden_size, cfg.expert_size, cfg.shared_size
    shared = drawn("mlp.gate_up", 2 * S, D)[None], drawn("mlp.down", D, S)[None]
    gate = drawn("moe.deepspeed_moe.gate.wg", cfg.num_experts, D)
    return Weights(gate, stacked("gate_up", 2 * F, D), stacked("down", D, F), shared)


def _draw(tensor: Tensor, name: str, seed: int) -> Tensor:
    """Random entries that follow from the parameter's name and the seed."""
    generator = torch.Generator(tensor.device).manual_seed(seed + zlib.crc32(name.encode()))
    return tensor.normal_(std=INIT_STD, generator=generator)


def parameter_counts(model: SeedLM) -> dict[str, int]:
    """Parameters of the whole model, over all ranks, and those that one token's forward pass touches."""
    cfg = model.cfg
    experts = sum(p.numel() for p in model.parameters() if is_moe_param(p)) * cfg.ep_size
    dense = sum(p.numel() for p in model.parameters() if not is_moe_param(p))
    return {"total": dense + experts, "active": dense + experts * cfg.top_k // cfg.num_experts}


def random_batches(cfg: SeedConfig, batch: int, num: int, seed: int, rank: int, device: torch.device) -> Tensor:
    """int64 [num, B, S + 1], uniform words; other ones on every rank."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + rank)
    return torch.randint(cfg.vocab, (num, batch, cfg.context + 1), generator=generator).to(device)


def stock_moe(cfg: SeedConfig) -> MoE:
    drops = cfg.capacity_factor is not None
    return MoE(
        cfg.hidden_size,
        SwiGLU(cfg.hidden_size, cfg.expert_size),
        num_experts=cfg.num_experts,
        ep_size=cfg.ep_size,
        k=cfg.top_k,
        capacity_factor=cfg.capacity_factor if drops else 1.0,
        drop_tokens=drops,
        use_rts=False,
        top2_2nd_expert_sampling=False,  # else the second expert is drawn at random
    )
