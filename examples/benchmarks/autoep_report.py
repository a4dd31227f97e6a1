# SPDX-License-Identifier: GPL-3.0-or-later
"""The results of `autoep_step.py` as Markdown."""

from __future__ import annotations

from statistics import median
from typing import Any

from report import heading, markdown_table, number
from step_report import percentile, stage_remarks, times_stock

COLUMNS = (
    "ZeRO", "MoE layers", "step p50 ms", "p90 ms", "tokens/s", "times stock", "fwd+bwd ms", "times stock",
    "optimizer ms", "peak GiB", "MoE fwd ms", "MoE bwd ms", "MoE % of kernels", "busiest expert",
    "loss, first to last",
)  # fmt: skip
LEGEND = (
    "A step is all its forwards and backwards and the optimizer; its time is from the end of the step before, steps "
    "following one another without a pause, the slowest rank's. Times stock: the fastest AutoEP engine's p50 at this "
    "stage over this one's. Peak: most of one engine's memory on a GPU. MoE: time in which a kernel of a MoE layer "
    "runs, from a profile, and its share of the time in which any kernel runs. Busiest expert: its tokens over the "
    "mean, in the worst layer."
)


def _cells(row: dict[str, Any], outcome: dict[str, Any]) -> list[str]:
    p50, forward_backward = median(row["step_ms"]), median(row["forward_backward_ms"])
    same_stage = [other for other in outcome["rows"] if other["stage"] == row["stage"]]
    as_steps = [{**other, "step_ms": other["forward_backward_ms"]} for other in same_stage]
    profile = {name: median(step[name] for step in row["moe"]) for name in row["moe"][0]} if row["moe"] else {}
    return [
        str(row["stage"]),
        f"**{row['title']}**" if row["ours"] else row["title"],
        number(p50, 2),
        number(percentile(row["step_ms"], 0.9), 2),
        f"{1e3 * outcome['tokens_per_step'] / p50:,.0f}",
        number(times_stock(row, same_stage), 2),
        number(forward_backward, 2),
        number(times_stock({**row, "step_ms": row["forward_backward_ms"]}, as_steps), 2),
        number(p50 - forward_backward, 2),
        number(None if row["peak_bytes"] is None else row["peak_bytes"] / 2**30, 1),
        number(profile.get("forward"), 2),
        number(profile.get("backward"), 2),
        number(100 * profile["moe"] / profile["all"] if profile else None, 0),
        number(max(row["max_over_mean_load"]), 2),
        f"{row['losses'][0]:.4f} to {row['losses'][-1]:.4f}",
    ]


def table(outcome: dict[str, Any]) -> str:
    rows = outcome["rows"]
    return markdown_table(COLUMNS, [_cells(row, outcome) for row in rows], stage_remarks(rows))


def model_line(outcome: dict[str, Any]) -> str:
    model, size, settings = outcome["model"], outcome["parameters"], outcome["settings"]
    optimizers = ", ".join(dict.fromkeys(row["optimizer"] for row in outcome["rows"]))
    return (
        f"Qwen3MoeForCausalLM, {model['num_hidden_layers']} layers of width {model['hidden_size']}, "
        f"{model['num_experts']} experts of {model['moe_intermediate_size']} (top-{model['num_experts_per_tok']}), "
        f"{model['vocab_size']} words; {size['total'] / 1e9:.2f} B parameters, {size['active'] / 1e9:.2f} B active; "
        f"{outcome['world_size']} processes, autoep_size {settings['autoep_size']}, {settings['batch']} x "
        f"{settings['context']} tokens on each, {settings['accumulation']} times a step, {settings['dtype']}"
        f"{', states in bf16' if settings['bf16_states'] else ''}"
        f"{', activations recomputed' if settings['checkpointing'] else ''}, ep_backend {settings['ep_backend']}; "
        f"{optimizers}; engines {'one after the other' if settings['apart'] else 'in turns'}"
    )


def document(outcome: dict[str, Any]) -> str:
    parts = ["## Training steps under AutoEP", heading(outcome), model_line(outcome), LEGEND, table(outcome)]
    return "\n\n".join(parts) + "\n"
