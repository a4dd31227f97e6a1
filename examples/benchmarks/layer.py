# SPDX-License-Identifier: GPL-3.0-or-later
"""Time one MoE layer, router included, against every other layer that is installed and the dense floor.

    python examples/benchmarks/layer.py --shape seed qwen3 --launches --out runs/layer

Prints a Markdown table and leaves `layer.md`, `layer.json` (every sample, machine and versions) and `layer.png` in
--out. All layers share weights and inputs, are checked against a wider reference first, and take turns in rounds.
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from command import (
    DTYPES,
    add_arguments,
    check_positive,
    in_time,
    named_layers,
    new_outcome,
    quiet_libraries,
    say,
    shapes_of,
    write_pages,
    write_run,
)
from compare import Row, Settings, compare, empty_result
from layers import REGISTRY, SLOW_TO_IMPORT, Entry, with_backends
from report import FORMAT, document, floor_ms, load_runs, merge_results, table
from shapes import NAMED, Shape
from tuning import LEVELS


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time one MoE layer against its rivals and the dense floor.")
    add_arguments(parser, REGISTRY, rounds=10)
    more = parser.add_argument_group("further")
    more.add_argument(
        "--gemm_backend", nargs="+", default=[], metavar="NAME", help="one more row of ours for each of these backends"
    )
    more.add_argument("--device", default="cuda", help="cuda, cuda:1, ... or cpu (default: cuda)")
    more.add_argument(
        "--tune", choices=LEVELS, default="short", help="how long rivals' autotuners search (default: short)"
    )
    more.add_argument("--launches", action="store_true", help="count kernels too, with PyTorch's profiler")
    more.add_argument(
        "--isolate",
        action="store_true",
        help="each layer in a process of its own, beside the floor, so that a CUDA error costs one row",
    )
    more.add_argument("--isolate_seconds", type=float, default=300, help="per such process (default: 300)")
    more.add_argument(
        "--merge", nargs="+", type=Path, metavar="JSON", help="time nothing; one table and picture from these results"
    )
    args = parser.parse_args(argv)

    check_positive(parser, args, "rounds", "seconds", "isolate_seconds")
    args.known = with_backends(args.gemm_backend)
    args.shapes = shapes_of(parser, args)
    if args.layers is None:
        on_cpu = args.device == "cpu"
        args.keys = [k for k, e in args.known.items() if not (on_cpu and (e.cuda_only or k in SLOW_TO_IMPORT))]
    else:
        args.keys = named_layers(parser, args, args.known)
        args.keys = list(dict.fromkeys([*args.keys, *(f"ours-{name}" for name in args.gemm_backend)]))
    try:
        args.device = torch.device(args.device)
    except RuntimeError as error:
        parser.error(str(error))
    if args.device.type == "cuda" and not args.merge:
        if not torch.cuda.is_available():
            parser.error("--device cuda: PyTorch finds no GPU here; --device cpu runs the PyTorch rows at toy sizes")
        args.device = torch.device("cuda", args.device.index or 0)
    return args


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
        log_failure=say,
    )
    outcome = new_outcome(args, ("rounds", "seconds", "tune", "seed", "isolate"))
    for shape, deadline in in_time(args.shapes, args.routing, args.seconds):
        settings = replace(settings, deadline=deadline)
        time_one = time_shape_isolated if args.isolate else time_shape
        outcome["results"].append(time_one(shape, args, settings))
        print(table(outcome["results"][-1]) + "\n", flush=True)
        write(outcome)
        if outcome["results"][-1].get("broken") and not args.isolate:
            say("nothing more can run in this process")
            break
    return outcome


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
            write_pages(runs, results, args, "layer")
        return 0
    outcome = run(args, partial(write_run, args=args, name="layer"))
    rows = [row for result in outcome["results"] for row in result["layers"] if row["ours"]]
    broken = any(result.get("broken") for result in outcome["results"])
    return int(broken or any(row["status"] in ("wrong", "failed") for row in rows))


if __name__ == "__main__":
    sys.exit(main())
