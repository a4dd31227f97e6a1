# SPDX-License-Identifier: GPL-3.0-or-later
"""Hugging Face models under AutoEP, on gloo ranks: what plain Transformers computes, and what stock AutoEP trains."""

from __future__ import annotations

import argparse
import itertools
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed import comm as dist
from torch import Tensor

import flashfusemoe_ds
from flashfusemoe_ds.ds.autoep import TRANSFORMERS_BEFORE, TRANSFORMERS_FROM
from tests.distributed import run_ranks
from tests.ds import autoep_engines as hf
from tests.hf.models import build

transformers = pytest.importorskip("transformers", reason="needs transformers: pip install flashfusemoe_ds[hf]")
VERSION = tuple(int(part) for part in transformers.__version__.split(".")[:2])
if not TRANSFORMERS_FROM <= VERSION < TRANSFORMERS_BEFORE:
    pytest.skip(f"AutoEP does not work with transformers {transformers.__version__}", allow_module_level=True)

STEPS = 10
STAGES = (0, 1, 2, 3)
TRAINED = ("mixtral", "qwen3_moe", "deepseek_v3")
# Before 5.13 Transformers' own group-limited DeepSeek-V2 fails in its forward.
PRESETS = ("mixtral", "qwen2_moe", "qwen3_moe", "qwen3_5_moe", "deepseek_v2", "deepseek_v3")
PRESETS += ("deepseek_v2_groups",) if VERSION >= (5, 13) else ()
LAYERS = {"stock": "AutoEPMoELayer", "ours": "FusedAutoEPMoELayer"}

Run = tuple[str, int, int]  # model, ep_size, ZeRO stage
RUNS: dict[int, list[Run]] = {
    2: [*itertools.product(TRAINED, (2,), STAGES), ("mixtral", 1, 3), ("deepseek_v3", 1, 1)],
    4: [
        *[("mixtral", 2, 1), ("mixtral", 2, 3), ("mixtral", 4, 0), ("mixtral", 4, 2)],
        *[("qwen3_moe", 2, 3), ("qwen3_moe", 4, 1), ("deepseek_v3", 2, 2), ("deepseek_v3", 4, 3)],
    ],
}


def _initialize(whose: str) -> Callable[..., Any]:
    return flashfusemoe_ds.initialize if whose == "ours" else deepspeed.initialize


def _moe_classes(engine: Any) -> set[str]:
    return {type(m).__name__ for m in engine.module.modules() if type(m).__name__ in LAYERS.values()}


def _engine(whose: str, model: torch.nn.Module, ds_config: dict[str, Any]) -> Any:
    engine = hf.start(_initialize(whose), model, ds_config)
    assert _moe_classes(engine) == {LAYERS[whose]}
    return engine


def assert_all_close(
    actual: dict[str, Tensor], expected: dict[str, Tensor], where: str = "", rtol: float = 0.0, *, atol: float
) -> None:
    assert actual.keys() == expected.keys(), where
    for name, tensor in actual.items():
        torch.testing.assert_close(tensor, expected[name], rtol=rtol, atol=atol, msg=f"{where}{name}")


# ---- training, beside stock AutoEP


def _train(rank: int, whose: str, run: Run) -> tuple[list[float], dict[str, Tensor]]:
    name, ep_size, stage = run
    engine = _engine(whose, build(name), hf.config(ep_size, stage))
    losses = [hf.train_step(engine, hf.batch(rank, step)) for step in range(STEPS)]
    weights = hf.weights(engine.module, rank % ep_size)
    engine.destroy()
    return losses, weights


def _train_all(rank: int, world_size: int) -> list[tuple[Any, Any]]:
    return [tuple(_train(rank, whose, run) for whose in ("stock", "ours")) for run in RUNS[world_size]]


@pytest.fixture(scope="module", params=sorted(RUNS))
def trained(request: pytest.FixtureRequest) -> dict[Run, list[tuple[Any, Any]]]:
    """Of each run what each rank got: (stock, ours), each losses and weights."""
    per_rank = run_ranks(request.param, _train_all, timeout=540)
    return dict(zip(RUNS[request.param], zip(*per_rank, strict=True), strict=True))


@pytest.mark.slow
def test_ten_steps_equal_stock(trained: dict[Run, list[tuple[Any, Any]]]) -> None:
    start = {name: hf.plain_weights(build(name)) for name in TRAINED}
    for run, ranks in trained.items():
        for (stock_losses, stock_weights), (losses, weights) in ranks:
            assert losses == pytest.approx(stock_losses, abs=5e-6), run
            assert_all_close(weights, stock_weights, f"{run}: ", atol=3e-6)
            still = [key for key, value in weights.items() if (value - start[run[0]][key]).abs().max() < 1e-3]
            assert not still, f"{run}: training left {still} where they were"


# ---- each preset, beside plain Transformers


def _beside_transformers(rank: int, name: str) -> dict[str, tuple[Tensor, Tensor]]:
    """Pairs of ours and plain Transformers' (logits, losses, router logits, weights after one step of SGD), all ranks
    with one batch: then the average over ranks is the gradient of one."""
    inputs = hf.batch(0, 0)
    plain = build(name)
    out = plain(**inputs)
    out.loss.backward()
    with torch.no_grad():
        for parameter in plain.parameters():
            if parameter.grad is not None:
                parameter -= parameter.grad  # lr 1

    engine = _engine("ours", build(name), hf.config(ep_size=2, stage=0, optimizer="sgd"))
    ours = engine(**inputs)
    pairs = {"logits": (ours.logits.detach(), out.logits.detach()), "loss": (ours.loss.detach(), out.loss.detach())}
    expected = out.get("router_logits") or ()
    assert len(ours.get("router_logits") or ()) == len(expected)
    for layer, (mine, theirs) in enumerate(zip(ours.get("router_logits") or (), expected, strict=True)):
        pairs[f"router_logits of layer {layer}"] = (mine.detach(), theirs.detach())
    engine.backward(ours.loss)
    engine.step()
    weights, plain_weights = hf.weights(engine.module, rank), hf.plain_weights(plain)
    assert sum(".w1." in key for key in weights) * 2 == sum(".w1." in key for key in plain_weights) > 0
    pairs |= {f"{key} after a step": (value, plain_weights[key]) for key, value in weights.items()}
    engine.destroy()
    return pairs


# ---- dtypes, recomputation, and the ways in


def _bf16_logits(rank: int, name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Logits in bf16 of ours and of plain Transformers, and the latter in float32."""
    inputs = hf.batch(rank, 1)
    with torch.no_grad():
        exact = build(name).eval()(**inputs).logits
        plain = build(name).bfloat16().eval()(**inputs).logits
        engine = _engine("ours", build(name), hf.config(2, 1, bf16={"enabled": True}))
        engine.eval()
        ours = engine(**inputs).logits
    engine.destroy()
    return ours.float(), plain.float(), exact


def _three_steps(rank: int, stage: int, checkpoint: bool, section: dict[str, Any]) -> tuple[list[float], dict]:
    model = build("mixtral")
    if checkpoint:
        model.gradient_checkpointing_enable()
    engine = _engine("ours", model, hf.config(2, stage, flashfusemoe=section))
    engine.train()
    losses = [hf.train_step(engine, hf.batch(rank, step)) for step in range(3)]
    weights = hf.weights(engine.module, rank)
    engine.destroy()
    return losses, weights


def _layers_left_alone(rank: int) -> tuple[set[str], set[str], set[str], list[str]]:
    """Layer classes with replace_moe off, after attach, with an activation we lack, and what was said about it."""
    engine = hf.start(_initialize("ours"), build("mixtral"), hf.config(2, 1, flashfusemoe={"replace_moe": False}))
    off = _moe_classes(engine)
    engine.destroy()
    engine = hf.start(_initialize("stock"), build("mixtral"), hf.config(2, 1))
    attached = _moe_classes(flashfusemoe_ds.attach(engine))
    engine.destroy()

    said: list[str] = []
    logger = logging.getLogger("DeepSpeed")
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    ds_config = hf.config(2, 1)
    ds_config["expert_parallel"]["expert_activation"] = "swiglu_oai"
    engine = hf.start(_initialize("ours"), build("mixtral"), ds_config)
    logger.setLevel(logging.ERROR)
    logger.removeHandler(handler)
    other = _moe_classes(engine)
    hf.train_step(engine, hf.batch(rank, 0))
    engine.destroy()
    return off, attached, other, [line for line in said if "flashfusemoe:" in line]


def _on_two_ranks(rank: int, world_size: int) -> dict[str, Any]:
    return {
        "presets": {name: _beside_transformers(rank, name) for name in PRESETS},
        "bf16": {name: _bf16_logits(rank, name) for name in ("mixtral", "deepseek_v3")},
        "plain": _three_steps(rank, 1, False, {}),
        "checkpointed": _three_steps(rank, 1, True, {}),
        "recomputed": _three_steps(rank, 3, True, {"recompute_activations": True}),
        "sent again": _three_steps(rank, 1, False, {"recompute_dispatch": True}),
        "alone": _layers_left_alone(rank),
    }


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[str, Any]]:
    return run_ranks(2, _on_two_ranks, timeout=540)


@pytest.mark.slow
@pytest.mark.parametrize("name", PRESETS)
def test_equals_plain_transformers(two_ranks: list[dict[str, Any]], name: str) -> None:
    for result in two_ranks:
        mine, theirs = ({what: pair[i] for what, pair in result["presets"][name].items()} for i in (0, 1))
        assert_all_close(mine, theirs, rtol=1e-5, atol=2e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", ("mixtral", "deepseek_v3"))
def test_bf16_rounds_as_transformers_does(two_ranks: list[dict[str, Any]], name: str) -> None:
    for result in two_ranks:
        ours, plain, exact = result["bf16"][name]
        assert (ours - exact).norm() < 1.2 * (plain - exact).norm()
        assert (ours - exact).norm() < 0.1 * exact.norm()  # one of DeepSeek's tokens goes to another expert in both


@pytest.mark.slow
@pytest.mark.parametrize("how", ("checkpointed", "recomputed", "sent again"))
def test_recomputation_changes_nothing(two_ranks: list[dict[str, Any]], how: str) -> None:
    for result in two_ranks:
        (losses, weights), (plain_losses, plain_weights) = result[how], result["plain"]
        assert losses == pytest.approx(plain_losses, abs=5e-6)
        assert_all_close(weights, plain_weights, atol=3e-6)


@pytest.mark.slow
def test_layers_that_stay_stock(two_ranks: list[dict[str, Any]]) -> None:
    for rank, result in enumerate(two_ranks):
        off, attached, other, said = result["alone"]
        assert off == {LAYERS["stock"]}, "replace_moe: false"
        assert attached == {LAYERS["ours"]}, "deepspeed.initialize and attach"
        assert other == {LAYERS["stock"]}, "an activation that the fused experts do not have"
        announced = [line for line in said if "2 AutoEP layers keep stock's own computation" in line]
        assert len(announced) == (rank == 0) and all("'swiglu_oai'" in line for line in announced)


# ---- checkpoints


def _to_universal(folder: str, tag: str) -> None:
    from deepspeed.checkpoint import ds_to_universal

    if dist.get_rank() == 0:
        ds_to_universal.main(
            argparse.Namespace(
                input_folder=f"{folder}/{tag}",
                output_folder=f"{folder}/{tag}_universal",
                num_extract_workers=1,
                num_merge_workers=1,
                keep_temp_folder=False,
                strict=True,
                inject_missing_state=True,
            )
        )
    dist.barrier()


def _continue(
    rank: int, world_size: int, folder: str, ep_size: int, previous: int | None, whose: tuple[str, ...]
) -> dict[tuple[str, int], tuple[float, float]]:
    """For each owner and ZeRO stage: train three steps, or load the previous ep_size's universal checkpoint; save one.

    Returns the evaluation losses there and after one more step.
    """
    losses = {}
    for owner, stage in itertools.product(whose, (1, 3)):
        place = f"{folder}/stage{stage}"
        if previous is None:
            engine = _engine(owner, build("mixtral"), hf.config(ep_size, stage))
            for step in range(3):
                hf.train_step(engine, hf.batch(rank, step))
        else:
            # Weights of another seed, which the checkpoint must overwrite.
            universal = hf.config(ep_size, stage, checkpoint={"load_universal": True})
            engine = _engine(owner, build("mixtral", seed=5), universal)
            engine.load_checkpoint(place, tag=f"ep{previous}_universal")
        here = hf.eval_loss(engine, rank)
        if owner == "ours":
            engine.save_checkpoint(place, tag=f"ep{ep_size}")
            dist.barrier()
            _to_universal(place, f"ep{ep_size}")
        hf.train_step(engine, hf.batch(rank, 50))
        losses[owner, stage] = here, hf.eval_loss(engine, rank)
        engine.destroy()
    return losses


@pytest.mark.slow
def test_universal_checkpoint_at_other_ep_sizes(tmp_path: Path) -> None:
    """EP 2 -> 4 -> 1, each in processes of its own: DeepSpeed looks the ranks up in the largest group it ever made."""
    at2 = run_ranks(4, _continue, str(tmp_path), 2, None, ("ours",), timeout=300)
    at4 = run_ranks(4, _continue, str(tmp_path), 4, 2, ("ours", "stock"), timeout=300)
    at1 = run_ranks(4, _continue, str(tmp_path), 1, 4, ("ours",), timeout=300)
    for first, second, third in zip(at2, at4, at1, strict=True):
        for (owner, stage), (here, after) in (*second.items(), *third.items()):
            expected_here, expected_after = first["ours", stage]
            assert here == pytest.approx(expected_here, abs=2e-6), (owner, stage)
            # After stock's load at stage 3, the experts' next step is another one: ds/autoep.py repairs it.
            same = after == pytest.approx(expected_after, abs=2e-6)
            assert same == ((owner, stage) != ("stock", 3)), (owner, stage)


# ---- refusals: in this process, which has no process group


def _refusal(ds_config: dict[str, Any]) -> str:
    with pytest.raises(ValueError) as error:
        flashfusemoe_ds.initialize(model=build("mixtral"), config=ds_config)
    assert not dist.is_initialized()
    return str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("comm_backend", "deepep"),
        ("expert_tensor_parallel_size", 2),
        ("async_split_plan", True),
        ("combine_impl", "legacy_bmm"),
        ("row_weighting_impl", "fused"),
        ("score_apply", "pre"),
        ("use_grouped_mm", False),
        ("disable_triton_grouped_mm", True),
        ("validate_folding_routing", True),
    ],
)
def test_settings_of_stocks_own_layer_are_refused(key: str, value: Any) -> None:
    ds_config = hf.config(2, 1)
    ds_config["expert_parallel"][key] = value
    message = _refusal(ds_config)
    assert f"expert_parallel.{key} is {value!r}" in message and "Valid: " in message


def test_tensor_parallelism_is_refused() -> None:
    assert "tensor_parallel.autotp_size is 2" in _refusal(hf.config(2, 1, tensor_parallel={"autotp_size": 2}))


@pytest.mark.parametrize("version", ("5.5.4", "5.23.0", "6.0.0.dev0"))
def test_other_transformers_are_refused(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr("transformers.__version__", version)
    message = _refusal(hf.config(2, 1))
    assert f"transformers is {version}" in message and ">= 5.6, < 5.23" in message
