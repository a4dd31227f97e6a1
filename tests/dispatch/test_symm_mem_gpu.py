# SPDX-License-Identifier: GPL-3.0-or-later
"""symm_mem between GPUs, against the nccl transport: values and gradients, no host synchronisation, graphs, failures.

Both transports order rows by rank, then token, and add up in rank order, so that they agree in every bit.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from flashfusemoe_ds.config import SymmMemConfig
from flashfusemoe_ds.dispatch.base import Dispatcher, Geometry, combine, dispatch
from flashfusemoe_ds.dispatch.nccl import NcclDispatcher
from flashfusemoe_ds.dispatch.symm_mem import SymmMemDispatcher
from flashfusemoe_ds.kernels.activation import ACTIVATIONS
from flashfusemoe_ds.kernels.experts import experts
from flashfusemoe_ds.kernels.grouped_gemm import ReferenceGemm
from flashfusemoe_ds.kernels.products import TorchProducts
from flashfusemoe_ds.types import Routing
from tests.dispatch.contract import CASES, routes
from tests.distributed import run_ranks

pytestmark = pytest.mark.gpu

MAX_TOKENS = 512


def ranks_here() -> int:
    world = min(torch.cuda.device_count(), 4)
    if world < 2:
        pytest.skip("needs two GPUs")
    return world


def make(
    num_experts: int,
    top_k: int,
    hidden: int = 64,
    dtype: torch.dtype = torch.bfloat16,
    group: Any = None,
    **settings: Any,
) -> SymmMemDispatcher:
    settings = SymmMemConfig(**{"max_tokens_per_rank": MAX_TOKENS, **settings})
    with torch.device("cuda"):  # as where a model is built on the GPU: what must be on the host says so itself
        return SymmMemDispatcher(group or dist.group.WORLD, Geometry(num_experts, hidden, top_k, dtype), settings)


def tokens_and_routes(
    case: str, rank: int, world: int, top_k: int, num_experts: int, hidden: int, dtype: torch.dtype, seed: int = 0
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    idx, g = routes(case, rank, world, top_k, num_experts, seed=1000 * seed, tokens=256, step=165)
    rows = len(idx)
    x = torch.randn(rows, hidden, generator=g).to(dtype)
    return x.cuda(), idx.cuda(), torch.rand(rows, top_k, generator=g).cuda()


def layer(
    dispatcher: Dispatcher, data: tuple[torch.Tensor, ...], num_experts: int, rank: int, world: int
) -> list[torch.Tensor]:
    """Output and all gradients of a layer of random experts."""
    x, idx, weight = data
    hidden, g = x.shape[1], torch.Generator().manual_seed(5)
    up = torch.randn(num_experts, 2 * 32, hidden, generator=g)[rank * num_experts // world :][: num_experts // world]
    down = torch.randn(num_experts, hidden, 32, generator=g)[rank * num_experts // world :][: num_experts // world]
    leaves = [t.clone().requires_grad_() for t in (x, weight, up.to(x.dtype).cuda(), down.to(x.dtype).cuda())]
    sent = dispatch(dispatcher, leaves[0], Routing(idx, leaves[1], torch.zeros(num_experts)))
    assert sent.num_routes >= int((sent.idx_RK >= 0).sum())
    y = experts(sent.x_RD, sent.idx_RK, sent.weight_RK, *leaves[2:], ACTIVATIONS["swiglu"],
                TorchProducts(ReferenceGemm()), num_routes=sent.num_routes)  # fmt: skip
    out = combine(dispatcher, y, sent.handle)
    (out.float() * torch.linspace(-1, 1, out.numel(), device="cuda").view(out.shape)).sum().backward()
    return [out.detach(), *(leaf.grad for leaf in leaves)]


def differences(rank: int, world: int) -> dict[str, list[int]]:
    """By case, how many entries of (out, dx, dweight, dup, ddown) differ from those over nccl."""
    found = {}
    for top_k, num_experts, dtype in (
        (1, world, torch.bfloat16), (8, 8, torch.bfloat16), (8, 64, torch.bfloat16), (3, 4 * world, torch.float32),
        (2, 8, torch.float16),
    ):  # fmt: skip
        ours = {
            "exact": make(num_experts, top_k, dtype=dtype),
            "no host": make(num_experts, top_k, dtype=dtype, capacity_factor=float(world), num_sms=5),
        }
        nccl = NcclDispatcher(dist.group.WORLD, num_experts)
        for case in CASES:
            data = tokens_and_routes(case, rank, world, top_k, num_experts, 64, dtype)
            expected = layer(nccl, data, num_experts, rank, world)
            for name, dispatcher in ours.items():
                actual = layer(dispatcher, data, num_experts, rank, world)
                again = layer(dispatcher, data, num_experts, rank, world)
                label = f"{name}, {case}, K={top_k}, E={num_experts}, {dtype}"
                found[label] = [int((a != e).sum()) for a, e in zip(actual, expected, strict=True)]
                assert all(torch.equal(a, b) for a, b in zip(actual, again, strict=True)), f"{label}: not repeatable"
                dispatcher.raise_if_failed()
        torch.cuda.synchronize()
        dist.barrier()
    return found


def test_equals_nccl_in_every_bit() -> None:
    for found in run_ranks(ranks_here(), differences, accelerator="cuda", timeout=400):
        assert {case: n for case, n in found.items() if any(n)} == {}


def exchange(dispatcher: SymmMemDispatcher, x: torch.Tensor, idx: torch.Tensor, weight: torch.Tensor):
    """A dispatch, a redispatch of twice the rows, a combine of those: three exchanges, an odd number."""
    sent = dispatcher.start_dispatch(x, idx, weight).wait()
    twice = dispatcher.start_redispatch(x * 2, sent.handle).wait()
    kept = torch.where(sent.idx_RK >= 0, sent.weight_RK, 0)
    home = dispatcher.start_combine(twice, sent.handle, kept)
    return home.rows.wait(), home.weights.wait()


def expected_exchange(x: torch.Tensor, idx: torch.Tensor, weight: torch.Tensor, num_experts: int, world: int):
    rank = torch.where(idx >= 0, idx // (num_experts // world), -1)
    copies = sum((rank == p).any(1).float() for p in range(world))
    return x * 2 * copies.unsqueeze(1).to(x.dtype), torch.where(idx >= 0, weight, 0)


@contextmanager
def no_host_synchronisation() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def without_host(rank: int, world: int) -> list[str]:
    """Many exchanges of changing sizes that nothing waits for, then graphs replayed with other routes in between."""
    wrong = []
    eager = make(16, 4, capacity_factor=float(world))
    cases = [(case, seed) for seed in range(8) for case in CASES]
    data = [tokens_and_routes(case, rank, world, 4, 16, 64, torch.bfloat16, seed) for case, seed in cases]
    exchange(eager, *data[0])  # compiles
    with no_host_synchronisation():
        results = [exchange(eager, *d) for d in data]
    for case, d, result in zip(cases, data, results, strict=True):
        if not all(torch.equal(a, b) for a, b in zip(result, expected_exchange(*d, 16, world), strict=True)):
            wrong.append(f"eager {case}")
    eager.raise_if_failed()

    for factor in (None, float(world)):
        dispatcher = make(16, 4, capacity_factor=factor)
        static = [t.clone() for t in tokens_and_routes("even", rank, world, 4, 16, 64, torch.bfloat16)]
        exchange(dispatcher, *static)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize()
        dist.barrier()
        with torch.cuda.graph(graph):
            out = exchange(dispatcher, *static)
        for seed in range(6):
            for case in ("even", "dropped", "all to rank 0", "all dropped"):
                fresh = tokens_and_routes(case, rank, world, 4, 16, 64, torch.bfloat16, seed)
                for old, new in zip(static, fresh, strict=True):
                    old.copy_(new)
                graph.replay()
                got = [t.clone() for t in out]
                if seed % 2:
                    between = exchange(dispatcher, *fresh)
                    got += between
                expected = expected_exchange(*fresh, 16, world)
                torch.cuda.synchronize()
                if not all(torch.equal(a, b) for a, b in zip(got, expected * (len(got) // 2), strict=True)):
                    wrong.append(f"graph {factor} {case} {seed}")
        dispatcher.raise_if_failed()
    return wrong


def test_no_host_and_graphs() -> None:
    assert run_ranks(ranks_here(), without_host, accelerator="cuda", timeout=300) == [[]] * ranks_here()


def error_of(fn: Callable[[], Any]) -> tuple[str, float]:
    start = time.monotonic()
    try:
        fn()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}", time.monotonic() - start
    return "nothing", time.monotonic() - start


def failures(rank: int, world: int) -> dict[str, tuple[str, float]]:
    """What each rank is told, and after how many seconds."""
    said = {}
    many = tuple(torch.cat([t, t, t]) for t in tokens_and_routes("even", rank, world, 2, 8, 64, torch.bfloat16))
    data = tokens_and_routes("all to rank 0", rank, world, 2, 8, 64, torch.bfloat16)

    said["too many tokens on rank 1"] = error_of(lambda: exchange(make(8, 2), *(many if rank == 1 else data)))

    tight = make(8, 2, capacity_factor=0.9)

    def overflow() -> None:
        try:
            rows, _ = exchange(tight, *data)
            torch.cuda.synchronize()
            assert rows.isnan().all(), f"rank {rank} was given numbers"
            tight.raise_if_failed()
        finally:
            dist.barrier()

    said["no room on rank 0"] = error_of(overflow)

    impatient = dist.new_group(timeout=timedelta(seconds=10))
    for name, settings in (("late", {}), ("late, no host", {"capacity_factor": 1.0})):
        dispatcher = make(8, 2, group=impatient, **settings)

        def one_is_missing(dispatcher: SymmMemDispatcher = dispatcher) -> None:
            if rank != 1:
                exchange(dispatcher, *data)
                torch.cuda.synchronize()
                dispatcher.raise_if_failed()

        said[name] = error_of(one_is_missing)
        torch.cuda.synchronize()
        dist.barrier()
    return said


def test_failures_are_told_on_every_rank() -> None:
    first, second, *rest = run_ranks(ranks_here(), failures, accelerator="cuda", timeout=300)
    text, seconds = second["too many tokens on rank 1"]
    assert text.startswith(
        "ValueError: symm_mem dispatch: rank 1 sends 768 tokens; symm_mem.max_tokens_per_rank is 512"
    )
    for said in (first, *rest):
        text, seconds = said["too many tokens on rank 1"]
        assert "symm_mem dispatch failed" in text and "rank(s) 1 gave up" in text and seconds < 60
        for late in ("late", "late, no host"):
            text, seconds = said[late]
            assert "rank(s) 1 did not arrive within 10 s" in text and 9 < seconds < 60
    text, _ = first["no room on rank 0"]
    assert "routes arrived, and symm_mem.capacity_factor (0.9) leaves room for 922" in text
    assert "gave up" in second["no room on rank 0"][0]


def set_up_refusals(rank: int, world: int) -> list[str]:
    return [
        error_of(lambda: make(world + 1, 1))[0],
        error_of(lambda: make(world, 1, hidden=7 + rank))[0],
        error_of(lambda: make(world, 1, hidden=12))[0],
    ]


def test_refusals_before_anything_is_shared() -> None:
    for indivisible, different, ragged in run_ranks(ranks_here(), set_up_refusals, accelerator="cuda"):
        assert "must divide num_experts" in indivisible
        assert "ranks differ" in different
        assert "must be a multiple of 16" in ragged
