# SPDX-License-Identifier: GPL-3.0-or-later
"""Overlapped gradient reduction on GPUs over NCCL: the numbers, streams that wait for each other, a host that does
not wait."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from flashfusemoe_ds import OverlappedGradSync
from tests.distributed import run_ranks
from tests.ds import tiny
from tests.ds.test_grad_overlap import Case, assert_equal, train_all
from tests.ds.test_overlapped_grad_sync import every_case

pytestmark = pytest.mark.gpu

WORLD = 2
WIDTH, LAYERS = 2048, 8


@pytest.fixture(autouse=True)
def two_gpus() -> None:
    if torch.cuda.device_count() < WORLD:
        pytest.skip("needs two GPUs")


def test_averages_are_those_of_a_plain_all_reduce() -> None:
    for found in run_ranks(WORLD, every_case, "cuda", accelerator="cuda"):
        # float32 sums of the one float32 layer; the others agree to 1e-15.
        assert {name: case["error"] for name, case in found.items() if not case["error"] < 1e-6} == {}


def test_weights_do_not_depend_on_overlap() -> None:
    cases = [Case(stage, ep_size, 3, ours) for stage in (0, 1, 2) for ep_size in (1, 2) for ours in (True, False)]
    per_rank = run_ranks(WORLD, train_all, cases, accelerator="cuda")
    weights = {
        c: tiny.merge(r.weights for r in ranks) for c, ranks in zip(cases, zip(*per_rank, strict=True), strict=True)
    }
    for case in cases[::2]:
        assert_equal(weights[case], weights[Case(case.stage, case.ep_size, 3, False)])


class _Late(torch.autograd.Function):
    """The identity, whose gradient takes its time on the GPU."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        torch.cuda._sleep(20_000_000)  # some 10 ms
        return grad.clone()


def late_gradients(rank: int, world: int) -> dict[str, float]:
    """Gradients made late on two streams, read at once after finish, under a debugger of host synchronisation."""
    torch.cuda.set_device(rank)
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(LAYERS)).cuda()
    sync = OverlappedGradSync(list(layers.parameters())[::-1], dist.group.WORLD)
    x = torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(rank)).cuda()
    other = torch.cuda.Stream()

    def backward() -> None:
        y = x
        for i, layer in enumerate(layers):
            # A backward runs on the stream of its forward: every other gradient is made on another stream.
            stream = other if i % 2 else torch.cuda.current_stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                y = _Late.apply(layer(y)).tanh()
            torch.cuda.current_stream().wait_stream(stream)
        y.sum().backward()

    with sync.no_sync():
        backward()
    expected = []
    for param in layers.parameters():
        mean = param.grad.clone()
        dist.all_reduce(mean)
        expected.append(mean / world)
    layers.zero_grad()
    backward()
    sync.finish()  # the first round, which makes the communicator's buffers
    errors = []
    for _ in range(3):
        layers.zero_grad()
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("error")
        backward()
        sync.finish()
        seen = [p.grad.clone() for p in layers.parameters()]
        # Memory that finish let go of is written again: sums that are not through yet would change.
        layers.zero_grad()
        garbage = [torch.full((WIDTH, WIDTH), float("nan"), device="cuda") for _ in range(LAYERS)]
        torch.cuda.set_sync_debug_mode("default")
        errors += [float((s - e).abs().max() / e.abs().max()) for s, e in zip(seen, expected, strict=True)]
        del garbage
    return {"error": max(errors)}


def test_streams_wait_and_the_host_does_not() -> None:
    for found in run_ranks(WORLD, late_gradients, accelerator="cuda"):
        assert found["error"] < 1e-6
