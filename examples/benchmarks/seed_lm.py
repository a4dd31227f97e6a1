# SPDX-License-Identifier: GPL-3.0-or-later
"""Train FlashFusedMoE's published workload with one MoE layer or another, and time whole steps.

    python examples/benchmarks/seed_lm.py --out runs/seed_ep1
    torchrun --nproc_per_node 2 examples/benchmarks/seed_lm.py --out runs/seed_ep2

24 layers, 23 of them MoE, 1.14 B parameters, 8192 random words per GPU and step ([seed_model.py](seed_model.py)).
Without a launcher all experts are on one GPU; with one, they are spread over all ranks unless --ep_size says less.
DeepSpeed's layer, AutoEP's, FlashFusedMoE's where it is installed, and ours ([seed_layers.py](seed_layers.py)) train
in one process, in turns, from equal weights on equal words, in one plain PyTorch loop with one optimizer
([plain_training.py](plain_training.py)). step.py is for DeepSpeed's engine around the model.

--precision autocast is what was published: float32 parameters, bfloat16 autocast. bf16 is what DeepSpeed users train
in: bfloat16 parameters, float32 copies in the optimizer. The learning rate is constant, which costs no time.

torch.compile is put around the whole model, or with --compile blocks around each decoder layer, which compiles in a
fraction of the time. With experts on several ranks our layers stay outside of its graphs.

Leaves `seed_lm.md`, `seed_lm.json` (every sample, losses, the machine and all versions) and `seed_lm.png` in --out.
A contender that is missing or fails keeps its row, with the reason. Without a GPU nothing is profiled, and toy sizes
show that everything runs:

    torchrun --nproc_per_node 2 examples/benchmarks/seed_lm.py --size toy --batch 2 --compile_backend aot_eager
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import importlib.util
import json
import math
import sys
import time
import traceback
from dataclasses import asdict
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.distributed as dist
from compare import failure_of
from deepspeed.utils import groups
from machine import describe
from plain_training import PRECISIONS, PlainTraining, TrainingGroups
from ranks import Failed, Failure, Ranks
from seed_layers import Variant, build_model, expert_loads, kept_bytes, routed_layers, transport, variants
from seed_model import SIZES, add_model_arguments, model_config, parameter_counts, random_batches
from seed_report import document, table
from step import command, quiet_libraries, say
from step_arguments import add_timing_arguments, check_timing_arguments
from step_engines import check_backend, group_names, join, world_size
from timed_steps import TimedSteps, take_turns
from torch import Tensor

FORMAT = 1
NUM_BATCHES = 8  # then they come again
RANK_TIMEOUT = timedelta(minutes=5)  # for what ranks say to each other beside the training
GRAPHS = 64  # that torch.compile may make of one function: blocks differ in what it looks at


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time training steps of the seed's workload, layer against layer.")
    known = variants()
    what = parser.add_argument_group("what to time")
    what.add_argument("--layers", nargs="+", choices=known, default=list(known), help="default: all")
    what.add_argument("--batch", type=int, default=8, help="sequences per process (default: 8)")
    what.add_argument("--precision", choices=PRECISIONS, help="default: autocast on GPUs, float32 on CPUs")
    what.add_argument(
        "--ep_backend",
        nargs="+",
        default=["nccl"],
        help="our transport between expert-parallel ranks, symm_mem:2 with its capacity_factor, nccl+again with "
        "recompute_dispatch; further ones get rows of their own (default: nccl)",
    )
    what.add_argument(
        "--compile", choices=("model", "blocks"), default="model", help="what is one call to torch.compile"
    )
    what.add_argument("--compile_backend", default="inductor", help="torch.compile's (default: inductor)")
    what.add_argument("--compile_mode", help="torch.compile's, such as reduce-overhead, which captures CUDA graphs")
    what.add_argument("--learning_rate", type=float, default=3e-4)
    what.add_argument("--gradient_clipping", type=float, default=1.0, help="0 is none")
    what.add_argument("--seed", type=int, default=0)
    add_model_arguments(parser)

    how = parser.add_argument_group("how")
    add_timing_arguments(how, "layer", steps=5, profile_steps=1, files="seed_lm.md, seed_lm.json and seed_lm.png")
    args = parser.parse_args(argv)

    check_timing_arguments(parser, args)
    args.precision = args.precision or ("autocast" if torch.cuda.is_available() else "float32")
    args.ep_backend = list(dict.fromkeys(args.ep_backend))
    args.known = variants(args.ep_backend)
    args.keys = [*dict.fromkeys(args.layers), *(f"ours-{name}" for name in args.ep_backend[1:])]
    try:
        ranks, experts = world_size(), args.num_experts or SIZES[args.size].num_experts
        args.model = model_config(args, args.ep_size or math.gcd(experts, ranks))
        if ranks % args.model.ep_size:
            raise ValueError(f"--ep_size {args.model.ep_size}: must divide the {ranks} processes")
        if args.model.capacity_factor is not None:
            raise ValueError("--capacity_factor: these layers drop nothing; leave it out")
        if args.ep_backend[1:] and args.model.ep_size == 1:
            raise ValueError(f"--ep_backend {' '.join(args.ep_backend)}: at EP=1 nothing is exchanged; name one")
        for name in args.ep_backend:
            check_backend(transport(name).ep_backend)
    except (ValueError, ImportError) as error:
        parser.error(str(error))
    return args


class Run:
    """One variant's model and training, or the reason why there is none."""

    def __init__(self, key: str, variant: Variant) -> None:
        self.key, self.variant = key, variant
        self.status, self.note = "ok", ""
        self.kept_bytes: list[int] | None = None
        self.training: PlainTraining | None = None
        self.timed: TimedSteps | None = None

    def build(self, args: argparse.Namespace, batches: Tensor, training_groups: TrainingGroups, ranks: Ranks) -> None:
        """Builds the model, compiles and tunes its kernels, and measures memory. Collective."""
        gc.collect()
        held_before = torch.cuda.memory_allocated() if batches.is_cuda else 0
        model = build_model(
            self.variant, args.model, args.seed, args.batch, batches.device, PRECISIONS[args.precision],
            training_groups.ep_group, ranks,
        )  # fmt: skip
        self.note = routed_layers(model)[0].note
        forward = compiled(model, args) if self.variant.compiled else model
        self.training = PlainTraining(
            model, forward, args.precision, args.learning_rate, args.gradient_clipping, training_groups
        )
        self.timed = TimedSteps(self.training, batches, held_before)
        self.timed.warm_up(args.warmup)
        if batches.is_cuda:
            step = self.timed.step
            self.kept_bytes = step() if self.variant.compiled else kept_bytes(model, step)

    def forget(self, failure: Failure) -> None:
        """Keeps the reason, and gives the memory back."""
        self.status, self.note = failure.status, failure.reason
        self.training = self.timed = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def row(self) -> dict[str, Any]:
        """JSON-ready, of all ranks. Collective."""
        row = {
            "key": self.key,
            "title": self.variant.title,
            "ours": self.variant.ours,
            "rival": self.variant.rival,
            "status": self.status,
            "note": self.note,
            "step_ms": [],
        }
        if self.timed is None or self.training is None:
            return row
        gathered = self.timed.gathered()
        loads_LE, over = self._loads()
        room = routed_layers(self.training.model)[0].parts.room
        notes = [self.note, gathered.pop("note")]
        if room is not None and over:
            notes.append(f"after the last step up to {over} routes of a layer found no room and were not computed")
        kept = [None] * dist.get_world_size()
        dist.all_gather_object(kept, self.kept_bytes)
        return {
            **row,
            **gathered,
            "note": "; ".join(filter(None, notes)),
            "kept_bytes": None if self.kept_bytes is None else kept,  # by rank and layer
            "max_over_mean_load": (loads_LE.max(1).values / loads_LE.mean(1)).tolist(),
            "routes_without_room": over if room is not None else None,
        }

    def _loads(self) -> tuple[Tensor, int]:
        """Routes of an expert-parallel group's tokens to each expert of each layer, float32 [L, E], the mean over such
        groups; and how many of a layer find no room, in the worst layer."""
        training, timed = self.training, self.timed
        words_BS = timed.batches[len(timed.losses) % len(timed.batches)]

        def forward() -> None:
            with training.autocast():
                training.model(words_BS)

        loads_LE = expert_loads(training.model, forward).float()
        dist.all_reduce(loads_LE, group=training.groups.ep_group)
        room = routed_layers(training.model)[0].parts.room
        over = torch.zeros(()) if room is None else (loads_LE - room).clamp(min=0).sum(1).max()
        return loads_LE, int(over)


def compiled(model: torch.nn.Module, args: argparse.Namespace) -> Any:
    torch._dynamo.config.recompile_limit = GRAPHS
    options = {"dynamic": False, "backend": args.compile_backend, "mode": args.compile_mode}
    forward = model
    if args.compile == "model":
        forward = torch.compile(model, **options)
    else:
        for block in model.blocks:
            block.compile(**options)

    def one_step(*inputs: Tensor) -> Any:
        torch.compiler.cudagraph_mark_step_begin()  # a mode with CUDA graphs may use its buffers again from here on
        return forward(*inputs)

    return one_step


def prepare(
    run: Run, args: argparse.Namespace, batches: Tensor, training_groups: TrainingGroups, ranks: Ranks
) -> None:
    """Builds it, or has it keep the reason why not, on every rank alike.

    Raises:
        RuntimeError: it failed on some ranks only, and others may wait for them.
    """
    if run.variant.cuda_only and not batches.is_cuda:
        run.forget(Failure("skipped", "needs a CUDA device"))
        return
    start = time.monotonic()
    try:
        try:
            with contextlib.redirect_stdout(sys.stderr):  # what libraries print is no part of a table
                run.build(args, batches, training_groups, ranks)
        except Failed:
            raise
        except Exception as error:  # a rival's failure is a result
            failure = failure_of(error)
            if failure.status == "failed":
                say(traceback.format_exc())
            error.__traceback__ = None  # its frames hold the failed model
            ranks.fail(failure)
        ranks.meet()
    except Failed as failed:
        of, failed.__traceback__ = failed.of, None
        if None in of:
            raise RuntimeError(f"{run.variant.title} failed on some ranks: {of}") from None
        run.forget(of[0])
    say(f"{run.variant.title}: {run.status} after {time.monotonic() - start:.1f} s")


def make_groups(ep_size: int) -> TrainingGroups:
    """DeepSpeed's process groups, which its layer takes from the same place."""
    groups._create_expert_and_data_parallel(ep_size)
    name = f"ep_size_{ep_size}"
    return TrainingGroups(
        groups._get_data_parallel_group(),
        groups._get_expert_parallel_group(name),
        groups._get_expert_data_parallel_group(name),
    )


def write(outcome: dict[str, Any], folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "seed_lm.json").write_text(json.dumps(outcome, indent=1) + "\n")
    (folder / "seed_lm.md").write_text(document(outcome))
    if importlib.util.find_spec("matplotlib") is None:
        say("no seed_lm.png: matplotlib is not installed")
        return
    from step_chart import draw_layers

    draw_layers(outcome, folder / "seed_lm.png")


def main(argv: list[str] | None = None) -> int:
    """0; 1 if one of ours failed."""
    args = parse_args(argv)
    quiet_libraries()
    device = join()
    with contextlib.redirect_stdout(sys.stderr):
        training_groups = make_groups(args.model.ep_size)
    world = dist.get_world_size()
    ranks = Ranks(dist.new_group(backend="gloo", timeout=RANK_TIMEOUT) if world > 1 else None)
    batches = random_batches(args.model, args.batch, NUM_BATCHES, args.seed, dist.get_rank(), device)
    runs = [Run(key, args.known[key]) for key in args.keys]
    for run in runs:
        prepare(run, args, batches, training_groups, ranks)
    ready = [run for run in runs if run.timed is not None]
    take_turns([run.timed for run in ready], args.rounds, args.steps)
    if device.type == "cuda" and args.profile_steps:
        for run in ready:
            run.timed.profile(args.profile_steps, group_names())
    names = ("batch", "precision", "ep_backend", "compile", "compile_backend", "compile_mode", "learning_rate",
             "gradient_clipping", "seed", "warmup", "rounds", "steps", "profile_steps")  # fmt: skip
    outcome = {
        "format": FORMAT,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command(),
        "machine": describe(device),
        "world_size": world,
        "model": asdict(args.model),
        "parameters": parameter_counts(ready[0].training.model) if ready else {"total": 0, "active": 0},
        "tokens_per_step": world * args.batch * args.model.context,
        "settings": {name: getattr(args, name) for name in names},
        "rows": [run.row() for run in runs],
    }
    if dist.get_rank() == 0:
        if args.out is not None:
            write(outcome, args.out)
        print(table(outcome), flush=True)
    dist.barrier()
    dist.destroy_process_group()
    return int(any(run.variant.ours and run.status != "ok" for run in runs))


if __name__ == "__main__":
    sys.exit(main())
