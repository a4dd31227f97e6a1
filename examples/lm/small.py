# SPDX-License-Identifier: GPL-3.0-or-later
"""What the small examples around a DeepSpeed engine share: arguments, sizes of a ByteLM, and its training loop."""

from __future__ import annotations

import argparse
from typing import Any

import deepspeed
import deepspeed.comm as dist

from lm.data import SMALL_TEXT, Corpus, train_batches
from lm.layers import cross_entropy
from lm.model import LMConfig

AUX_LOSS_COEFF = 0.01


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--ep_size", type=int, default=1, help="ranks that share one set of experts (default: 1)")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps (default: 20)")
    parser.add_argument("--context", type=int, default=64, help="bytes that the model sees at once (default: 64)")
    parser.add_argument("--data", default=SMALL_TEXT, help="text file or folder (default: this repository's LICENSE)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--local_rank", type=int, default=-1, help="set by the deepspeed launcher")
    deepspeed.add_config_arguments(parser)


def model_config(args: argparse.Namespace) -> LMConfig:
    return LMConfig(
        num_layers=3,
        hidden_size=64,
        num_heads=4,
        mlp_size=192,
        num_experts=8,
        expert_size=96,
        top_k=2,
        ep_size=args.ep_size,
        context=args.context,
    )


def train(engine: Any, corpus: Corpus, steps: range, seed: int) -> list[float]:
    """The engine's `steps`; returns the cross-entropy of each, nats per byte, mean over ranks."""
    context, batch = engine.module.cfg.context, engine.train_micro_batch_size_per_gpu()
    losses = []
    for step in steps:
        (window_BS,) = train_batches(corpus.train, context, batch, 1, (seed, step, dist.get_rank()))
        window_BS = window_BS.to(engine.device)
        output = engine(window_BS[:, :-1])
        loss = cross_entropy(output.logits_BSV, window_BS)
        engine.backward(loss + AUX_LOSS_COEFF * output.l_aux)
        engine.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / dist.get_world_size())
    return losses


def say(line: str) -> None:
    """Prints on rank 0."""
    if dist.get_rank() == 0:
        print(line, flush=True)
