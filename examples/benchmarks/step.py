# SPDX-License-Identifier: GPL-3.0-or-later
"""Time whole training steps under DeepSpeed's engine: stock DeepSpeed against ours, ZeRO stage by stage.

    deepspeed --num_gpus 2 examples/benchmarks/step.py --stage 0 1 2 --layers stock ours --out runs/step

The model is FlashFusedMoE's published workload ([seed_model.py](seed_model.py)) on random words. Per stage the engines
share a process and take turns in blocks of steps; they start from equal weights and see equal words, so that their
losses can be compared. Measured for each engine:

step time       From the end of the step before to its own end on the device, in blocks of steps that follow one
                another without a pause, the first of a block left out. The slowest rank counts. p50 and p90 over all.
peak memory     Most allocated in the warm-up steps, less what the other engines hold; of all ranks the most.
exposed dense-  From a profile of `--profile_steps` steps: time during which a collective of dense gradients runs on a
gradient        GPU and no compute kernel does there. [device_trace.py](device_trace.py) has the exact definition.
communication   For each step the slowest rank, then the median; in ms, and in per cent of the p50 that was measured
                without the profiler. The experts' exchange is reported apart, by the same measure.
exposed trans-  How that divides into transfer and waiting for a rank that comes later: from the durations of the same
fer, waiting    collective on all ranks. [waiting.py](waiting.py) has the definition and its limits.

Leaves `step.md`, `step.json` (every sample, losses, the machine and all versions) and `step.png` in --out. `--trace`
keeps rank 0's Chrome traces too, and draws each stage's `step_zero<stage>_backward.png`: one step's backward, kernel
by kernel. Without a GPU nothing is profiled, and toy sizes show that everything runs:

    deepspeed --num_gpus 2 examples/benchmarks/step.py --size toy --batch 2 --stage 0 1 2 --rounds 2 --steps 2
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import json
import logging
import math
import os
import shlex
import sys
import time
import warnings
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import torch
import torch.distributed as dist
from device_trace import BACKWARD, FORWARD, OPTIMIZER, num_steps
from machine import describe
from seed_model import SIZES, add_model_arguments, model_config, parameter_counts, random_batches
from step_arguments import add_timing_arguments, check_timing_arguments
from step_engines import (
    CONTENDERS,
    Training,
    build,
    check_backend,
    check_stages,
    group_names,
    join,
    world_size,
)
from step_report import document, table
from timed_steps import TimedSteps, take_turns
from torch import Tensor
from torch.profiler import record_function

FORMAT = 1
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
NUM_BATCHES = 8  # then they come again


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Time training steps of stock DeepSpeed and flashfusemoe_ds.")
    what = parser.add_argument_group("what to time")
    what.add_argument("--stage", nargs="+", type=int, default=[0, 1, 2], help="ZeRO stages (default: 0 1 2)")
    what.add_argument(
        "--layers", nargs="+", choices=CONTENDERS, default=["stock", "ours"], help="engines (default: stock ours)"
    )
    what.add_argument("--batch", type=int, default=8, help="sequences per process (default: 8)")
    what.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on GPUs, float32 on CPUs")
    what.add_argument("--ep_backend", default="nccl", help="our transport between expert-parallel ranks")
    what.add_argument("--learning_rate", type=float, default=3e-4)
    what.add_argument("--aux_loss_coeff", type=float, default=0.0, help="of the load-balancing loss; 0 as published")
    what.add_argument("--gradient_clipping", type=float, default=1.0, help="0 is none")
    what.add_argument("--seed", type=int, default=0)
    add_model_arguments(parser)

    how = parser.add_argument_group("how")
    add_timing_arguments(
        how,
        "engine",
        steps=5,
        profile_steps=2,
        files="step.md, step.json and step.png",
        trace="keep Chrome traces and draw the backward; needs --out",
    )
    args = parser.parse_args(argv)

    check_timing_arguments(parser, args)
    args.dtype = args.dtype or ("bfloat16" if torch.cuda.is_available() else "float32")
    args.stages, args.keys = list(dict.fromkeys(args.stage)), list(dict.fromkeys(args.layers))
    try:
        ranks, experts = world_size(), args.num_experts or SIZES[args.size].num_experts
        args.model = model_config(args, args.ep_size or math.gcd(experts, ranks))
        if ranks % args.model.ep_size:
            raise ValueError(f"--ep_size {args.model.ep_size}: must divide the {ranks} processes")
        check_stages(args.keys, args.stages)
        check_backend(args.ep_backend)
    except (ValueError, ImportError) as error:
        parser.error(str(error))
    return args


class Run:
    """One engine at one stage, and the steps that were timed of it."""

    def __init__(self, key: str, stage: int, training: Training, batches: Tensor, aux_loss_coeff: float) -> None:
        self.key, self.stage, self.aux_loss_coeff = key, stage, aux_loss_coeff
        gc.collect()
        held_before = torch.cuda.memory_allocated() if batches.is_cuda else 0
        self.engine = build(key, stage, training, batches.device)
        self.parameters = parameter_counts(self.engine.module)
        self.timed = TimedSteps(self._step, batches, held_before)
        self.counts_LE: Tensor | None = None

    def _step(self, words_BS: Tensor) -> Tensor:
        with record_function(FORWARD):
            output = self.engine(words_BS)
            loss = output.loss
            if self.aux_loss_coeff:
                loss = loss + self.aux_loss_coeff * output.l_aux
        with record_function(BACKWARD):
            self.engine.backward(loss)
        with record_function(OPTIMIZER):
            self.engine.step()
        self.counts_LE = output.counts_LE
        return output.loss

    def row(self) -> dict[str, Any]:
        """JSON-ready, of all ranks. Collective."""
        counts_LE = self.counts_LE.to(self.timed.device, torch.float32)
        dist.all_reduce(counts_LE)
        contender = CONTENDERS[self.key]
        return {
            "stage": self.stage,
            "key": self.key,
            "title": contender.title,
            "ours": contender.ours,
            "optimizer": type(self.engine.optimizer).__name__,
            **self.timed.gathered(),
            "max_over_mean_load": (counts_LE.max(1).values / counts_LE.mean(1)).tolist(),
        }

    def close(self) -> None:
        """Gives the engine's memory back."""
        self.engine.destroy()
        del self.engine, self.timed
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def say(text: str) -> None:
    """Progress of rank 0, on stderr: stdout holds the table alone."""
    if dist.get_rank() == 0:
        print(text, file=sys.stderr, flush=True)


def run_stage(stage: int, args: argparse.Namespace, training: Training, batches: Tensor) -> list[Run]:
    """All engines of one stage, measured and still open."""
    runs: list[Run] = []
    for key in args.keys:
        if stage not in CONTENDERS[key].stages:
            say(f"ZeRO {stage}, {CONTENDERS[key].title}: not at this stage")
            continue
        start = time.monotonic()
        runs.append(Run(key, stage, training, batches, args.aux_loss_coeff))
        runs[-1].timed.warm_up(args.warmup)
        say(f"ZeRO {stage}, {CONTENDERS[key].title}: ready after {time.monotonic() - start:.1f} s")
    take_turns([run.timed for run in runs], args.rounds, args.steps)
    if batches.is_cuda and args.profile_steps:
        for run in runs:
            keep = args.trace and dist.get_rank() == 0
            path = args.out / f"step_zero{stage}_{run.key}.json.gz" if keep else None
            run.timed.profile(args.profile_steps, group_names(), path)
    return runs


def write(outcome: dict[str, Any], folder: Path) -> None:
    (folder / "step.json").write_text(json.dumps(outcome, indent=1) + "\n")
    (folder / "step.md").write_text(document(outcome))
    if _can_draw():
        from step_chart import draw_steps

        draw_steps(outcome, folder / "step.png")


def draw_timeline(runs: list[Run], path: Path) -> None:
    """Of each engine's last profiled step."""
    if _can_draw():
        from step_chart import draw_backward

        stage = f"ZeRO {runs[0].stage}, rank 0"
        panels = [
            (f"{CONTENDERS[r.key].title}, {stage}", r.timed.kernels, num_steps(r.timed.kernels) - 1) for r in runs
        ]
        if not draw_backward(panels, path):
            say(f"no {path.name}: the profile has no kernel of a backward")


def _can_draw() -> bool:
    if importlib.util.find_spec("matplotlib") is None:
        say("no pictures: matplotlib is not installed")
        return False
    return True


def command() -> str:
    """What started these processes, without the arguments that a launcher adds."""
    launcher = ["torchrun", "--nproc_per_node"] if "TORCHELASTIC_RUN_ID" in os.environ else ["deepspeed", "--num_gpus"]
    launcher = [*launcher, str(world_size())] if world_size() > 1 else ["python"]
    return shlex.join([*launcher, *(word for word in sys.argv if not word.startswith("--local_rank"))])


def quiet_libraries() -> None:
    """DeepSpeed's chatter is no part of a table."""
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # It calls collectives by names that torch has since renamed: nothing that a user of this script could act on.
    warnings.filterwarnings("ignore", category=FutureWarning)


def main(argv: list[str] | None = None) -> int:
    args = parse_args(argv)
    quiet_libraries()
    device = join()
    rank = dist.get_rank()
    training = Training(
        model=args.model,
        batch=args.batch,
        dtype=DTYPES[args.dtype],
        learning_rate=args.learning_rate,
        gradient_clipping=args.gradient_clipping,
        ep_backend=args.ep_backend,
        seed=args.seed,
    )
    batches = random_batches(args.model, args.batch, NUM_BATCHES, args.seed, rank, device)
    settings = ("batch", "dtype", "ep_backend", "learning_rate", "aux_loss_coeff", "gradient_clipping", "seed",
                "warmup", "rounds", "steps", "profile_steps")  # fmt: skip
    outcome: dict[str, Any] = {
        "format": FORMAT,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command(),
        "machine": describe(device),
        "world_size": dist.get_world_size(),
        "model": asdict(args.model),
        "tokens_per_step": dist.get_world_size() * args.batch * args.model.context,
        "settings": {name: getattr(args, name) for name in settings},
        "rows": [],
    }
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
    for stage in args.stages:
        runs = run_stage(stage, args, training, batches)
        outcome["parameters"] = runs[0].parameters
        outcome["rows"] += [run.row() for run in runs]
        # After each stage, so that a later failure loses nothing.
        if rank == 0 and args.out is not None:
            write(outcome, args.out)
            if args.trace:
                draw_timeline(runs, args.out / f"step_zero{stage}_backward.png")
        for run in runs:
            run.close()
        if device.type == "cuda":
            say(f"ZeRO {stage}: done; {torch.cuda.memory_allocated() / 2**30:.1f} GiB still allocated")
    if rank == 0:
        print(table(outcome), flush=True)
    dist.destroy_process_group()
    return 0


if __name__ == "__main__":
    sys.exit(main())
