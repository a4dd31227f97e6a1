# SPDX-License-Identifier: GPL-3.0-or-later
"""Experts of one's own: which are fused, which run one by one, and why.

    deepspeed --num_gpus 2 examples/custom_expert/train.py --ep_size 2 --deepspeed_config ds_configs/zero0.json

Trains a model with each, and prints what became of it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for lm, beside this folder

from lm.data import Corpus, load_corpus
from lm.launch import start_deepspeed, stop
from lm.model import ByteLM, dropless_moe
from lm.small import add_arguments, model_config, say, train

import flashfusemoe_ds as ffmoe
from flashfusemoe_ds.ds.fused_experts import FusedExperts


class PackedMLP(nn.Module):
    """A gated MLP under names of its own, gate and up in one Linear. It computes swiglu, and that is what counts."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.wide = nn.Linear(hidden_size, 2 * intermediate_size, bias=False)
        self.narrow = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.wide(x).chunk(2, dim=-1)
        return self.narrow(F.silu(gate) * up)


class ClampedMLP(PackedMLP):
    """The same parameters, another function."""

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.wide(x).clamp(-7, 7).chunk(2, dim=-1)
        return self.narrow(F.silu(gate) * up)


class NormedMLP(PackedMLP):
    """A norm inside, with a parameter of its own."""

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__(hidden_size, intermediate_size)
        self.norm = nn.RMSNorm(intermediate_size)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.wide(x).chunk(2, dim=-1)
        return self.narrow(self.norm(F.silu(gate) * up))


EXPERTS = {expert.__name__: expert for expert in (PackedMLP, ClampedMLP, NormedMLP)}


def run(expert: type[nn.Module], args: argparse.Namespace, corpus: Corpus) -> tuple[bool, list[float]]:
    """Whether the experts were fused, and the losses."""
    torch.manual_seed(args.seed)
    model = ByteLM(model_config(args), moe=lambda cfg: dropless_moe(cfg, expert(cfg.hidden_size, cfg.expert_size)))
    engine, *_ = ffmoe.initialize(model=model, model_parameters=model.parameters(), config=args.deepspeed_config)
    fused = any(isinstance(module, FusedExperts) for module in engine.module.modules())
    return fused, train(engine, corpus, range(args.steps), args.seed)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train with experts of one's own.")
    parser.add_argument("--experts", nargs="+", choices=EXPERTS, default=list(EXPERTS), help="(default: all)")
    add_arguments(parser)
    args = parser.parse_args()
    if args.deepspeed_config is None:
        parser.error("--deepspeed_config is required, for example ds_configs/zero0.json")
    start_deepspeed()
    corpus = load_corpus(args.data, args.context)
    for name in args.experts:
        fused, losses = run(EXPERTS[name], args, corpus)
        how = "fused" if fused else "one by one"
        say(f"{name:<10}  {how:<10}  loss {losses[0]:.4f} at step 1, {losses[-1]:.4f} at step {args.steps}")
    stop()


if __name__ == "__main__":
    main()
