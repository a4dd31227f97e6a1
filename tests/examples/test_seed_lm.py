# SPDX-License-Identifier: GPL-3.0-or-later
"""The seed's workload at toy size: every layer trains the same model, at any ep_size. Loss curves of transports."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from deepspeed.moe.utils import is_moe_param

from tests.close import relative_error
from tests.distributed import run_ranks
from tests.examples.scripts import BENCHMARKS, ROOT, cells, run_main

LAYERS = ["stock", "autoep", "ours", "ours-compile"]
# Clipping binds: the norm is about 1.
TOY = ["--size", "toy", "--batch", "2", "--rounds", "2", "--steps", "4", "--gradient_clipping", "0.1",
       "--learning_rate", "2e-3", "--compile_backend", "aot_eager"]  # fmt: skip
STEPS = 3 + 2 * (1 + 4)  # warm-up, and blocks whose first step is not timed


def torchrun(script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2",
         str(BENCHMARKS / script), *arguments],
        capture_output=True, text=True, timeout=240, cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo",
             "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip


def check(rows: dict[str, dict[str, Any]], page: str) -> torch.Tensor:
    """All layers learn alike; returns the losses of one."""
    expected = torch.tensor(rows["stock"]["losses"])
    assert len(expected) == STEPS and expected[-1] < expected[0] - 0.05
    for key, row in rows.items():
        assert row["status"] == "ok", row
        assert len(row["step_ms"]) == 2 * 4 and f"{median(row['step_ms']):.2f}" in page
        torch.testing.assert_close(
            torch.tensor(row["losses"]), expected, rtol=1e-5, atol=0, msg=lambda text, key=key: f"{key}: {text}"
        )
        assert row["max_over_mean_load"] == rows["stock"]["max_over_mean_load"]
        assert row["peak_bytes"] is row["kept_bytes"] is row["profile"] is row["routes_without_room"] is None
    return expected


def test_all_layers_train_the_same_model(tmp_path: Path) -> None:
    out = tmp_path / "one"
    arguments = [*TOY, "--num_layers", "2", "--layers", *LAYERS, "flashfusedmoe", "--out", out]
    ((code, printed),) = run_ranks(1, run_main, "seed_lm", *arguments)
    assert code == 0
    assert "- FlashFusedMoE: skipped: needs a CUDA device" in printed
    outcome = json.loads((out / "seed_lm.json").read_text())
    assert outcome["world_size"] == outcome["model"]["ep_size"] == 1 and outcome["tokens_per_step"] == 2 * 32
    *rows, _ = outcome["rows"]
    check({row["key"]: row for row in rows}, (out / "seed_lm.md").read_text())


@pytest.mark.slow
def test_experts_on_two_ranks_train_as_on_each(tmp_path: Path) -> None:
    """EP=2 under torchrun, and the same ranks with all experts on each: gradients, their norm and the steps agree."""
    spread = torchrun("seed_lm.py", *TOY, "--layers", *LAYERS, "--ep_backend", "nccl", "nccl+again", "--compile",
                      "blocks", "--out", str(tmp_path / "two"))  # fmt: skip
    assert spread.returncode == 0, spread.stderr[-4000:]
    outcome = json.loads((tmp_path / "two" / "seed_lm.json").read_text())
    assert outcome["model"]["ep_size"] == 2 and outcome["command"].startswith("torchrun --nproc_per_node 2 ")
    losses = check({row["key"]: row for row in outcome["rows"]}, spread.stdout)
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "two" / "seed_lm.png").read_bytes()[:4] == b"\x89PNG"

    run_ranks(2, run_main, "seed_lm", *TOY, "--layers", "stock", "ours", "--ep_size", "1", "--out", tmp_path / "each")
    outcome = json.loads((tmp_path / "each" / "seed_lm.json").read_text())
    assert outcome["model"]["ep_size"] == 1 and outcome["world_size"] == 2
    for row in outcome["rows"]:
        torch.testing.assert_close(torch.tensor(row["losses"]), losses, rtol=1e-5, atol=0)


def test_curves_of_transports(tmp_path: Path) -> None:
    """Without an exchange the same curve but for rounding; a repeated run bit for bit; what cannot run is said."""
    arguments = ["--steps", "20", "--batch", "2", "--context", "32", "--num_layers", "2", "--hidden_size", "32",
                 "--data", ROOT / "LICENSE", "--tolerance", "0", "--out", tmp_path]  # fmt: skip
    (code, printed), _ = run_ranks(
        2, run_main, "backend_curves", *arguments, "--curves", "nccl", "ep1", "symm_mem", "nccl"
    )
    outcome = json.loads((tmp_path / "curves.json").read_text())
    curves, apart = outcome["curves"], outcome["differences"]
    assert list(curves) == ["nccl", "ep1", "nccl (2)"] and all(len(losses) == 20 for losses in curves.values())
    assert curves["nccl"][-1] < curves["nccl"][0] - 0.3
    assert curves["nccl"] == curves["nccl (2)"] and apart["nccl (2)"] == 0
    assert apart["ep1"] < 1e-5
    assert code == int(apart["ep1"] > 0) and ("BEYOND" in printed) == bool(code)
    assert "needs CUDA GPUs" in outcome["refused"]["symm_mem"]
    assert f"| 20 | {curves['nccl'][-1]:.6f} | {curves['ep1'][-1]:.6f} |" in printed
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--ep_backend", "nccl:2"], "--ep_backend nccl:2: only symm_mem takes a capacity_factor"),
        (["--ep_backend", "symm_mem:much"], "--ep_backend symm_mem:much: only symm_mem takes a capacity_factor"),
        (["--ep_backend", "symm_mem:+again"], "--ep_backend symm_mem:+again: only symm_mem takes a capacity_factor"),
        (["--ep_backend", "nccl", "hybrid"], "--ep_backend nccl hybrid: at EP=1 nothing is exchanged"),
        (["--capacity_factor", "1.0"], "--capacity_factor: these layers drop nothing"),
    ],
)
def test_mistakes_are_said(refusal: Callable[..., str], arguments: list[str], message: str) -> None:
    assert message in refusal("seed_lm", *TOY, *arguments)


def test_differences_of_curves(load: Any) -> None:
    backend_curves = load("backend_curves")
    curves = {"a": [3.0, 2.0], "b": [3.25, 2.0], "c": [3.0, float("nan")], "d": [3.0, 2.0]}
    assert backend_curves.differences(curves) == {"a": 0, "b": 0.25, "c": float("inf"), "d": 0}
    assert backend_curves.table(curves).splitlines()[-1] == "| largest difference |  | 2.50e-01 | inf | 0, bit-equal |"
    assert backend_curves.numbered(["nccl", "ep1", "nccl", "nccl"]) == ["nccl", "ep1", "nccl (2)", "nccl (3)"]


def test_table_and_picture(load: Any, tmp_path: Path) -> None:
    seed_report = load("seed_report")
    common = {"status": "ok", "note": "", "losses": [2.0, 1.5], "ours": False, "rival": "", "profile": None,
              "kept_bytes": None, "peak_bytes": 3 << 30, "max_over_mean_load": [1.1, 1.25]}  # fmt: skip
    roles = {"dense gradients": (5.0, 2.0, 1.0), "experts' gradients": (1.0, 0.5, 0.5), "experts' exchange": (7, 6, 3)}
    profile = {
        "steps": [dict.fromkeys(("ZeRO's parameters", "other communication"), (0, 0, 0)) | roles],
        "transfer_and_waiting": [{"dense gradients": (1.5, 0.5), "experts' gradients": (0.25, 0.25)}],
    }
    rows = [
        {**common, "title": "deepspeed MoE", "rival": "stock", "step_ms": [60.0, 50.0, 40.0]},
        {**common, "title": "Flash", "rival": "flashfusedmoe", "step_ms": [45.0], "note": "2252 rows per expert"},
        {**common, "title": "Flash, torch.compile", "rival": "flashfusedmoe", "step_ms": [40.0]},
        {**common, "title": "ours", "ours": True, "step_ms": [24.0, 25.0, 27.0], "profile": profile,
         "kept_bytes": [[117_500_000, 117_600_000], [117_700_000, 117_600_000]]},
        {**common, "title": "Other", "status": "missing", "note": "ImportError: no", "step_ms": []},
    ]  # fmt: skip
    outcome = {"rows": rows, "tokens_per_step": 1000}
    lines = seed_report.table(outcome).splitlines()
    _, _, *found = cells(lines[:6])
    assert found[0] == ["deepspeed MoE", "50.00", "60.00", "20,000", "", "0.80", "3.0", "", "", "", "", "", "", "", "",
                        "1.25", "2.0000 to 1.5000"]  # fmt: skip
    assert found[2][4:6] == ["1.25", ""]
    assert found[3] == ["ours", "25.00", "27.00", "40,000", "2.00", "1.60", "3.0", "117.6", "117.7", "7.00", "6.00",
                        "", "6.00", "2.50", "1.75", "1.25", "2.0000 to 1.5000"]  # fmt: skip
    assert lines[-2:] == ["- Flash: 2252 rows per expert", "- Other: missing: ImportError: no"]

    pytest.importorskip("matplotlib")
    step_chart = load("step_chart")
    outcome |= {
        "parameters": {"total": 1.14e9},
        "world_size": 1,
        "machine": {"device": "a GPU"},
        "model": {"ep_size": 1},
        "settings": {"precision": "autocast"},
    }
    assert step_chart.draw_layers(outcome, tmp_path / "seed.png")
    assert (tmp_path / "seed.png").read_bytes()[:4] == b"\x89PNG"
    assert not step_chart.draw_layers({**outcome, "rows": rows[-1:]}, tmp_path / "nothing.png")


def test_weights_are_those_of_the_stock_model(load: Any) -> None:
    seed_model, cpu = load("seed_model"), torch.device("cpu")
    toy = seed_model.SIZES["toy"]
    stock = dict(seed_model.make_model(toy, 3, 0, cpu, torch.float32).named_parameters())
    prefix = "blocks.2.moe.deepspeed_moe."
    weights = seed_model.moe_weights(toy, 2, 3, cpu, torch.float32)
    assert torch.equal(weights.gate, stock[prefix + "gate.wg.weight"])
    for e in range(toy.num_experts):
        expert = f"{prefix}experts.deepspeed_experts.{e}."
        assert torch.equal(weights.gate_up[e], stock[expert + "gate_up.weight"])
        assert torch.equal(weights.down[e], stock[expert + "down.weight"])
    gate_up, down = weights.shared
    assert torch.equal(gate_up[0], stock["blocks.2.mlp.gate_up.weight"])
    assert torch.equal(down[0], stock["blocks.2.mlp.down.weight"])


@pytest.fixture
def own_model(load: Any) -> Callable[..., torch.nn.Module]:
    """The toy model with layers of ours, and other sizes where they are given."""
    seed_layers, seed_model, ranks = load("seed_layers"), load("seed_model"), load("ranks")

    def build(**sizes: int) -> torch.nn.Module:
        variant, cfg = seed_layers.variants()["ours"], replace(seed_model.SIZES["toy"], **sizes)
        return seed_layers.build_model(variant, cfg, 3, 1, torch.device("cpu"), torch.float32, None, ranks.ALONE)

    return build


@pytest.mark.parametrize("shared_size", [32, 48])
def test_our_layer_brings_the_shared_expert(
    load: Any, own_model: Callable[..., Any], shared_size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of any width, as dense parameters, with the weights, gradients and results of the model's own."""
    seed_model, seed_layers = load("seed_model"), load("seed_layers")
    ours = own_model(shared_size=shared_size)

    def routed_alone(*args: Any) -> Any:
        return replace(seed_model.moe_weights(*args), shared=None)

    monkeypatch.setattr(seed_layers, "moe_weights", routed_alone)
    plain = own_model(shared_size=shared_size)

    words = seed_model.random_batches(ours.cfg, 1, 1, 0, 0, torch.device("cpu"))[0]
    losses = [model(words).loss for model in (ours, plain)]
    # float32 sums in another order: one product over gate and up, or two. The losses come out equal to the bit here.
    torch.testing.assert_close(*losses, rtol=2.5e-7, atol=0)
    for loss in losses:
        loss.backward()
    assert seed_model.parameter_counts(ours) == seed_model.parameter_counts(plain)
    assert ours.blocks[0].mlp is not None
    for block, other in zip(ours.blocks[1:], plain.blocks[1:], strict=True):
        assert block.mlp is None
        assert all(is_moe_param(param) for param in block.moe.parts.experts)
        shared = block.moe.parts.shared
        for param, expected in zip(shared.parameters(), other.mlp.parameters(), strict=True):
            assert not is_moe_param(param) and torch.equal(param[0], expected)
            assert relative_error(param.grad[0], expected.grad) < 1e-6  # 3e-7 was seen


def test_kept_bytes_are_without_the_shared_expert(
    load: Any, own_model: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whichever way its output is added. Memory is what the two modules here say that they allocate."""
    held = 0
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda: held)

    class Shared(torch.nn.Module):
        def forward(self, x: torch.Tensor, into: torch.Tensor | None = None) -> torch.Tensor:
            nonlocal held
            held += 1000 + (x.nbytes if into is None else 0)
            return x.clone() if into is None else into

    model, seen = own_model(num_layers=3), []
    for layer, in_place in zip(load("seed_layers").routed_layers(model), (True, False), strict=True):
        layer.parts = replace(layer.parts, shared=Shared())

        def run(x: torch.Tensor, shared: Shared = layer.parts.shared, in_place: bool = in_place) -> torch.Tensor:
            nonlocal held
            held += 70 + x.nbytes
            seen.append(x.nbytes)
            if in_place:
                return shared(x, x.clone())
            shared(x)
            held -= x.nbytes
            return x.clone()

        layer.run = run
    words = torch.zeros(1, 33, dtype=torch.int64)
    assert load("seed_layers").kept_bytes(model, lambda: model(words)) == [70 + nbytes for nbytes in seen]
    assert not any(layer.parts.shared._forward_hooks for layer in load("seed_layers").routed_layers(model))
