# SPDX-License-Identifier: GPL-3.0-or-later
"""Draws a profiler's trace of one step of a layer as a time line per stream: what runs beside what.

    python examples/benchmarks/timeline.py runs/ep/trace.json -o runs/ep/trace.png

The trace is what `ep_layer.py --trace` writes, or any of torch.profiler with this package's `moe:` ranges. A kernel
belongs to the innermost range that it was launched in. Without a GPU the ranges themselves are drawn.
"""

from __future__ import annotations

import argparse
import json
import sys
from bisect import bisect_right
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from intervals import length, subtract

PREFIX = "moe:"
REST, BESIDE, AFTER_DX = "router and the rest", "beside", "backward.experts, dX sent"
COLOURS = {
    "dispatch": "#4c78a8",
    "experts": "#f58518",
    "combine": "#72b7b2",
    "backward.redispatch": "#8cb4dd",
    "backward.experts": "#e4572e",
    AFTER_DX: "#a3281f",
    "backward.combine": "#54a24b",
    BESIDE: "#b279a2",
    REST: "#bab0ac",
}
COMPUTE, SIDE, EXCHANGE, COPIES = "compute", "side: shared experts", "communication", "copies"


@dataclass(frozen=True)
class Span:
    """Something that ran: milliseconds since the first one, on which lane, for which stage, and when launched."""

    start: float
    end: float
    lane: str
    stage: str
    name: str
    launched: float


def read(path: Path) -> list[Span]:
    """Spans of a Chrome trace, by start; ValueError if it has no `moe:` range."""
    try:
        events = [e for e in json.loads(path.read_text())["traceEvents"] if e.get("ph") == "X"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: is not a profiler's trace: {error}") from error
    ranges = [e for e in events if e.get("cat") == "user_annotation" and e["name"].startswith(PREFIX)]
    if not ranges:
        raise ValueError(f"{path}: has no {PREFIX} range; profile a step of this package's layer")
    kernels = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    spans = _of_kernels(kernels, events, ranges) if kernels else _of_ranges(ranges)
    first = min(span.start for span in spans)
    moved = [replace(s, start=s.start - first, end=s.end - first, launched=s.launched - first) for s in spans]
    return sorted(moved, key=lambda span: span.start)


def _of_ranges(ranges: list[dict[str, Any]]) -> list[Span]:
    threads = list(dict.fromkeys(e["tid"] for e in sorted(ranges, key=lambda e: e["ts"])))
    return [
        _span(e, f"thread {threads.index(e['tid']) + 1}", _stage(e["name"].removeprefix(PREFIX)), e["ts"])
        for e in ranges
    ]


def _of_kernels(
    kernels: list[dict[str, Any]], events: list[dict[str, Any]], ranges: list[dict[str, Any]]
) -> list[Span]:
    launches = {
        e["args"]["correlation"]: e
        for e in events
        if e.get("cat") in ("cuda_runtime", "cuda_driver") and "correlation" in e.get("args", {})
    }
    in_thread: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for one in sorted(ranges, key=lambda e: e["ts"]):
        in_thread[one["tid"]].append(one)
    spans = []
    for kernel in kernels:
        launch = launches.get(kernel["args"].get("correlation"), kernel)
        stage = _innermost(in_thread.get(launch["tid"], []), launch["ts"]) if launch is not kernel else REST
        spans.append(_span(kernel, str(kernel["args"].get("stream", kernel["tid"])), stage, launch["ts"]))
    return _after_dx(_named_lanes(spans))


def _span(event: dict[str, Any], lane: str, stage: str, launched: float) -> Span:
    start = event["ts"] / 1e3
    return Span(start, start + event["dur"] / 1e3, lane, stage, event["name"], launched / 1e3)


def _innermost(ranges: list[dict[str, Any]], at: float) -> str:
    """The latest-begun range of a thread that is open at a time; they nest."""
    for one in reversed(ranges[: bisect_right(ranges, at, key=lambda e: e["ts"])]):
        if at <= one["ts"] + one["dur"]:
            return _stage(one["name"].removeprefix(PREFIX))
    return REST


def _stage(name: str) -> str:
    """Waiting for something belongs to it."""
    return name.split(".wait")[0]


def _named_lanes(spans: list[Span]) -> list[Span]:
    """Streams by what they do: the one with the experts computes, one that only copies copies, others communicate."""
    streams: dict[str, list[Span]] = defaultdict(list)
    for span in spans:
        streams[span.lane].append(span)

    def time_in(stream: str, *stages: str) -> float:
        return sum(span.end - span.start for span in streams[stream] if span.stage in stages)

    compute = max(streams, key=lambda stream: time_in(stream, "experts", "backward.experts"))
    names: dict[str, str] = {compute: COMPUTE}
    for stream in sorted(streams.keys() - {compute}):
        if time_in(stream, BESIDE):
            name = SIDE
        else:
            name = COPIES if all(s.name.startswith(("Memcpy", "Memset")) for s in streams[stream]) else EXCHANGE
        taken = sum(other.startswith(name) for other in names.values())
        names[stream] = f"{name} {taken + 1}" if taken else name
    # The backward of what ran beside is launched by autograd, outside of any range.
    return [replace(s, lane=names[s.lane], stage=BESIDE if names[s.lane].startswith(SIDE) else s.stage) for s in spans]


def _after_dx(spans: list[Span]) -> list[Span]:
    """What the experts' backward launches once its dX is on the way: dW."""
    sent = min((span.launched for span in spans if span.stage == "backward.combine"), default=float("inf"))
    return [replace(s, stage=AFTER_DX) if s.stage == "backward.experts" and s.launched > sent else s for s in spans]


def overlap(spans: list[Span]) -> tuple[float, float]:
    """Milliseconds in which the communication streams are busy, and those of them in which another stream computes."""
    exchange = [(s.start, s.end) for s in spans if s.lane.startswith(EXCHANGE)]
    others = [(s.start, s.end) for s in spans if s.lane.startswith((COMPUTE, SIDE))]
    return length(exchange), length(exchange) - length(subtract(exchange, others))


def sentence(spans: list[Span]) -> str:
    """How long it took and how much of the communication is hidden."""
    total = max(span.end for span in spans)
    busy, hidden = overlap(spans)
    if not busy:
        return f"{total:.2f} ms"
    return f"{total:.2f} ms; communication {busy:.2f} ms, of which {hidden:.2f} ms beside computation"


def draw(spans: list[Span], path: Path, title: str = "") -> bool:
    """Writes a PNG; False, and nothing is written, without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.patches import Patch

    order = [COMPUTE, SIDE, EXCHANGE, COPIES]
    lanes = sorted(
        {span.lane for span in spans},
        key=lambda lane: (next((i for i, o in enumerate(order) if lane.startswith(o)), len(order)), lane),
    )
    fig, ax = plt.subplots(figsize=(14, 1.9 + 0.62 * len(lanes)), layout="constrained")
    for row, lane in enumerate(lanes):
        on_lane = [span for span in spans if span.lane == lane]
        ax.broken_barh(
            [(span.start, span.end - span.start) for span in on_lane],
            (row - 0.36, 0.72),
            facecolors=[COLOURS.get(span.stage, COLOURS[REST]) for span in on_lane],
        )
    ax.set_yticks(range(len(lanes)), lanes)
    ax.invert_yaxis()
    ax.set_xlim(0, max(span.end for span in spans))
    ax.set_xlabel("milliseconds")
    ax.spines[["top", "right"]].set_visible(False)
    present = {span.stage if span.stage in COLOURS else REST for span in spans}
    shown = [Patch(color=colour, label=stage) for stage, colour in COLOURS.items() if stage in present]
    fig.legend(handles=shown, loc="outside lower center", ncols=len(shown), fontsize=9, frameon=False)
    fig.suptitle(f"{title}\n{sentence(spans)}" if title else sentence(spans), fontsize=11)
    fig.savefig(path, dpi=130)
    plt.close(fig)
    return True


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Draw a trace of one step as a time line per stream.")
    parser.add_argument("trace", type=Path)
    parser.add_argument("-o", "--out", type=Path, help="default: the trace's name with .png")
    parser.add_argument("--title", default="")
    args = parser.parse_args(argv)
    try:
        spans = read(args.trace)
    except ValueError as error:
        parser.error(str(error))
    print(sentence(spans))
    if not draw(spans, args.out or args.trace.with_suffix(".png"), args.title):
        print("no picture: matplotlib is not installed", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
