# SPDX-License-Identifier: GPL-3.0-or-later
"""The plot command: what it reads from a run's CSV files, what it draws, and what it says when there is nothing."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from flashfusemoe_ds.plot_load import main, read_history

SAMPLES = (64, 128, 192, 256)


def write(folder: Path, name: str, values: list[float]) -> None:
    """A file as DeepSpeed's csv_monitor names and writes it."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = [f"step,{name.split('/')[-1]}", *(f"{x},{y}" for x, y in zip(SAMPLES, values, strict=True))]
    (folder / f"Train_MoE_{name.replace('/', '_')}.csv").write_text("\r\n".join(rows) + "\r\n")


def write_run(folder: Path, num_layers: int, num_experts: int, busiest: float) -> None:
    """A run whose last expert of each layer starts with `busiest` times the mean load, and ends balanced."""
    loads = [busiest + (1 - busiest) * t / 3 for t in range(4)]
    for name in ("load_max_over_mean", "load_max_over_mean_worst"):
        write(folder, name, loads)
    write(folder, "dropped_share", [0.3, 0.2, 0.1, 0.05])
    write(folder, "dead_experts", [2.0, 1.0, 0.0, 0.0])
    for layer in range(num_layers):
        write(folder, f"model.layers.{layer}.mlp/load_max_over_mean", loads)
        for expert in range(num_experts):
            rest = [(num_experts - load) / (num_experts - 1) for load in loads]
            write(folder, f"model.layers.{layer}.mlp/expert_{expert}", loads if expert == num_experts - 1 else rest)


def image(path: Path) -> np.ndarray:
    """Pixels, [height, width, RGB] in 0 to 1."""
    from matplotlib.image import imread

    return imread(path)[:, :, :3]


def test_a_resumed_run_and_the_order_of_layers(tmp_path: Path) -> None:
    write_run(tmp_path / "run", num_layers=12, num_experts=4, busiest=3.0)
    file = tmp_path / "run" / "Train_MoE_dropped_share.csv"
    file.write_text(file.read_text() + "step,dropped_share\r\n192,0.15\r\n256,0.25\r\n")
    for path in (tmp_path, tmp_path / "run", file):
        history = read_history(path)
        assert history.overall["dropped_share"] == {64: 0.3, 128: 0.2, 192: 0.15, 256: 0.25}
        assert history.layers["model.layers.11.mlp"] == {
            "load_max_over_mean": dict(zip(SAMPLES, (3, 7 / 3, 5 / 3, 1), strict=True))
        }
        assert sorted(history.experts["model.layers.2.mlp"]) == [0, 1, 2, 3]
        assert set(history.overall) == {
            "load_max_over_mean",
            "load_max_over_mean_worst",
            "dropped_share",
            "dead_experts",
        }


@pytest.mark.parametrize("detail", ["brief", "layers", "experts"])
@pytest.mark.parametrize(("num_layers", "busiest"), [(3, 3.0), (40, 7.0)])
def test_the_picture_shows_the_load(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], detail: str, num_layers: int, busiest: float
) -> None:
    write_run(tmp_path / "run", num_layers if detail != "brief" else 0, 8 if detail == "experts" else 0, busiest)
    assert main([str(tmp_path), "--out", str(tmp_path / "load.png")]) == 0
    assert capsys.readouterr().out == f"wrote {tmp_path / 'load.png'}\n"
    pixels = image(tmp_path / "load.png")
    height, width, _ = pixels.shape
    assert height > 500 and width > 1000
    if detail == "brief":
        return
    # Within the heat map, the first interval is darker than the last, which is balanced.
    first, last = (pixels[int(0.2 * height) : int(0.5 * height), int(x * width)] for x in (0.25, 0.75))
    assert first.mean() < last.mean() - 0.02 and last.mean() > 0.85


def test_what_is_missing_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    assert main([str(tmp_path / "empty")]) == 1
    assert "found none; they are written with csv_monitor enabled" in capsys.readouterr().err
    for run in ("a", "b"):
        write_run(tmp_path / run, 1, 0, 2.0)
    assert main([str(tmp_path)]) == 1
    assert "found those of 2 runs" in capsys.readouterr().err
    (tmp_path / "a" / "Train_MoE_dead_experts.csv").unlink()
    assert main([str(tmp_path / "a")]) == 1
    assert "Train_MoE_dead_experts.csv is missing or empty" in capsys.readouterr().err
