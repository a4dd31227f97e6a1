# SPDX-License-Identifier: GPL-3.0-or-later
"""The results of `seed_lm.py` as Markdown."""

from __future__ import annotations

from statistics import mean, median
from typing import Any

from device_trace import Role
from report import heading, markdown_table, number
from step_report import median_communication, median_split, percentile

COLUMNS = (
    "MoE layer", "step p50 ms", "p90 ms", "tokens/s", "x stock", "x FlashFusedMoE", "peak GiB", "kept MB a MoE layer",
    "most", "experts' exchange ms", "exposed ms", "exposed transfer ms", "gradients ms", "exposed ms",
    "exposed transfer ms", "fullest expert", "loss, first to last",
)  # fmt: skip
LEGEND = (
    "One plain PyTorch loop trains one model, of which the MoE layers alone differ; ours, and FlashFusedMoE's "
    "between ranks, computes the shared expert too, for others plain PyTorch does. A step is forward, backward, "
    "clipping and AdamW; its time is from the end of the step before, steps following one another without a pause, "
    "the slowest rank's, in blocks that take turns. x stock, x FlashFusedMoE: p50 of deepspeed's own layer, and of "
    "FlashFusedMoE's fastest row, over this one's. Peak: most of one contender's memory on a GPU. Kept: what a MoE "
    "layer's forward leaves allocated for the backward, the mean and the most of all layers and ranks, which differ "
    "where a rank gets more routes than its share; copies of weights that a layer keeps of autocast's casts are a "
    "part of it, the shared expert, whoever computes it, is not. Exchange, gradients: time in which their "
    "collectives run; exposed: while no compute kernel runs (device_trace.py); exposed transfer: the part of that in "
    "which all ranks have begun the collective (waiting.py), empty where the trace names none. Fullest expert: most "
    "routes over the mean, after the last step, the worst layer's."
)


def fastest(rows: list[dict[str, Any]], rival: str) -> float | None:
    """The p50 of the fastest row of this rival."""
    return min((median(row["step_ms"]) for row in rows if row["rival"] == rival and row["step_ms"]), default=None)


def times(row: dict[str, Any], rows: list[dict[str, Any]], rival: str) -> float | None:
    """How many times as fast as the rival's fastest row this one is; None for the rival itself."""
    best = fastest(rows, rival)
    return None if best is None or row["rival"] == rival else best / median(row["step_ms"])


def _cells(row: dict[str, Any], outcome: dict[str, Any]) -> list[str]:
    p50, rows = median(row["step_ms"]), outcome["rows"]
    spent = median_communication(row) or {}
    exchange, dense, experts = (
        spent.get(role.value, (None, None)) for role in (Role.EXCHANGE, Role.DENSE, Role.EXPERTS)
    )
    gradients = [None if a is None else a + b for a, b in zip(dense[:2], experts[:2], strict=True)]
    split = median_split(row)
    exchange_transfer, dense_transfer, experts_transfer = (
        split.get(role.value, (None, None))[0] for role in (Role.EXCHANGE, Role.DENSE, Role.EXPERTS)
    )
    kept = None if row["kept_bytes"] is None else [nbytes for of_rank in row["kept_bytes"] for nbytes in of_rank]
    known = dense_transfer is not None and experts_transfer is not None
    return [
        f"**{row['title']}**" if row["ours"] else row["title"],
        number(p50, 2),
        number(percentile(row["step_ms"], 0.9), 2),
        f"{1e3 * outcome['tokens_per_step'] / p50:,.0f}",
        number(times(row, rows, "stock"), 2),
        number(times(row, rows, "flashfusedmoe"), 2),
        number(None if row["peak_bytes"] is None else row["peak_bytes"] / 2**30, 1),
        number(kept and mean(kept) / 1e6, 1),
        number(kept and max(kept) / 1e6, 1),
        number(exchange[0], 2),
        number(exchange[1], 2),
        number(exchange_transfer, 2),
        number(gradients[0], 2),
        number(gradients[1], 2),
        number(dense_transfer + experts_transfer if known else None, 2),
        number(row["max_over_mean_load"] and max(row["max_over_mean_load"]), 2),
        f"{row['losses'][0]:.4f} to {row['losses'][-1]:.4f}",
    ]


def table(outcome: dict[str, Any]) -> str:
    """Rows with numbers, then a line for every row that has a note or none."""
    measured = [row for row in outcome["rows"] if row["step_ms"]]
    remarks = [f"{row['title']}: {row['note']}" for row in measured if row["note"]]
    remarks += [f"{row['title']}: {row['status']}: {row['note']}" for row in outcome["rows"] if not row["step_ms"]]
    return markdown_table(COLUMNS, [_cells(row, outcome) for row in measured], remarks)


def model_line(outcome: dict[str, Any]) -> str:
    model, size, settings = outcome["model"], outcome["parameters"], outcome["settings"]
    return (
        f"{model['num_layers']} layers, {model['num_layers'] - 1} of them MoE with {model['num_experts']} experts "
        f"(top-{model['top_k']}) and a shared one; {size['total'] / 1e9:.2f} B parameters, "
        f"{size['active'] / 1e9:.2f} B active; {outcome['world_size']} processes, EP={model['ep_size']}, "
        f"{outcome['tokens_per_step'] // outcome['world_size']} tokens on each, precision {settings['precision']}, "
        f"our ep_backend {settings['ep_backend'][0]}"
    )


def document(outcome: dict[str, Any]) -> str:
    return (
        "\n\n".join(["## The seed's workload", heading(outcome), model_line(outcome), LEGEND, table(outcome)]) + "\n"
    )
