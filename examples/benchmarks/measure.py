# SPDX-License-Identifier: GPL-3.0-or-later
"""Time, memory and launches of one timed thing. Milliseconds and bytes."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable

import torch
from ranks import ALONE, Ranks
from timed import Eager, Timed

SAMPLE_MS = 20.0  # a sample repeats the work until it is about this long ...
MAX_REPEATS = 20  # ... or this often
# Before a sample the same work runs this long: a GPU's clock follows its power, and power what ran before. The same
# cuBLAS products took 4.85 to 5.69 ms on an H200, depending on which layer had run.
WARM_UP_MS = 100.0


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def elapsed_ms(
    work: Callable[[], object],
    repeats: int,
    device: torch.device,
    ranks: Ranks = ALONE,
    warm_up_ms: float = WARM_UP_MS,
) -> float:
    """Time per call of `repeats` calls in a row, from the first one's start to the last one's end on the device.

    Of several ranks the slowest one's; they begin together, and warm up by equally many calls.
    """
    if device.type == "cuda":
        until = time.perf_counter() + 1e-3 * warm_up_ms
        while ranks.any(time.perf_counter() < until):
            work()
            synchronize(device)
    synchronize(device)
    ranks.meet()
    return ranks.largest(_own_elapsed_ms(work, repeats, device))


def _own_elapsed_ms(work: Callable[[], object], repeats: int, device: torch.device) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(repeats):
            work()
        return 1e3 * (time.perf_counter() - start) / repeats
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / repeats


def repeats_for(work: Callable[[], object], device: torch.device, ranks: Ranks = ALONE) -> int:
    """The same on every rank."""
    return max(1, min(MAX_REPEATS, round(SAMPLE_MS / max(1e-3, elapsed_ms(work, 2, device, ranks)))))


def host_ms(timed: Timed, device: torch.device, ranks: Ranks = ALONE) -> float:
    """Until one step is issued, from an idle device. A layer that waits for the device shows it here."""
    synchronize(device)
    ranks.meet()
    start = time.perf_counter()
    timed.step()
    spent = 1e3 * (time.perf_counter() - start)
    synchronize(device)
    return ranks.largest(spent)


def memory(eager: Eager, device: torch.device) -> tuple[int, int]:
    """(kept, peak) bytes, by PyTorch's allocator.

    kept: still allocated after the forward. Counts the output and not the input, two tensors of one size, of which
    the backward needs the input.
    peak: the most allocated during a step above what was there before it: weights, input and output gradient.
    """
    eager.drop_gradients()
    gc.collect()
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    out_TD = eager.forward()
    kept = torch.cuda.memory_allocated(device) - before
    out_TD.backward(eager.dout_TD)
    del out_TD
    synchronize(device)
    peak = torch.cuda.max_memory_allocated(device) - before
    eager.drop_gradients()
    return kept, peak


def launches(timed: Timed, device: torch.device) -> tuple[int, int]:
    """Kernels launched by (forward, backward), copies and fills by the copy engine not counted."""
    forward = _kernels(timed.forward, device)
    return forward, _kernels(timed.step, device) - forward


def _kernels(work: Callable[[], object], device: torch.device) -> int:
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    synchronize(device)
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
        work()
        synchronize(device)
    # Annotations of regions ("## ...", "Torch-Compiled Region") also show up on the device's time line.
    other = ("Memcpy", "Memset", "##", "Torch-Compiled", "ProfilerStep", "Activity Buffer", "Lazy Function")
    return sum(
        event.device_type == DeviceType.CUDA
        and not event.name.startswith(other)
        and not getattr(event, "is_user_annotation", False)
        for event in profiler.events()
    )
