# SPDX-License-Identifier: GPL-3.0-or-later
"""The results of `step.py` and `seed_lm.py` as pictures: step times, and the timeline of one step's backward.

Needs matplotlib.
"""

from __future__ import annotations

from pathlib import Path
from statistics import median
from typing import Any

import matplotlib

matplotlib.use("Agg")  # training machines have no display
import matplotlib.pyplot as plt
from device_trace import BACKWARD, Kernel, Role, compute_intervals
from intervals import Interval, length, subtract, union
from matplotlib.axes import Axes
from seed_report import times
from step_report import median_communication, percentile, times_stock

OURS, OTHERS = "#e4572e", "#9aa5b1"
RIVALS = {"stock": "stock", "flashfusedmoe": "FlashFusedMoE"}
EXPOSED = "#c1121f"
COLOURS = {
    Role.COMPUTE: "#4c78a8",
    Role.DENSE: "#f2a541",
    Role.EXPERTS: "#b279a2",
    Role.EXCHANGE: "#54a24b",
    Role.PARAMETERS: "#9d755d",
    Role.OTHER: "#79706e",
}
SIDE_STREAMS = "other streams"
PIXELS = 3000  # gaps narrower than one of so many are not drawn


def draw_steps(outcome: dict[str, Any], path: Path) -> None:
    """Step times of engines, stage by stage (step.py)."""
    remarks = {}
    for i, row in enumerate(outcome["rows"]):
        ratio = times_stock(row, outcome["rows"])
        if row["ours"] and ratio is not None:
            remarks[i] = f"{ratio:.2f} x stock"
    labels = [f"ZeRO {row['stage']}, {row['title']}" for row in outcome["rows"]]
    _draw_bars(outcome["rows"], labels, remarks, _title(outcome, outcome["settings"]["dtype"]), path)


def draw_layers(outcome: dict[str, Any], path: Path) -> bool:
    """Step times of a model with one layer or another (seed_lm.py); False where nothing was measured."""
    rows = [row for row in outcome["rows"] if row["step_ms"]]
    if not rows:
        return False
    remarks = {}
    for i, row in enumerate(rows):
        ratios = [(times(row, rows, rival), name) for rival, name in RIVALS.items()]
        remarks[i] = ", ".join(f"{ratio:.2f} x {name}" for ratio, name in ratios if row["ours"] and ratio is not None)
    labels = [row["title"] for row in rows]
    _draw_bars(rows, labels, remarks, _title(outcome, outcome["settings"]["precision"]), path)
    return True


def _title(outcome: dict[str, Any], precision: str) -> str:
    return (
        f"{outcome['parameters']['total'] / 1e9:.2f} B parameters, {outcome['world_size']} x "
        f"{outcome['machine']['device']}, EP={outcome['model']['ep_size']}, {precision}"
    )


def _draw_bars(rows: list[dict[str, Any]], labels: list[str], remarks: dict[int, str], title: str, path: Path) -> None:
    """A bar for every row: the median step, and in it the exposed communication of dense gradients and exchange.

    The 90th percentile stands beside it: a median does not show steps that now and then take far longer.
    """
    rows, labels = rows[::-1], labels[::-1]
    p50 = [median(row["step_ms"]) for row in rows]
    fig, ax = plt.subplots(figsize=(9.6, 1.9 + 0.42 * len(rows)), layout="constrained")
    ax.barh(labels, p50, color=[OURS if row["ours"] else OTHERS for row in rows])
    left = list(p50)
    for role, name in ((Role.DENSE, "dense gradients, exposed"), (Role.EXCHANGE, "experts' exchange, exposed")):
        exposed = [(median_communication(row) or {}).get(role.value, (0.0, 0.0, 0.0))[1] for row in rows]
        if any(exposed):
            left = [at - ms for at, ms in zip(left, exposed, strict=True)]
            colour = EXPOSED if role is Role.DENSE else COLOURS[role]
            ax.barh(labels, exposed, left=left, color=colour, label=name)
    for i, ms in enumerate(p50):
        remark, p90 = remarks.get(len(rows) - 1 - i), percentile(rows[i]["step_ms"], 0.9)
        text = f" {ms:.1f}, p90 {p90:.1f} ms" + (f"  ({remark})" if remark else "")
        ax.text(ms, i, text, va="center", fontsize=9)
    ax.set_xlim(0, 1.5 * max(p50))
    ax.set_xlabel("training step, median (ms; lower is better)")
    ax.spines[["top", "right"]].set_visible(False)
    if ax.get_legend_handles_labels()[0]:
        fig.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)  # beside bars it hides their texts
    ax.set_title(title, fontsize=10)
    fig.savefig(path, dpi=130)
    plt.close(fig)


def draw_backward(panels: list[tuple[str, list[Kernel], int]], path: Path) -> bool:
    """The backward of one profiled step of each engine, on one time scale; False where none has a kernel of it.

    Args:
        panels: (title, what ran on one GPU, the step), an engine each.
    """
    panels = [(title, kernels, step) for title, kernels, step in panels if _window(kernels, step)]
    if not panels:
        return False
    widest = max(end - start for start, end in (_window(kernels, step) for _, kernels, step in panels))
    fig, axes = plt.subplots(
        len(panels), 1, figsize=(14, 0.8 + 2.4 * len(panels)), layout="constrained", squeeze=False, sharex=True
    )
    for ax, (title, kernels, step) in zip(axes.flat, panels, strict=True):
        _draw_panel(ax, title, kernels, step)
        ax.set_xlim(0, 1.02 * widest)
    axes.flat[-1].set_xlabel("ms since the backward's first kernel")
    fig.savefig(path, dpi=140)
    plt.close(fig)
    return True


def _draw_panel(ax: Axes, title: str, kernels: list[Kernel], step: int) -> None:
    start, end = _window(kernels, step)
    shown = [k for k in kernels if k.end > start and k.start < end]
    compute = compute_intervals(kernels)
    side = [k.interval for k in shown if k.role is Role.COMPUTE]
    rows: list[tuple[str, str, list[Interval]]] = [
        (Role.COMPUTE.value, COLOURS[Role.COMPUTE], compute),
        (SIDE_STREAMS, "#a0cbe8", subtract(side, compute)),
    ]
    for role in (Role.DENSE, Role.EXPERTS, Role.EXCHANGE, Role.PARAMETERS, Role.OTHER):
        intervals = [k.interval for k in shown if k.role is role]
        if intervals or role is Role.DENSE:
            rows.append((role.value, COLOURS[role], union(intervals)))
    for height, (_, colour, intervals) in enumerate(reversed(rows)):
        _bars(ax, height, intervals, (start, end), colour)
    dense = [k.interval for k in shown if k.role is Role.DENSE and k.step == step]
    bare = subtract(dense, compute)
    height = [name for name, *_ in reversed(rows)].index(Role.DENSE.value)
    _bars(ax, height, bare, (start, end), EXPOSED)
    ax.set_yticks(range(len(rows)), [name for name, *_ in reversed(rows)])
    ax.set_title(
        f"{title}: backward {end - start:.1f} ms; dense gradients travel {length(dense):.2f} ms, "
        f"{length(bare):.2f} ms of it exposed (red)",
        fontsize=10,
        loc="left",
    )
    ax.spines[["top", "right"]].set_visible(False)


def _bars(ax: Axes, height: int, intervals: list[Interval], window: Interval, colour: str) -> None:
    start, end = window
    inside = [(max(a, start), min(b, end)) for a, b in intervals if b > start and a < end]
    merged = union(inside, gap=(end - start) / PIXELS)
    ax.broken_barh([(a - start, b - a) for a, b in merged], (height - 0.4, 0.8), facecolors=colour)


def _window(kernels: list[Kernel], step: int) -> Interval | None:
    """From the first to the last kernel that a step's backward launched."""
    own = [k for k in kernels if k.step == step and k.phase == BACKWARD]
    return (min(k.start for k in own), max(k.end for k in own)) if own else None
