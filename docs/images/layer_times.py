# SPDX-License-Identifier: GPL-3.0-or-later
"""Draws layer_times.png from layer_times.json: `python docs/images/layer_times.py`.

A bar is a layer's time over ours in the same process: ratios within one block are what those measurements are good
for. The dense floor is the same arithmetic as cuBLAS products without routing. What was not measured has no bar.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).parent
OURS, OTHERS, FLOOR = "#e4572e", "#9aa5b1", "#d8dde2"
FLOOR_LABEL, OURS_LABEL = "dense floor (cuBLAS, no routing)", "flashfusemoe_ds"


def draw(source: bytes, path: Path) -> None:
    """The picture of a layer_times.json, whose digest it carries, so that a test sees a picture that is not of it."""
    data: dict[str, Any] = json.loads(source)
    shapes = list(dict.fromkeys(block["shape"] for block in data["blocks"]))
    labels = [FLOOR_LABEL, OURS_LABEL, *dict.fromkeys(name for block in data["blocks"] for name in block["others"])]
    fig, axes = plt.subplots(1, len(shapes), figsize=(13, 4.6), layout="constrained", sharey=True)
    for ax, shape in zip(axes, shapes, strict=True):
        blocks = [block for block in data["blocks"] if block["shape"] == shape]
        first = blocks[0]
        ratios = {FLOOR_LABEL: first["floor"] / first["ours"], OURS_LABEL: 1.0}
        for block in blocks:
            ratios |= {name: ms / block["ours"] for name, ms in block["others"].items()}
        for y, label in enumerate(labels):
            if label not in ratios:
                ax.text(0.02, y, "not measured", va="center", fontsize=9, color="#7a8691")
                continue
            colour = {OURS_LABEL: OURS, FLOOR_LABEL: FLOOR}.get(label, OTHERS)
            ax.barh(y, ratios[label], color=colour)
            ax.text(ratios[label], y, f" {ratios[label]:.2f}", va="center", fontsize=9)
        ax.axvline(1, color=OURS, lw=1, ls=":")
        ax.set_xlim(0, 1.15 * max(ratios.values()))
        ax.set_title(f"{shape}: {first['ours']:.2f} ms\n{first['sizes']}", fontsize=10)
        ax.set_xlabel("time, ours = 1 (lower is better)", fontsize=9)
        ax.spines[["top", "right"]].set_visible(False)
        ax.set_yticks(range(len(labels)), labels)
    axes[0].invert_yaxis()
    axes[0].get_yticklabels()[1].set_fontweight("bold")
    fig.suptitle(f"{data['what']}\n{data['machine']}, {data['versions']}, {data['date']}", fontsize=11)
    fig.savefig(path, dpi=110, metadata={"Software": None, "Source": hashlib.sha256(source).hexdigest()})
    plt.close(fig)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE / "layer_times.png")
    draw((HERE / "layer_times.json").read_bytes(), parser.parse_args().out)
