# SPDX-License-Identifier: GPL-3.0-or-later
"""A profiler's trace of one step of our layer across ranks, with this package's `moe:` ranges."""

from __future__ import annotations

from pathlib import Path

import torch
from compare import Settings
from ep_layers import ours
from layers import Bench
from measure import synchronize
from routing import make_input
from shapes import Shape
from timed import Eager
from torch.profiler import ProfilerActivity, profile, schedule
from weights import Weights

WARM_UPS = 3  # compile and allocate
NOT_KEPT = 2  # with the profiler on already: its own start takes time


def record(shape: Shape, settings: Settings, ep_backend: str, num_shared: int, path: Path) -> None:
    """Rank 0 writes a Chrome trace of the last of a few steps. Collective.

    Raises:
        CannotRun, ImportError: the transport cannot be used, on every rank alike.
    """
    device, ranks = settings.device, settings.ranks
    generator = torch.Generator(device).manual_seed(settings.seed)
    weights = Weights.random(shape, settings.dtype, generator)
    generator.manual_seed(settings.seed + 1 + ranks.rank)
    x_TD = make_input(shape, weights.gate, settings.routing, generator)[0].requires_grad_()
    dout_TD = torch.empty_like(x_TD).normal_(generator=generator)
    bench = Bench(shape, weights, settings.dtype, device, shape.T, settings.tune, settings.group, ranks.meet)
    layer = ours(bench, ep_backend, num_shared_experts=num_shared)
    eager = Eager(layer, x_TD, dout_TD)

    def step() -> None:
        ranks.meet()
        eager.step()
        synchronize(device)

    for _ in range(WARM_UPS):
        step()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * (device.type == "cuda")
    plan = schedule(wait=0, warmup=NOT_KEPT, active=1, repeat=1)
    with profile(activities=activities, schedule=plan, acc_events=True) as profiler:
        for _ in range(NOT_KEPT):
            step()
            profiler.step()
        step()
    if ranks.rank == 0:
        path.parent.mkdir(parents=True, exist_ok=True)
        profiler.export_chrome_trace(str(path))
    layer.close()
