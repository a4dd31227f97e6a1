# SPDX-License-Identifier: GPL-3.0-or-later
"""The comparison as a picture: time over the dense floor, a panel per shape, fastest layer on top, ours in colour."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from report import world_size, x_floor

OURS, OTHERS, WRONG = "#e4572e", "#9aa5b1", "#d9c7a0"


def draw(results: list[dict[str, Any]], path: Path, subtitle: str = "") -> bool:
    """Writes a PNG; False, and nothing is written, where there is nothing to draw or no matplotlib."""
    panels = [(r, [row for row in r["layers"] if x_floor(r, row) is not None]) for r in results]
    panels = [(result, rows) for result, rows in panels if rows]
    if not panels:
        return False
    try:
        import matplotlib
    except ImportError:
        return False
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    columns = min(2, len(panels))
    lines = -(-len(panels) // columns)
    tallest = max(len(rows) for _, rows in panels)
    fig, axes = plt.subplots(
        lines,
        columns,
        figsize=(8.4 * columns, lines * (1.3 + 0.32 * tallest) + 0.7),
        layout="constrained",
        squeeze=False,
    )
    for ax in axes.flat[len(panels) :]:
        ax.set_axis_off()
    for ax, (result, rows) in zip(axes.flat, panels, strict=False):
        rows = sorted(rows, key=lambda row: x_floor(result, row), reverse=True)
        values = [x_floor(result, row) for row in rows]
        colours = [WRONG if row["status"] == "wrong" else OURS if row["ours"] else OTHERS for row in rows]
        labels = [row["title"] + (" (wrong)" if row["status"] == "wrong" else "") for row in rows]
        bars = ax.barh(labels, values, color=colours)
        ax.bar_label(bars, [f"{value:.2f}" for value in values], padding=3, fontsize=9)
        for label, row in zip(ax.get_yticklabels(), rows, strict=True):
            label.set_fontweight("bold" if row["ours"] else "normal")
        ax.axvline(1, color="black", lw=1, ls=":")
        ax.set_xlim(0, 1.12 * max(values))
        shape = result["shape"]
        sizes = ", ".join(f"{name}={shape[name]}" for name in "TDFEK")
        parallel = f", EP={world_size(result)}" if world_size(result) > 1 else ""
        ax.set_title(f"{shape['name']} ({sizes}){parallel}, {result['routing']}, {result['dtype']}", fontsize=10)
        ax.set_xlabel("forward + backward, times the dense cuBLAS floor (lower is better)", fontsize=9)
        ax.spines[["top", "right"]].set_visible(False)
    fig.suptitle("One MoE layer, router included" + (f"\n{subtitle}" if subtitle else ""), fontsize=12)
    fig.savefig(path, dpi=130)
    plt.close(fig)
    return True
