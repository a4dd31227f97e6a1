# SPDX-License-Identifier: GPL-3.0-or-later
"""Results as a Markdown table, and several runs as one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

FORMAT = 1
EP1 = "ours-ep1"  # key of the row that others' throughput is compared with
COLUMNS = (
    "layer", "fwd ms", "fwd+bwd ms", "min to max", "TFLOP/s", "x floor", "floor ms", "kept MiB", "peak MiB",
    "launches fwd, bwd", "host ms", "error out, dx",
)  # fmt: skip
PARALLEL_COLUMNS = (
    "layer", "fwd ms", "fwd+bwd ms", "min to max", "TFLOP/s", "x floor", "floor ms", "of EP=1", "wire ms",
    "wire share", "kept MiB", "peak MiB", "host ms", "error out, dx",
)  # fmt: skip
LEGEND = (
    "Medians over rounds; each round has a new random input. TFLOP/s and x floor are of fwd+bwd. Floor: the experts' "
    "products as dense matrix products of cuBLAS in the same process. Kept: allocated after the forward. Peak: most "
    "allocated during a step above weights and input. Host: until a step is issued. Error: relative, against a wider "
    "reference."
)
PARALLEL_LEGEND = (
    "T tokens per rank, experts shared by all ranks; every number is the worst rank's, and samples start together. Of "
    "EP=1: throughput per GPU over that of our layer with all experts on each GPU. Wire: what a step exchanges, done "
    "alone, one exchange after another; its share is that time over the step's, whether hidden or not."
)


def load_runs(paths: list[Path]) -> list[dict[str, Any]]:
    """The runs in these JSON files. ValueError names a file that this program did not write."""
    runs = []
    for path in paths:
        try:
            run = json.loads(path.read_text())
        except (OSError, ValueError) as error:
            raise ValueError(f"{path}: cannot be read: {error}") from error
        if not isinstance(run, dict) or run.get("format") != FORMAT or "results" not in run:
            raise ValueError(f"{path}: is not a result of this benchmark")
        runs.append(run)
    return runs


def merge_results(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Results of all runs, those of one shape, routing and dtype together. A row keeps the floor of its own run; of a
    layer that several runs have, the last one that was measured stays."""
    merged: dict[str, dict[str, Any]] = {}
    for run in runs:
        for result in run["results"]:
            rows = {row["key"]: {**row, "floor_ms": row.get("floor_ms", floor_ms(result))} for row in result["layers"]}
            key = json.dumps([result["shape"], result["routing"], result["dtype"], world_size(result)])
            if key not in merged:
                merged[key] = {**result, "layers": list(rows.values())}
                continue
            known = {row["key"]: row for row in merged[key]["layers"]}
            known.update({k: row for k, row in rows.items() if row["step_ms"] or k not in known})
            merged[key]["layers"] = list(known.values())
    return list(merged.values())


def world_size(result: dict[str, Any]) -> int:
    return result.get("world_size", 1)


def floor_ms(result: dict[str, Any]) -> float | None:
    samples = result["floor"]["step_ms"]
    return median(samples) if samples else None


def x_floor(result: dict[str, Any], row: dict[str, Any]) -> float | None:
    """Time of a step over the dense floor's in the same run."""
    floor = row.get("floor_ms", floor_ms(result))
    return median(row["step_ms"]) / floor if row["step_ms"] and floor else None


def of_single(result: dict[str, Any], row: dict[str, Any]) -> float | None:
    """Throughput per GPU over that of the row named EP=1 in the same run."""
    single = next((one["step_ms"] for one in result["layers"] if one["key"] == EP1), None)
    return median(single) / median(row["step_ms"]) if single and row["step_ms"] else None


def number(value: float | None, digits: int) -> str:
    """A cell's text; empty for None."""
    return "" if value is None else f"{value:.{digits}f}"


def markdown_table(columns: Sequence[str], rows: Iterable[Sequence[str]], remarks: Sequence[str] = ()) -> str:
    """A table with these cells, and the remarks under it as a list."""
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    lines += ["| " + " | ".join(cells) + " |" for cells in rows]
    return "\n".join([*lines, *[""] * bool(remarks), *(f"- {remark}" for remark in remarks)])


def _cells(result: dict[str, Any], row: dict[str, Any]) -> dict[str, str]:
    def mebibytes(value: int | None) -> str:
        return "" if value is None else f"{value / 2**20:.1f}" if value < 2**24 else f"{value / 2**20:.0f}"

    title = f"**{row['title']}**" if row["ours"] else row["title"]
    if row["status"] == "wrong":
        title += " WRONG"
    step = median(row["step_ms"])
    wire = median(row["exchange_ms"]) if row.get("exchange_ms") else None
    launches = (row["launches_forward"], row["launches_backward"])
    errors = (row["error_output"], row["error_input_grad"])
    return {
        "layer": title,
        "fwd ms": number(median(row["forward_ms"]), 3),
        "fwd+bwd ms": number(step, 3),
        "min to max": f"{min(row['step_ms']):.3f} to {max(row['step_ms']):.3f}",
        "TFLOP/s": number(result["step_flops"] / step / 1e9, 0 if result["step_flops"] > 1e10 else 3),
        "x floor": number(x_floor(result, row), 2),
        "floor ms": number(row.get("floor_ms", floor_ms(result)), 3),
        "of EP=1": number(of_single(result, row), 2),
        "wire ms": number(wire, 3),
        "wire share": "" if wire is None else f"{wire / step:.0%}",
        "kept MiB": mebibytes(row["kept_bytes"]),
        "peak MiB": mebibytes(row["peak_bytes"]),
        "launches fwd, bwd": "" if None in launches else f"{launches[0]}, {launches[1]}",
        "host ms": number(median(row["host_ms"]) if row["host_ms"] else None, 3),
        "error out, dx": "" if None in errors else f"{errors[0]:.1e}, {errors[1]:.1e}",
    }


def table(result: dict[str, Any]) -> str:
    """One shape's Markdown: heading, table, and a line for every layer that has a note or no numbers."""
    shape = result["shape"]
    sizes = ", ".join(f"{name}={shape[name]}" for name in "TDFEK")
    world = world_size(result)
    columns = PARALLEL_COLUMNS if world > 1 else COLUMNS
    parallel = f", EP={world}" if world > 1 else ""
    heading_line = f"### {shape['name']} ({sizes}){parallel}, {result['routing']} routing, {result['dtype']}"
    measured = [row for row in result["layers"] if row["step_ms"]]
    rows = [list(map(_cells(result, row).__getitem__, columns)) for row in measured]
    remarks = [f"{row['title']}: {row['note']}" for row in measured if row["note"]]
    remarks += [
        f"{row['title']}: {row['status']}: {row['reason']}" for row in result["layers"] if row["status"] != "ok"
    ]
    return f"{heading_line}\n\n{markdown_table(columns, rows, remarks)}"


def device(run: dict[str, Any]) -> str:
    """What it ran on, and how many of them."""
    count = run.get("world_size", 1)
    return f"{count} x " * (count > 1) + run["machine"]["device"]


def heading(run: dict[str, Any]) -> str:
    """One line on where and when."""
    machine = run["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())
    driver = f", driver {machine['driver']}" if machine["driver"] else ""
    commit = f", commit {machine['commit'][:12]}" if machine["commit"] else ""
    return f"{device(run)}{driver}; {versions}{commit}; {run['date']}\n\n    {run['command']}"


def document(runs: list[dict[str, Any]], results: list[dict[str, Any]]) -> str:
    legends = [LEGEND] + [PARALLEL_LEGEND] * any(world_size(result) > 1 for result in results)
    parts = [*map(heading, runs), *legends, *map(table, results)]
    return "\n\n".join(parts) + "\n"
