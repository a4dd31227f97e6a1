# SPDX-License-Identifier: GPL-3.0-or-later
"""Checkpoints on four gloo ranks: weights travel between stock DeepSpeed and us and between EP sizes, training resumes
exactly, and an optimizer state of another layout is refused on every rank."""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed import comm as dist
from deepspeed.moe.layer import MoE as StockMoE
from torch import Tensor

import flashfusemoe_ds
from flashfusemoe_ds import MoE
from tests.distributed import run_ranks
from tests.ds import tiny
from tests.ds.compare import assert_all_near

STAGES = (0, 1, 2)
EVAL_TOLERANCE = 1e-6
OTHER_WEIGHTS = 4321  # the seed of engines that are about to load: every weight differs from the saved one


@dataclass(frozen=True)
class Saved:
    """A tensor-free summary would hide which weight went wrong, so every rank hands its weights back."""

    eval_loss: float
    weights: dict[str, Tensor]


def _engine(
    ours: bool, ep_size: int, stage: int, rank: int, seed: int = OTHER_WEIGHTS, optimizer: str = "adamw"
) -> Any:
    model = tiny.build(MoE if ours else StockMoE, ep_size, rank, tiny.global_weights(seed))
    initialize = flashfusemoe_ds.initialize if ours else deepspeed.initialize
    return tiny.start(initialize, model, tiny.config(stage, optimizer))


def _state(engine: Any, ep_size: int, rank: int) -> Saved:
    return Saved(tiny.eval_loss(engine, rank), tiny.to_global(engine.module.state_dict(), ep_size, rank))


def _load_weights(engine: Any, folder: str) -> None:
    path, _ = engine.load_checkpoint(folder, load_optimizer_states=False, load_lr_scheduler_states=False)
    assert path is not None, f"nothing was loaded from {folder}"


# --- weights between stock and ours -----------------------------------------------------------------------------


def _interchange(rank: int, world_size: int, folder: str) -> dict[int, list[Saved]]:
    """Per stage: stock, trained and saved -> ours, loaded and saved -> stock, loaded."""
    results = {}
    for stage in STAGES:
        first, second = f"{folder}/stock{stage}", f"{folder}/ours{stage}"
        chain = []
        engine = _engine(False, 2, stage, rank)
        for step in range(2):
            tiny.train_step(engine, rank, step)
        chain.append(_state(engine, 2, rank))
        engine.save_checkpoint(first)
        engine.destroy()

        engine = _engine(True, 2, stage, rank, seed=1)
        _load_weights(engine, first)
        chain.append(_state(engine, 2, rank))
        engine.save_checkpoint(second)
        # The fp32 master weights of ZeRO must have followed: a step from stale ones would undo the load.
        tiny.train_step(engine, rank, 2)
        chain.append(_state(engine, 2, rank))
        engine.destroy()

        engine = _engine(False, 2, stage, rank, seed=2)
        _load_weights(engine, second)
        chain.append(_state(engine, 2, rank))
        tiny.train_step(engine, rank, 2)
        chain.append(_state(engine, 2, rank))
        engine.destroy()
        results[stage] = chain
    return results


@pytest.mark.slow
def test_stock_to_ours_to_stock(tmp_path: Path) -> None:
    per_rank = run_ranks(tiny.WORLD_SIZE, _interchange, str(tmp_path), timeout=400)
    for stage in STAGES:
        saved, loaded, ours_after, stock_again, stock_after = _by_position(per_rank, stage)
        assert saved.eval_loss == pytest.approx(loaded.eval_loss, rel=EVAL_TOLERANCE)
        assert saved.eval_loss == pytest.approx(stock_again.eval_loss, rel=EVAL_TOLERANCE)
        assert_all_near(loaded.weights, saved.weights, rtol=0.0)
        assert_all_near(stock_again.weights, saved.weights, rtol=0.0)
        # A fresh optimizer on the same weights and the same batch: one step must agree as well.
        assert_all_near(ours_after.weights, stock_after.weights)
        assert not torch.equal(ours_after.weights["head.weight"], saved.weights["head.weight"])
    names = {path.name for path in (tmp_path / "ours0" / "global_step2").iterdir()}
    expert_files = {
        f"layer_{layer}_expert_{i}_mp_rank_00_model_states.pt"
        for layer, count in ((0, 8), (1, 4))
        for i in range(count)
    }
    assert expert_files <= names, f"missing: {sorted(expert_files - names)}"


# --- between EP sizes -------------------------------------------------------------------------------------------


def _shrink_ep(rank: int, world_size: int, folder: str) -> dict[int, list[Saved]]:
    """Per stage: EP 4 -> 2 -> 1 -> 4, each loaded from what the one before saved."""
    results = {}
    for stage in STAGES:
        chain = []
        for position, ep_size in enumerate((4, 2, 1, 4)):
            engine = _engine(True, ep_size, stage, rank, seed=100 + position)
            if position == 0:
                tiny.train_step(engine, rank, 0)
            else:
                _load_weights(engine, f"{folder}/{stage}-{position - 1}")
            chain.append(_state(engine, ep_size, rank))
            engine.save_checkpoint(f"{folder}/{stage}-{position}")
            engine.destroy()
        results[stage] = chain
    return results


@pytest.mark.slow
def test_weights_load_at_another_ep_size(tmp_path: Path) -> None:
    per_rank = run_ranks(tiny.WORLD_SIZE, _shrink_ep, str(tmp_path), timeout=400)
    for stage in STAGES:
        first, *others = _by_position(per_rank, stage)
        assert len(others) == 3
        for other in others:
            assert other.eval_loss == pytest.approx(first.eval_loss, rel=EVAL_TOLERANCE)
            assert_all_near(other.weights, first.weights, rtol=0.0)


# --- resume -----------------------------------------------------------------------------------------------------


def _resume(rank: int, world_size: int, folder: str) -> dict[int, dict[str, list[float]]]:
    """Per stage: losses of steps 5..9, uninterrupted, and by a new engine that loaded the state after step 4."""
    results = {}
    for stage in STAGES:
        engine = _engine(True, 2, stage, rank)
        for step in range(5):
            tiny.train_step(engine, rank, step)
        engine.save_checkpoint(f"{folder}/{stage}")
        straight = [tiny.train_step(engine, rank, step) for step in range(5, 10)]
        straight_end = _state(engine, 2, rank)
        engine.destroy()

        engine = _engine(True, 2, stage, rank, seed=3)
        path, _ = engine.load_checkpoint(f"{folder}/{stage}")
        assert path is not None
        assert engine.global_steps == 5
        resumed = [tiny.train_step(engine, rank, step) for step in range(5, 10)]
        resumed_end = _state(engine, 2, rank)
        engine.destroy()

        # Weights alone: shows that the optimizer state matters, so that the exact comparison means something.
        engine = _engine(True, 2, stage, rank, seed=3)
        _load_weights(engine, f"{folder}/{stage}")
        stateless = [tiny.train_step(engine, rank, step) for step in range(5, 10)]
        engine.destroy()
        for name, weight in straight_end.weights.items():
            assert torch.equal(weight, resumed_end.weights[name]), f"stage {stage}: {name} differs after resuming"
        results[stage] = {"straight": straight, "resumed": resumed, "stateless": stateless}
    return results


@pytest.mark.slow
def test_resuming_is_exact(tmp_path: Path) -> None:
    for rank, stages in enumerate(run_ranks(tiny.WORLD_SIZE, _resume, str(tmp_path), timeout=400)):
        for stage, curves in stages.items():
            assert curves["resumed"] == curves["straight"], f"rank {rank}, stage {stage}"
            assert curves["stateless"] != curves["straight"], f"rank {rank}, stage {stage}"


# --- refusals ---------------------------------------------------------------------------------------------------


def _refusals(rank: int, world_size: int, folder: str) -> dict[str, tuple[str, str, str]]:
    """For every refused load: exception type, its text, its traceback. No rank may hang: this function returns."""
    outcomes = {}
    for stage in STAGES:
        for writer, ep_size in (("stock", 2), ("ours", 4), ("ours", 2)):
            engine = _engine(writer == "ours", ep_size, stage, rank)
            tiny.train_step(engine, rank, 0)
            engine.save_checkpoint(f"{folder}/{writer}{ep_size}-{stage}")
            engine.destroy()
        # The reader runs at EP 2, so "ours2" must load, or the refusals would prove nothing.
        for source in ("stock2", "ours4", "ours2"):
            engine = _engine(True, 2, stage, rank, seed=5)
            outcome = ("nothing raised", "", "")
            try:
                path, _ = engine.load_checkpoint(f"{folder}/{source}-{stage}")
                assert path is not None
            except Exception as error:  # whatever it is, the test shows it
                outcome = (type(error).__name__, str(error), traceback.format_exc())
            outcomes[f"{source} at stage {stage}"] = outcome
            engine.destroy()
    return outcomes


@pytest.mark.slow
def test_optimizer_states_of_another_layout_are_refused_on_every_rank(tmp_path: Path) -> None:
    per_rank = run_ranks(tiny.WORLD_SIZE, _refusals, str(tmp_path), timeout=400)
    for rank, outcomes in enumerate(per_rank):
        assert len(outcomes) == 3 * len(STAGES)
        for what, (kind, text, trace) in outcomes.items():
            if what.startswith("ours2"):
                assert kind == "nothing raised", f"rank {rank}, {what}: {trace}"
                continue
            assert kind == "ValueError", f"rank {rank}, {what}: {kind}\n{trace}"
            assert "optimizer" in text, f"rank {rank}, {what}: {text}"
            assert "load_optimizer_states=False" in text, f"rank {rank}, {what}: {text}"


def _by_position(per_rank: list[dict[int, list[Saved]]], stage: int) -> list[Saved]:
    """[ranks][positions] -> [positions], with whole-model weights and the mean evaluation loss."""
    return [
        Saved(sum(part.eval_loss for part in parts) / len(parts), tiny.merge(part.weights for part in parts))
        for parts in zip(*(result[stage] for result in per_rank), strict=True)
    ]


def _broken_layout_file(rank: int, world_size: int, folder: str) -> list[str]:
    """What load_checkpoint says of a layout file cut short, by tag and by number."""
    engine = _engine(True, 2, 1, rank)
    engine.save_checkpoint(folder, tag=5)
    if rank == 0:  # the others see no such file, as on disks of their own
        path = Path(folder) / "5" / "flashfusemoe_layout.json"
        path.write_text(path.read_text()[:20])
    dist.barrier()
    folder = folder if rank == 0 else f"{folder}/nothing"
    said = []
    for tag in (None, 5, "5"):
        try:
            engine.load_checkpoint(folder, tag)
            said.append("nothing")
        except ValueError as error:
            said.append(str(error))
    return said


def test_a_broken_layout_file_is_said_on_every_rank(tmp_path: Path) -> None:
    for said in run_ranks(tiny.WORLD_SIZE, _broken_layout_file, str(tmp_path), timeout=120):
        assert len(said) == 3
        assert all("flashfusemoe_layout.json cannot be read (JSONDecodeError" in text for text in said), said
