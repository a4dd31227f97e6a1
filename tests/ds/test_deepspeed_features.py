# SPDX-License-Identifier: GPL-3.0-or-later
"""What DeepSpeed does around a MoE layer: discovery, timers, the flops profiler, activation checkpointing."""

from __future__ import annotations

import io
import logging
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.moe.layer import MoE as StockMoE
from deepspeed.moe.utils import has_moe_layers
from deepspeed.profiling.flops_profiler.profiler import FlopsProfiler, get_module_flops
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import flashfusemoe_ds
from flashfusemoe_ds import MoE, get_dense_params, replace_moe
from flashfusemoe_ds.nn.shared import SharedExperts
from tests.distributed import run_ranks
from tests.ds import tiny
from tests.ds.compare import assert_all_near, assert_near
from tests.ds.experts_zoo import EXPERTS
from tests.ds.stock_grads import stock_grads

EP_SIZE = 2


def _engine(rank: int, ds_config: dict[str, Any], checkpoint: Callable[..., Any] | None = None) -> Any:
    model = tiny.build(MoE, EP_SIZE, rank, tiny.global_weights(), checkpoint)
    return tiny.start(flashfusemoe_ds.initialize, model, ds_config)


# --- discovery --------------------------------------------------------------------------------------------------


def test_has_moe_layers() -> None:
    assert has_moe_layers(tiny.TinyModel(MoE, ep_size=1)) == has_moe_layers(tiny.TinyModel(StockMoE, ep_size=1))
    assert has_moe_layers(tiny.TinyModel(MoE, ep_size=1)) == (True, 8)  # DeepSpeed reports the first layer


def _discovery(rank: int, world_size: int) -> dict[str, Any]:
    engine = _engine(rank, tiny.config(stage=1))
    return {
        "has_moe_layers": engine.has_moe_layers,
        "num_experts": list(engine.num_experts),
        "gates": len(engine.gate_modules),
        "layers": len(engine.moe_layers),
        "expert_groups": sorted(group["name"] for group in engine.optimizer.param_groups if group.get("moe")),
    }


def test_the_engine_finds_the_layers() -> None:
    for found in run_ranks(2, _discovery):
        groups = found.pop("expert_groups")
        assert found == {"has_moe_layers": True, "num_experts": [8, 4], "gates": 2, "layers": 2}
        assert groups and set(groups) == {"ep_size_2"}


# --- replace_moe, get_dense_params ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "kwargs",
    [
        {"k": 1, "capacity_factor": 0.7},
        {"k": 1, "noisy_gate_policy": "RSample", "use_rts": False, "capacity_factor": 8.0},
        {"k": 2, "use_residual": True},
        {"k": 2, "top2_2nd_expert_sampling": False, "min_capacity": 9},
        {"k": 4, "drop_tokens": False},
        {"k": 4, "eval_capacity_factor": 0.5, "noisy_gate_policy": "Jitter"},
    ],
    ids=str,
)
@pytest.mark.parametrize("experts", ["gelu_bias", "swiglu", "custom"])
def test_replace_moe_keeps_weights_and_settings(kwargs: dict[str, Any], experts: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), StockMoE(16, EXPERTS[experts](16, 32), num_experts=8, **kwargs))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    x = torch.randn(40, 16)
    for training in (True, False):
        model.train(training)
        torch.manual_seed(1)
        out, l_aux, counts = model(x)
        replaced = replace_moe(_copy(model, kwargs, experts))
        assert type(replaced[1]) is MoE and type(replaced[0]) is nn.Linear
        assert replaced.training == replaced[1].training == training
        assert_all_near(replaced.state_dict(), before, rtol=0.0)
        torch.manual_seed(1)
        again = replaced(x)
        assert_near("output", again[0], out)
        assert_near("l_aux", again[1], l_aux)
        assert torch.equal(again[2], counts)


def _copy(model: nn.Sequential, kwargs: dict[str, Any], experts: str) -> nn.Sequential:
    copy = nn.Sequential(nn.Linear(16, 16), StockMoE(16, EXPERTS[experts](16, 32), num_experts=8, **kwargs))
    copy.load_state_dict(model.state_dict())
    return copy.train(model.training)


def test_get_dense_params() -> None:
    model = tiny.TinyModel(MoE, ep_size=1)
    routed = {
        id(parameter) for moe in (model.moe_a, model.moe_b) for parameter in moe.deepspeed_moe.experts.parameters()
    }
    expected = {id(parameter) for parameter in model.parameters()} - routed
    dense = list(get_dense_params(model))
    assert {id(parameter) for parameter in dense} == expected and len(dense) == len(expected)
    assert id(model.moe_a.deepspeed_moe.gate.wg.weight) in expected  # gates are replicated, so dense


# --- timers and profiler ----------------------------------------------------------------------------------------


def _wall_clock(rank: int, world_size: int) -> tuple[str, list[tuple[float, ...]]]:
    engine = _engine(rank, tiny.config(stage=0, wall_clock_breakdown=True))
    logger, stream = logging.getLogger("DeepSpeed"), io.StringIO()
    handler = logging.StreamHandler(stream)
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    for step in range(2):
        tiny.train_step(engine, rank, step)
    times = [(moe.gate.gate_time, moe.time_moe, moe.time_falltoall, moe.time_salltoall) for moe in engine.moe_layers]
    return stream.getvalue(), times


def test_wall_clock_breakdown_prints_the_moe_times() -> None:
    (text, times), (_, times_of_1) = run_ranks(2, _wall_clock)
    number = r"([\d.]+)"
    pattern = rf"fwd: {number} \(fwd_moe: {number}, 1st_a2a: {number}, 2nd_a2a: {number}, top_k: {number}\)"
    printed = [[float(value) for value in line] for line in re.findall(pattern, text)]
    assert len(printed) == 2, text  # one line per step
    for _, moe, first, second, gate in printed:
        assert first > 0.0 and second > 0.0 and gate > 0.0
        assert moe >= first + second
    for layers in (times, times_of_1):
        for gate, moe, first, second in layers:
            assert all(value > 0.0 for value in (gate, first, second))
            assert moe >= gate + first + second


def _profile(rank: int, world_size: int, output_file: str) -> tuple[float, float, float] | None:
    """Rank 0: flops that the profiler saw in the MoE layers, in the model, and the experts' GEMMs by arithmetic."""
    torch.manual_seed(0)
    d_model, ffn_dim, num_experts, num_tokens = 64, 128, 8, 96

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.plain = MoE(d_model, EXPERTS["relu"](d_model, ffn_dim), num_experts, EP_SIZE, k=2, drop_tokens=False)
            self.gated = MoE(
                d_model, EXPERTS["swiglu"](d_model, ffn_dim), num_experts, EP_SIZE, k=4, drop_tokens=False
            )

        def forward(self, x: Tensor) -> Tensor:
            return self.gated(self.plain(x)[0])[0].square().mean()

    ds_config = tiny.config(
        stage=0,
        accumulation=1,
        flops_profiler={"enabled": True, "profile_step": 1, "detailed": True, "output_file": output_file},
    )
    engine = tiny.start(flashfusemoe_ds.initialize, Model(), ds_config)
    seen = None
    for step in range(2):
        torch.manual_seed(10 * step + rank)
        loss = engine(torch.randn(num_tokens, d_model))
        engine.backward(loss)
        if step == 1 and rank == 0:
            moes = (engine.module.plain, engine.module.gated)
            seen = sum(get_module_flops(moe.deepspeed_moe) for moe in moes), get_module_flops(engine.module)
        flops = 0
        for moe, gemms in ((engine.module.plain, 2), (engine.module.gated, 3)):
            counts = moe.deepspeed_moe.exp_counts.clone()
            torch.distributed.all_reduce(counts)
            routes = int(counts[: num_experts // EP_SIZE].sum())  # rank 0 holds the first half
            flops += routes * gemms * 2 * d_model * ffn_dim
        engine.step()
    return None if seen is None else (*seen, float(flops))


def test_flops_profiler_counts_the_experts(tmp_path: Path) -> None:
    output_file = tmp_path / "profile.txt"
    result = run_ranks(2, _profile, str(output_file))[0]
    assert result is not None
    in_moe, in_model, by_arithmetic = result
    # Router, activations and the weighting are counted as well; at this width they are a few percent.
    assert in_moe == pytest.approx(by_arithmetic, rel=0.2)
    assert in_model >= in_moe
    assert "Flops Profiler" in output_file.read_text()


def test_flops_profiler_counts_shared_experts() -> None:
    class Added(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.shared = SharedExperts(2, 16, 32, "swiglu")

        def forward(self, x: Tensor) -> Tensor:
            return self.shared(x, torch.zeros_like(x))

    model, x = Added(), torch.randn(8, 16)
    profiler = FlopsProfiler(model)
    profiler.start_profile()
    model(x)
    profiler.stop_profile()
    macs = profiler.get_total_macs()
    profiler.end_profile()
    assert macs == sum(p.numel() for p in model.parameters()) * len(x)


# --- activation checkpointing -----------------------------------------------------------------------------------

CHECKPOINTS: dict[str, Callable[..., Any] | None] = {
    "none": None,
    "torch_reentrant": partial(torch_checkpoint, use_reentrant=True),
    "torch_non_reentrant": partial(torch_checkpoint, use_reentrant=False),
    "deepspeed": deepspeed.checkpointing.checkpoint,
}


def _checkpointed(rank: int, world_size: int) -> dict[str, tuple[float, dict[str, Tensor], dict[str, Tensor]]]:
    """Loss, gradients at stage 0 and weights after two steps of stage 2, for every kind of checkpointing.

    Both layers draw random numbers (jitter, RTS, second-expert sampling), so a recompute from another generator state
    routes other tokens and shows in every gradient.
    """
    results = {}
    for name, checkpoint in CHECKPOINTS.items():
        engine = _engine(rank, tiny.config(stage=0, accumulation=1), checkpoint)
        torch.manual_seed(50 + rank)
        loss = engine(*tiny.batch(rank, 0, 0))
        torch.rand(7)  # moves the generator on between forward and backward
        engine.backward(loss)
        grads = {
            f"{kind}.{leaf}": grad.clone()
            for kind in ("moe_a", "moe_b")
            for leaf, grad in stock_grads(getattr(engine.module, kind)).items()
        }
        grads["embed"] = engine.module.embed.weight.grad.clone()
        engine.destroy()

        engine = _engine(rank, tiny.config(stage=2), checkpoint)
        for step in range(2):
            tiny.train_step(engine, rank, step)
        results[name] = (float(loss.detach()), grads, tiny.to_global(engine.module.state_dict(), EP_SIZE, rank))
        engine.destroy()
    return results


def test_activation_checkpointing_changes_nothing() -> None:
    for results in run_ranks(2, _checkpointed):
        loss, grads, weights = results.pop("none")
        assert len(grads) > 20 and all(grad.any() for name, grad in grads.items() if "wg" in name or name == "embed")
        for name, (other_loss, other_grads, other_weights) in results.items():
            assert other_loss == loss, name
            assert_all_near(other_grads, grads, rtol=1e-6)
            assert_all_near(other_weights, weights, rtol=1e-6)
