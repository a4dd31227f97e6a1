# SPDX-License-Identifier: GPL-3.0-or-later
"""The picture of a run: what it learned, and how its experts shared the work."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # training machines have no display
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

CELL_TEXT_LIMIT = 16  # more experts than this, and numbers in the cells overlap


def plot_run(metrics: dict[str, Any], path: Path) -> None:
    """Write a finished run's loss curves and expert load as a PNG; `metrics` is what metrics.json holds."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(14, 5.2), layout="constrained", width_ratios=(1, 1.15))
    model, run = metrics["model"], metrics["run"]
    processes = f"{run['world_size']} {run['device']} process" + ("es" if run["world_size"] > 1 else "")
    size = {name: f"{count / 1e6:.1f} M" for name, count in metrics["parameters"].items()}
    fig.suptitle(
        f"Byte-level MoE language model on {metrics['data']['name']}\n"
        f"{size['total']} parameters, {size['active']} active per byte; {processes}"
        f", EP={model['ep_size']}, ZeRO-{run['zero_stage']}, {run['dtype']}; trained {run['train_seconds']:.0f} s",
        fontsize=12,
    )
    _plot_loss(left, metrics)
    _plot_load(fig, right, np.asarray(metrics["expert_load"]), model["top_k"])
    fig.savefig(path, dpi=130)
    plt.close(fig)


def _plot_loss(ax: Axes, metrics: dict[str, Any]) -> None:
    train, evals = metrics["history"]["train"], metrics["history"]["eval"]
    uniform = math.log(256)
    ax.plot([p["step"] for p in train], [p["loss"] for p in train], color="#4c78a8", lw=1.2, label="training text")
    ax.plot([p["step"] for p in evals], [p["loss"] for p in evals], "o-", color="#e45756", ms=4, label="held-out text")
    ax.axhline(uniform, color="gray", ls=":", lw=1, label=f"uniform guess, ln 256 = {uniform:.2f}")
    last = evals[-1]
    ax.annotate(
        f"{last['loss']:.2f} nats = {last['bits_per_byte']:.2f} bits per byte",
        xy=(last["step"], last["loss"]),
        xytext=(-8, 34),
        textcoords="offset points",
        ha="right",
        arrowprops={"arrowstyle": "-", "color": "#e45756", "lw": 0.8},
    )
    ax.set(title="Loss", xlabel="optimizer step", ylabel="cross-entropy (nats per byte)", ylim=(0, 1.06 * uniform))
    ax.set_xlim(left=0)
    ax.grid(alpha=0.25)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.legend(loc="lower left", frameon=False)


def _plot_load(fig: Figure, ax: Axes, load_LE: np.ndarray, top_k: int) -> None:
    layers, experts = load_LE.shape
    ideal = 1 / experts
    share = 100 * load_LE
    # Diverging and centred on the ideal, so that white means balanced and a colour its direction. Twice the ideal at
    # least, so that a well balanced run looks like one.
    top = max(200 * ideal, share.max())
    norm = matplotlib.colors.TwoSlopeNorm(vmin=0, vcenter=100 * ideal, vmax=top)
    image = ax.imshow(share, aspect="auto", cmap="PuOr_r", norm=norm)
    if experts <= CELL_TEXT_LIMIT:
        for layer, expert in np.ndindex(layers, experts):
            value = share[layer, expert]
            dark = norm(value) < 0.2 or norm(value) > 0.8
            ax.text(expert, layer, f"{value:.1f}", ha="center", va="center", color="white" if dark else "black")
        ax.set_xticks(range(experts))
    # The first layer is dense, so MoE layers are numbered from 2 as the model counts its layers.
    worst = load_LE.max(axis=1) * experts
    ax.set_yticks(range(layers), [f"layer {i + 2}\nmax/mean {w:.2f}" for i, w in enumerate(worst)])
    ax.set(title=f"Load of every expert, held-out text (top-{top_k})", xlabel="expert")
    bar = fig.colorbar(image, ax=ax)
    bar.set_label("share of the layer's routes (%)", labelpad=10)
    bar.ax.axhline(100 * ideal, color="black", lw=1.5)
    low, high = np.linspace(0, 100 * ideal, 3)[:2], np.linspace(100 * ideal, top, 3)[1:]
    bar.set_ticks(
        [*low, 100 * ideal, *high],
        labels=[f"{v:.1f}" for v in low] + [f"{100 * ideal:.1f} = 1/E, ideal"] + [f"{v:.1f}" for v in high],
    )
