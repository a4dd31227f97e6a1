# SPDX-License-Identifier: GPL-3.0-or-later
"""One shape and routing: build every layer, check it against the reference, then time all of them in turn.

A layer that cannot be imported, fails or is wrong keeps its row, with the reason. Only a CUDA error that breaks the
process ends the comparison; what was measured until then is returned.
"""

from __future__ import annotations

import contextlib
import gc
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from floor import Floor
from layers import Bench, Entry
from measure import elapsed_ms, host_ms, launches, memory, repeats_for, synchronize
from reference import reference, relative_error
from routing import choose_experts, make_input
from shapes import Shape
from timed import Eager, Graphed, Timed
from weights import Weights

# Relative Euclidean error of output and input gradient above which a layer is called wrong. A bfloat16 gate alone
# costs 0.4 % of a routing weight.
TOLERANCE = {torch.bfloat16: 0.02, torch.float16: 0.01, torch.float32: 1e-4}
SETUP_SHARE = 0.7  # of a shape's time; the rest is for timing


@dataclass(frozen=True)
class Settings:
    """How to compare. `deadline` is a time.monotonic() of the end of this shape's time, or None."""

    device: torch.device
    dtype: torch.dtype
    routing: str
    rounds: int
    tune: str
    seed: int
    count_launches: bool
    deadline: float | None
    log: Callable[[str], None]


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
    kept_bytes: int | None = None
    peak_bytes: int | None = None
    launches_forward: int | None = None
    launches_backward: int | None = None


class BrokenDevice(RuntimeError):
    """A CUDA error after which nothing more runs in this process."""


def compare(shape: Shape, entries: dict[str, Entry], settings: Settings) -> dict[str, Any]:
    """A JSON-ready result: the shape, the floor's samples and a row per entry; whether a CUDA error ended it."""
    start = time.monotonic()
    generator = torch.Generator(settings.device).manual_seed(settings.seed)
    weights = Weights(shape, settings.dtype, generator)
    x, _ = make_input(shape, weights.gate, settings.routing, generator)
    x_TD, dout_TD = x.requires_grad_(), torch.empty_like(x)
    dout_TD.normal_(generator=generator)
    expected = reference(x_TD, dout_TD, weights, shape.K)
    load = choose_experts(shape, settings.routing, generator).flatten().bincount().max()
    bench = Bench(shape, weights, settings.dtype, settings.device, int(load), settings.tune)
    floor = Row("floor", "dense cuBLAS, same arithmetic", ours=False)
    rows = [Row(key, entry.title, entry.ours) for key, entry in entries.items()]
    ready: list[tuple[Row, Timed]] = []
    broken = False
    try:
        ready.append((floor, Floor(shape, settings.dtype, generator)))
        for row, entry in zip(rows, entries.values(), strict=True):
            if settings.deadline is not None:
                share = (time.monotonic() - start) / max(1e-9, settings.deadline - start)
                if share > SETUP_SHARE:
                    row.status, row.reason = "skipped", "the time budget left none for it"
                    continue
            with contextlib.redirect_stdout(sys.stderr):  # what libraries print is no part of a table
                timed = _prepare(row, entry, bench, x_TD, dout_TD, expected, settings)
            if timed is not None:
                ready.append((row, timed))
        _time_all(ready, shape, weights, x_TD, generator, settings)
    except BrokenDevice as error:
        broken = True
        settings.log(str(error))
        for row in rows:
            if row.status == "ok" and not row.step_ms:
                row.status, row.reason = "skipped", f"{error}; --isolate keeps such errors apart"
    return {
        **empty_result(shape, settings.routing, settings.dtype),
        "seconds": time.monotonic() - start,
        "broken": broken,
        "floor": vars(floor),
        "layers": [vars(row) for row in rows],
    }


def empty_result(shape: Shape, routing: str, dtype: torch.dtype) -> dict[str, Any]:
    """What a result says of its problem, with no layer measured."""
    return {
        "shape": {"name": shape.name, **{name: getattr(shape, name) for name in "TDFEK"}},
        "routing": routing,
        "dtype": str(dtype).removeprefix("torch."),
        "step_flops": shape.step_flops,
        "floor": {"step_ms": []},
        "layers": [],
    }


def _prepare(
    row: Row, entry: Entry, bench: Bench, x_TD: torch.Tensor, dout_TD: torch.Tensor, expected: Any, settings: Settings
) -> Timed | None:
    """Builds, compiles, tunes and checks a layer and measures its memory; None, and the row says why, if it cannot."""
    start = time.monotonic()
    if entry.cuda_only and settings.device.type != "cuda":
        row.status, row.reason = "skipped", "needs a CUDA device"
        return None
    try:
        layer = entry.build(bench)
        row.note = layer.note
        eager = Eager(layer, x_TD, dout_TD)
        eager.step()  # compiles and tunes; some kernels add up while they are tuned, so this result is not looked at
        timed = Graphed(eager) if entry.graph else eager
        out_TD, dx_TD = timed.result()
        row.error_output, row.error_input_grad = (
            relative_error(got, want) for got, want in zip((out_TD, dx_TD), expected, strict=True)
        )
        del out_TD, dx_TD
        if layer.exact and max(row.error_output, row.error_input_grad) > TOLERANCE[settings.dtype]:
            row.status = "wrong"
            row.reason = (
                f"relative error {row.error_output:.1e} of the output, {row.error_input_grad:.1e} of its gradient"
            )
        if settings.device.type == "cuda" and not entry.graph:
            row.kept_bytes, row.peak_bytes = memory(eager, settings.device)
        if settings.count_launches and settings.device.type == "cuda":
            row.launches_forward, row.launches_backward = launches(timed, settings.device)
        timed.drop_gradients()
        synchronize(settings.device)
    except Exception as error:  # a rival's failure is a result
        _explain(row, error, settings)
        timed = None
    x_TD.grad = None
    settings.log(f"{row.title}: {row.status} {row.reason} ({time.monotonic() - start:.1f} s to set up)")
    return timed


def _explain(row: Row, error: Exception, settings: Settings) -> None:
    """Puts an exception into the row; raises BrokenDevice if the GPU does not answer any more."""
    first_line = (str(error).strip() or "no message").splitlines()[0][:300]
    row.status = "missing" if isinstance(error, ImportError) else "failed"
    row.reason = f"{type(error).__name__}: {first_line}"
    if not isinstance(error, ImportError):
        settings.log(traceback.format_exc())
    error.__traceback__ = None  # its frames hold the tensors of the failed step
    gc.collect()
    try:
        synchronize(settings.device)
        if settings.device.type == "cuda":
            torch.cuda.empty_cache()
    except RuntimeError as broken:
        raise BrokenDevice(f"{row.title} left the GPU in an error state") from broken


def _time_all(
    ready: list[tuple[Row, Timed]],
    shape: Shape,
    weights: Weights,
    x_TD: torch.Tensor,
    generator: torch.Generator,
    settings: Settings,
) -> None:
    """Rounds over all layers, each with a new input and routing and starting at another layer."""
    device = settings.device
    repeats: dict[str, tuple[int, int]] = {}
    for number in range(settings.rounds):
        with torch.no_grad():
            x_TD.copy_(make_input(shape, weights.gate, settings.routing, generator)[0])
        turn = number % len(ready)
        for row, timed in ready[turn:] + ready[:turn]:
            if number and settings.deadline is not None and time.monotonic() > settings.deadline:
                settings.log(f"time is up after {number} of {settings.rounds} rounds")
                return
            if row.status == "failed":
                continue
            try:
                if row.key not in repeats:
                    repeats[row.key] = (repeats_for(timed.forward, device), repeats_for(timed.step, device))
                forward, step = repeats[row.key]
                row.forward_ms.append(elapsed_ms(timed.forward, forward, device))
                row.step_ms.append(elapsed_ms(timed.step, step, device))
                row.host_ms.append(host_ms(timed, device))
                timed.drop_gradients()
            except Exception as error:
                _explain(row, error, settings)
