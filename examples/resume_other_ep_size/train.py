# SPDX-License-Identifier: GPL-3.0-or-later
"""Train at one ep_size, save half-way, resume at another: the same losses.

    deepspeed --num_gpus 4 examples/resume_other_ep_size/train.py --ep_size 2 --save runs/resume/ep2 \\
        --deepspeed_config ds_configs/zero0.json
    python -m flashfusemoe_ds.convert_checkpoint runs/resume/ep2 runs/resume/ep4 --to stacked --ep-size 4
    deepspeed --num_gpus 4 examples/resume_other_ep_size/train.py --ep_size 4 --resume runs/resume/ep4 \\
        --deepspeed_config ds_configs/zero0.json
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for lm, beside this folder

from lm.data import load_corpus
from lm.launch import start_deepspeed, stop
from lm.model import ByteLM
from lm.small import add_arguments, model_config, say, train

import flashfusemoe_ds as ffmoe


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Save at one ep_size, resume at another.")
    parser.add_argument("--save", metavar="FOLDER", help="save a checkpoint there after half of the steps, and go on")
    parser.add_argument("--resume", metavar="FOLDER", help="start from the checkpoint there")
    parser.add_argument("--weights_only", action="store_true", help="with --resume: start the optimizer afresh")
    add_arguments(parser)
    args = parser.parse_args()
    if args.deepspeed_config is None:
        parser.error("--deepspeed_config is required, for example ds_configs/zero0.json")
    return args


def main() -> None:
    args = parse_args()
    start_deepspeed()
    corpus = load_corpus(args.data, args.context)
    torch.manual_seed(args.seed)
    model = ByteLM(model_config(args))
    engine, *_ = ffmoe.initialize(model=model, model_parameters=model.parameters(), config=args.deepspeed_config)

    first, half = 0, args.steps // 2
    if args.resume:
        # Files of another ep_size load as they are for weights; optimizer state must have been converted.
        _, client_state = engine.load_checkpoint(args.resume, load_optimizer_states=not args.weights_only)
        first = client_state["step"]
    losses = train(engine, corpus, range(first, half), args.seed)
    if args.save:
        engine.save_checkpoint(args.save, client_state={"step": half})
    losses += train(engine, corpus, range(max(first, half), args.steps), args.seed)
    for step, loss in enumerate(losses, start=first + 1):
        say(f"ep_size {args.ep_size}  step {step:>3}  loss {loss:.4f}")
    stop()


if __name__ == "__main__":
    main()
