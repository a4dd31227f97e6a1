# SPDX-License-Identifier: GPL-3.0-or-later
"""Gradient norms and clipping on four gloo ranks: the same at every ep_size, and the switch back to DeepSpeed's."""

from __future__ import annotations

from typing import Any

import deepspeed
import pytest
import torch
from deepspeed.moe.layer import MoE as StockMoE
from torch import Tensor, nn

import flashfusemoe_ds
from flashfusemoe_ds import MoE
from flashfusemoe_ds.ds.grad_norm import global_grad_norm
from tests.distributed import run_ranks
from tests.ds import tiny
from tests.ds.compare import assert_all_near, assert_near

STEPS, CLIP = 4, 0.5
EP_SIZES = (1, 2, 4)
BF16 = {"bf16": {"enabled": True}}

# name: (ours, ZeRO stage, what else the config holds)
WAYS: dict[str, tuple[bool, int, dict[str, Any]]] = {
    "exact": (True, 0, {}),
    "exact, stage 1": (True, 1, {}),
    "exact, stage 2": (True, 2, {}),
    "switched off": (True, 0, {"flashfusemoe": {"exact_grad_norm": False}}),
    "stock": (False, 0, {}),
    "bf16": (True, 0, BF16),
    "bf16, switched off": (True, 0, {**BF16, "flashfusemoe": {"exact_grad_norm": False}}),
    "bf16, stock": (False, 0, BF16),
}


def _train(rank: int, world_size: int) -> dict[tuple[str, int], tuple[list[float], dict[str, Tensor], Any]]:
    found = {}
    for way, (ours, stage, extra) in WAYS.items():
        for ep_size in EP_SIZES:
            model = tiny.build(MoE if ours else StockMoE, ep_size, rank, tiny.global_weights())
            initialize = flashfusemoe_ds.initialize if ours else deepspeed.initialize
            engine = tiny.start(initialize, model, tiny.config(stage, clip=CLIP, **extra))
            if "bf16" in way:
                _run_in_bf16(engine.module)
            norms = [_step(engine, rank, step) for step in range(STEPS)]
            found[way, ep_size] = norms, tiny.to_global(engine.module.state_dict(), ep_size, rank)
            engine.destroy()
    return found


def _run_in_bf16(model: nn.Module) -> None:
    model.register_forward_pre_hook(lambda _, args: tuple(x.bfloat16() for x in args))


def _step(engine: Any, rank: int, step: int) -> tuple[float, float | None]:
    """The norm by hand from the reduced gradients (nan under ZeRO, which keeps none), and the engine's."""
    _, true = tiny.train_step(engine, rank, step)
    reported = engine.get_global_grad_norm()
    return true, None if reported is None else float(reported)


@pytest.fixture(scope="module")
def trained() -> dict[tuple[str, int], tuple[Tensor, Tensor | None, dict[str, Tensor]]]:
    """By way and ep_size: the norms by hand, those that the engine reports, the final weights."""
    per_rank = run_ranks(tiny.WORLD_SIZE, _train, timeout=300)
    result = {}
    for key in per_rank[0]:
        norms = [ranks[key][0] for ranks in per_rank]
        assert all(n == norms[0] for n in norms), f"{key}: the ranks disagree about the norm: {norms}"
        true, reported = zip(*norms[0], strict=True)
        result[key] = (
            torch.tensor(true, dtype=torch.float64),
            None if None in reported else torch.tensor(reported, dtype=torch.float64),
            tiny.merge(ranks[key][1] for ranks in per_rank),
        )
    return result


@pytest.mark.slow
@pytest.mark.parametrize("ep_size", EP_SIZES)
@pytest.mark.parametrize("way", ["exact", "exact, stage 1", "exact, stage 2"])
def test_float32_norm_and_clipped_weights_do_not_depend_on_ep_size_or_stage(trained, way: str, ep_size: int) -> None:
    true, _, _ = trained["stock", 1]
    assert (true > CLIP).all(), "a step was not clipped: its weights would not show a wrong norm"
    _, reported, weights = trained[way, ep_size]
    # At EP=1 every rank holds all experts, so stock DeepSpeed's average of the ranks' norms is the norm.
    assert_near("norm", reported, true)
    assert_all_near(weights, trained["stock", 1][2])


@pytest.mark.slow
@pytest.mark.parametrize("ep_size", EP_SIZES)
def test_the_switch_gives_stock_clipping(trained, ep_size: int) -> None:
    true, reported, weights = trained["switched off", ep_size]
    assert reported is None, "stock DeepSpeed reports no norm for float32 at stage 0"
    assert_near("norm", true, trained["stock", ep_size][0])
    assert_all_near(weights, trained["stock", ep_size][2])


@pytest.mark.slow
def test_stock_clipping_depends_on_ep_size(trained) -> None:
    """The fault: once DeepSpeed has mended it, ours can go."""
    with pytest.raises(AssertionError):
        assert_all_near(trained["stock", 4][2], trained["stock", 1][2], rtol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("ep_size", EP_SIZES)
def test_bf16_counts_the_experts(trained, ep_size: int) -> None:
    true, reported, _ = trained["bf16", ep_size]
    assert_near("norm", reported, true, rtol=2e-3)  # the one by hand adds up squares in bf16
    assert_near("norm", reported[:1], trained["bf16", 1][1][:1], rtol=1e-2)  # bf16's own rounding of the gradients
    _, switched_off, _ = trained["bf16, switched off", ep_size]
    assert (switched_off < 0.97 * true).all(), "stock leaves the experts out; once it has mended that, ours can go"
    assert_near("stock's norm", switched_off[:1], trained["bf16, stock", ep_size][1][:1], rtol=1e-2)


def _parts(rank: int, world_size: int) -> dict[str, float]:
    """Norms of hand-made gradients: 3 dense, 4 * (rank + 1) in this rank's expert, of a group of all ranks."""
    from deepspeed.utils import groups

    groups._create_expert_and_data_parallel(world_size)
    dense, expert, unused, sparse = (nn.Parameter(torch.zeros(2, 2)) for _ in range(4))
    expert.allreduce, expert.group_name = False, f"ep_size_{world_size}"
    unused.allreduce, unused.group_name = False, f"ep_size_{world_size}"
    dense_grad, expert_grad = torch.zeros(2, 2), torch.zeros(2, 2)
    dense_grad[0, 1], expert_grad[1, 1] = 3.0, 4.0 * (rank + 1)
    # Twice at one place: 1 + 1 counts as 2.
    sparse_grad = torch.sparse_coo_tensor(torch.tensor([[0, 0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]]), (2, 2))
    return {
        "dense": float(global_grad_norm([(dense, dense_grad)])),
        "expert": float(global_grad_norm([(expert, expert_grad), (unused, None)])),
        "both": float(global_grad_norm([(dense, dense_grad), (expert, expert_grad)])),
        "on one rank": float(global_grad_norm([(expert, expert_grad if rank == 0 else None)])),
        "sparse": float(global_grad_norm([(sparse, sparse_grad)])),
        "none": float(global_grad_norm([(unused, None)])),
    }


def test_parts_of_the_norm() -> None:
    for parts in run_ranks(2, _parts):
        assert parts == pytest.approx(
            {"dense": 3, "expert": 80**0.5, "both": 89**0.5, "on one rank": 4, "sparse": 2, "none": 0}
        )
