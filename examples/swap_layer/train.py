# SPDX-License-Identifier: GPL-3.0-or-later
"""One model on deepspeed.moe, trained as it is, with one changed import, and with one JSON section.

    deepspeed --num_gpus 2 examples/swap_layer/train.py --ep_size 2 \\
        --deepspeed_config examples/swap_layer/ds_config.json

Prints the losses of the three side by side: they are equal.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import deepspeed.comm as dist
import torch
from deepspeed.moe.layer import MoE as StockMoE

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for lm, beside this folder

from lm.data import Corpus, load_corpus
from lm.launch import start_deepspeed, stop
from lm.layers import SwiGLU
from lm.model import ByteLM, LMConfig
from lm.small import add_arguments, model_config, say, train

import flashfusemoe_ds as ffmoe

# The class of the model's MoE layers, and who makes the engine. Everything else is the same.
WAYS: dict[str, tuple[type[StockMoE], Callable[..., Any]]] = {
    "stock": (StockMoE, deepspeed.initialize),
    "import": (ffmoe.MoE, ffmoe.initialize),  # from flashfusemoe_ds import MoE
    "json": (StockMoE, ffmoe.initialize),  # "flashfusemoe": {"replace_moe": true}
}


def build_model(moe_class: type[StockMoE], cfg: LMConfig) -> ByteLM:
    """DeepSpeed's defaults: a capacity, dropped tokens, a random choice of the second expert."""
    return ByteLM(
        cfg,
        moe=lambda cfg: moe_class(
            hidden_size=cfg.hidden_size,
            expert=SwiGLU(cfg.hidden_size, cfg.expert_size),
            num_experts=cfg.num_experts,
            ep_size=cfg.ep_size,
            k=cfg.top_k,
        ),
    )


def run(way: str, args: argparse.Namespace, corpus: Corpus) -> list[float]:
    moe_class, initialize = WAYS[way]
    torch.manual_seed(args.seed)
    model = build_model(moe_class, model_config(args))
    engine, *_ = initialize(model=model, model_parameters=model.parameters(), config=args.deepspeed_config)
    torch.manual_seed(args.seed + dist.get_rank())  # the gate draws random numbers
    return train(engine, corpus, range(args.steps), args.seed)


def main() -> None:
    parser = argparse.ArgumentParser(description="Swap the layer of a deepspeed.moe model.")
    parser.add_argument("--ways", nargs="+", choices=WAYS, default=list(WAYS), help="(default: all)")
    add_arguments(parser)
    args = parser.parse_args()
    if args.deepspeed_config is None:
        parser.error("--deepspeed_config is required, for example examples/swap_layer/ds_config.json")
    start_deepspeed()
    corpus = load_corpus(args.data, args.context)
    losses = {way: run(way, args, corpus) for way in args.ways}
    say("step" + "".join(f"{way:>9}" for way in losses))
    for step, row in enumerate(zip(*losses.values(), strict=True)):
        say(f"{step + 1:>4}" + "".join(f"{loss:>9.4f}" for loss in row))
    stop()


if __name__ == "__main__":
    main()
