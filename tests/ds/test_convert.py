# SPDX-License-Identifier: GPL-3.0-or-later
"""Conversion of optimizer state between stock DeepSpeed's layout of experts and ours, on four gloo ranks.

Losses continue across a conversion as without one. What every expert's moments and fp32 weights are is read off the
engines, before and after, by DeepSpeed's own access functions, and must be equal to the bit; so must the files that an
engine writes after it loaded converted ones.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any
from unittest import mock

import deepspeed
import pytest
import torch
from deepspeed import comm as dist
from deepspeed.moe.layer import MoE as StockMoE
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.utils import groups, safe_get_full_fp32_param, safe_get_full_optimizer_state
from torch import Tensor, nn

import flashfusemoe_ds
from flashfusemoe_ds import MoE
from flashfusemoe_ds.convert_checkpoint import main
from flashfusemoe_ds.ds.checkpoint import LAYOUT_FILE, guard_checkpoints, write_layout
from flashfusemoe_ds.ds.convert import convert_checkpoint, files
from flashfusemoe_ds.ds.fused_experts import FusedExperts
from tests.distributed import run_ranks
from tests.ds import experts_zoo, tiny
from tests.ds.differences import differences

ROOT = Path(__file__).parent.parent.parent
STAGES = (0, 1, 2)
RTOL = 1e-5
SMALL_GROUP = 900  # elements: cuts Zoo's groups of experts into several


# --- the acceptance: losses continue, stock EP 4 -> ours EP 2 -> stock EP 4 -------------------------------------


def tiny_stock() -> nn.Module:
    return tiny.TinyModel(StockMoE, ep_size=1)


def _as_a_new_process() -> None:
    """DeepSpeed names stage 0's files by the largest EP group that the process ever had, and keeps groups by size."""
    for made in (
        groups._EXPERT_PARALLEL_GROUP,
        groups._EXPERT_PARALLEL_GROUP_RANKS,
        groups._EXPERT_DATA_PARALLEL_GROUP,
        groups._EXPERT_DATA_PARALLEL_GROUP_RANKS,
    ):
        made.clear()


def _engine(ours: bool, ep_size: int, stage: int, rank: int, seed: int) -> Any:
    """Without clipping: DeepSpeed's at fp32 stage 0 depends on the EP size."""
    _as_a_new_process()
    model = tiny.build(MoE if ours else StockMoE, ep_size, rank, tiny.global_weights(seed))
    return tiny.start(flashfusemoe_ds.initialize if ours else deepspeed.initialize, model, tiny.config(stage))


def _convert(rank: int, *arguments: str) -> None:
    """On rank 0, through the command line's own function."""
    assert rank or main(arguments) == 0, "the reason is in rank 0's output"
    dist.barrier()


def _losses(rank: int, world_size: int, folder: str) -> dict[int, dict[str, list[float]]]:
    curves = {}
    for stage in STAGES:
        a, b, c, d = (f"{folder}/{name}{stage}" for name in "abcd")
        engine = _engine(False, 4, stage, rank, seed=1234)
        for step in range(5):
            tiny.train_step(engine, rank, step)
        engine.save_checkpoint(a)
        stock = [tiny.train_step(engine, rank, step)[0] for step in range(5, 15)]
        engine.destroy()

        _convert(rank, a, b, "--to", "stacked", "--ep-size", "2", "--model", f"{__name__}:tiny_stock")
        engine = _engine(True, 2, stage, rank, seed=1)
        path, _ = engine.load_checkpoint(b)
        assert path is not None and engine.global_steps == 5
        ours = [tiny.train_step(engine, rank, step)[0] for step in range(5, 15)]
        engine.save_checkpoint(c)
        ours_on = [tiny.train_step(engine, rank, step)[0] for step in range(15, 25)]
        engine.destroy()

        _convert(rank, c, d, "--to", "per_expert", "--ep-size", "4")
        engine = _engine(False, 4, stage, rank, seed=2)
        path, _ = engine.load_checkpoint(d)
        assert path is not None and engine.global_steps == 15
        stock_on = [tiny.train_step(engine, rank, step)[0] for step in range(15, 25)]
        engine.destroy()

        # The weights alone: what a lost optimizer state would look like.
        engine = _engine(True, 2, stage, rank, seed=1)
        engine.load_checkpoint(b, load_optimizer_states=False)
        stateless = [tiny.train_step(engine, rank, step)[0] for step in range(5, 9)]
        engine.destroy()
        curves[stage] = {
            "stock": stock,
            "ours": ours,
            "ours_on": ours_on,
            "stock_on": stock_on,
            "stateless": stateless,
        }
    return curves


@pytest.fixture(scope="module")
def resumed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[int, dict[str, list[float]]]]]:
    """The folder with checkpoints a0..d2, and every rank's losses."""
    folder = tmp_path_factory.mktemp("resumed")
    return folder, run_ranks(tiny.WORLD_SIZE, _losses, str(folder), timeout=300)


@pytest.mark.slow
@pytest.mark.parametrize("stage", STAGES)
def test_losses_continue(resumed: Any, stage: int) -> None:
    for curves in (result[stage] for result in resumed[1]):
        assert curves["ours"] == pytest.approx(curves["stock"], rel=RTOL)
        assert curves["stock_on"] == pytest.approx(curves["ours_on"], rel=RTOL)
        assert curves["stateless"] != pytest.approx(curves["stock"][:4], rel=100 * RTOL)


# --- every kind of optimizer file, read off the engines ---------------------------------------------------------


class Zoo(nn.Module):
    """A layer of packed experts (8, with a residual MLP), one that is not fused (4), one plain (4); odd sizes."""

    def __init__(self, moe_class: type[nn.Module], ep_size: int) -> None:
        super().__init__()
        self.embed = nn.Linear(tiny.D_IN, 8)
        plain = experts_zoo.PlainMLP(8, 12, nn.ReLU(), False)
        experts = experts_zoo.InterleavedMLP(8, 8), experts_zoo.CustomExpert(8, 5), plain
        self.moe_a = moe_class(8, experts[0], num_experts=8, ep_size=ep_size, k=2, use_residual=True)
        self.moe_b = moe_class(8, experts[1], num_experts=4, ep_size=ep_size, k=2)
        self.moe_c = moe_class(8, experts[2], num_experts=4, ep_size=ep_size, k=2)
        self.head = nn.Linear(8, tiny.D_OUT)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        x = self.embed(x)
        for moe in (self.moe_a, self.moe_b, self.moe_c):
            x = x + moe(x)[0]
        return (self.head(x) - target).square().mean()


def zoo_stock() -> nn.Module:
    return Zoo(StockMoE, ep_size=1)


def _one_group(model: nn.Module) -> list[Any]:
    return list(model.parameters())


def _two_groups(model: nn.Module, is_decayed: Callable[[str], bool]) -> list[Any]:
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    return [
        {"name": "decay", "params": [p for n, p in named if is_decayed(n)], "weight_decay": 0.1},
        {"name": "rest", "params": [p for n, p in named if not is_decayed(n)], "weight_decay": 0.0},
    ]


def _decay_groups(model: nn.Module) -> list[Any]:
    """Matrices and vectors."""
    return _two_groups(model, lambda name: not name.endswith("bias") and "norm" not in name)


def _alike_groups(model: nn.Module) -> list[Any]:
    """By their shapes alone, a norm's weight and its bias might be in either."""
    return _two_groups(model, lambda name: not name.endswith("bias"))


def _small_groups(model: nn.Module) -> list[Any]:
    return split_params_into_different_moe_groups_for_optimizer(_decay_groups(model), max_group_size=SMALL_GROUP)


def _frozen_groups(model: nn.Module) -> list[Any]:
    for layer in (model.moe_a, model.moe_c):
        for name, p in layer.deepspeed_moe.experts.named_parameters():
            p.requires_grad_(not (name.endswith(("down.bias", "down_proj_bias")) or layer is model.moe_c))
    return _decay_groups(model)


@dataclass(frozen=True)
class Case:
    stage: int
    config: dict[str, Any] = field(default_factory=dict)
    groups: Callable[[nn.Module], list[Any]] = _one_group
    optimizer: str = "adamw"
    fused: bool = False  # FP16_Optimizer, which DeepSpeed takes around its FusedAdam
    steps: int = 2
    options: tuple[str, ...] = ()  # of the command line
    record: bool = False  # the stock run writes a layout file


BF16 = {"bf16": {"enabled": True}}
SCHEDULER = {"scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 4, "warmup_max_lr": 1e-2}}}


def _zero(**settings: Any) -> dict[str, Any]:
    return {"zero": settings}


CASES = {
    "fp32, weight decay by kind, a schedule": Case(0, SCHEDULER, _decay_groups),
    "fp32, SGD without state": Case(0, optimizer="plain_sgd"),
    "fp32, groups of the same shapes": Case(0, groups=_alike_groups, record=True),
    "fp32, groups cut": Case(0, groups=_small_groups, options=("--max-group-size", str(SMALL_GROUP))),
    "bf16 unfused": Case(0, BF16, _decay_groups),
    "bf16 fused": Case(0, BF16, _decay_groups, fused=True),
    "ZeRO-1, groups cut": Case(1, SCHEDULER, _small_groups, options=("--max-group-size", str(SMALL_GROUP))),
    "ZeRO-1, bf16, aligned": Case(1, {**BF16, **_zero(parameter_alignment=True)}, _decay_groups),
    "BF16_Optimizer": Case(1, {**BF16, "data_types": {"grad_accum_dtype": "fp32"}}, _decay_groups),
    "ZeRO-2, round robin, aligned": Case(2, _zero(round_robin_gradients=True, parameter_alignment=True)),
    "ZeRO-2, data before experts": Case(2, {"use_data_before_expert_parallelism": True}, optimizer="sgd"),
    "ZeRO-2, frozen": Case(2, groups=_frozen_groups),
    "ZeRO-2, before the first step": Case(2, steps=0),
}


def _start(case: Case, ours: bool, ep_size: int, rank: int, seed: int) -> Any:
    _as_a_new_process()
    generator = torch.Generator().manual_seed(seed)
    stock = Zoo(StockMoE, ep_size=1)
    state = {k: torch.randn(v.shape, generator=generator) * 0.3 for k, v in stock.state_dict().items()}
    model = Zoo(MoE if ours else StockMoE, ep_size)
    place = _expert_rank(case, ep_size, rank)
    model.load_state_dict(tiny.to_local(state, ep_size, place))
    config = {**tiny.config(case.stage, "adamw" if case.optimizer == "adamw" else "sgd"), **case.config}
    config["zero_optimization"] = {"stage": case.stage, **config.pop("zero", {})}
    config["gradient_accumulation_steps"] = 1
    if case.optimizer == "plain_sgd":
        config["optimizer"] = {"type": "SGD", "params": {"lr": 1e-2}}
    patch = mock.patch("deepspeed.runtime.engine.FusedAdam", torch.optim.AdamW) if case.fused else nullcontext()
    with patch:
        initialize = flashfusemoe_ds.initialize if ours else deepspeed.initialize
        engine, _, _, _ = initialize(model=model, model_parameters=case.groups(model), config=config)
    if case.fused:
        assert type(engine.optimizer).__name__ == "FP16_Optimizer"
    return engine


def _expert_rank(case: Case, ep_size: int, rank: int) -> int:
    """Which experts the rank holds: a number that is so modulo ep_size."""
    return rank // (tiny.WORLD_SIZE // ep_size) if "use_data_before_expert_parallelism" in case.config else rank


def _states(engine: Any, case: Case, ep_size: int, rank: int) -> dict[str, Tensor]:
    """All the optimizer holds of this rank's parameters, under stock names with global expert ids."""
    if case.stage > 0 and case.steps:
        # DeepSpeed does so once, after the first step of the first group, when the others have no state yet.
        engine.optimizer._hp_optimizer_states_linked = False
        engine.optimizer._lazy_init_hp_params_optimizer_state()
    found: dict[str, dict[str, Tensor]] = {}
    for name, param in engine.module.named_parameters():
        if param.requires_grad:
            for key, value in _of_parameter(engine.optimizer, param, case):
                found.setdefault(key, {})[name] = value
    result = {}
    for key, by_name in found.items():
        own = dict(by_name)
        for layer, moe in engine.module.named_modules():
            if isinstance(getattr(moe, "experts", None), FusedExperts):
                prefix = f"{layer}.experts."
                stacked = {n: by_name[prefix + n] for n in moe.experts.stacked() if prefix + n in by_name}
                full = {n: stacked.get(n, p.detach()) for n, p in moe.experts.stacked().items()}
                for name in stacked:
                    del own[prefix + name]
                wanted = {part for name in stacked for part in moe.experts.layout.sources()[name]}
                for i in range(moe.experts.num_local_experts):
                    for leaf, value in moe.experts.expert_tensors(i, full).items():
                        if leaf in wanted:
                            own[f"{prefix}deepspeed_experts.{i}.{leaf}"] = value
        renamed = tiny.to_global(own, ep_size, _expert_rank(case, ep_size, rank))
        result.update({f"{name} | {key}": value for name, value in renamed.items()})
    return result


def _of_parameter(optimizer: Any, param: nn.Parameter, case: Case) -> Iterator[tuple[str, Tensor]]:
    keys = ("exp_avg", "exp_avg_sq") if case.optimizer == "adamw" else ("momentum_buffer",)
    if case.stage > 0:
        yield "fp32", safe_get_full_fp32_param(param)
        for key in keys if case.steps else ():
            yield key, safe_get_full_optimizer_state(param, key)
        return
    place = param
    if case.fused:
        for low, flat in zip(optimizer.fp16_groups, optimizer.fp32_groups_flat, strict=True):
            index = next((i for i, p in enumerate(low) if p is param), None)
            if index is not None:
                start = sum(p.numel() for p in low[:index])
                part = slice(start, start + param.numel())
                yield "fp32", flat.detach()[part].view(param.shape)
                for key in keys:
                    yield key, optimizer.optimizer.state[flat][key][part].view(param.shape)
        return
    if hasattr(optimizer, "fp32_groups"):
        pairs = zip(
            chain.from_iterable(optimizer.fp16_groups), chain.from_iterable(optimizer.fp32_groups), strict=True
        )
        place = next(high for low, high in pairs if low is param)
        yield "fp32", place.detach()
        optimizer = optimizer.optimizer
    for key, value in optimizer.state.get(place, {}).items():
        if value is not None:
            yield key, value.expand(param.shape) if value.dim() == 0 else value


def _train(engine: Any, rank: int, steps: int) -> None:
    dtype = next(engine.module.parameters()).dtype
    for step in range(steps):
        torch.manual_seed(step)
        engine.backward(engine(*(t.to(dtype) for t in tiny.batch(rank, step, 0))))
        engine.step()


def _convert_cases(rank: int, world_size: int, folder: str) -> dict[str, dict[str, dict[str, Tensor]]]:
    """Per case: states of the stock engine at EP 4, of ours at EP 2 after conversion, of stock after another two."""
    results = {}
    for number, (name, case) in enumerate(CASES.items()):
        a, b, c, d, e = (f"{folder}/{number}{letter}" for letter in "abcde")
        engine = _start(case, False, 4, rank, seed=1)
        _train(engine, rank, case.steps)
        engine.save_checkpoint(a, tag="t", client_state={"note": "kept"})
        if case.record:
            write_layout(engine, a, "t")
        states = {"stock": _states(engine, case, 4, rank)}
        schedule = engine.lr_scheduler.state_dict() if engine.lr_scheduler else None
        engine.destroy()

        _convert(rank, a, b, "--to", "stacked", "--ep-size", "2", "--model", f"{__name__}:zoo_stock", *case.options)
        engine = _start(case, True, 2, rank, seed=2)
        path, client_state = engine.load_checkpoint(b)
        assert path is not None and engine.global_steps == case.steps and client_state["note"] == "kept"
        assert schedule == (engine.lr_scheduler.state_dict() if engine.lr_scheduler else None)
        states["ours"] = _states(engine, case, 2, rank)
        engine.save_checkpoint(c, tag="t", client_state={"note": "kept"})
        engine.destroy()

        _convert(rank, c, d, "--to", "stacked", "--ep-size", "1", *case.options)
        _convert(rank, d, e, "--to", "per_expert", "--ep-size", "4", *case.options)
        engine = _start(case, False, 4, rank, seed=4)
        assert engine.load_checkpoint(e)[0] is not None
        states["stock again"] = _states(engine, case, 4, rank)
        engine.destroy()
        results[name] = states
    return results


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, dict[str, Tensor]]]]:
    """The folder with checkpoints <number of the case><a to e>, and the states of the whole model."""
    folder = tmp_path_factory.mktemp("cases")
    per_rank = run_ranks(tiny.WORLD_SIZE, _convert_cases, str(folder), timeout=400)
    merged = {
        name: {key: tiny.merge(result[name][key] for result in per_rank) for key in per_rank[0][name]}
        for name in CASES
    }
    return folder, merged


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_engines_hold_the_same_state(cases: Any, name: str) -> None:
    stock, *others = cases[1][name].values()
    assert len(others) == 2
    if CASES[name].optimizer != "plain_sgd":
        assert sum(".experts." in key for key in stock) > 40
        assert all(bool(value.any()) for key, value in stock.items() if "moe_a" in key and CASES[name].steps)
    for other in others:
        assert set(other) == set(stock)
        for key, value in stock.items():
            assert torch.equal(other[key], value), key


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_files_are_those_that_an_engine_writes(cases: Any, name: str) -> None:
    """b is converted, c is what ours saved right after it loaded b; a is stock's, e came back from c."""
    number = list(CASES).index(name)
    a, b, c, e = (cases[0] / f"{number}{letter}" / "t" for letter in "abce")
    assert {p.name for p in a.iterdir()} | {LAYOUT_FILE} == {p.name for p in e.iterdir()}
    if CASES[name].record:
        # What stock DeepSpeed's experts would be stacked as, it does not know.
        ours, stock = (json.loads((folder / LAYOUT_FILE).read_text()) for folder in (e, a))
        assert ours["expert_groups"] == stock["expert_groups"] and not any(m["stacking"] for m in stock["moe_layers"])
    assert {p.name for p in b.iterdir()} == {p.name for p in c.iterdir()}
    assert json.loads((b / LAYOUT_FILE).read_text()) == json.loads((c / LAYOUT_FILE).read_text())
    for one, other in [(a, e), (b, c)]:
        for path in one.glob("*.pt"):
            # What frozen experts leave out is said in ds/convert/model_file.py; the config is the engine's own.
            skip = ("ds_config", *(("frozen_param_shapes", "frozen_param_fragments") if "frozen" in name else ()))
            assert list(differences(_load(path), _load(other / path.name), skip)) == [], path


def _load(path: Path) -> Any:
    return torch.load(path, weights_only=False)


# --- refusals, and what a conversion leaves behind --------------------------------------------------------------


def _refused(source: Path, target: Path, *arguments: str, capsys: pytest.CaptureFixture[str]) -> str:
    """What the command line says; it must have written nothing."""
    before = sorted(target.parent.iterdir())
    assert main([str(source), str(target), *arguments]) == 1
    assert sorted(target.parent.iterdir()) == before
    return capsys.readouterr().err


STACKED = ("--to", "stacked", "--ep-size", "2", "--model", f"{__name__}:tiny_stock")


def _no_model() -> None:
    return None


def _other_model() -> nn.Module:
    return zoo_stock()


def _one_by_one() -> nn.Module:
    model = tiny.TinyModel(StockMoE, ep_size=1)
    for layer in (model.moe_a, model.moe_b):
        for expert in layer.deepspeed_moe.experts.deepspeed_experts:
            expert.register_forward_hook(lambda *_: None)
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--to", "stacked", "--ep-size", "2"), "--model MODULE:FUNCTION"),
        (("--to", "per_expert", "--ep-size", "3"), "ep_size is 3; it must divide the experts of every MoE layer"),
        (("--to", "per_expert", "--ep-size", "0"), "Valid: 1, 2, 4"),
        (
            ("--to", "per_expert", "--ep-size", "1", "--tag", "x"),
            "no checkpoint with the tag 'x'; valid: global_step5",
        ),
        ((*STACKED[:-1], f"{__name__}:nothing"), "has no attribute 'nothing'"),
        ((*STACKED[:-1], f"{__name__}:_no_model"), "it must return the model"),
        ((*STACKED[:-1], f"{__name__}:_other_model"), "the model's MoE layers are moe_a, moe_b, moe_c"),
        ((*STACKED[:-1], f"{__name__}:_one_by_one"), "use the layout per_expert"),
        ((*STACKED, "--safe-globals", "os.nothing"), "--safe-globals os.nothing"),
    ],
)
def test_arguments_that_do_not_fit(resumed: Any, tmp_path: Path, capsys: Any, arguments: Any, said: str) -> None:
    assert said in _refused(resumed[0] / "a2", tmp_path / "new", *arguments, capsys=capsys)


def _edit(path: Path, change: Callable[[Any], None]) -> None:
    payload = _load(path)
    change(payload)
    torch.save(payload, path)


def _each(pattern: str, change: Callable[[Any], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        paths = list(folder.glob(pattern))
        assert paths
        for path in paths:
            _edit(path, change)

    return edit


def _swap_groups(state: Any) -> None:
    shapes = state["param_shapes"][1]
    first = next(iter(shapes))
    shapes.move_to_end(first)


def _widen(state: Any) -> None:
    name, shape = next(iter(state["param_shapes"][1].items()))
    state["param_shapes"][1][name] = (shape[0] + 1, *shape[1:])


def _base(state: Any) -> Any:
    return state["optimizer_state_dict"]["base_optimizer_state"]


MODEL_FILE = "mp_rank_00_model_states.pt"
ZERO_FILES = "zero_pp_rank_*"
# What is done to the stock checkpoint of stage 2 at EP 4, and what is said then.
DAMAGE: dict[str, tuple[Callable[[Path], Any], str]] = {
    "no model file": (lambda f: (f / MODEL_FILE).unlink(), f"has no {MODEL_FILE}"),
    "an expert is missing": (lambda f: (f / f"layer_0_expert_3_{MODEL_FILE}").unlink(), "is missing"),
    "an optimizer file is missing": (
        lambda f: (f / "zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink(),
        "is missing",
    ),
    "the last optimizer file is missing": (
        lambda f: (f / "zero_pp_rank_3_mp_rank_00_optim_states.pt").unlink(),
        "ep_size 4 does not divide",
    ),
    "no optimizer files": (lambda f: [p.unlink() for p in f.glob(ZERO_FILES)], "no optimizer's files"),
    "a file cut short": (lambda f: os.truncate(f / MODEL_FILE, 1000), "cannot be read"),
    "tensor parallelism": (lambda f: (f / "mp_rank_01_model_states.pt").touch(), "saved with tensor parallelism"),
    "ZeRO-3": (lambda f: (f / f"zero_pp_rank_0_{MODEL_FILE}").touch(), "saved with ZeRO stage 3"),
    "pipeline": (
        _each(MODEL_FILE, lambda s: s["checkpoint_parallel_dimensions"].update(pp_degree=2)),
        "pp_degree': 2",
    ),
    "AutoEP": (_each(MODEL_FILE, lambda s: s.update(ds_autoep_layers=[{}])), "universal checkpoints"),
    "code": (_each(MODEL_FILE, lambda s: s.update(arguments=argparse.Namespace(a=1))), "argparse.Namespace"),
    "elastic": (
        _each(ZERO_FILES, lambda s: s["optimizer_state_dict"].update(base_optimizer_state=[])),
        "elastic_checkpoint",
    ),
    "another order": (_each(MODEL_FILE, _swap_groups), "such a group is not converted"),
    "another shape": (_each(MODEL_FILE, _widen), "by the experts' files it would be"),
    "another size": (
        _each("zero_pp_rank_2*", lambda s: s["optimizer_state_dict"]["single_partition_of_fp32_groups"].reverse()),
        "elements, not",
    ),
    "two sizes": (
        _each(ZERO_FILES, lambda s: _base(s)["param_groups"][0].update(moe=True, name="ep_size_2")),
        "several sizes, ep_size_2, ep_size_4",
    ),
    "a wrong size": (
        _each(ZERO_FILES, lambda s: _base(s)["param_groups"][1].update(name="ep_size_2")),
        "local experts (at ep_size 2)",
    ),
    "a group too many": (
        _each(ZERO_FILES, lambda s: _base(s)["param_groups"].append(_base(s)["param_groups"][1])),
        "does not have all of each parameter group",
    ),
    "no group of experts": (_each(ZERO_FILES, lambda s: _base(s)["param_groups"][1].pop("moe")), "of experts alone"),
    "ranks differ": (_each("zero_pp_rank_1*", lambda s: _base(s)["param_groups"][0].update(lr=1)), "other parameter"),
    "another partitioning": (
        _each(ZERO_FILES, lambda s: s["optimizer_state_dict"].update(partition_count=[4, 2])),
        "partition_count is 2, not 1",
    ),
    "factored state": (
        _each(ZERO_FILES, lambda s: _base(s)["state"][1].update(row=torch.zeros(3))),
        "what belongs to no single element",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("what", DAMAGE)
def test_checkpoints_that_are_not_converted(resumed: Any, tmp_path: Path, capsys: Any, what: str) -> None:
    damage, said = DAMAGE[what]
    source = tmp_path / "source"
    shutil.copytree(resumed[0] / "a2", source)
    damage(source / "global_step5")
    text = _refused(source, tmp_path / "new", *STACKED, capsys=capsys)
    assert said in text, text


@pytest.mark.slow
def test_the_commands_of_the_docs(resumed: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(resumed[0] / "a2", tmp_path / "runs" / "stock")
    (tmp_path / "train.py").write_text(f"from {__name__} import tiny_stock as build_model")
    page = (ROOT / "docs" / "checkpoints.md").read_text()
    commands = re.findall(r"^python -m flashfusemoe_ds.convert_checkpoint .*", page, re.MULTILINE)
    assert len(commands) == 2
    monkeypatch.chdir(tmp_path)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    first, second = (shlex.split(command) for command in commands)
    done = subprocess.run([sys.executable, *first[1:]], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert f"wrote {tmp_path / 'runs' / 'fused' / 'global_step5'}" in done.stdout
    assert main(second[3:]) == 0
    again = tmp_path / "runs" / "stock_again" / "global_step5"
    for path in (tmp_path / "runs" / "stock" / "global_step5").glob("*.pt"):
        assert list(differences(_load(path), _load(again / path.name), ())) == [], path


@pytest.mark.slow
def test_trusted_classes_are_read(resumed: Any, tmp_path: Path, capsys: Any) -> None:
    source = tmp_path / "source"
    shutil.copytree(resumed[0] / "a2", source)
    _edit(source / "global_step5" / MODEL_FILE, lambda s: s.update(arguments=argparse.Namespace(a=1)))
    assert main([str(source), str(tmp_path / "new"), *STACKED, "--safe-globals", "argparse.Namespace"]) == 0
    assert _load(tmp_path / "new" / "global_step5" / MODEL_FILE)["arguments"].a == 1


@pytest.mark.slow
def test_the_target_must_be_new(resumed: Any, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    assert "is not empty" in _refused(resumed[0] / "a2", tmp_path / "full", *STACKED, capsys=capsys)
    assert main([str(resumed[0] / "a2"), str(tmp_path / "no" / "new"), *STACKED]) == 1
    assert "create" in capsys.readouterr().err
    (tmp_path / "empty").mkdir()
    assert main([str(resumed[0] / "a2"), str(tmp_path / "empty"), *STACKED]) == 0
    assert (tmp_path / "empty" / "latest").read_text() == "global_step5"


def _killed_at(point: int, source: str, target: str) -> None:
    """Converts, and dies at the given write to the disk."""
    torch.set_num_threads(1)
    left = iter(range(point))
    real = os.fsync

    def fsync(descriptor: int) -> None:
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGKILL)
        real(descriptor)

    with mock.patch("os.fsync", fsync):
        os._exit(main([source, target, *STACKED]))


@pytest.mark.slow
def test_a_killed_conversion_leaves_nothing_that_looks_whole(resumed: Any, tmp_path: Path) -> None:
    source, context = str(resumed[0] / "a2"), multiprocessing.get_context("fork")
    whole = sum(1 for _ in (resumed[0] / "b2").rglob("*") if _.is_file())
    outcomes = []
    # 19 files, two folders, `latest`, its folder, and, after the rename, the parent.
    for point in (0, 1, 5, 18, 19, 20, 21, 22, 23, 24):
        target = tmp_path / f"target{point}"
        process = context.Process(target=_killed_at, args=(point, source, str(target)))
        process.start()
        process.join(timeout=60)
        outcomes.append(process.exitcode)
        if target.exists():  # then all of it
            assert sum(1 for path in target.rglob("*") if path.is_file()) == whole
            assert (target / "latest").is_file()
        else:
            assert process.exitcode == -signal.SIGKILL
            (partial,) = tmp_path.glob(f".target{point}.partial-*")
            # Only when every file is on the disk does the hidden folder get its `latest`.
            assert not (partial / "latest").exists() or len(list(partial.rglob("*.*"))) >= whole - 1
    assert outcomes[0] == -signal.SIGKILL and outcomes[-1] == 0, outcomes


@pytest.mark.slow
def test_a_failed_conversion_leaves_nothing(resumed: Any, tmp_path: Path) -> None:
    calls = iter(range(7))
    real = files.copy

    def copy(source: Path, path: Path) -> None:
        if next(calls, None) is None:
            raise OSError("no space left")
        real(source, path)

    with mock.patch.object(files, "copy", copy), pytest.raises(OSError, match="no space"):
        convert_checkpoint(resumed[0] / "a2", tmp_path / "new", to="per_expert", ep_size=2)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_the_guard_sees_another_order(resumed: Any, tmp_path: Path) -> None:
    """The order in which the optimizer holds the experts' parameters is part of the layout."""
    source = tmp_path / "source"
    shutil.copytree(resumed[0] / "b1", source)
    path = source / "global_step5" / LAYOUT_FILE
    record = json.loads(path.read_text())
    names = record["expert_groups"][0]
    names[0], names[1] = names[1], names[0]
    path.write_text(json.dumps(record))
    (said,) = run_ranks(1, _guarded, str(source), timeout=60)
    assert "in another order: of group 0, parameter 0" in said and "convert_checkpoint" in said


def _guarded(rank: int, world_size: int, folder: str) -> str:
    engine = mock.Mock(global_steps=0)
    model = tiny.TinyModel(MoE, ep_size=1)
    for layer in (model.moe_a, model.moe_b):
        layer.ep_size = 2  # as on one of two ranks; nothing runs
        for p in layer.deepspeed_moe.experts.parameters():
            p.allreduce = False
    experts = [p for p in model.parameters() if not getattr(p, "allreduce", True)]
    engine.module, engine.optimizer = model, mock.Mock(spec=["param_groups"], param_groups=[{"params": experts}])
    engine.param_names = {p: name for name, p in model.named_parameters()}
    engine.load_universal_checkpoint.return_value = False
    guard_checkpoints(engine)
    try:
        engine.load_checkpoint(folder)
    except ValueError as error:
        return str(error)
    return "nothing"
