# SPDX-License-Identifier: GPL-3.0-or-later
"""The picture of a run's expert load, from the CSV files that `log_expert_load` left (docs/expert_load.md):

    python -m flashfusemoe_ds.plot_load RUN_DIR --out load.png

Above, a heat map over training: load of every expert, layer by layer, or max/mean of every layer, as the run logged.
Below, max/mean of every layer and of all. Needs matplotlib: pip install flashfusemoe_ds[examples].
"""

from __future__ import annotations

import argparse
import csv
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Points = dict[int, float]  # samples seen so far -> value

PREFIX = "Train_MoE_"
MAX_OVER_MEAN = "load_max_over_mean"
# Of a layer's series, a file's name is the layer's path, "_" and one of these.
LAYER_SERIES = (MAX_OVER_MEAN, "load_entropy", "dropped_share", "dead_experts", "aux_loss", "z_loss")
# Of those over all layers, what the picture cannot do without.
OVERALL_SERIES = (MAX_OVER_MEAN, f"{MAX_OVER_MEAN}_worst", "dropped_share", "dead_experts")
_EXPERT = re.compile(r"(.+)_expert_(\d+)")

LEGEND_LIMIT = 8  # more layers than this, and a colour bar tells them apart
LABEL_LIMIT = 32  # layers named beside the heat map


@dataclass(frozen=True)
class LoadHistory:
    """What a run logged.

    Attributes:
        overall: series over all layers, by name.
        layers: a layer's path -> its series by name; empty in brief mode.
        experts: a layer's path -> load relative to the layer's mean of each expert; empty unless "experts" was logged.
    """

    overall: dict[str, Points] = field(default_factory=dict)
    layers: dict[str, dict[str, Points]] = field(default_factory=dict)
    experts: dict[str, dict[int, Points]] = field(default_factory=dict)

    def lines(self) -> list[Points]:
        """Max/mean of everything that has it: the mean over layers, the worst layer, every layer."""
        overall = [points for name, points in self.overall.items() if name.startswith(MAX_OVER_MEAN)]
        return overall + [series[MAX_OVER_MEAN] for series in self.layers.values()]


def read_history(path: str | Path) -> LoadHistory:
    """Reads the CSV files in a folder or anywhere below it, or those beside the one given.

    Raises:
        ValueError: there are none, or not all that a run writes, or those of more than one run.
    """
    path = Path(path)
    files = sorted((path.parent if path.is_file() else path).rglob(f"{PREFIX}*.csv"))
    folders = sorted({str(file.parent) for file in files})
    if len(folders) != 1:
        found = "none" if not folders else f"those of {len(folders)} runs ({', '.join(folders)})"
        raise ValueError(
            f"{path}: needs the files {PREFIX}*.csv of one run, found {found}; they are written with csv_monitor "
            "enabled and flashfusemoe.log_expert_load set"
        )
    history = LoadHistory()
    for file in files:
        points, name = _read(file), file.stem.removeprefix(PREFIX)
        expert = _EXPERT.fullmatch(name)
        layer, series = _layer_and_series(name)
        if expert:
            history.experts.setdefault(expert[1], {})[int(expert[2])] = points
        elif layer:
            history.layers.setdefault(layer, {})[series] = points
        else:
            history.overall[name] = points
    missing = [name for name in OVERALL_SERIES if not history.overall.get(name)]
    if missing:
        raise ValueError(f"{folders[0]}: {PREFIX}{missing[0]}.csv is missing or empty; every run writes it")
    return history


def _read(file: Path) -> Points:
    """A resumed run writes the header again, and steps that it repeats: the last value of each counts."""
    with file.open(newline="") as lines:
        return {int(row[0]): float(row[1]) for row in csv.reader(lines) if row and row[0] != "step"}


def _layer_and_series(name: str) -> tuple[str, str]:
    """The layer's path, empty for a series over all layers, and the series' own name."""
    for series in LAYER_SERIES:
        if name.endswith(f"_{series}"):
            return name.removesuffix(f"_{series}"), series
    return "", name


def _in_order(layers: Sequence[str]) -> list[str]:
    """Layer 10 after layer 9."""
    return sorted(
        layers, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
    )


# ---- the picture


def plot_load(history: LoadHistory, out: str | Path) -> None:
    """Draws a history as a PNG, or whatever the name's suffix says.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("plot_load needs matplotlib: pip install flashfusemoe_ds[examples]") from error
    matplotlib.use("Agg")  # training machines have no display
    import matplotlib.pyplot as plt

    heat = bool(history.layers or history.experts)
    rows = sum(len(experts) for experts in history.experts.values()) or 4 * len(history.layers)
    heights = [min(9.0, max(3.0, 0.11 * rows)), 3.4] if heat else [4.2]
    fig, axes = plt.subplots(
        len(heights), 1, figsize=(12, sum(heights) + 1), layout="constrained", height_ratios=heights, squeeze=False,
        sharex=True,
    )  # fmt: skip
    fig.suptitle(_headline(history), fontsize=12)
    if history.experts:
        _plot_experts(fig, axes[0, 0], history.experts)
    elif history.layers:
        _plot_layers(fig, axes[0, 0], history.layers)
    _plot_lines(fig, axes[-1, 0], history)
    fig.savefig(out, dpi=130)
    plt.close(fig)


def _headline(history: LoadHistory) -> str:
    def last(name: str) -> float:
        points = history.overall[name]
        return points[max(points)]

    return (
        f"Expert load; at the end max/mean {last(MAX_OVER_MEAN):.2f} on average, "
        f"{last(f'{MAX_OVER_MEAN}_worst'):.2f} in the worst layer\n"
        f"{100 * last('dropped_share'):.1f} % of routes dropped, {last('dead_experts'):.0f} experts without a token"
    )


def _edges(samples: Sequence[int]) -> list[int]:
    """Bounds of the intervals that end at these sample counts."""
    first = samples[0] - (samples[1] - samples[0]) if len(samples) > 1 else 0
    return [max(first, 0), *samples]


def _heat_map(ax: Axes, series: Sequence[Points], **colours: Any) -> Any:
    """One row per series, first on top; blank where a series has no value."""
    samples = sorted(set().union(*series))
    values = [[points.get(x, float("nan")) for x in samples] for points in series]
    mesh = ax.pcolormesh(_edges(samples), range(len(series) + 1), values, rasterized=True, **colours)
    ax.invert_yaxis()
    ax.tick_params(axis="y", length=0)
    return mesh


def _name_bands(ax: Axes, names: Sequence[str], sizes: Sequence[int]) -> None:
    """Names of layers beside their bands of rows, every n-th where there are too many, and lines between the bands."""
    ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
    every = -(-len(names) // LABEL_LIMIT)
    shown = range(0, len(names), every)
    ax.set_yticks([ends[i] - sizes[i] / 2 for i in shown], [names[i] for i in shown])
    for end in ends[:-1]:
        ax.axhline(end, color="white" if max(sizes) == 1 else "dimgray", lw=0.6)


def _plot_experts(fig: Figure, ax: Axes, experts: dict[str, dict[int, Points]]) -> None:
    from matplotlib.colors import TwoSlopeNorm

    names = _in_order(list(experts))
    rows = [experts[name][i] for name in names for i in sorted(experts[name])]
    # Diverging around 1, so that white is balanced. Up to 2 at least, so that a well balanced run looks like one; and
    # to 4 at most, or a single busy expert would pale all others.
    highest = max(value for points in rows for value in points.values())
    top = min(max(2.0, highest), 4.0)
    mesh = _heat_map(ax, rows, cmap="PuOr_r", norm=TwoSlopeNorm(1.0, vmin=0.0, vmax=top))
    _name_bands(ax, names, [len(experts[name]) for name in names])
    bar = fig.colorbar(mesh, ax=ax, pad=0.015, extend="max" if highest > top else "neither")
    middle = (1 + top) / 2
    last = f"{top:.1f}" + (f" to {highest:.1f}" if highest > top else "")
    bar.set_ticks([0, 0.5, 1, middle, top], labels=["0, dead", "0.5", "1, balanced", f"{middle:.1f}", last])
    ax.set(title="Load of every expert, relative to its layer's mean", ylabel="experts of each layer, 0 on top")


def _plot_layers(fig: Figure, ax: Axes, layers: dict[str, dict[str, Points]]) -> None:
    from matplotlib.colors import LogNorm

    names = _in_order(list(layers))
    rows = [layers[name][MAX_OVER_MEAN] for name in names]
    top = max(2.0, *(value for points in rows for value in points.values()))
    mesh = _heat_map(ax, rows, cmap="Purples", norm=LogNorm(1.0, top))
    _name_bands(ax, names, [1] * len(names))
    bar = fig.colorbar(mesh, ax=ax, pad=0.015)
    bar.set_label("max/mean; 1 is balanced")
    bar.set_ticks(_doublings(top), labels=[f"{tick:g}" for tick in _doublings(top)])
    bar.minorticks_off()
    ax.set(title="Load of the busiest expert of every layer, relative to the layer's mean")


def _doublings(top: float) -> list[float]:
    return [tick for tick in (1, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128, 256) if tick <= top]


def _plot_lines(fig: Figure, ax: Axes, history: LoadHistory) -> None:
    from matplotlib import colormaps
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.ticker import StrMethodFormatter

    names = _in_order(list(history.layers))
    depth = Normalize(0, max(len(names) - 1, 1))
    cmap = colormaps["viridis"]
    few = len(names) <= LEGEND_LIMIT
    for i, name in enumerate(names):
        points = history.layers[name][MAX_OVER_MEAN]
        ax.plot(*_sorted(points), color=cmap(0.92 * depth(i)), lw=1, label=name if few else None)
    ax.plot(*_sorted(history.overall[MAX_OVER_MEAN]), color="black", lw=2, label="mean over layers")
    if not names:
        worst = history.overall[f"{MAX_OVER_MEAN}_worst"]
        ax.plot(*_sorted(worst), color="#e45756", lw=1.2, label="worst layer")
    ax.axhline(1, color="gray", ls=":", lw=1, label="balanced")
    ax.set(title="Load of the busiest expert", xlabel="samples seen", ylabel="max/mean")
    top = max(value for points in history.lines() for value in points.values())
    if top > 4:  # else the balanced end of a run would be a line at the bottom
        ax.set_yscale("log", base=2)
        ax.set_yticks(_doublings(1.1 * top), labels=[f"{tick:g}" for tick in _doublings(1.1 * top)])
        ax.minorticks_off()
    ax.set_ylim(bottom=0.95)
    ax.margins(x=0)
    ax.grid(alpha=0.25)
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    ax.legend(loc="upper right", frameon=False, ncols=2 if few and len(names) > 3 else 1)
    if not few:
        bar = fig.colorbar(ScalarMappable(Normalize(0, len(names) - 1), cmap), ax=ax, pad=0.015)
        bar.set_ticks([0, len(names) - 1], labels=[names[0], names[-1]])


def _sorted(points: Points) -> tuple[list[int], list[float]]:
    samples = sorted(points)
    return samples, [points[x] for x in samples]


# ---- the command


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 1 with a line on stderr that says what is missing."""
    parser = argparse.ArgumentParser(
        prog="python -m flashfusemoe_ds.plot_load",
        description="Draw the expert load of a run from the CSV files that log_expert_load left.",
    )
    parser.add_argument("run", type=Path, metavar="RUN_DIR_OR_CSV", help="folder that holds the files, or one of them")
    parser.add_argument("--out", type=Path, default=Path("load.png"), help="default: %(default)s")
    args = parser.parse_args(arguments)
    try:
        plot_load(read_history(args.run), args.out)
    except (ValueError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"wrote {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
