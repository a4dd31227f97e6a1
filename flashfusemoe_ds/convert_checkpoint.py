# SPDX-License-Identifier: GPL-3.0-or-later
"""Converts a checkpoint's optimizer state between stock DeepSpeed's layout of experts and this package's:

    python -m flashfusemoe_ds.convert_checkpoint SOURCE TARGET --to stacked --ep-size 2 --model train:build_model

The folders are those given to save_checkpoint and load_checkpoint. Runs on one process, without GPUs.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from flashfusemoe_ds.ds.convert import LAYOUTS, MAX_GROUP_SIZE, convert_checkpoint


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m flashfusemoe_ds.convert_checkpoint",
        description="Convert a DeepSpeed MoE checkpoint, optimizer state included, to another layout of experts or "
        "another ep_size. Weights alone need no conversion.",
    )
    parser.add_argument("source_dir", help="folder that was given to save_checkpoint")
    parser.add_argument("target_dir", help="folder to write, for load_checkpoint; new or empty")
    parser.add_argument("-t", "--tag", help="which checkpoint, e.g. global_step1000; default: the one in 'latest'")
    parser.add_argument(
        "--to", required=True, choices=LAYOUTS, help="stacked: for this package; per_expert: for stock DeepSpeed"
    )
    parser.add_argument("--ep-size", required=True, type=int, help="ep_size of every MoE layer that will load it")
    parser.add_argument(
        "--model",
        metavar="MODULE:FUNCTION",
        help="a function without arguments that returns the model, on the CPU, to see how its experts are stacked; "
        "needed for checkpoints that stock DeepSpeed saved",
    )
    parser.add_argument(
        "--max-group-size",
        type=int,
        default=MAX_GROUP_SIZE,
        help="elements beyond which DeepSpeed cuts a parameter group of experts; default: %(default)s, as DeepSpeed's",
    )
    parser.add_argument(
        "--safe-globals",
        nargs="+",
        default=(),
        metavar="NAME",
        help="full names of classes in the files that you trust, beside DeepSpeed's own, e.g. argparse.Namespace",
    )
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 1 with a line on stderr that says what does not fit."""
    args = parse_arguments(arguments)
    try:
        folder = convert_checkpoint(
            args.source_dir,
            args.target_dir,
            to=args.to,
            ep_size=args.ep_size,
            tag=args.tag,
            model=args.model,
            max_group_size=args.max_group_size,
            safe_globals=args.safe_globals,
        )
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {folder}: {args.to}, ep_size {args.ep_size}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
