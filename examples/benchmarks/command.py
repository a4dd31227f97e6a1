# SPDX-License-Identifier: GPL-3.0-or-later
"""What the commands `layer.py` and `ep_layer.py` have in common: arguments, a time budget over shapes, files."""

from __future__ import annotations

import argparse
import json
import logging
import os
import shlex
import sys
import time
from collections.abc import Iterable, Iterator
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from chart import draw
from machine import describe
from ranks import ALONE, Ranks
from report import FORMAT, device, document
from routing import ROUTINGS
from shapes import NAMED, Shape, parse_shape

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def add_arguments(parser: argparse.ArgumentParser, layers: Iterable[str], rounds: int) -> None:
    what = parser.add_argument_group("what to time")
    what.add_argument(
        "--shape", nargs="+", default=["seed"], metavar="S", help=f"{', '.join(NAMED)}, or T,D,F,E,K (default: seed)"
    )
    what.add_argument("--routing", choices=ROUTINGS, default="balanced", help="default: balanced")
    what.add_argument("--layers", metavar="KEY,KEY", help=f"default: all that can run here of {', '.join(layers)}")
    what.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default: bfloat16")

    how = parser.add_argument_group("how")
    how.add_argument("--rounds", type=int, default=rounds, help=f"samples per layer (default: {rounds})")
    how.add_argument("--seconds", type=float, help="stop after about this long, over all shapes, with fewer rounds")
    how.add_argument("--seed", type=int, default=0)

    output = parser.add_argument_group("output")
    output.add_argument("--out", type=Path, help="folder for a .md, .json and .png of this command's name")
    output.add_argument("--no_chart", action="store_true", help="no PNG of the table")


def check_positive(parser: argparse.ArgumentParser, args: argparse.Namespace, *names: str) -> None:
    for name in names:
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            parser.error(f"--{name} {getattr(args, name)}: must be positive")


def shapes_of(parser: argparse.ArgumentParser, args: argparse.Namespace) -> list[Shape]:
    try:
        return [parse_shape(text) for text in args.shape]
    except ValueError as error:
        parser.error(str(error))


def named_layers(parser: argparse.ArgumentParser, args: argparse.Namespace, known: Iterable[str]) -> list[str]:
    """Those of --layers, which must be among the known ones."""
    known = list(known)
    keys = [key for key in args.layers.split(",") if key]
    unknown = [key for key in keys if key not in known]
    if unknown or not keys:
        parser.error(f"--layers {args.layers}: unknown {', '.join(unknown)}; valid: {', '.join(known)}")
    return list(dict.fromkeys(keys))


def say(text: str) -> None:
    """Progress, on stderr: stdout holds the tables alone."""
    print(text, file=sys.stderr, flush=True)


def quiet_libraries() -> None:
    """DeepSpeed's and Dynamo's chatter is no part of a table."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    os.environ.setdefault("DS_LOG_LEVEL", "error")


def in_time(
    shapes: list[Shape], routing: str, seconds: float | None, ranks: Ranks = ALONE
) -> Iterator[tuple[Shape, float | None]]:
    """Each shape with the time.monotonic() until which it may run: its part of what is left. Announces them."""
    end = None if seconds is None else time.monotonic() + seconds
    for number, shape in enumerate(shapes):
        if ranks.rank == 0:
            say(f"--- {shape}, {routing}")
        left = None if end is None else end - time.monotonic()
        if left is not None and ranks.any(left <= 0):
            if ranks.rank == 0:
                say("skipped: the time budget is spent")
            continue
        yield shape, None if left is None else time.monotonic() + left / (len(shapes) - number)


def new_outcome(args: argparse.Namespace, settings: Iterable[str], world_size: int = 1) -> dict[str, Any]:
    """A run without results yet, JSON-ready."""
    return {
        "format": FORMAT,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join([*_launcher(world_size), *sys.argv]),
        "machine": describe(args.device),
        "world_size": world_size,
        "settings": {name: getattr(args, name) for name in settings},
        "results": [],
    }


def _launcher(world_size: int) -> list[str]:
    if world_size == 1:
        return ["python"]
    by_torchrun = "TORCHELASTIC_RUN_ID" in os.environ
    return ["torchrun", "--nproc_per_node", str(world_size)] if by_torchrun else ["deepspeed"]


def write_run(outcome: dict[str, Any], args: argparse.Namespace, name: str) -> None:
    """Brings --out up to date; nothing without it."""
    if args.out is None:
        return
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / f"{name}.json").write_text(json.dumps(outcome, indent=1) + "\n")
    write_pages([outcome], outcome["results"], args, name)


def write_pages(
    runs: list[dict[str, Any]], results: list[dict[str, Any]], args: argparse.Namespace, name: str
) -> None:
    (args.out / f"{name}.md").write_text(document(runs, results))
    devices = " + ".join(dict.fromkeys(map(device, runs)))
    if not args.no_chart and not draw(results, args.out / f"{name}.png", devices):
        say(f"no {name}.png: matplotlib is not installed, or nothing was measured")
