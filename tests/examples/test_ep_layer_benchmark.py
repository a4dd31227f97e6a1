# SPDX-License-Identifier: GPL-3.0-or-later
"""The benchmark of a layer across ranks, at toy size over gloo: what it prints and leaves, and layers that fail."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.distributed import run_ranks

FOLDER = Path(__file__).parents[2] / "examples" / "benchmarks"
TOY = ["--device", "cpu", "--shape", "64,32,16,4,2", "--dtype", "float32", "--rounds", "2"]
PICTURES = importlib.util.find_spec("matplotlib") is not None


def columns(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines() if line[:1] == "|"]


def test_table_json_picture_and_trace_under_torchrun(tmp_path: Path) -> None:
    keys = "ours-ep1,ours-nccl,ours-nccl-serial,ours-symm_mem,autoep,deepspeed"
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    trace = tmp_path / "trace.json"
    command = [*launcher, str(FOLDER / "ep_layer.py"), *TOY, "--layers", keys, "--out", str(tmp_path)]
    done = subprocess.run(
        [*command, "--trace", str(trace)],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "GLOO_SOCKET_IFNAME": "lo"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    header, _, *rows = columns(done.stdout)
    assert [row[0].strip("*") for row in rows] == [
        "flashfusemoe_ds, EP=1",
        "flashfusemoe_ds, nccl",
        "flashfusemoe_ds, nccl, no overlap",
        "DeepSpeed AutoEP, comm",
        "deepspeed MoE, drop_tokens=False",
    ]
    for name in ("fwd ms", "fwd+bwd ms", "x floor", "of EP=1", "host ms"):
        assert all(float(row[header.index(name)]) > 0 for row in rows), name
    assert rows[0][header.index("of EP=1")] == "1.00" and rows[0][header.index("wire ms")] == ""
    assert all(row[header.index("wire share")].endswith("%") for row in rows[1:])
    assert "- flashfusemoe_ds, symm_mem: skipped: needs a CUDA device" in done.stdout

    outcome = json.loads((tmp_path / "ep_layer.json").read_text())
    assert outcome["machine"]["device"] == "CPU" and outcome["machine"]["versions"]["torch"] == torch.__version__
    assert outcome["world_size"] == 2 and outcome["command"].startswith("torchrun --nproc_per_node 2 ")
    (result,) = outcome["results"]
    assert result["world_size"] == 2 and result["step_flops"] == 18 * 64 * 2 * 32 * 16
    for row in result["layers"]:
        if row["key"] == "ours-symm_mem":
            continue
        assert row["status"] == "ok", row
        assert len(row["forward_ms"]) == len(row["step_ms"]) == len(row["host_ms"]) == 2
        assert len(row["exchange_ms"]) == (0 if row["key"] == "ours-ep1" else 2)
        assert max(row["error_output"], row["error_input_grad"]) < 1e-5

    names = {event["name"] for event in json.loads(trace.read_text())["traceEvents"]}
    assert {"moe:dispatch", "moe:beside", "moe:experts", "moe:combine", "moe:backward.experts"} <= names
    for picture in (tmp_path / "ep_layer.png", tmp_path / "trace.png"):
        assert picture.read_bytes()[:4] == b"\x89PNG" if PICTURES else not picture.exists()


# --- layers that fail ----------------------------------------------------------------------------------------------


def _layers_that_fail(rank: int, world: int, store: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """A run whose failures leave the ranks in step, and one where rank 0 is left alone in an exchange."""
    import torch.distributed as dist

    sys.path.insert(0, str(FOLDER))
    dist.init_process_group("gloo", f"file://{store}", timedelta(seconds=4), world, rank)
    ep_layer, layers = importlib.import_module("ep_layer"), importlib.import_module("layers")
    ours = ep_layer.REGISTRY["ours-nccl"].build

    def on_rank_1_while_built(bench: Any) -> Any:
        if rank == 1:
            raise RuntimeError("no room here")
        return ours(bench)

    def missing(bench: Any) -> Any:
        import a_package_that_nobody_has  # noqa: F401

    def after_its_exchange(bench: Any) -> Any:
        layer = ours(bench)

        def run(x_TD: torch.Tensor) -> torch.Tensor:
            layer.run(x_TD)
            raise RuntimeError("no kernel for this shape")

        return layers.Layer(run)

    def wrong_on_rank_1(bench: Any) -> Any:
        layer = ours(bench)
        return layers.Layer(lambda x_TD: (1 + 0.05 * rank) * layer.run(x_TD), layer.parameters)

    def before_its_exchange(bench: Any) -> Any:
        layer = ours(bench)

        def run(x_TD: torch.Tensor) -> torch.Tensor:
            if rank == 1:
                raise RuntimeError("out of memory")
            return layer.run(x_TD)

        return layers.Layer(run)

    def run(*builders: Any) -> dict[str, Any]:
        added = {build.__name__: layers.Entry(build.__name__, build, cuda_only=False) for build in builders}
        ep_layer.REGISTRY.clear()
        ep_layer.REGISTRY.update({**added, "ours-nccl": layers.Entry("ours", ours, cuda_only=False, ours=True)})
        args = ep_layer.parse_args([*TOY, "--timeout", "4"])
        settings = ep_layer.settings_of(args, ep_layer.join(args))
        (result,) = ep_layer.run(args, settings)["results"]
        return result

    return run(on_rank_1_while_built, missing, after_its_exchange, wrong_on_rank_1), run(before_its_exchange)


@pytest.fixture(scope="module")
def failing(tmp_path_factory: pytest.TempPathFactory) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    return run_ranks(2, _layers_that_fail, str(tmp_path_factory.mktemp("ep") / "store"), init=False, timeout=100)


def test_a_layer_that_fails_on_a_rank_keeps_its_row_on_all(failing: list[Any]) -> None:
    for result, _ in failing:
        rows = {row["key"]: row for row in result["layers"]}
        assert {key: row["status"] for key, row in rows.items()} == {
            "on_rank_1_while_built": "failed",
            "missing": "missing",
            "after_its_exchange": "failed",
            "wrong_on_rank_1": "wrong",
            "ours-nccl": "ok",
        }
        assert rows["on_rank_1_while_built"]["reason"] == "on rank 1: RuntimeError: no room here"
        assert "a_package_that_nobody_has" in rows["missing"]["reason"]
        assert rows["after_its_exchange"]["reason"] == "RuntimeError: no kernel for this shape"
        assert 0.04 < rows["wrong_on_rank_1"]["error_output"] < 0.06
        assert not result["broken"] and len(rows["ours-nccl"]["step_ms"]) == 2
    ours = [row for result, _ in failing for row in result["layers"] if row["key"] == "ours-nccl"]
    assert ours[0]["step_ms"] == ours[1]["step_ms"], "the slowest rank's, on every rank"


def test_a_rank_that_leaves_an_exchange_ends_the_run(failing: list[Any]) -> None:
    for _, result in failing:
        assert result["broken"]
        left, after = result["layers"]
        assert left["status"] == "failed" and "on rank 1: RuntimeError: out of memory" in left["reason"]
        assert after["status"] == "skipped" and not after["step_ms"]


# --- the picture ---------------------------------------------------------------------------------------------------


def _event(cat: str, name: str, start: float, length: float, tid: int = 1, **args: object) -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": length, "pid": 0, "tid": tid, "args": args}


def _launched(number: int, at: float, stream: int, start: float, length: float, name: str, tid: int = 1) -> list[Any]:
    copy = name.startswith("Mem")
    return [
        _event("cuda_runtime", "cudaLaunchKernel", at, 1, tid, correlation=number),
        _event("gpu_memcpy" if copy else "kernel", name, start, length, stream, correlation=number, stream=stream),
    ]


def test_kernels_are_drawn_where_they_ran_and_for_what(
    load: Callable[[str], ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two threads; streams 7 (compute), 20 (side), 30 (NCCL) and 31 (copies). Microseconds."""
    timeline = load("timeline")
    events = [
        _event("user_annotation", "moe:dispatch", 1000, 20),
        *_launched(1, 1005, 30, 1100, 400, "ncclDevKernel_SendRecv"),
        *_launched(2, 1006, 31, 1150, 10, "Memcpy DtoH"),
        _event("user_annotation", "moe:beside", 1030, 20),
        *_launched(3, 1035, 20, 1200, 200, "shared"),
        _event("user_annotation", "moe:dispatch.wait", 1055, 5),
        _event("user_annotation", "moe:experts", 1060, 40),
        *_launched(4, 1070, 7, 1500, 1000, "up"),
        _event("user_annotation", "moe:backward.experts", 1200, 100, 2),
        *_launched(5, 1210, 7, 2500, 500, "dx", 2),
        _event("user_annotation", "moe:backward.combine", 1220, 20, 2),
        *_launched(6, 1225, 30, 3000, 300, "ncclDevKernel_SendRecv", 2),
        *_launched(7, 1250, 7, 3000, 600, "dw", 2),
        *_launched(8, 1400, 20, 3100, 100, "shared backward", 2),
        *_launched(9, 1500, 7, 3600, 50, "router backward", 2),
    ]
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": events}))
    spans = timeline.read(path)
    assert [(span.name, span.lane, span.stage) for span in spans] == [
        ("ncclDevKernel_SendRecv", "communication", "dispatch"),
        ("Memcpy DtoH", "copies", "dispatch"),
        ("shared", "side: shared experts", "beside"),
        ("up", "compute", "experts"),
        ("dx", "compute", "backward.experts"),
        ("ncclDevKernel_SendRecv", "communication", "backward.combine"),
        ("dw", "compute", "backward.experts, dX sent"),
        ("shared backward", "side: shared experts", "beside"),
        ("router backward", "compute", "router and the rest"),
    ]
    assert spans[0].start == 0 and spans[3].start == pytest.approx(0.4)
    # 0.4 + 0.3 ms of communication; 0.2 beside the shared experts, 0.3 beside dW (and them, which counts once).
    assert timeline.overlap(spans) == pytest.approx((0.7, 0.5))
    assert timeline.main([str(path)]) == (0 if PICTURES else 1)
    assert "2.55 ms; communication 0.70 ms, of which 0.50 ms beside computation" in capsys.readouterr().out
    assert (tmp_path / "trace.png").exists() == PICTURES


def test_a_file_that_is_no_trace_is_refused(
    load: Callable[[str], ModuleType], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    timeline = load("timeline")
    for content, message in (("{}", "is not a profiler's trace"), ('{"traceEvents": []}', "has no moe: range")):
        (tmp_path / "a.json").write_text(content)
        with pytest.raises(SystemExit):
            timeline.main([str(tmp_path / "a.json")])
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "world", "message"),
    [
        ([], 1, "needs at least 2 ranks: run it with torchrun"),
        ([], 3, "3 ranks do not divide its 4 experts"),
        (["--layers", "ours-nccl,theirs"], 2, "unknown theirs; valid: ours-ep1, ours-nccl, "),
        (["--rounds", "0"], 2, "--rounds 0: must be positive"),
        (["--trace_only"], 2, "--trace_only: needs --trace"),
    ],
)
def test_mistakes_are_said(
    arguments: list[str],
    world: int,
    message: str,
    load: Callable[[str], ModuleType],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("WORLD_SIZE", str(world))
    with pytest.raises(SystemExit) as stopped:
        load("ep_layer").parse_args([*TOY, *arguments])
    assert stopped.value.code == 2 and message in capsys.readouterr().err
