# SPDX-License-Identifier: GPL-3.0-or-later
"""Time one MoE layer across expert-parallel ranks, against DeepSpeed's two layers, the dense floor and EP=1.

    torchrun --nproc_per_node 2 examples/benchmarks/ep_layer.py --shape seed qwen3 mixtral --out runs/ep

T of a shape is tokens per rank; its experts are shared by all ranks. Rank 0 prints a Markdown table and leaves
`ep_layer.md`, `ep_layer.json` and `ep_layer.png` in --out. Everything is checked and timed as in layer.py, samples of
all ranks start together, and every number is the worst rank's. --trace profiles a step of ours, with shared experts,
and draws it (timeline.py).
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import ep_trace
import timeline
import torch
import torch.distributed as dist
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
    write_run,
)
from compare import Settings, compare
from ep_layers import ON_REQUEST, REGISTRY, SLOW_TO_IMPORT
from layers import CannotRun
from ranks import NoAnswer, Ranks
from report import floor_ms, table
from shapes import Shape

from flashfusemoe_ds.dispatch.select import EP_BACKENDS


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time one MoE layer across expert-parallel ranks.")
    add_arguments(parser, REGISTRY, rounds=5)
    more = parser.add_argument_group("further")
    more.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: cuda, a GPU per rank")
    more.add_argument("--timeout", type=float, default=120, help="seconds to wait for a rank (default: 120)")
    more.add_argument(
        "--trace", type=Path, metavar="JSON", help="profile a step of ours on the first shape; its picture: .png"
    )
    more.add_argument(
        "--trace_backend", choices=EP_BACKENDS, default="nccl", help="ep_backend of the trace (default: nccl)"
    )
    more.add_argument("--trace_shared", type=int, default=1, help="shared experts in the trace (default: 1)")
    more.add_argument("--trace_only", action="store_true", help="time nothing")
    more.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher's
    args = parser.parse_args(argv)

    check_positive(parser, args, "rounds", "seconds", "timeout")
    if args.trace_shared < 0:
        parser.error(f"--trace_shared {args.trace_shared}: must be 0 or more")
    if args.trace_only and args.trace is None:
        parser.error("--trace_only: needs --trace, the file to write")
    args.world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if args.world_size < 2:
        parser.error("needs at least 2 ranks: run it with torchrun --nproc_per_node 2, or with deepspeed")
    args.shapes = shapes_of(parser, args)
    for shape in args.shapes:
        if shape.E % args.world_size:
            parser.error(f"shape {shape}: {args.world_size} ranks do not divide its {shape.E} experts")
    if args.layers is not None:
        args.keys = named_layers(parser, args, REGISTRY)
    else:
        on_cpu = args.device == "cpu"
        off = {*ON_REQUEST, *(SLOW_TO_IMPORT if on_cpu else ())}
        args.keys = [k for k, entry in REGISTRY.items() if k not in off and not (on_cpu and entry.cuda_only)]
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if args.device == "cuda":
        if torch.cuda.device_count() <= local:
            parser.error(f"--device cuda: rank {local} of this host has no GPU; --device cpu runs toy sizes over gloo")
        args.device = torch.device("cuda", local)
    else:
        args.device = torch.device("cpu")
    return args


def join(args: argparse.Namespace) -> Ranks:
    """All ranks: the default group for the layers' exchange, a gloo group for what is agreed beside it."""
    timeout = timedelta(seconds=args.timeout)
    if args.device.type == "cuda":
        # Multicast objects are not allowed everywhere, and nothing here needs them.
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
        torch.cuda.set_device(args.device)
        if not dist.is_initialized():
            dist.init_process_group("nccl", timeout=timeout, device_id=args.device)
    elif not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timeout)
    # Twice as long: a rank that is stuck in the exchange says so when that has timed out.
    control = dist.new_group(backend="gloo", timeout=2 * timeout)
    return Ranks(control, dist.group.WORLD)


def time_shape(shape: Shape, args: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    gc.collect()
    if settings.device.type == "cuda":
        torch.cuda.empty_cache()
    result = compare(shape, {key: REGISTRY[key] for key in args.keys}, settings)
    for row in result["layers"]:
        row["floor_ms"] = floor_ms(result)
    return result


def run(args: argparse.Namespace, settings: Settings) -> dict[str, Any]:
    """All shapes; rank 0 prints and writes after each, so that a later crash loses nothing."""
    ranks = settings.ranks
    outcome = new_outcome(args, ("rounds", "seconds", "seed", "timeout"), ranks.world)
    for shape, deadline in in_time(args.shapes, args.routing, args.seconds, ranks):
        outcome["results"].append(time_shape(shape, args, replace(settings, deadline=deadline)))
        if ranks.rank == 0:
            print(table(outcome["results"][-1]) + "\n", flush=True)
            write_run(outcome, args, "ep_layer")
        if outcome["results"][-1]["broken"]:
            settings.log("nothing more can run in these processes")
            break
    return outcome


def trace(args: argparse.Namespace, settings: Settings) -> bool:
    """Writes --trace and its picture, on rank 0; False if the transport cannot be used."""
    shape = args.shapes[0]
    try:
        ep_trace.record(shape, settings, args.trace_backend, args.trace_shared, args.trace)
    except (CannotRun, ImportError) as refusal:
        settings.log(f"no trace: {refusal}")
        return False
    if settings.ranks.rank == 0:
        spans = timeline.read(args.trace)
        title = f"{shape}, EP={settings.ranks.world}, {args.trace_backend}"
        print(f"{title}: {timeline.sentence(spans)}", flush=True)
        if not timeline.draw(spans, args.trace.with_suffix(".png"), title):
            say("no picture of the trace: matplotlib is not installed")
    return True


def settings_of(args: argparse.Namespace, ranks: Ranks) -> Settings:
    def log(text: str) -> None:
        if ranks.rank == 0:
            say(text)

    return Settings(
        device=args.device,
        dtype=DTYPES[args.dtype],
        routing=args.routing,
        rounds=args.rounds,
        tune="off",
        seed=args.seed,
        count_launches=False,
        deadline=None,
        log=log,
        log_failure=lambda text: say(f"rank {ranks.rank}: {text}"),
        ranks=ranks,
        group=dist.group.WORLD,
    )


def main(argv: list[str] | None = None) -> int:
    """0; 1 if a layer of ours failed or was wrong, the trace could not be made, or nothing more could run."""
    args = parse_args(argv)
    quiet_libraries()
    settings = settings_of(args, join(args))
    results = [] if args.trace_only else run(args, settings)["results"]
    if any(result["broken"] for result in results):
        leave_at_once()
    traced = args.trace is None or trace(args, settings)
    rows = [row for result in results for row in result["layers"] if row["ours"]]
    return int(not traced or any(row["status"] in ("wrong", "failed") for row in rows))


def leave_at_once() -> None:
    """Ends the process: an orderly end would wait for an exchange that never comes."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(1)


if __name__ == "__main__":
    try:
        code = main()
    except NoAnswer as error:
        say(str(error))
        leave_at_once()
    dist.destroy_process_group()
    sys.exit(code)
