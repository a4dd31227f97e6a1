# SPDX-License-Identifier: GPL-3.0-or-later
"""Training through the engine on four gloo ranks, fp32: equal to stock DeepSpeed, at every EP size and ZeRO stage."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.moe.layer import MoE as StockMoE
from torch import Tensor

import flashfusemoe_ds
from flashfusemoe_ds import MoE
from tests.distributed import run_ranks
from tests.ds import tiny
from tests.ds.compare import assert_all_near, assert_near

STEPS = 10
CLIP = 1.0
EP_SIZES = (1, 2, 4)
STAGES = (0, 1, 2)


@dataclass(frozen=True)
class Config:
    ours: bool
    ep_size: int
    stage: int
    optimizer: str
    clip: float
    overlap: bool | None = None  # zero_optimization.overlap_comm; None leaves the choice to initialize
    way: str = "import"  # how our layer gets into the model: see _start

    @property
    def name(self) -> str:
        overlap = "" if self.overlap is None else f"-overlap_{self.overlap}"
        way = "" if self.way == "import" else f"-{self.way}"
        return f"ep{self.ep_size}-stage{self.stage}-{self.optimizer}{overlap}{way}"

    def stock(self) -> Config:
        return Config(False, self.ep_size, self.stage, self.optimizer, self.clip)


@dataclass(frozen=True)
class Curve:
    """What ten steps left: the mean loss over ranks and the gradient norm of each step, and the final weights."""

    loss: Tensor
    norm: Tensor
    weights: dict[str, Tensor]


def _configs() -> list[Config]:
    grid = list(itertools.product(EP_SIZES, STAGES))
    configs = [
        Config(ours, ep_size, stage, optimizer, CLIP)
        for ours in (False, True)
        for ep_size, stage in grid
        for optimizer in ("sgd", "adamw")
        if optimizer == "adamw" or ep_size == 2
    ]
    # Without clipping, for the comparison across EP sizes and stages: see test_the_same_at_every_ep_size_and_stage.
    configs += [Config(True, ep_size, stage, "adamw", 0.0) for ep_size, stage in grid]
    # Reduction by hooks during backward, or at its end; ours picks the former, stock's default is the latter.
    configs += [Config(True, 2, stage, "adamw", CLIP, overlap=on) for stage in (1, 2) for on in (False, True)]
    configs += [Config(True, 2, stage, "adamw", CLIP, way=way) for stage in (0, 2) for way in ("json", "attach")]
    return configs


def _start(cfg: Config, rank: int, weights: dict[str, Tensor]) -> Any:
    # Clipped by stock's norm, whose fault at float32 stage 0 tests/ds/test_grad_norm.py has: the comparison is exact.
    ds_config = tiny.config(cfg.stage, cfg.optimizer, cfg.clip, flashfusemoe={"exact_grad_norm": False})
    if cfg.overlap is not None:
        ds_config["zero_optimization"]["overlap_comm"] = cfg.overlap
    if not cfg.ours:
        return tiny.start(deepspeed.initialize, tiny.build(StockMoE, cfg.ep_size, rank, weights), ds_config)
    if cfg.way == "json":  # stock layers in the model, replaced because the section says so
        ds_config["flashfusemoe"]["replace_moe"] = True
        engine = tiny.start(flashfusemoe_ds.initialize, tiny.build(StockMoE, cfg.ep_size, rank, weights), ds_config)
    elif cfg.way == "attach":  # our layers, DeepSpeed's initialize
        engine = tiny.start(deepspeed.initialize, tiny.build(MoE, cfg.ep_size, rank, weights), ds_config)
        flashfusemoe_ds.attach(engine)
    else:
        engine = tiny.start(flashfusemoe_ds.initialize, tiny.build(MoE, cfg.ep_size, rank, weights), ds_config)
    assert type(engine.module.moe_a) is MoE and type(engine.module.moe_b) is MoE
    return engine


def _train_all(rank: int, world_size: int, configs: list[Config]) -> list[tuple[list[float], list[float], dict]]:
    """Every configuration in turn: starting four processes costs more than training."""
    weights = tiny.global_weights()
    results = []
    for cfg in configs:
        engine = _start(cfg, rank, weights)
        losses, norms = zip(*(tiny.train_step(engine, rank, step) for step in range(STEPS)), strict=True)
        results.append((list(losses), list(norms), tiny.to_global(engine.module.state_dict(), cfg.ep_size, rank)))
        engine.destroy()
    return results


@pytest.fixture(scope="module")
def curves() -> dict[Config, Curve]:
    configs = _configs()
    per_rank = run_ranks(tiny.WORLD_SIZE, _train_all, configs, timeout=540)
    result = {}
    for cfg, ranks in zip(configs, zip(*per_rank, strict=True), strict=True):
        losses, norms, weights = zip(*ranks, strict=True)
        assert all(norm == norms[0] for norm in norms), f"{cfg}: the ranks disagree about the gradient norm: {norms}"
        result[cfg] = Curve(
            tiny.average(list(losses)), torch.tensor(norms[0], dtype=torch.float64), tiny.merge(weights)
        )
    return result


@pytest.mark.slow
@pytest.mark.parametrize("cfg", [c for c in _configs() if c.ours and c.clip], ids=lambda c: c.name)
def test_equals_stock_at_the_same_ep_size_and_stage(curves: dict[Config, Curve], cfg: Config) -> None:
    ours, stock = curves[cfg], curves[cfg.stock()]
    assert (stock.norm > CLIP).any(), "nothing was clipped: the comparison would not see a wrong norm"
    assert stock.loss[-1] < stock.loss[0]
    assert_near("loss", ours.loss, stock.loss)
    assert_near("gradient norm", ours.norm, stock.norm)
    assert_all_near(ours.weights, stock.weights)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("ep_size", EP_SIZES)
def test_the_same_at_every_ep_size_and_stage(curves: dict[Config, Curve], ep_size: int, stage: int) -> None:
    """Without clipping: at fp32 stage 0 DeepSpeed scales by the average of the ranks' local norms, each over the
    rank's own experts, so its clipped updates depend on the EP size. The norm compared here is the true global one."""
    curve, reference = curves[Config(True, ep_size, stage, "adamw", 0.0)], curves[Config(True, 1, 0, "adamw", 0.0)]
    assert_near("loss", curve.loss, reference.loss)
    assert_near("gradient norm", curve.norm, reference.norm)
    assert_all_near(curve.weights, reference.weights)


@pytest.mark.slow
@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("ep_size", EP_SIZES)
def test_clipping_under_zero_does_not_depend_on_ep_size(curves: dict[Config, Curve], ep_size: int, stage: int) -> None:
    curve = curves[Config(True, ep_size, stage, "adamw", CLIP)]
    reference = curves[Config(True, 1, 1, "adamw", CLIP)]
    assert_near("loss", curve.loss, reference.loss)
    assert_near("gradient norm", curve.norm, reference.norm)
    assert_all_near(curve.weights, reference.weights)


@pytest.mark.slow
def test_every_weight_moved(curves: dict[Config, Curve]) -> None:
    """Else equal curves prove nothing about it."""
    before = tiny.global_weights()
    after = curves[Config(True, 2, 0, "adamw", 0.0)].weights
    assert set(before) == set(after)
    for name, weight in before.items():
        assert not torch.equal(weight, after[name]), name
