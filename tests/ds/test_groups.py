# SPDX-License-Identifier: GPL-3.0-or-later
"""Groups other than expert-before-data parallelism: the reverse order, and Ulysses in both of DeepSpeed's forms.

Four gloo ranks, fp32, an engine with stock's layers beside one with ours.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import deepspeed
import deepspeed.runtime.sequence_parallel.parallel_state_sp as ulysses
import pytest
import torch
from deepspeed.moe.layer import MoE as StockMoE
from deepspeed.utils import groups
from torch import Tensor

import flashfusemoe_ds
from flashfusemoe_ds import MoE
from tests.distributed import run_ranks
from tests.ds import tiny
from tests.ds.compare import assert_all_near, assert_near
from tests.ds.layouts import SequenceMpu, fresh_groups, stock_gathers_on_gloo
from tests.ds.stock_grads import stock_grads

EP, WORLD, STEPS = 2, 4, 3
EXPERT = re.compile(r".*\.deepspeed_experts\..*")


class Run:
    """What one engine did: the reduced gradients of its first step (stage 0), losses and final weights."""

    def __init__(
        self, ours: bool, rank: int, stage: int = 0, ep_rank: int | None = None, mpu: Any = None, **kwargs: Any
    ) -> None:
        ds_config = tiny.config(stage, accumulation=1, **kwargs.pop("config", {}))
        weights = tiny.global_weights()
        initialize: Callable[..., Any] = flashfusemoe_ds.initialize if ours else deepspeed.initialize
        with fresh_groups():
            model = tiny.build(MoE if ours else StockMoE, EP, rank if ep_rank is None else ep_rank, weights)
            params = list(model.parameters())
            engine, *_ = initialize(model=model, model_parameters=params, config=ds_config, mpu=mpu, **kwargs)
            self.ranks = [list(find("ep_size_2")) for find in (
                groups._get_expert_parallel_group_ranks, groups._get_expert_data_parallel_group_ranks)]  # fmt: skip
            self.grads: dict[str, Tensor] = {}
            losses = []
            for step in range(STEPS):
                torch.manual_seed(1000 * step + rank)
                loss = engine(*tiny.batch(rank, step, 0))
                engine.backward(loss)
                if stage == 0 and step == 0:
                    self.grads = {name: grad.clone() for name, grad in stock_grads(engine.module).items()}
                engine.step()
                losses.append(float(loss.detach()))
            self.losses = torch.tensor(losses)
            self.weights = {name: value.clone() for name, value in engine.module.state_dict().items()}
            engine.destroy()


def assert_same(ours: Run, stock: Run) -> None:
    assert ours.ranks == stock.ranks
    assert_near("losses", ours.losses, stock.losses)
    assert_all_near(ours.grads, stock.grads)
    assert_all_near(ours.weights, stock.weights)


def _data_first(rank: int, world_size: int) -> None:
    for stage in (0, 1, 2):
        setting = {"config": {"use_data_before_expert_parallelism": True}, "ep_rank": rank // 2}
        stock, ours = (Run(ours, rank, stage, **setting) for ours in (False, True))
        assert ours.ranks == [[rank % 2, rank % 2 + 2], [rank // 2 * 2, rank // 2 * 2 + 1]]
        assert_same(ours, stock)


@pytest.mark.slow
def test_data_before_expert_parallelism() -> None:
    run_ranks(WORLD, _data_first)


def _ulysses(rank: int, world_size: int) -> None:
    mpu = SequenceMpu(2)
    for stage in (0, 2):
        for layout in ({"mesh_param": (2, 2)}, {"mpu": mpu}):
            stock, ours = (Run(ours, rank, stage, **layout) for ours in (False, True))
            assert_same(ours, stock)
        # To the layer it is data parallelism.
        plain = Run(True, rank, stage)
        assert_near("first loss", ours.losses[:1], plain.losses[:1])
        # The engine divides by data-parallel ranks, half as many; but through an mpu, at stage 0, DeepSpeed divides
        # experts' gradients by all ranks.
        for name, grad in plain.grads.items():
            assert_near(name, ours.grads[name], grad if EXPERT.fullmatch(name) else 2 * grad)


def test_ulysses() -> None:
    run_ranks(WORLD, _ulysses)


def _deepspeeds_own_mpu(rank: int, world_size: int) -> tuple[float, float]:
    """How far the first loss of stock and of ours is from the one without sequence parallelism."""
    ulysses.initialize_sequence_parallel(2)
    plain, ours = Run(True, rank), Run(True, rank, mpu=ulysses)
    assert_same(ours, Run(False, rank, mpu=SequenceMpu(2)))
    with stock_gathers_on_gloo():
        stock = Run(False, rank, mpu=ulysses)
    return float((stock.losses - plain.losses)[0].abs()), float((ours.losses - plain.losses)[0].abs())


def test_where_stock_takes_the_sequence_for_replicated_tokens() -> None:
    """deepspeed.runtime.sequence_parallel.parallel_state_sp: stock then mixes the tokens of two ranks."""
    for stock, ours in run_ranks(WORLD, _deepspeeds_own_mpu):
        assert ours < 1e-6 < 1e-3 < stock
