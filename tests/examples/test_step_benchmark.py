# SPDX-License-Identifier: GPL-3.0-or-later
"""The step benchmark: two processes at toy size, what counts as exposed communication, the published model."""

from __future__ import annotations

import importlib
import json
import os
import random
import socket
import subprocess
import sys
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch

from tests.examples.scripts import ROOT, cells

TOY = ["--size", "toy", "--batch", "2", "--rounds", "2", "--steps", "2", "--gradient_clipping", "0"]


def start(*arguments: str, processes: int = 2) -> subprocess.CompletedProcess[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    return subprocess.run(
        [sys.executable, "-m", "deepspeed.launcher.runner", "--num_gpus", str(processes), "--master_port", port,
         "examples/benchmarks/step.py", *TOY, *arguments],
        cwd=ROOT, env={**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""},
        text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, timeout=300,
    )  # fmt: skip


@pytest.mark.slow
def test_two_processes_all_stages(tmp_path: Path) -> None:
    run = start("--stage", "0", "1", "2", "--layers", "stock", "ours", "--out", str(tmp_path))
    assert run.returncode == 0, run.stdout
    outcome = json.loads((tmp_path / "step.json").read_text())
    assert outcome["world_size"] == 2 and outcome["model"]["ep_size"] == 2
    assert outcome["tokens_per_step"] == 2 * 2 * 32
    assert outcome["command"].startswith("deepspeed --num_gpus 2 examples/benchmarks/step.py --size toy")
    assert "--local_rank" not in outcome["command"]
    rows = {(row["stage"], row["key"]): row for row in outcome["rows"]}
    assert set(rows) == {(stage, key) for stage in (0, 1, 2) for key in ("stock", "ours")}
    page = (tmp_path / "step.md").read_text()
    for (stage, key), row in rows.items():
        assert len(row["step_ms"]) == 2 * 2 and min(row["step_ms"]) > 0
        # 3 steps of warm-up, and one in each block that is not timed.
        assert len(row["losses"]) == 3 + 2 * (1 + 2)
        assert row["profile"] is None and row["peak_bytes"] is None
        assert f"{median(row['step_ms']):.2f}" in page and f"{median(row['step_ms']):.2f}" in run.stdout
        # All engines train one model on the same words, and it learns them.
        losses, expected = torch.tensor(row["losses"]), torch.tensor(rows[0, "stock"]["losses"])
        torch.testing.assert_close(
            losses, expected, rtol=1e-5, atol=0, msg=lambda text, at=(stage, key): f"{at}: {text}"
        )
        assert losses[-1] < losses[0] - 0.01
    if importlib.util.find_spec("matplotlib"):
        assert (tmp_path / "step.png").read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--stage", "3"], "--stage 3: none of --layers runs at it (stock: 0, 1, 2; ours: 0, 1, 2)"),
        (["--num_heads", "3"], "hidden_size=32: must be a multiple of 2 * num_heads = 6"),
    ],
)
def test_mistakes_are_said(refusal: Callable[..., str], arguments: list[str], message: str) -> None:
    assert message in refusal("step", *TOY, *arguments)


def test_intervals_against_counting_cells(load: Any) -> None:
    intervals = load("intervals")
    drawn = random.Random(0)

    def some() -> list[tuple[float, float]]:
        starts = [drawn.randrange(40) for _ in range(drawn.randrange(7))]
        return [(float(start), float(start + drawn.randrange(9))) for start in starts]

    def cells(of: list[tuple[float, float]]) -> set[int]:
        return {cell for start, end in of for cell in range(int(start), int(end))}

    for _ in range(500):
        a, b = some(), some()
        for got, expected in (
            (intervals.union(a), cells(a)),
            (intervals.subtract(a, b), cells(a) - cells(b)),
        ):
            assert cells(got) == expected
            assert all(first[1] < second[0] for first, second in pairwise(got))  # in order, with gaps
            assert all(start < end for start, end in got)
        assert intervals.length(a) == len(cells(a))
    assert intervals.union([(0, 1), (1.5, 2), (4, 5)], gap=0.5) == [(0, 2), (4, 5)]


def chrome_trace() -> dict[str, Any]:
    """One backward of 20 ms, launched in the second of two steps. Times below are in ms, in the trace in us.

    stream 7   compute            [0, 4] [5, 10]                  [18, 20]
    stream 8   packing                           [10, 11]
    stream 9   dense gradients      [3, 6]  [9, 12][12, 13]
               norm, experts' gradients                    [13, 14][14, 15]
    stream 10  exchange, all-gather    [4, 5]                              [15, 16]
    copies                                         [12,                   18]
    """
    events: list[dict[str, Any]] = []

    def add(category: str, name: str, start: float, end: float, **args: Any) -> None:
        events.append(
            {"ph": "X", "cat": category, "name": name, "ts": 1e3 * start, "dur": 1e3 * (end - start), "args": args}
        )

    def kernel(name: str, stream: int, start: float, end: float, category: str = "kernel", **args: Any) -> None:
        correlation = len(events)
        # Everything is launched in the first 0.1 ms of the second step's backward.
        add("cuda_runtime", "cudaLaunchKernel", 0.01, 0.02, correlation=correlation)
        add(category, name, start, end, stream=stream, correlation=correlation, **args)

    def reduction(start: float, end: float, group: str, elements: int) -> None:
        metadata = {"Collective name": "allreduce", "In msg nelems": elements, "Process Group Name": group}
        kernel("ncclDevKernel_AllReduce_Sum_bf16_RING_LL(...)", 9, start, end, **metadata)

    add("user_annotation", "train step", -50, -1)
    add("user_annotation", "train step", -0.5, 1)
    add("user_annotation", "train forward", -0.4, -0.1)
    add("user_annotation", "train backward", 0, 0.1)
    for start, end in ((0, 4), (5, 10), (18, 20)):
        kernel("gemm", 7, start, end)
    kernel("pack", 8, 10, 11)
    reduction(3, 6, "1", 1 << 20)
    reduction(9, 12, "1", 1 << 20)
    reduction(13, 14, "1", 1)
    reduction(14, 15, "3", 1 << 20)
    # The group is said by the operation on the host alone.
    metadata = {"Collective name": "allreduce", "In msg nelems": 4096, "Process Group Name": "1"}
    add("cpu_op", "record_param_comms", 0.01, 0.02, **{"External id": 99, **metadata})
    kernel("ncclDevKernel_AllReduce_Sum_bf16_RING_LL(...)", 9, 12, 13, **{"External id": 99})
    kernel("ncclDevKernel_SendRecv(...)", 10, 4, 5,
           **{"Collective name": "all_to_allv", "In msg nelems": 8, "Process Group Name": "2"})  # fmt: skip
    kernel("ncclDevKernel_AllGather_RING_LL(...)", 10, 15, 16,
           **{"Collective name": "_allgather_base", "In msg nelems": 1 << 20, "Process Group Name": "1"})  # fmt: skip
    kernel("Memcpy DtoD", 11, 12, 18, category="gpu_memcpy")
    return {"traceEvents": events}


def test_exposed_communication_of_a_trace(load: Any) -> None:
    device_trace = load("device_trace")
    groups = device_trace.Groups(frozenset({"0", "1"}), frozenset({"3"}), expert_ranks=2)
    trace = chrome_trace()
    kernels = device_trace.read_kernels(trace, groups)
    assert device_trace.num_steps(kernels) == 2
    assert all(k.step == 1 and k.phase == device_trace.BACKWARD for k in kernels)
    assert device_trace.communication(kernels, 0) == {role.value: (0, 0, 0) for role in device_trace.COMMUNICATION}
    role = device_trace.Role
    spent = device_trace.communication(kernels, 1)
    # [3, 6] under compute but for [4, 5]; [9, 13] but for [9, 10]: neither packing nor copies hide it.
    assert spent[role.DENSE.value] == pytest.approx((7, 4, 3))
    assert spent[role.EXPERTS.value] == pytest.approx((1, 1, 1))
    assert spent[role.EXCHANGE.value] == pytest.approx((1, 1, 0))  # beside the dense gradients
    assert spent[role.PARAMETERS.value] == pytest.approx((1, 1, 1))
    assert spent[role.OTHER.value] == pytest.approx((1, 1, 1))

    # With more compute nothing of the first reduction is exposed.
    trace["traceEvents"].append(
        {"ph": "X", "cat": "kernel", "name": "gemm", "ts": 3.9e3, "dur": 1.2e3, "args": {"stream": 7}}
    )
    spent = device_trace.communication(device_trace.read_kernels(trace, groups), 1)
    assert spent[role.DENSE.value] == pytest.approx((7, 3, 3))
    assert spent[role.EXCHANGE.value] == pytest.approx((1, 0, 0))


def test_a_collective_without_its_group(load: Any) -> None:
    device_trace = load("device_trace")
    names = (
        "ncclDevKernel_AllReduce_Sum_bf16_RING_LL(...)",
        "ncclDevKernel_SendRecv(...)",
        "void deep_ep::dispatch(...)",
        "fetch_rows_kernel",
    )
    events = [{"ph": "X", "cat": "kernel", "name": n, "ts": 0, "dur": 1, "args": {"stream": 7}} for n in names]
    role = device_trace.Role
    alone = device_trace.Groups(frozenset({"1"}), frozenset({"3"}), expert_ranks=1)
    roles = [k.role for k in device_trace.read_kernels({"traceEvents": events}, alone)]
    assert roles == [role.DENSE, role.EXCHANGE, role.EXCHANGE, role.EXCHANGE]
    shared = device_trace.Groups(frozenset({"1"}), frozenset({"3"}), expert_ranks=2)
    with pytest.raises(ValueError, match="dense gradients or experts' gradients"):
        device_trace.read_kernels({"traceEvents": events}, shared)


def test_pictures_and_table_of_a_profile(load: Any, tmp_path: Path) -> None:
    device_trace, step_report = load("device_trace"), load("step_report")
    groups = device_trace.Groups(frozenset({"1"}), frozenset({"3"}), expert_ranks=2)
    kernels = device_trace.read_kernels(chrome_trace(), groups)
    profile = {
        "steps": [device_trace.communication(kernels, 1)],
        "transfer_and_waiting": [{"dense gradients": (2.5, 1.5)}],
    }
    common = {"stage": 1, "note": "", "peak_bytes": 3 << 30, "losses": [2.0, 1.0]}
    rows = [
        {**common, "title": "DeepSpeed", "ours": False, "step_ms": [60.0, 50.0, 40.0], "profile": None},
        {**common, "title": "ours", "ours": True, "step_ms": [24.0, 25.0, 27.0, 25.0], "profile": profile},
    ]
    outcome = {"rows": rows, "tokens_per_step": 1000}
    _, _, *found = cells(step_report.table(outcome).splitlines())
    assert found[0][1:7] == ["DeepSpeed", "50.00", "60.00", "20,000", "1.00", "3.0"]
    assert found[1][1:7] == ["ours", "25.00", "27.00", "40,000", "2.00", "3.0"]
    # 4 ms of 25 ms.
    assert found[1][7:17] == ["7.00", "4.00", "16.00", "3.00", "1.50", "2.50", "10.00", "1.00", "1.00", ""]

    pytest.importorskip("matplotlib")
    step_chart = load("step_chart")
    assert step_chart.draw_backward([("ours", kernels, 1), ("nobody", [], 0)], tmp_path / "backward.png")
    assert not step_chart.draw_backward([("ours", kernels, 0)], tmp_path / "nothing.png")
    outcome |= {
        "parameters": {"total": 1.14e9},
        "world_size": 2,
        "machine": {"device": "a GPU"},
        "model": {"ep_size": 2},
        "settings": {"dtype": "bfloat16"},
    }
    step_chart.draw_steps(outcome, tmp_path / "step.png")
    for name in ("backward.png", "step.png"):
        assert (tmp_path / name).read_bytes()[:4] == b"\x89PNG"
    assert not (tmp_path / "nothing.png").exists()


def test_the_published_model(load: Any) -> None:
    """Its parameters, counted by hand."""
    seed_model = load("seed_model")
    with torch.device("meta"):
        model = seed_model.SeedLM(seed_model.SeedConfig())
    attention, norms = 4 * 1024 * 1024, 2 * 1024
    expert = 3 * 1024 * 1536
    layers = 24 * (attention + norms) + 3 * 1024 * 4096 + 23 * (8 * 1024 + 9 * expert) + 50304 * 1024 + 1024
    assert seed_model.parameter_counts(model) == {"total": layers, "active": layers - 23 * 6 * expert}
    assert 1.135e9 < layers < 1.145e9


def test_weights_do_not_depend_on_ep_size(load: Any) -> None:
    seed_model = load("seed_model")
    cpu, toy = torch.device("cpu"), seed_model.SIZES["toy"]
    whole = dict(seed_model.make_model(toy, 5, 0, cpu, torch.float32).named_parameters())
    cfg = importlib.import_module("dataclasses").replace(toy, ep_size=2)
    for ep_rank in range(2):
        for name, param in seed_model.make_model(cfg, 5, ep_rank, cpu, torch.float32).named_parameters():
            for local in range(2):
                of_all = name.replace(f"deepspeed_experts.{local}.", f"deepspeed_experts.{local + 2 * ep_rank}.")
                if of_all != name or "deepspeed_experts" not in name:
                    assert torch.equal(param, whole[of_all]), name
    other = dict(seed_model.make_model(toy, 6, 0, cpu, torch.float32).named_parameters())
    assert all(not torch.equal(p, other[n]) for n, p in whole.items() if p.ndim > 1)
    experts = [p for n, p in whole.items() if n.endswith("gate_up.weight") and "blocks.1.moe" in n]
    assert len(experts) == 4 and all(not torch.equal(experts[0], p) for p in experts[1:])
