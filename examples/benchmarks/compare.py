# SPDX-License-Identifier: GPL-3.0-or-later
"""One shape and routing: build every layer, check it against the reference, then time all of them in turn.

A layer that cannot be imported, fails or is wrong keeps its row, with the reason. Only a CUDA error that breaks the
process ends the comparison; what was measured until then is returned.

With several ranks (ranks.py) each has tokens of its own, every number is the worst rank's, and a layer that fails on
one rank is dropped by all. If it failed amid an exchange, some may still wait in it, and the comparison ends.
"""

from __future__ import annotations

import contextlib
import gc
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from floor import Floor
from layers import Bench, CannotRun, Entry, Layer
from measure import elapsed_ms, host_ms, launches, memory, repeats_for, synchronize
from ranks import ALONE, Failed, Failure, NoAnswer, Ranks
from reference import reference, relative_error
from routing import choose_experts, make_input
from shapes import Shape
from timed import Eager, Graphed, Timed
from weights import Weights

# Relative Euclidean error of output and input gradient above which a layer is called wrong. A bfloat16 gate alone
# costs 0.4 % of a routing weight.
TOLERANCE = {torch.bfloat16: 0.02, torch.float16: 0.01, torch.float32: 1e-4}
SETUP_SHARE = 0.7  # of a shape's time; the rest is for timing
EXCHANGE_WARM_UP_MS = 10.0  # the links' speed does not follow the GPU's power
T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """How to compare.

    Attributes:
        deadline: a time.monotonic(), the end of this shape's time, or None.
        log: for progress. log_failure: for tracebacks.
        ranks: who times together; group: who shares the experts.
    """

    device: torch.device
    dtype: torch.dtype
    routing: str
    rounds: int
    tune: str
    seed: int
    count_launches: bool
    deadline: float | None
    log: Callable[[str], None]
    log_failure: Callable[[str], None]
    ranks: Ranks = ALONE
    group: dist.ProcessGroup | None = None

    def spent(self, start: float) -> float:
        """Share of the time from `start` to the deadline that is over, the same on every rank; 0 without one."""
        if self.deadline is None:
            return 0.0
        return self.ranks.largest((time.monotonic() - start) / max(1e-9, self.deadline - start))


@dataclass
class Row:
    """One layer's results. status: ok, wrong, missing (package), failed, skipped (no time left)."""

    key: str
    title: str
    ours: bool
    status: str = "ok"
    reason: str = ""
    note: str = ""
    error_output: float | None = None
    error_input_grad: float | None = None
    forward_ms: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    host_ms: list[float] = field(default_factory=list)
    exchange_ms: list[float] = field(default_factory=list)
    kept_bytes: int | None = None
    peak_bytes: int | None = None
    launches_forward: int | None = None
    launches_backward: int | None = None


class Broken(RuntimeError):
    """A CUDA error, or an exchange that some ranks are stuck in: nothing more runs in this process."""


@dataclass(frozen=True)
class Ready:
    """What takes turns: its row, what is timed, and the layer unless it is the floor."""

    row: Row
    timed: Timed
    layer: Layer | None = None


def compare(shape: Shape, entries: dict[str, Entry], settings: Settings) -> dict[str, Any]:
    """A JSON-ready result: the shape, the floor's samples and a row per entry; whether a CUDA error ended it."""
    start = time.monotonic()
    ranks = settings.ranks
    generator = torch.Generator(settings.device).manual_seed(settings.seed)
    weights = Weights.random(shape, settings.dtype, generator)
    if ranks.world > 1:
        generator.manual_seed(settings.seed + 1 + ranks.rank)  # equal weights, tokens of its own
    x, _ = make_input(shape, weights.gate, settings.routing, generator)
    x_TD, dout_TD = x.requires_grad_(), torch.empty_like(x)
    dout_TD.normal_(generator=generator)
    expected = reference(x_TD, dout_TD, weights, shape.K)
    load = choose_experts(shape, settings.routing, generator).flatten().bincount().max()
    bench = Bench(
        shape, weights, settings.dtype, settings.device, int(load), settings.tune, settings.group, ranks.meet
    )
    floor = Row("floor", "dense cuBLAS, same arithmetic", ours=False)
    rows = [Row(key, entry.title, entry.ours) for key, entry in entries.items()]
    closings: list[Callable[[], object]] = []
    broken = False
    try:
        ready = [Ready(floor, Floor(shape, settings.dtype, generator))]
        for row, entry in zip(rows, entries.values(), strict=True):
            if settings.spent(start) > SETUP_SHARE:
                row.status, row.reason = "skipped", "the time budget left none for it"
                continue
            with contextlib.redirect_stdout(sys.stderr):  # what libraries print is no part of a table
                one = _prepare(row, entry, bench, x_TD, dout_TD, expected, settings, closings)
            if one is not None:
                ready.append(one)
        _time_all(ready, shape, weights, x_TD, generator, start, settings)
        for close in closings:
            close()
    except (Broken, NoAnswer) as error:
        broken = True
        settings.log(str(error))
        advice = "; --isolate keeps such errors apart" if ranks.world == 1 else ""
        for row in rows:
            if row.status == "ok" and not row.step_ms:
                row.status, row.reason = "skipped", f"{error}{advice}"
    return {
        **empty_result(shape, settings.routing, settings.dtype, ranks.world),
        "seconds": time.monotonic() - start,
        "broken": broken,
        "floor": vars(floor),
        "layers": [vars(row) for row in rows],
    }


def empty_result(shape: Shape, routing: str, dtype: torch.dtype, world_size: int = 1) -> dict[str, Any]:
    """What a result says of its problem, with no layer measured. T and step_flops are of one rank."""
    return {
        "shape": {"name": shape.name, **{name: getattr(shape, name) for name in "TDFEK"}},
        "world_size": world_size,
        "routing": routing,
        "dtype": str(dtype).removeprefix("torch."),
        "step_flops": shape.step_flops,
        "floor": {"step_ms": []},
        "layers": [],
    }


def _prepare(
    row: Row,
    entry: Entry,
    bench: Bench,
    x_TD: torch.Tensor,
    dout_TD: torch.Tensor,
    expected: Any,
    settings: Settings,
    closings: list[Callable[[], object]],
) -> Ready | None:
    """Builds, compiles, tunes and checks a layer and measures its memory; None, and the row says why, if it cannot.
    What the layer wants called in the end is added to `closings`."""
    start = time.monotonic()
    if entry.cuda_only and settings.device.type != "cuda":
        row.status, row.reason = "skipped", "needs a CUDA device"
        return None
    layer = _attempt(row, settings, lambda: entry.build(bench), exchanging=False)
    timed = None
    if layer is not None:
        row.note = layer.note
        if layer.close is not None:
            closings.append(layer.close)
        eager = Eager(layer, x_TD, dout_TD)
        # Compiles and tunes; some kernels add up while they are tuned, so this result is not looked at.
        if _attempt(row, settings, lambda: eager.step() is not None):
            timed = _attempt(row, settings, lambda: _check(row, eager, entry, expected, settings))
    x_TD.grad = None
    settings.log(f"{row.title}: {row.status} {row.reason} ({time.monotonic() - start:.1f} s to set up)")
    return None if timed is None else Ready(row, timed, layer)


def _check(row: Row, eager: Eager, entry: Entry, expected: Any, settings: Settings) -> Timed:
    """What is to be timed; the row gets its errors, memory and launches."""
    device, ranks = settings.device, settings.ranks
    timed = Graphed(eager) if entry.graph else eager
    out_TD, dx_TD = timed.result()
    row.error_output, row.error_input_grad = (
        ranks.largest(relative_error(got, want)) for got, want in zip((out_TD, dx_TD), expected, strict=True)
    )
    del out_TD, dx_TD
    if eager.layer.exact and max(row.error_output, row.error_input_grad) > TOLERANCE[settings.dtype]:
        row.status = "wrong"
        row.reason = f"relative error {row.error_output:.1e} of the output, {row.error_input_grad:.1e} of its gradient"
    if device.type == "cuda" and not entry.graph:
        row.kept_bytes, row.peak_bytes = (int(ranks.largest(n)) for n in memory(eager, device))
    if settings.count_launches and device.type == "cuda":
        row.launches_forward, row.launches_backward = launches(timed, device)
    timed.drop_gradients()
    synchronize(device)
    return timed


def _attempt(row: Row, settings: Settings, work: Callable[[], T], *, exchanging: bool = True) -> T | None:
    """work(), if it succeeds on every rank; else None on every rank, and the row says why.

    Args:
        exchanging: whether ranks that succeeded, or did not get as far, may wait for those that failed.

    Raises:
        Broken: nothing more can run.
        NoAnswer: nor then.
    """
    ranks = settings.ranks
    try:
        try:
            done = work()
        except (Failed, NoAnswer):
            raise
        except Exception as error:  # a rival's failure is a result
            failure = failure_of(error)
            if failure.status == "failed":
                settings.log_failure(traceback.format_exc())
            error.__traceback__ = None  # its frames hold the tensors of the failed step
            ranks.fail(failure)
        ranks.meet()
        return done
    except Failed as failed:
        of, failed.__traceback__ = failed.of, None
    row.status, row.reason = _joined(of, settings)
    if exchanging and None in of:
        raise Broken(f"{row.title} failed on some ranks amid an exchange")
    gc.collect()
    works = True
    try:
        synchronize(settings.device)
        if settings.device.type == "cuda":
            torch.cuda.empty_cache()
    except RuntimeError:
        works = False
    if ranks.any(not works):
        raise Broken(f"{row.title} left the GPU in an error state")
    if ranks.any(not ranks.exchange_works(settings.device)):
        raise Broken(f"{row.title} left the exchange between ranks in an error state")
    return None


def failure_of(error: Exception) -> Failure:
    first_line = (str(error).strip() or "no message").splitlines()[0][:300]
    if isinstance(error, CannotRun):
        return Failure("skipped", first_line)
    return Failure("missing" if isinstance(error, ImportError) else "failed", f"{type(error).__name__}: {first_line}")


def _joined(of: list[Failure | None], settings: Settings) -> tuple[str, str]:
    """Status and reason of a row from those of all ranks."""
    status = next(failure.status for failure in of if failure is not None)
    if settings.group is None:
        return status, of[0].reason
    from flashfusemoe_ds.dispatch.agreement import joint_reason

    return status, joint_reason(settings.group, [None if failure is None else failure.reason for failure in of])


def _time_all(
    ready: list[Ready],
    shape: Shape,
    weights: Weights,
    x_TD: torch.Tensor,
    generator: torch.Generator,
    start: float,
    settings: Settings,
) -> None:
    """Rounds over all layers, each with a new input and routing and starting at another layer."""
    repeats: dict[str, tuple[int, int]] = {}
    for number in range(settings.rounds):
        with torch.no_grad():
            x_TD.copy_(make_input(shape, weights.gate, settings.routing, generator)[0])
        turn = number % len(ready)
        for one in ready[turn:] + ready[:turn]:
            if number and settings.spent(start) > 1:
                settings.log(f"time is up after {number} of {settings.rounds} rounds")
                return
            if one.row.status in ("ok", "wrong"):
                _attempt(one.row, settings, lambda one=one: _sample(one, x_TD, repeats, settings))


def _sample(one: Ready, x_TD: torch.Tensor, repeats: dict[str, tuple[int, int]], settings: Settings) -> bool:
    """One sample of everything that is timed of a layer."""
    row, timed, device, ranks = one.row, one.timed, settings.device, settings.ranks
    if row.key not in repeats:
        repeats[row.key] = (repeats_for(timed.forward, device, ranks), repeats_for(timed.step, device, ranks))
    forward, step = repeats[row.key]
    row.forward_ms.append(elapsed_ms(timed.forward, forward, device, ranks))
    row.step_ms.append(elapsed_ms(timed.step, step, device, ranks))
    row.host_ms.append(host_ms(timed, device, ranks))
    timed.drop_gradients()
    if one.layer is not None and one.layer.exchange is not None:
        exchange = one.layer.exchange(x_TD)
        row.exchange_ms.append(elapsed_ms(exchange, max(2, step), device, ranks, EXCHANGE_WARM_UP_MS))
    return True
