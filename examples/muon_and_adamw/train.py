# SPDX-License-Identifier: GPL-3.0-or-later
"""Muon for the dense matrices, AdamW for the experts and everything else.

    torchrun --nproc_per_node=2 examples/muon_and_adamw/train.py --ep_size 2

The model, the loop and the arguments are those of full_integration.py; this file only makes other optimizers.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.optim import Optimizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for full_integration, beside this folder

import full_integration

from flashfusemoe_ds import get_dense_params


def muon_and_adamw(model: full_integration.LanguageModel, args: argparse.Namespace) -> list[Optimizer]:
    experts = model.expert_params
    # Muon is for matrices that map hidden states to hidden states: no lookup tables, no routers, no norms.
    tables = [model.embedding.weight, model.head.weight, *(block.moe.router.weight for block in model.blocks)]
    dense = without(get_dense_params(model), experts)  # in one process the experts are dense parameters too
    matrices = without([param for param in dense if param.ndim == 2], tables)
    rest = without(dense, matrices)
    say(f"Muon: {summary('dense', matrices)}")
    say(f"AdamW: {summary('dense', rest)}; {summary('expert', experts)}")
    # match_rms_adamw: Muon's updates become as large as AdamW's, so that one learning rate serves both.
    return [
        torch.optim.Muon(matrices, lr=args.lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [{"params": rest, "weight_decay": 0.0}, {"params": experts, "weight_decay": 0.1}],
            lr=args.lr,
            betas=(0.9, 0.95),
        ),
    ]


def without(params: list[nn.Parameter], others: list[nn.Parameter]) -> list[nn.Parameter]:
    left_out = {id(param) for param in others}
    return [param for param in params if id(param) not in left_out]


def summary(kind: str, params: list[nn.Parameter]) -> str:
    return f"{len(params)} {kind} tensors, {sum(param.numel() for param in params):,} elements"


def say(line: str) -> None:
    if not dist.is_initialized() or dist.get_rank() == 0:
        print(line, flush=True)


def main() -> None:
    args = full_integration.parser().parse_args()
    if args.deepspeed_config is not None:
        raise ValueError(f"deepspeed_config={args.deepspeed_config!r}: this example has a loop of its own")
    full_integration.check(args)
    full_integration.train(args, full_integration.plain_step(args, muon_and_adamw))


if __name__ == "__main__":
    main()
