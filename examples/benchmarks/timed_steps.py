# SPDX-License-Identifier: GPL-3.0-or-later
"""Training steps of one contender: timed in blocks, profiled, and what all ranks saw of them put together."""

from __future__ import annotations

import gzip
import json
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from device_trace import STEP, Groups, Kernel, Role, communication, num_steps, read_kernels
from measure import synchronize
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function
from waiting import transfer_and_waiting


class TimedSteps:
    """Runs a contender's steps, and holds what was measured of them on this rank.

    Args:
        train_step: one training step on words [B, S + 1], its phases annotated as device_trace wants them; returns
            the loss.
        batches: [num, B, S + 1], taken in turn.
        held_before: bytes that were allocated on this GPU before the contender was built.
    """

    def __init__(self, train_step: Callable[[Tensor], Tensor], batches: Tensor, held_before: int) -> None:
        self.train_step, self.batches, self.device = train_step, batches, batches.device
        self._held_before = held_before
        self.losses: list[Tensor] = []
        self.step_ms: list[float] = []
        self.peak_bytes: int | None = None
        self.kernels: list[Kernel] = []
        self.problem = ""  # why there is no profile

    def step(self) -> None:
        with record_function(STEP):
            loss = self.train_step(self.batches[len(self.losses) % len(self.batches)])
        self.losses.append(loss.detach())

    def warm_up(self, steps: int) -> None:
        """Compiles and tunes in the first step, and measures memory in the others."""
        self.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        for _ in range(steps - 1):
            self.step()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
            self.peak_bytes = torch.cuda.max_memory_allocated() - self._held_before

    def time_block(self, steps: int) -> None:
        """One step that does not count, then `steps` that do, without a pause between them."""
        synchronize(self.device)
        dist.barrier()
        self.step()
        ends = [now(self.device)]
        for _ in range(steps):
            self.step()
            ends.append(now(self.device))
        synchronize(self.device)
        self.step_ms += [between_ms(*pair) for pair in pairwise(ends)]

    def profile(self, steps: int, groups: Groups, keep: Path | None = None) -> None:
        """Profiles steps into `kernels`; the trace stays at `keep`, gzipped, if given."""
        synchronize(self.device)
        dist.barrier()
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            for _ in range(1 + steps):  # in the first one the profiler sets itself up
                self.step()
            synchronize(self.device)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(path))
            if keep is not None:
                with path.open("rb") as plain, gzip.open(keep, "wb", compresslevel=3) as packed:
                    shutil.copyfileobj(plain, packed)
            trace = json.loads(path.read_text())
        try:
            self.kernels = read_kernels(trace, groups)
        except ValueError as error:
            self.problem = f"exposed communication is unknown: {error}"

    def gathered(self) -> dict[str, Any]:
        """JSON-ready, all ranks' samples as the slowest's, losses as their mean. Collective."""
        profiled = [communication(self.kernels, step) for step in range(1, num_steps(self.kernels))]
        split, mismatches = transfer_and_waiting(self.kernels, range(1, num_steps(self.kernels)))
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, (self.step_ms, self.peak_bytes, profiled, split, self.problem))
        step_ms, peak_bytes, profiles, splits, problems = zip(*everyone, strict=True)
        losses = torch.stack(self.losses).float()
        dist.all_reduce(losses)
        steps = [_slowest(of_ranks) for of_ranks in zip(*profiles, strict=True)] if not any(problems) else []
        split_steps = [_slowest(of_ranks) for of_ranks in zip(*splits, strict=True)]
        return {
            "note": "; ".join(filter(None, [next(filter(None, problems), ""), _doubt(steps), *mismatches])),
            "step_ms": [max(of_ranks) for of_ranks in zip(*step_ms, strict=True)],
            "peak_bytes": None if self.peak_bytes is None else max(peak_bytes),
            "profile": {"steps": steps, "transfer_and_waiting": split_steps} if steps else None,
            "losses": (losses / dist.get_world_size()).tolist(),
        }


def take_turns(runs: Sequence[TimedSteps], rounds: int, steps: int) -> None:
    """Blocks of all contenders, round by round, each round beginning with another one."""
    for number in range(rounds):
        turn = number % len(runs)
        for run in [*runs[turn:], *runs[:turn]]:
            run.time_block(steps)


def _slowest(of_ranks: Sequence[dict[str, tuple[float, ...]]]) -> dict[str, tuple[float, ...]]:
    """The most that a rank has, number by number."""
    return {
        role: tuple(max(times) for times in zip(*(of_rank[role] for of_rank in of_ranks), strict=True))
        for role in of_ranks[0]
    }


def _doubt(steps: list[dict[str, tuple[float, ...]]]) -> str:
    """What must not be taken for a good result."""
    if steps and dist.get_world_size() > 1 and any(step[Role.DENSE.value][0] == 0 for step in steps):
        return "the profile shows no collective of dense gradients, though ranks exchange them"
    return ""


def now(device: torch.device) -> Any:
    """This moment, on a GPU on its current stream."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def between_ms(start: Any, end: Any) -> float:
    return start.elapsed_time(end) if isinstance(start, torch.cuda.Event) else 1e3 * (end - start)
