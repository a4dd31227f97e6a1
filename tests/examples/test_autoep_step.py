# SPDX-License-Identifier: GPL-3.0-or-later
"""The benchmark of steps under AutoEP: two processes at toy size, what counts as a MoE layer's time, the table."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

from tests.distributed import run_ranks
from tests.examples.scripts import cells, run_main

pytest.importorskip("transformers", reason="needs transformers: pip install flashfusemoe_ds[hf]")

TOY = ["--size", "toy", "--rounds", "1", "--steps", "2", "--gradient_clipping", "0"]


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    arguments = ["--stage", "1", "3", "--layers", "stock", "ours", "--accumulation", "2", "--out", str(tmp_path)]
    run_ranks(2, run_main, "autoep_step", *TOY, *arguments)
    outcome = json.loads((tmp_path / "autoep_step.json").read_text())
    assert outcome["world_size"] == 2 and outcome["settings"]["autoep_size"] == 2
    assert outcome["tokens_per_step"] == 2 * 1 * 16 * 2
    rows = {(row["stage"], row["key"]): row for row in outcome["rows"]}
    assert set(rows) == {(stage, key) for stage in (1, 3) for key in ("stock", "ours")}
    assert {row["layer"] for (_, key), row in rows.items() if key == "stock"} == {"AutoEPMoELayer"}
    assert {row["layer"] for (_, key), row in rows.items() if key == "ours"} == {"FusedAutoEPMoELayer"}
    for at, row in rows.items():
        assert len(row["step_ms"]) == len(row["forward_backward_ms"]) == 2
        for whole, part in zip(row["step_ms"], row["forward_backward_ms"], strict=True):
            assert 0 < part < whole
        # 3 steps of warm-up, and one in the block that is not timed.
        assert len(row["losses"]) == 3 + 1 + 2 and row["moe"] == [] and row["peak_bytes"] is None
        # All engines train one model on the same words, and it learns them.
        losses, expected = torch.tensor(row["losses"]), torch.tensor(rows[1, "stock"]["losses"])
        torch.testing.assert_close(losses, expected, rtol=1e-5, atol=0, msg=lambda text, at=at: f"{at}: {text}")
        assert losses[-1] < losses[0] - 0.01
        assert row["max_over_mean_load"] == pytest.approx(rows[1, "stock"]["max_over_mean_load"])
    page = (tmp_path / "autoep_step.md").read_text()
    assert "Qwen3MoeForCausalLM, 2 layers of width 32, 8 experts of 24 (top-2), 64 words" in page
    assert "autoep_size 2, 1 x 16 tokens on each, 2 times a step, float32" in page
    assert page.count("| **flashfusemoe_ds** |") == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--autoep_size", "2"], "--autoep_size 2: must divide the 8 experts and the 1 processes"),
        (["--autoep_size", "3"], "--autoep_size 3: must divide the 8 experts and the 1 processes"),
        (["--stage", "4"], "--stage: invalid choice: 4"),
        (["--bf16_states", "--dtype", "float32"], "--bf16_states: needs --dtype bfloat16 and a --stage of 1, 2 or 3"),
        (["--bf16_states", "--dtype", "bfloat16", "--stage", "0"], "--bf16_states: needs --dtype bfloat16"),
        (["--context", "0"], "--context 0: must be positive"),
    ],
)
def test_mistakes_are_said(refusal: Callable[..., str], arguments: list[str], message: str) -> None:
    assert message in refusal("autoep_step", *TOY, *arguments)


# ---- what a MoE layer launches. In this model its part is tanh, and all else is sin.


class _MoE(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.tanh().tanh()


class _DecoderLayer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mlp = _MoE()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.mlp(x.sin())


@pytest.mark.parametrize("recompute", (None, False, True), ids=("plain", "checkpoint", "reentrant"))
def test_what_is_a_moe_layers(load: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, recompute: Any) -> None:
    """From the annotations of a profile, in the forward, the backward, and a forward inside of a backward."""
    autoep_trace = load("autoep_trace")
    monkeypatch.setattr(autoep_trace, "AutoEPMoELayer", _MoE)
    layers = nn.ModuleList(_DecoderLayer() for _ in range(2))

    def step() -> None:
        x = torch.ones(4, requires_grad=True)
        for layer in layers:
            x = layer(x) if recompute is None else checkpoint(layer, x, use_reentrant=recompute)
        x.sum().backward()

    with autoep_trace.MoEPhases().of(layers), profile(activities=[ProfilerActivity.CPU]) as profiler:
        step()
    assert not any(layer._forward_hooks or layer.mlp._forward_hooks for layer in layers), "hooks left behind"
    profiler.export_chrome_trace(str(tmp_path / "trace.json"))
    events = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    windows = sorted(
        (event["ts"], event["ts"] + event["dur"], event["name"])
        for event in events
        if event.get("cat") == "user_annotation" and event["name"] in (autoep_trace.FORWARD, autoep_trace.BACKWARD)
    )
    assert all(first[1] <= second[0] for first, second in pairwise(windows)), "they overlap"
    seen: dict[str, list[str | None]] = {}
    for event in events:
        if event.get("cat") == "cpu_op" and event["name"] in (
            "aten::sin",
            "aten::cos",
            "aten::tanh",
            "aten::tanh_backward",
        ):
            phases = [phase for start, end, phase in windows if start <= event["ts"] <= end]
            seen.setdefault(event["name"], []).append(phases[0] if phases else None)
    forwards = 1 if recompute is None else 2
    assert seen["aten::tanh"] == [autoep_trace.FORWARD] * 2 * 2 * forwards
    assert seen["aten::tanh_backward"] == [autoep_trace.BACKWARD] * 2 * 2
    assert set(seen["aten::cos"]) == {None} and len(seen["aten::cos"]) == 2
    assert set(seen["aten::sin"]) == {None} and len(seen["aten::sin"]) == 2 * forwards


def test_times_and_table(load: Any) -> None:
    autoep_trace, device_trace = load("autoep_trace"), load("device_trace")
    role = device_trace.Role

    def kernel(start: float, end: float, phase: str | None, of: Any = role.COMPUTE, step: int = 1) -> Any:
        return device_trace.Kernel("k", start, end, 7, of, step, phase)

    kernels = [
        kernel(0, 9, device_trace.FORWARD, step=0),
        kernel(10, 12, None),
        kernel(12, 14, device_trace.FORWARD),
        kernel(13, 15, device_trace.FORWARD, role.EXCHANGE),
        kernel(15, 17, None),
        kernel(17, 21, device_trace.BACKWARD),
        kernel(18, 23, device_trace.BACKWARD, role.EXPERTS),
        kernel(24, 25, device_trace.OPTIMIZER),
    ]
    times = autoep_trace.moe_times(kernels, 1)
    assert times == {"forward": 3, "backward": 4, "moe": 7, "optimizer": 1, "all": 14}

    common = {"stage": 3, "note": "", "peak_bytes": 3 << 30, "losses": [2.0, 1.0], "max_over_mean_load": [1.5, 2.5]}
    stock = {
        "title": "AutoEP",
        "ours": False,
        "step_ms": [60.0, 50.0, 40.0],
        "forward_backward_ms": [30.0, 45.0, 30.0],
    }
    ours = {"title": "ours", "ours": True, "step_ms": [25.0] * 3, "forward_backward_ms": [10.0, 10.0, 14.0]}
    rows = [{**common, **stock, "moe": []}, {**common, **ours, "moe": [times]}]
    table = load("autoep_report").table({"rows": rows, "tokens_per_step": 1000})
    _, _, *found = cells(table.splitlines())
    assert found[0] == [
        *["3", "AutoEP", "50.00", "60.00", "20,000", "1.00", "30.00", "1.00", "20.00", "3.0"],
        *["", "", "", "2.50", "2.0000 to 1.0000"],
    ]
    assert found[1] == [
        *["3", "ours", "25.00", "25.00", "40,000", "2.00", "10.00", "3.00", "15.00", "3.0"],
        *["3.00", "4.00", "50", "2.50", "2.0000 to 1.0000"],
    ]


def test_the_published_model(load: Any) -> None:
    """Its parameters, counted by hand: with all 48 layers 30.5 B, of which 3.4 B are active."""
    autoep_step = load("autoep_step")
    transformers = pytest.importorskip("transformers")
    config = {**autoep_step.QWEN3_30B_A3B, "num_hidden_layers": 2}
    with torch.device("meta"):
        counts = autoep_step.parameter_counts(
            transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**config)), config
        )
    attention = 2048 * (4096 + 512 + 512) + 4096 * 2048 + 2 * 128
    expert, router, norms, words = 3 * 2048 * 768, 128 * 2048, 2 * 2048, 2 * 151936 * 2048 + 2048
    layer = attention + router + norms
    assert counts == {"total": 2 * (layer + 128 * expert) + words, "active": 2 * (layer + 8 * expert) + words}
    assert round((48 * (layer + 128 * expert) + words) / 1e9, 1) == 30.5
    assert round((48 * (layer + 8 * expert) + words) / 1e9, 1) == 3.4
