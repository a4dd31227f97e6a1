# SPDX-License-Identifier: GPL-3.0-or-later
"""What `step.py`, `autoep_step.py` and `seed_lm.py` take alike on the command line, and which of it they refuse."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

import torch


def add_timing_arguments(
    group: argparse._ArgumentGroup, of: str, *, steps: int, profile_steps: int, files: str, trace: str | None = None
) -> None:
    """How to time, with these defaults. `of` is what is timed, as in "every engine"; `files` are what --out is for;
    there is a --trace if `trace` says what it does."""
    group.add_argument(
        "--warmup", type=int, default=3, help=f"steps of every {of} before anything counts (default: 3)"
    )
    group.add_argument("--rounds", type=int, default=4, help=f"blocks of every {of} (default: 4)")
    group.add_argument("--steps", type=int, default=steps, help=f"timed steps of a block (default: {steps})")
    group.add_argument(
        "--profile_steps",
        type=int,
        default=profile_steps,
        help=f"profiled steps, on GPUs; 0 is none (default: {profile_steps})",
    )
    if trace is not None:
        group.add_argument("--trace", action="store_true", help=trace)
    group.add_argument("--out", type=Path, help=f"folder for {files}")
    group.add_argument("--local_rank", type=int, default=-1, help=argparse.SUPPRESS)  # the deepspeed launcher's


def check_timing_arguments(
    parser: argparse.ArgumentParser, args: argparse.Namespace, positive: Iterable[str] = ("batch",)
) -> None:
    """Ends the program, and says why, unless these and the timing arguments can be used. `positive` names the script's
    own numbers; where one is None, it was not given."""
    for name in (*positive, "rounds", "steps"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            parser.error(f"--{name} {getattr(args, name)}: must be positive")
    if args.warmup < 2:
        parser.error(f"--warmup {args.warmup}: must be at least 2, kernels are tuned in the first step")
    if args.profile_steps < 0 or args.gradient_clipping < 0:
        parser.error("--profile_steps and --gradient_clipping must not be negative")
    if getattr(args, "trace", False) and not (torch.cuda.is_available() and args.out and args.profile_steps):
        parser.error("--trace: needs a GPU, --out and at least one of --profile_steps")
