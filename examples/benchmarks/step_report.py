# SPDX-License-Identifier: GPL-3.0-or-later
"""The results of `step.py` as Markdown."""

from __future__ import annotations

import math
from statistics import median
from typing import Any

from device_trace import COMMUNICATION, Role
from report import heading, markdown_table, number

COLUMNS = (
    "ZeRO", "engine", "step p50 ms", "p90 ms", "tokens/s", "times stock", "peak GiB", "dense gradients ms",
    "exposed ms", "% of step", "alone ms", "exposed waiting ms", "exposed transfer ms", "% of step",
    "experts' exchange ms", "exposed ms", "exposed transfer ms", "loss, first to last",
)  # fmt: skip
LEGEND = (
    "A step is forward, backward and optimizer; its time is from the end of the step before, steps following one "
    "another without a pause, the slowest rank's. DeepSpeed has overlap_comm on at stages 1 and 2; stage 0 knows no "
    "such setting. Times stock: the fastest DeepSpeed engine's p50 at this stage over this one's. Peak: most of one "
    "engine's memory on a GPU. Dense gradients, experts' exchange: time in which their collectives run on a GPU; "
    "exposed: while no compute kernel runs there; alone: nor another collective. Exposed waiting: the part of exposed "
    "until the last rank has begun the same collective; exposed transfer: the part from then on (waiting.py). Both "
    "are empty where the trace names no collectives, as for symm_mem and deep_ep. Every number is its slowest rank's, "
    "the median of the profiled steps, so waiting and transfer need not add up; per cent of the p50, which is not "
    "profiled."
)


def percentile(samples: list[float], share: float) -> float:
    """The smallest sample that at least this share of them does not exceed."""
    return sorted(samples)[max(0, math.ceil(share * len(samples)) - 1)]


def median_communication(row: dict[str, Any]) -> dict[str, tuple[float, float, float]] | None:
    """Role -> (ms, exposed ms, exposed alone ms), medians over the profiled steps; None if there is no profile."""
    steps = row["profile"]["steps"] if row.get("profile") else []
    if not steps:
        return None
    return {
        role.value: tuple(median(step[role.value][i] for step in steps) for i in range(3)) for role in COMMUNICATION
    }


def median_split(row: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """Role -> (exposed transfer ms, exposed waiting ms), medians over the profiled steps; without roles that have no
    such numbers."""
    steps = row["profile"]["transfer_and_waiting"] if row.get("profile") else []
    return {role: tuple(median(step[role][i] for step in steps) for i in range(2)) for role in (steps or [{}])[0]}


def times_stock(row: dict[str, Any], rows: list[dict[str, Any]]) -> float | None:
    """Step time of the stage's fastest DeepSpeed engine over this row's."""
    rivals = [median(r["step_ms"]) for r in rows if r["stage"] == row["stage"] and not r["ours"]]
    return min(rivals) / median(row["step_ms"]) if rivals else None


def _cells(row: dict[str, Any], outcome: dict[str, Any]) -> list[str]:
    p50 = median(row["step_ms"])
    spent = median_communication(row) or {}
    dense_ms, dense_exposed, dense_alone = spent.get(Role.DENSE.value, (None, None, None))
    split = median_split(row)
    dense_transfer, dense_waiting = split.get(Role.DENSE.value, (None, None))
    exchange_transfer, _ = split.get(Role.EXCHANGE.value, (None, None))
    exchange_ms, exchange_exposed, _ = spent.get(Role.EXCHANGE.value, (None, None, None))
    return [
        str(row["stage"]),
        f"**{row['title']}**" if row["ours"] else row["title"],
        number(p50, 2),
        number(percentile(row["step_ms"], 0.9), 2),
        f"{1e3 * outcome['tokens_per_step'] / p50:,.0f}",
        number(times_stock(row, outcome["rows"]), 2),
        number(None if row["peak_bytes"] is None else row["peak_bytes"] / 2**30, 1),
        number(dense_ms, 2),
        number(dense_exposed, 2),
        number(None if dense_exposed is None else 100 * dense_exposed / p50, 2),
        number(dense_alone, 2),
        number(dense_waiting, 2),
        number(dense_transfer, 2),
        number(None if dense_transfer is None else 100 * dense_transfer / p50, 2),
        number(exchange_ms, 2),
        number(exchange_exposed, 2),
        number(exchange_transfer, 2),
        f"{row['losses'][0]:.4f} to {row['losses'][-1]:.4f}",
    ]


def stage_remarks(rows: list[dict[str, Any]]) -> list[str]:
    """The rows' notes."""
    return [f"ZeRO {row['stage']}, {row['title']}: {row['note']}" for row in rows if row["note"]]


def table(outcome: dict[str, Any]) -> str:
    rows = outcome["rows"]
    return markdown_table(COLUMNS, [_cells(row, outcome) for row in rows], stage_remarks(rows))


def model_line(outcome: dict[str, Any]) -> str:
    model, size = outcome["model"], outcome["parameters"]
    return (
        f"{model['num_layers']} layers, {model['num_layers'] - 1} of them MoE with {model['num_experts']} experts "
        f"(top-{model['top_k']}) and a shared one; {size['total'] / 1e9:.2f} B parameters, "
        f"{size['active'] / 1e9:.2f} B active; {outcome['world_size']} processes, EP={model['ep_size']}, "
        f"{outcome['tokens_per_step'] // outcome['world_size']} tokens on each, {outcome['settings']['dtype']}, "
        f"ep_backend {outcome['settings']['ep_backend']}"
    )


def document(outcome: dict[str, Any]) -> str:
    return "\n\n".join(["## Training steps", heading(outcome), model_line(outcome), LEGEND, table(outcome)]) + "\n"
