# SPDX-License-Identifier: GPL-3.0-or-later
"""Collectives' transfer told from waiting for a later rank: traces of several ranks, each on a clock of its own."""

from __future__ import annotations

import importlib
import json
import sys
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.distributed import run_ranks
from tests.examples.scripts import BENCHMARKS, cells

DENSE, EXPERTS, EXCHANGE = "dense gradients", "experts' gradients", "experts' exchange"
NCCL, GEMM = "ncclDevKernel_Something(...)", "gemm"
Event = tuple[str, float, float, dict[str, Any]]


def collective(operation: str, start: float, end: float, group: str, ranks: int = 2, elements: int = 4096) -> Event:
    """A kernel of NCCL, times in ms."""
    metadata = {"Collective name": operation, "In msg nelems": elements, "Group size": ranks}
    return NCCL, start, end, {**metadata, "Process Group Name": group, "stream": 9}


def compute(start: float, end: float) -> Event:
    return GEMM, start, end, {"stream": 7}


def trace(*steps: list[Event], clock: float = 0.0) -> dict[str, Any]:
    """A Chrome trace: each step's kernels are 1000 ms after the one's before, launched in its first ms."""
    events = []

    def add(category: str, name: str, start: float, end: float, **args: Any) -> None:
        at = 1e3 * (clock + start)
        events.append({"ph": "X", "cat": category, "name": name, "ts": at, "dur": 1e3 * (end - start), "args": args})

    for number, kernels in enumerate(steps):
        begin = 1000.0 * number
        add("user_annotation", "train step", begin, begin + 1)
        for name, start, end, args in kernels:
            add("cuda_runtime", "cudaLaunchKernel", begin + 0.01, begin + 0.02, correlation=len(events))
            add("kernel", name, begin + start, begin + end, correlation=len(events) - 1, **args)
    return {"traceEvents": events}


def read(device_trace: ModuleType, *traces: dict[str, Any]) -> list[Any]:
    groups = device_trace.Groups(frozenset({"1"}), frozenset({"3", "4"}), expert_ranks=2)
    return [device_trace.read_kernels(trace, groups) for trace in traces]


def early_and_late() -> tuple[list[Event], list[Event]]:
    """One step of two ranks.

    rank 0: compute            [0, 4] [5, 10]
            dense gradients       [3,    6] [9, 12]                  12 = 1 of transfer, 2 of waiting; 3 = 2 + 1
            exchange                                  [13, 20]       7 = 0.5 + 6.5
    rank 1: compute            [0, 4]
            dense gradients           [4, 5]  [6, 8]
            exchange                            [8, 8.5]
    """
    late = [
        compute(0, 4), collective("allreduce", 4, 5, "1"), collective("allreduce", 6, 8, "1"),
        collective("all_to_allv", 8, 8.5, "2", elements=70),
    ]  # fmt: skip
    early = [
        compute(0, 4), compute(5, 10), collective("allreduce", 3, 6, "1"), collective("allreduce", 9, 12, "1"),
        collective("all_to_allv", 13, 20, "2", elements=300),
    ]  # fmt: skip
    return early, late


def split(waiting: ModuleType, role: Any, ranks: list[Any], step: int = 0) -> list[tuple[float, float]]:
    """(exposed transfer, exposed waiting) of each rank."""
    transfers = waiting.transfer_times([waiting.parts(kernels, role, step) for kernels in ranks])
    return [waiting.exposed_parts(kernels, role, step, of) for kernels, of in zip(ranks, transfers, strict=True)]


def test_waiting_exposed_and_hidden(load: Any) -> None:
    device_trace, waiting = load("device_trace"), load("waiting")
    role = device_trace.Role
    early, late = early_and_late()
    ranks = read(device_trace, trace(early), trace(late, clock=3e6))
    dense = split(waiting, role.DENSE, ranks)
    # Of [3, 6] waiting is [3, 5], [4, 5] exposed, and transfer [5, 6], hidden; of [9, 12] waiting is [9, 10], hidden.
    assert dense[0] == pytest.approx((2, 1))
    assert dense[1] == pytest.approx((3, 0))
    assert split(waiting, role.EXCHANGE, ranks)[0] == pytest.approx((0.5, 6.5))
    assert split(waiting, role.EXPERTS, ranks) == [(0, 0), (0, 0)]
    for kernels, own in zip(ranks, dense, strict=True):
        assert sum(own) == pytest.approx(device_trace.communication(kernels, 0)[DENSE][1])

    # Whoever comes last, transfer is the same.
    ranks = read(device_trace, trace([*late, collective("allreduce", 30, 39, "1")], clock=-7e5),
                 trace([*early, collective("allreduce", 30, 32, "1")]))  # fmt: skip
    assert split(waiting, role.DENSE, ranks) == [pytest.approx((5, 7)), pytest.approx((4, 1))]


def test_groups_are_matched_apart(load: Any) -> None:
    """Four ranks; experts are shared by 0 and 2 (group 3), and by 1 and 3 (group 4), which reduce one bucket more."""
    device_trace, waiting = load("device_trace"), load("waiting")
    role = device_trace.Role

    def step(dense: float, group: str, *experts: float) -> list[Event]:
        buckets = [collective("allreduce", 20 + 10 * i, 20 + 10 * i + ms, group) for i, ms in enumerate(experts)]
        return [compute(0, 1), collective("reduce_scatter", 2, 2 + dense, "1", ranks=4), *buckets]

    ranks = read(
        device_trace,
        trace(step(5, "3", 1)), trace(step(2, "4", 2, 8)), trace(step(4, "3", 6)), trace(step(3, "4", 3, 4)),
    )  # fmt: skip
    assert split(waiting, role.DENSE, ranks) == [pytest.approx(p) for p in ((2, 3), (2, 0), (2, 2), (2, 1))]
    assert split(waiting, role.EXPERTS, ranks) == [pytest.approx(p) for p in ((1, 0), (6, 4), (1, 5), (6, 1))]


def test_a_root_does_not_wait_for_all(load: Any) -> None:
    device_trace, waiting = load("device_trace"), load("waiting")
    ranks = read(device_trace, *(trace([compute(0, 1), collective("reduce", 2, 2 + ms, "1")]) for ms in (1, 4)))
    assert split(waiting, device_trace.Role.DENSE, ranks) == [pytest.approx((1, 0)), pytest.approx((4, 0))]


def test_what_the_trace_does_not_name(load: Any) -> None:
    device_trace, waiting = load("device_trace"), load("waiting")
    role = device_trace.Role
    peer = ("fetch_rows_kernel", 2.0, 3.0, {"stream": 8})
    (kernels,) = read(device_trace, trace([compute(0, 1), peer, collective("all_to_all", 4, 5, "2")]))
    assert waiting.parts(kernels, role.EXCHANGE, 0) is None
    assert waiting.parts(kernels, role.DENSE, 0) == []
    alone = device_trace.Groups(frozenset({"1"}), frozenset(), expert_ranks=1)
    nameless = ("ncclDevKernel_AllReduce_Sum_bf16_RING_LL(...)", 2.0, 3.0, {"stream": 9})
    assert waiting.parts(device_trace.read_kernels(trace([nameless]), alone), role.DENSE, 0) is None


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ([("allreduce", "1", 2, 4096)],
         "process group 1 has different numbers of collectives: 2 on rank 0, 1 on rank 1"),
        ([("allreduce", "1", 2, 4096), ("reduce_scatter", "1", 2, 4096)],
         "collective 1 of process group 1 is not one operation: allreduce of 4096 elements on rank 0, "
         "reduce_scatter of 4096 elements on rank 1"),
        ([("allreduce", "1", 2, 4096), ("allreduce", "1", 2, 4095)],
         "allreduce of 4096 elements on rank 0, allreduce of 4095 elements on rank 1"),
        ([], "process group 1 has 2 ranks, of which 1 show collectives"),
        ([("allreduce", "1", 4, 4096)] * 2, "process group 1 has 2 or 4 ranks, of which 2 show collectives"),
    ],
)  # fmt: skip
def test_ranks_that_do_not_fit_together(load: Any, other: list[tuple[str, str, int, int]], message: str) -> None:
    device_trace, waiting = load("device_trace"), load("waiting")
    of_ranks = (("allreduce", "1", 2, 4096),) * 2, other
    ranks = read(device_trace, *(
        trace([collective(name, 2 * i, 2 * i + 1, *rest) for i, (name, *rest) in enumerate(own)]) for own in of_ranks
    ))  # fmt: skip
    with pytest.raises(ValueError, match=message):
        split(waiting, device_trace.Role.DENSE, ranks)


# ---- what two processes make of their traces


def gathered(rank: int, world_size: int) -> list[dict[str, Any]]:
    """Of three steps of which the first does not count; the same where one bucket more has been seen on rank 1; and
    where rank 0 has no profile."""
    sys.path.insert(0, str(BENCHMARKS))
    device_trace, timed_steps = (importlib.import_module(name) for name in ("device_trace", "timed_steps"))
    timed = timed_steps.TimedSteps(None, torch.zeros(1), 0)
    timed.losses, timed.step_ms = [torch.ones(())], [100.0, 100.0]
    own, clock = early_and_late()[rank], 3e6 * rank
    out = []
    for last in ([], [collective("allreduce", 40, 41, "1")] * rank):
        (timed.kernels,) = read(device_trace, trace([], own, [*own, *last], clock=clock))
        out.append(timed.gathered())
    if rank == 0:
        timed.kernels, timed.problem = [], "exposed communication is unknown: no trace"
    return [*out, timed.gathered()]


def test_two_ranks_and_their_table(load: Any) -> None:
    ours, other = run_ranks(2, gathered)
    assert ours == other
    fit, unfit, unprofiled = json.loads(json.dumps(ours))
    step = {DENSE: [3, 1], EXPERTS: [0, 0], EXCHANGE: [0.5, 6.5]}
    assert fit["note"] == ""
    for found in fit["profile"]["transfer_and_waiting"]:
        assert found == {role: pytest.approx(times) for role, times in step.items()}
    assert [set(found) for found in unfit["profile"]["transfer_and_waiting"]] == [{EXPERTS, EXCHANGE}] * 2
    why = "process group 1 has different numbers of collectives: 2 on rank 0, 3 on rank 1"
    assert unfit["note"] == f"transfer and waiting of {DENSE} are unknown: {why}"
    assert unprofiled["profile"] is None and unprofiled["note"] == "exposed communication is unknown: no trace"

    common = {"stage": 0, "title": "ours", "ours": True, "status": "ok", "rival": "", "kept_bytes": None,
              "max_over_mean_load": None}  # fmt: skip
    outcome = {"rows": [{**common, **row} for row in (fit, unfit, unprofiled)], "tokens_per_step": 1000}
    lines = load("step_report").table(outcome).splitlines()
    _, _, *found = cells(lines[:5])
    # Rank 0's exposed time is 3 ms, of which 1 waiting, rank 1's 3 ms, all transfer: 3 % of a step of 100 ms.
    assert found[0][7:17] == ["6.00", "3.00", "3.00", "3.00", "1.00", "3.00", "3.00", "7.00", "7.00", "0.50"]
    assert found[1][7:17] == ["6.00", "3.50", "3.50", "3.50", "", "", "", "7.00", "7.00", "0.50"]
    assert found[2][7:17] == [""] * 10
    assert lines[-2:] == [f"- ZeRO 0, ours: {row['note']}" for row in (unfit, unprofiled)]

    _, _, *found = cells(load("seed_report").table(outcome).splitlines()[:5])
    assert [row[9:15] for row in found] == [
        ["7.00", "7.00", "0.50", "6.00", "3.00", "3.00"], ["7.00", "7.00", "0.50", "6.00", "3.50", ""], [""] * 6,
    ]  # fmt: skip
