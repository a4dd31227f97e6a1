# SPDX-License-Identifier: GPL-3.0-or-later
"""What exchanges cost on this machine: each operation of a transport timed alone, and a plan's formula fitted to it.

operations     a transport's four exchanges of one batch, with the bytes that cross
slowest_ms     the time of each, their samples interleaved
fit            times and bytes -> one rate and a fixed part of each operation, by least squares
calibration    operations at three sizes: half, once and twice the tokens
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import Any, NamedTuple

import deepspeed.comm
import torch
import torch.distributed as dist
from torch import Tensor

from flashfusemoe_ds.config import FlashFuseMoEConfig
from flashfusemoe_ds.dispatch.base import Dispatcher
from flashfusemoe_ds.dispatch.select import close_dispatcher, make_dispatcher
from flashfusemoe_ds.planning import ExchangeCost, Exchanges, MoEShape, exchange_bytes

WARM_UP, SAMPLES = 3, 40


class Operation(NamedTuple):
    """One exchange that can be repeated.

    Attributes:
        name: a field of Exchanges.
        bytes: that the busiest rank receives.
        call: does it and waits for the result.
    """

    name: str
    bytes: int
    call: Callable[[], object]


class Sample(NamedTuple):
    """What `fit` takes: an operation's name, its bytes, and milliseconds."""

    name: str
    bytes: int
    ms: float


def operations(
    transport: Dispatcher, group: dist.ProcessGroup, shape: MoEShape, dtype: torch.dtype, idx_TK: Tensor
) -> list[Operation]:
    """The four exchanges of a layer, for one choice of experts. Collective.

    Args:
        group: the transport's.
        dtype: of the rows.
        idx_TK: int64 [T, K], global expert ids.
    """
    tokens, local = idx_TK.shape[0], shape.num_experts // transport.ep_size
    x_TD = torch.zeros(tokens, shape.hidden_size, dtype=dtype, device=idx_TK.device)
    weight_TK = torch.ones(tokens, shape.top_k, device=idx_TK.device)
    sent = transport.start_dispatch(x_TD, idx_TK, weight_TK).wait()
    y_RD, weight_RK = sent.x_RD.clone(), torch.where(sent.idx_RK >= 0, sent.weight_RK, 0)
    stay = (idx_TK // local == dist.get_rank(group)).any(1).sum()
    # Rows that stay do not cross.
    crossing = torch.stack([sent.x_RD.shape[0] - stay])
    dist.all_reduce(crossing, dist.ReduceOp.MAX)
    sizes = exchange_bytes(shape, int(crossing), dtype.itemsize)

    def grads_home() -> None:
        home = transport.start_combine(y_RD, sent.handle, weight_RK)
        home.weights.wait(), home.rows.wait()

    calls = Exchanges(
        dispatch=lambda: transport.start_dispatch(x_TD, idx_TK, weight_TK).wait(),
        combine=lambda: transport.start_combine(y_RD, sent.handle).rows.wait(),
        redispatch=lambda: transport.start_redispatch(x_TD, sent.handle).wait(),
        combine_grads=grads_home,
    )
    return [Operation(*each) for each in zip(Exchanges._fields, sizes, calls, strict=True)]


def slowest_ms(found: Sequence[Operation], device: torch.device, samples: int = SAMPLES) -> list[float]:
    """`time_calls` of these operations."""
    return time_calls([each.call for each in found], device, samples)


def time_calls(calls: Sequence[Callable[[], object]], device: torch.device, samples: int = SAMPLES) -> list[float]:
    """Median over samples of the slowest rank's milliseconds of each call. One sample of each in turn, so that a
    machine that changes its pace does so for all of them.

    On CUDA the time is that between two events on the current stream: it has what the device waits for its host.
    """
    token = torch.zeros(1, device=device)
    times = [[_once_ms(call, device, token) for call in calls] for _ in range(WARM_UP + samples)]
    slowest = torch.tensor(times[WARM_UP:], dtype=torch.float64, device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return [median(column) for column in slowest.T.tolist()]


def _once_ms(call: Callable[[], object], device: torch.device, token: Tensor) -> float:
    if device.type != "cuda":
        dist.all_reduce(token)
        began = time.perf_counter()
        call()
        return 1e3 * (time.perf_counter() - began)
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    torch.cuda._sleep(500_000)  # a quarter of a millisecond for the host to get ahead, where nothing stops it
    dist.all_reduce(token)  # the streams of all ranks leave it at about the same time
    start.record()
    call()
    end.record()
    torch.cuda.synchronize()
    return start.elapsed_time(end)


def fit(samples: Sequence[Sample]) -> ExchangeCost:
    """The cost that fits best, nothing in it negative: what comes out negative is left out, and the rest fitted again.

    A rate is infinite where times do not grow with the bytes.
    """
    terms = len(Exchanges._fields) + 1
    largest = max(sample.bytes for sample in samples)  # so that all coefficients are of one magnitude
    of = torch.zeros(len(samples), terms, dtype=torch.float64)
    for row, sample in zip(of, samples, strict=True):
        row[Exchanges._fields.index(sample.name)] = 1
        row[-1] = sample.bytes / largest
    us = torch.tensor([[1e3 * sample.ms] for sample in samples], dtype=torch.float64)
    used, solution = list(range(terms)), torch.zeros(terms, dtype=torch.float64)
    while True:
        # By singular values: torch's default driver returns no least squares where an operation has no samples.
        best = torch.linalg.lstsq(of[:, used], us, driver="gelsd").solution.flatten()
        if bool((best >= 0).all()):
            break
        used = [term for term, value in zip(used, best.tolist(), strict=True) if value >= 0]
    solution[used] = best
    *fixed, us_of_largest = solution.tolist()
    return ExchangeCost(largest / us_of_largest / 1e3 if us_of_largest else float("inf"), tuple(fixed))


def section(ep_backend: str, max_tokens: int, num_sms: int | None) -> dict[str, Any]:
    """The config's "flashfusemoe", for a transport of so many tokens per rank; num_sms None is its default.

    Raises:
        ValueError: num_sms for a transport that has no such setting.
    """
    if ep_backend == "nccl":
        if num_sms is not None:
            raise ValueError(f"--num_sms is {num_sms}, and --backend nccl has no such setting; leave it out")
        return {"ep_backend": ep_backend}
    own = {} if num_sms is None else {"num_sms": num_sms}
    return {"ep_backend": ep_backend, ep_backend: {"max_tokens_per_rank": max_tokens, **own}}


@contextlib.contextmanager
def calibration(
    ep_backend: str, num_sms: int | None, group: dist.ProcessGroup, shape: MoEShape, dtype: torch.dtype, tokens: int,
    device: torch.device,
) -> Iterator[list[Operation]]:  # fmt: skip
    """Operations of a transport of its own at half, once and twice these tokens, uniform routes. Collective.

    Once as well: a line through two sizes lies above what is measured between them, by 13 % for `symm_mem` on two
    H200s, since larger exchanges are faster.
    """
    sizes = (tokens // 2, tokens, 2 * tokens)
    config = FlashFuseMoEConfig.from_section(section(ep_backend, max(sizes), num_sms))
    transport = make_dispatcher(config, group, shape.geometry(dtype), comm=deepspeed.comm)
    generator = torch.Generator(device).manual_seed(dist.get_rank())
    found: list[Operation] = []
    for size in sizes:
        likes = torch.rand(size, shape.num_experts, generator=generator, device=device)
        found += operations(transport, group, shape, dtype, likes.topk(shape.top_k, dim=1)[1])
    yield found
    close_dispatcher(transport)


def flags(cost: ExchangeCost) -> str:
    """For `python -m flashfusemoe_ds.plan`."""
    return f"--exchange_gbps {cost.gbps:.4g} --exchange_us {' '.join(f'{us:.4g}' for us in cost.fixed_us)}"


def times_table(samples: Sequence[Sample]) -> str:
    """Markdown: microseconds by size and operation. Every four samples are those of one batch."""
    lines = [f"| MB of rows | {' | '.join(Exchanges._fields)} |", "|---|---|---|---|---|"]
    for first in range(0, len(samples), len(Exchanges._fields)):
        batch = samples[first : first + len(Exchanges._fields)]
        rows = next(sample.bytes for sample in batch if sample.name == "combine")
        lines.append(f"| {rows / 1e6:.3g} | {' | '.join(f'{1e3 * sample.ms:.0f}' for sample in batch)} |")
    return "\n".join(lines)
