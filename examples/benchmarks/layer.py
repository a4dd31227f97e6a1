# SPDX-License-Identifier: GPL-3.0-or-later
"""Time one MoE layer, router included, against every other layer that is installed and the dense floor.

    python examples/benchmarks/layer.py --shape seed qwen3 --launches --out runs/layer

Prints a Markdown table and leaves `layer.md`, `layer.json` (every sample, machine and versions) and `layer.png` in
--out. All layers share weights and inputs, are checked against a wider reference first, and take turns in rounds.
"""

from __future__ import annotations

import argparse
import gc
import json
import logging
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from chart import draw
from compare import Row, Settings, compare, empty_result
from layers import REGISTRY, SLOW_TO_IMPORT, Entry, with_backends
from machine import describe
from report import FORMAT, document, floor_ms, load_runs, merge_results, table
from routing import ROUTINGS
from shapes import NAMED, Shape, parse_shape
from tuning import LEVELS

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time one MoE layer against its rivals and the dense floor.")
    what = parser.add_argument_group("what to time")
    what.add_argument(
        "--shape", nargs="+", default=["seed"], metavar="S", help=f"{', '.join(NAMED)}, or T,D,F,E,K (default: seed)"
    )
    what.add_argument("--routing", choices=ROUTINGS, default="balanced", help="default: balanced")
    what.add_argument("--layers", metavar="KEY,KEY", help=f"default: all that can run here of {', '.join(REGISTRY)}")
    what.add_argument(
        "--gemm_backend", nargs="+", default=[], metavar="NAME", help="one more row of ours for each of these backends"
    )
    what.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default: bfloat16")
    what.add_argument("--device", default="cuda", help="cuda, cuda:1, ... or cpu (default: cuda)")

    how = parser.add_argument_group("how")
    how.add_argument("--rounds", type=int, default=10, help="samples per layer (default: 10)")
    how.add_argument("--seconds", type=float, help="stop after about this long, over all shapes, with fewer rounds")
    how.add_argument(
        "--tune", choices=LEVELS, default="short", help="how long rivals' autotuners search (default: short)"
    )
    how.add_argument("--launches", action="store_true", help="count kernels too, with PyTorch's profiler")
    how.add_argument(
        "--isolate",
        action="store_true",
        help="each layer in a process of its own, beside the floor, so that a CUDA error costs one row",
    )
    how.add_argument("--isolate_seconds", type=float, default=300, help="per such process (default: 300)")
    how.add_argument("--seed", type=int, default=0)

    output = parser.add_argument_group("output")
    output.add_argument("--out", type=Path, help="folder for layer.md, layer.json and layer.png")
    output.add_argument("--no_chart", action="store_true", help="no PNG")
    output.add_argument(
        "--merge", nargs="+", type=Path, metavar="JSON", help="time nothing; one table and picture from these results"
    )
    args = parser.parse_args(argv)

    for name in ("rounds", "seconds", "isolate_seconds"):
        if getattr(args, name) is not None and getattr(args, name) <= 0:
            parser.error(f"--{name} {getattr(args, name)}: must be positive")
    args.known = with_backends(args.gemm_backend)
    try:
        args.shapes = [parse_shape(text) for text in args.shape]
        args.keys = _keys(args)
        args.device = torch.device(args.device)
    except (ValueError, RuntimeError) as error:
        parser.error(str(error))
    if args.device.type == "cuda" and not args.merge:
        if not torch.cuda.is_available():
            parser.error("--device cuda: PyTorch finds no GPU here; --device cpu runs the PyTorch rows at toy sizes")
        args.device = torch.device("cuda", args.device.index or 0)
    return args


def _keys(args: argparse.Namespace) -> list[str]:
    """The layers asked for, or all that can run on the device."""
    if args.layers is None:
        on_cpu = args.device == "cpu"
        return [k for k, e in args.known.items() if not (on_cpu and (e.cuda_only or k in SLOW_TO_IMPORT))]
    keys = [key for key in args.layers.split(",") if key]
    unknown = [key for key in keys if key not in args.known]
    if unknown or not keys:
        raise ValueError(f"--layers {args.layers}: unknown {', '.join(unknown)}; valid: {', '.join(args.known)}")
    return list(dict.fromkeys([*keys, *(f"ours-{name}" for name in args.gemm_backend)]))


def say(text: str) -> None:
    """Progress, on stderr: stdout holds the tables alone."""
    print(text, file=sys.stderr, flush=True)


def quiet_libraries() -> None:
    """DeepSpeed's and Dynamo's chatter is no part of a table."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    os.environ.setdefault("DS_LOG_LEVEL", "error")


def time_shape(shape: Shape, args: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    entries: dict[str, Entry] = {key: args.known[key] for key in args.keys}
    torch._dynamo.reset()  # else the second shape would be compiled for any size
    if settings.device.type == "cuda":
        gc.collect()
        torch.cuda.set_device(settings.device)
        torch.cuda.empty_cache()
    result = compare(shape, entries, settings)
    for row in result["layers"]:
        row["floor_ms"] = floor_ms(result)
    return result


def time_shape_isolated(shape: Shape, args: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    """The same through one process per layer, each with its own floor."""
    runs = []
    for key in args.keys:
        limit = args.isolate_seconds
        if settings.deadline is not None:
            limit = min(limit, max(1.0, settings.deadline - time.monotonic()))
        runs.append(_in_child(key, shape, args, limit))
    return merge_results(runs)[0]


def _in_child(key: str, shape: Shape, args: argparse.Namespace, limit: float) -> dict[str, Any]:
    """One layer's run; a child that dies or takes too long gives a run with the reason in its row."""
    with tempfile.TemporaryDirectory() as folder:
        sizes = ",".join(str(getattr(shape, name)) for name in "TDFEK")
        command = [sys.executable, __file__, "--shape", shape.name if shape.name in NAMED else sizes]
        command += ["--layers", key, "--out", folder, "--no_chart", "--seconds", str(0.8 * limit)]
        command += ["--launches"] * args.launches
        command += [word for name in args.gemm_backend if key == f"ours-{name}" for word in ("--gemm_backend", name)]
        for name in ("routing", "dtype", "device", "rounds", "tune", "seed"):
            command += [f"--{name}", str(getattr(args, name))]
        errors = Path(folder) / "stderr"  # not a pipe: compiler processes that outlive the child would hold it open
        try:
            with errors.open("w") as file:
                child = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=file, timeout=limit)
            said = errors.read_text().rstrip()
            say(said)
            reason = f"its process ended with {child.returncode}: {(said.splitlines() or [''])[-1][:200]}"
        except subprocess.TimeoutExpired:
            reason = f"its process was stopped after {limit:g} s"
        result = Path(folder) / "layer.json"
        if result.is_file():
            return load_runs([result])[0]
    row = Row(key, args.known[key].title, args.known[key].ours, "failed", reason)
    result = empty_result(shape, args.routing, DTYPES[args.dtype])
    return {"format": FORMAT, "results": [{**result, "layers": [vars(row)]}]}


def run(args: argparse.Namespace, write: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """All shapes; `write` gets the run after each, so that a later crash loses nothing."""
    quiet_libraries()
    end = time.monotonic() + args.seconds if args.seconds else None
    settings = Settings(
        device=args.device,
        dtype=DTYPES[args.dtype],
        routing=args.routing,
        rounds=args.rounds,
        tune=args.tune,
        seed=args.seed,
        count_launches=args.launches,
        deadline=None,
        log=say,
    )
    outcome: dict[str, Any] = {
        "format": FORMAT,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "machine": describe(args.device),
        "settings": {name: getattr(args, name) for name in ("rounds", "seconds", "tune", "seed", "isolate")},
        "results": [],
    }
    for number, shape in enumerate(args.shapes):
        say(f"--- {shape}, {args.routing}")
        if end is not None:
            left = end - time.monotonic()
            if left <= 0:
                say("skipped: the time budget is spent")
                continue
            settings = replace(settings, deadline=time.monotonic() + left / (len(args.shapes) - number))
        time_one = time_shape_isolated if args.isolate else time_shape
        outcome["results"].append(time_one(shape, args, settings))
        print(table(outcome["results"][-1]) + "\n", flush=True)
        write(outcome)
        if outcome["results"][-1].get("broken") and not args.isolate:
            say("nothing more can run in this process")
            break
    return outcome


def writer(args: argparse.Namespace) -> Callable[[dict[str, Any]], None]:
    """Keeps --out up to date; writes nothing without it."""

    def write(outcome: dict[str, Any]) -> None:
        if args.out is None:
            return
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "layer.json").write_text(json.dumps(outcome, indent=1) + "\n")
        write_pages([outcome], outcome["results"], args)

    return write


def write_pages(runs: list[dict[str, Any]], results: list[dict[str, Any]], args: argparse.Namespace) -> None:
    (args.out / "layer.md").write_text(document(runs, results))
    devices = " + ".join(dict.fromkeys(run["machine"]["device"] for run in runs))
    if not args.no_chart and not draw(results, args.out / "layer.png", devices):
        say("no layer.png: matplotlib is not installed, or nothing was measured")


def main(argv: list[str] | None = None) -> int:
    """0; 1 if a layer of ours failed or was wrong, or a CUDA error ended the run; 2 for a file that is no result."""
    args = parse_args(argv)
    if args.merge:
        try:
            runs = load_runs(args.merge)
        except ValueError as error:
            say(f"error: --merge {error}")
            return 2
        results = merge_results(runs)
        print(document(runs, results))
        if args.out is not None:
            args.out.mkdir(parents=True, exist_ok=True)
            write_pages(runs, results, args)
        return 0
    outcome = run(args, writer(args))
    rows = [row for result in outcome["results"] for row in result["layers"] if row["ours"]]
    broken = any(result.get("broken") for result in outcome["results"])
    return int(broken or any(row["status"] in ("wrong", "failed") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
