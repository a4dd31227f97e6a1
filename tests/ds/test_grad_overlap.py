# SPDX-License-Identifier: GPL-3.0-or-later
"""Gradients reduced during backward inside the engine, on four gloo ranks in float32: the weights of stock DeepSpeed
without overlap after 20 steps, in every configuration; and that the reduction does happen during backward."""

from __future__ import annotations

import contextlib
import itertools
from dataclasses import dataclass, field
from typing import Any

import deepspeed
import pytest
import torch
from deepspeed import comm as dist
from deepspeed.moe.layer import MoE as StockMoE
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import flashfusemoe_ds
from flashfusemoe_ds import MoE
from flashfusemoe_ds.ds import engine as ds_engine
from flashfusemoe_ds.ds import engine_overlap, stage0_overlap, zero_overlap
from tests.distributed import run_ranks
from tests.ds import tiny
from tests.ds.experts_zoo import GatedMLP

STEPS, OPTION_STEPS = 20, 8
D, VOCAB, TOKENS = 8, 11, 12
EP_SIZES, STAGES, ACCUMULATIONS = (1, 2, 4), (0, 1, 2), (1, 3)


class Model(nn.Module):
    """Embedding -> MoE -> three Linears, of which some batches use some -> Linear."""

    def __init__(self, moe_class: type[nn.Module], ep_size: int, sparse: bool, reentrant: bool) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.embed = nn.Embedding(VOCAB, D, sparse=sparse)
        # The name under which tests.ds.tiny knows that there are four experts.
        self.moe_b = moe_class(D, GatedMLP(D, 8), 4, ep_size=ep_size, k=2, drop_tokens=False,
                               top2_2nd_expert_sampling=False)  # fmt: skip
        self.tied = nn.Linear(D, D)
        self.never = nn.Linear(D, D)
        self.sometimes = nn.Linear(D, D)
        self.by_rank = nn.Linear(D, D)
        self.head = nn.Linear(D, 1)

    def forward(self, ids: Tensor, use: tuple[str, ...]) -> Tensor:
        x = self.embed(ids)
        out, l_aux, _ = self.moe_b(x)
        x = x + out
        for name in use:
            x = x + getattr(self, name)(x).tanh()
        for _ in range(2):
            x = checkpoint(self.tied, x, use_reentrant=True) if self.reentrant else self.tied(x)
        return self.head(x).square().mean() + 0.1 * l_aux


@dataclass(frozen=True)
class Case:
    """One way to train. `ours` is None for stock DeepSpeed without overlap, else the section's overlap_dense_grads."""

    stage: int = 0
    ep_size: int = 2
    accumulation: int = 1
    ours: bool | None = None
    option: str = ""

    def stock(self, stage: int | None = None) -> Case:
        return Case(self.stage if stage is None else stage, self.ep_size, self.accumulation, None, self.option)

    @property
    def name(self) -> str:
        overlap = "" if self.ours is None else f"-overlap_{self.ours}"
        return f"stage{self.stage}-ep{self.ep_size}-accumulation{self.accumulation}{overlap} {self.option}".strip()

    @property
    def steps(self) -> int:
        return OPTION_STEPS if self.option else STEPS


# What else the engine's config holds.
SETTINGS: dict[str, dict[str, Any]] = {
    "predivide": {"gradient_predivide_factor": 2.0},
    "prescale": {"prescale_gradients": True},
    "sum": {"gradient_allreduce_op": "sum"},
    "wire bf16": {"communication_data_type": "bf16"},
    "unmanaged": {"managed_gradient_accumulation": False},
    "clip": {"gradient_clipping": 0.05},
    "bf16": {"bf16": {"enabled": True}},
}
STAGE0_OPTIONS = (*SETTINGS, "sparse", "no_sync", "boundary by hand", "thaw", "freeze", "reentrant")


def _grid() -> list[Case]:
    grid = [Case(*c) for c in itertools.product(STAGES, EP_SIZES, ACCUMULATIONS, (None, True, False))]
    for option in STAGE0_OPTIONS:
        grid += [Case(0, 2, 3, ours, option) for ours in (None, True)]
    grid += [Case(0, 2, 3, None, "by_rank"), *(Case(stage, 2, 3, True, "by_rank") for stage in STAGES)]
    grid += [Case(stage, 2, 3, ours, "wire bf16") for stage in (1, 2) for ours in (None, True)]
    grid += [Case(stage, 2, 2, ours, "coalesce") for stage in (1, 2) for ours in (None, True)]
    grid += [Case(1, 2, 3, ours, "no_sync") for ours in (None, True)]
    return grid


@dataclass
class Trained:
    weights: dict[str, Tensor] = field(default_factory=dict)
    launches: list[tuple[bool, int, int]] = field(default_factory=list)


def _start(case: Case, rank: int, weights: dict[str, Tensor]) -> Any:
    option = case.option
    model = Model(StockMoE if case.ours is None else MoE, case.ep_size, option == "sparse", option == "reentrant")
    model.load_state_dict(tiny.to_local(weights, case.ep_size, rank))
    if option == "thaw":
        model.sometimes.requires_grad_(False)
    ds_config = tiny.config(case.stage, "sgd" if option == "sparse" else "adamw", accumulation=case.accumulation,
                            **SETTINGS.get(option, {}))  # fmt: skip
    if case.ours is None:
        return tiny.start(deepspeed.initialize, model, ds_config)
    # Clipping by stock's norm: this file is about reductions.
    ds_config["flashfusemoe"] = {"overlap_dense_grads": case.ours, "exact_grad_norm": False}
    return tiny.start(flashfusemoe_ds.initialize, model, ds_config)


def reducer_of(engine: Any) -> Any:
    """The reducer that has taken over, or None."""
    for function in (engine.allreduce_gradients, getattr(engine.optimizer, "process_gradients", None)):
        owner = getattr(function, "__self__", None)
        if isinstance(owner, stage0_overlap.Stage0Overlap | zero_overlap.ZeroOverlap):
            return owner.reducer
    return None


class Spy:
    """deepspeed.comm that notes each bucket: launched before finish?, elements, ranks."""

    def __init__(self, reducer: Any, launches: list[tuple[bool, int, int]]) -> None:
        self.launches, self.finishing = launches, False
        reducer._comm, finish = self, reducer.finish

        def noted() -> None:
            self.finishing = True
            finish()
            self.finishing = False

        reducer.finish = noted

    def all_reduce(self, tensor: Tensor, group: Any, async_op: bool = False) -> Any:
        if async_op:  # else it is what the ranks tell each other after the first round
            self.launches.append((not self.finishing, tensor.numel(), dist.get_world_size(group)))
        return dist.all_reduce(tensor, group=group, async_op=async_op)

    def get_world_size(self, group: Any) -> int:
        return dist.get_world_size(group)


def _batch(rank: int, step: int, micro: int) -> Tensor:
    return torch.randint(VOCAB, (TOKENS,), generator=torch.Generator().manual_seed(1000 * step + 10 * rank + micro))


def _used(case: Case, rank: int, step: int, micro: int) -> tuple[str, ...]:
    """`sometimes` is missing from the last micro batch of a step, or from every other step."""
    used = ["sometimes"] if (step % 2 if case.accumulation == 1 else micro == 0) else []
    if case.option == "by_rank" and (rank + step + micro) % 3 == 0:
        used.append("by_rank")
    return tuple(used)


def _train_step(engine: Any, case: Case, rank: int, step: int) -> None:
    if case.option in ("thaw", "freeze") and step == 3:
        engine.module.sometimes.requires_grad_(case.option == "thaw")
    coalesce = engine.coalesce_grad_reduction() if case.option == "coalesce" else contextlib.nullcontext()
    with coalesce:
        for micro in range(case.accumulation):
            last = micro == case.accumulation - 1
            quiet = case.option == "no_sync" and not last
            if case.option == "boundary by hand":
                engine.set_gradient_accumulation_boundary(last)
            with engine.no_sync() if quiet else contextlib.nullcontext():
                ids = _batch(rank, step, micro).to(engine.device)
                engine.backward(engine(ids, _used(case, rank, step, micro)))
            if case.option not in ("unmanaged", "coalesce") and not quiet and case.option != "boundary by hand":
                engine.step()
            elif quiet:
                engine.micro_steps += 1  # what step() counts, which no_sync() forbids
    if case.option in ("unmanaged", "boundary by hand"):
        engine.step()
    if case.option == "coalesce":
        engine.set_gradient_accumulation_boundary(True)
        engine.step()


def train_all(rank: int, world_size: int, cases: list[Case]) -> list[Trained]:
    # Several buckets, although the model is tiny.
    for module in (stage0_overlap, zero_overlap):
        module.FIRST_BUCKET_NUMEL, module.BUCKET_NUMEL = 40, 150
    torch.manual_seed(0)
    weights = Model(StockMoE, 1, False, False).state_dict()
    results = []
    for case in cases:
        engine = _start(case, rank, weights)
        trained = Trained()
        for step in range(case.steps):
            if case.ours and not isinstance(reducer_of(engine)._comm, Spy):  # at first, and when one was made anew
                Spy(reducer_of(engine), trained.launches)
            _train_step(engine, case, rank, step)
        state = {name: value.cpu() for name, value in engine.module.state_dict().items()}
        trained.weights = tiny.to_global(state, case.ep_size, rank)
        results.append(trained)
        assert case.ours or reducer_of(engine) is None
        engine.destroy()
    return results


@pytest.fixture(scope="module")
def trained() -> dict[Case, tuple[dict[str, Tensor], list[list[tuple[bool, int, int]]]]]:
    """Final weights of the whole model, and each rank's launches."""
    cases = _grid()
    per_rank = run_ranks(tiny.WORLD_SIZE, train_all, cases, timeout=500)
    return {
        case: (tiny.merge(r.weights for r in ranks), [r.launches for r in ranks])
        for case, ranks in zip(cases, zip(*per_rank, strict=True), strict=True)
    }


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float = 1e-6) -> None:
    assert set(actual) == set(expected)
    for name, weight in expected.items():
        error = float((actual[name] - weight).abs().max())
        assert error <= tolerance, f"{name} differs by {error:.2e}"


OURS = [c for c in _grid() if c.ours is not None]


@pytest.mark.slow
@pytest.mark.parametrize("case", OURS, ids=[c.name for c in OURS])
def test_weights_equal_stock_without_overlap(trained, case: Case) -> None:
    # Stock ZeRO cannot train with parameters that only some ranks use: its ranks reduce different buckets.
    reference = case.stock(0) if case.option == "by_rank" else case.stock()
    # bfloat16 rounds sums in another order to other neighbours: of weights below 4, and of gradients on the wire.
    tolerance = {"bf16": 2**-6, "wire bf16": 2e-4}.get(case.option, 1e-6)
    assert_equal(trained[case][0], trained[reference][0], tolerance)


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in OURS if c.ours], ids=[c.name for c in OURS if c.ours])
def test_all_ranks_launch_the_same_buckets_in_the_same_order(trained, case: Case) -> None:
    by_rank = [[(numel, ranks) for _, numel, ranks in launches] for launches in trained[case][1]]
    assert by_rank[1:] == by_rank[:-1]
    if case.option == "coalesce":
        assert by_rank[0] == [], "DeepSpeed's own buckets serve it"
        return
    assert len(by_rank[0]) >= 3 * case.steps
    # Experts have buckets of their own: at ep_size 2 they travel between two of the four ranks.
    assert {ranks for _, ranks in by_rank[0]} == ({4, 2} if case.ep_size == 2 else {4})


@pytest.mark.slow
@pytest.mark.parametrize("case", [c for c in OURS if c.ours], ids=[c.name for c in OURS if c.ours])
def test_buckets_leave_during_backward(trained, case: Case) -> None:
    if case.option in ("unmanaged", "coalesce"):
        return  # the reduction belongs to step(), or to DeepSpeed
    for launches in trained[case][1]:
        during = sum(early for early, _, _ in launches)
        # Not in the first backward, and never the last bucket, of what was not used then.
        assert during >= case.steps, f"{during} of {len(launches)} buckets"


@pytest.mark.slow
def test_cases_differ_where_they_should(trained) -> None:
    """Else an option that never took effect would pass."""
    plain = trained[Case(0, 2, 3, None, "no_sync")][0]
    for option in ("sum", "thaw", "freeze", "clip", "by_rank", "bf16", "wire bf16"):
        other = trained[Case(0, 2, 3, None, option)][0]
        assert any(float((other[name] - plain[name]).abs().max()) > 1e-5 for name in plain), option


# --- which way is chosen, and what is said about it --------------------------------------------------------------


def _ways(rank: int, world_size: int) -> dict[str, str]:
    """What overlap_gradients says of engines of all kinds."""
    configs = {
        "stage 0": {},
        "stage 1": {"zero_optimization": {"stage": 1}},
        "stage 2": {"zero_optimization": {"stage": 2}},
        "off": {"flashfusemoe": {"overlap_dense_grads": False}},
        "overlap_comm off": {"zero_optimization": {"stage": 2, "overlap_comm": False}},
        "one owner": {"zero_optimization": {"stage": 2, "use_multi_rank_bucket_allreduce": False}},
        "BF16_Optimizer": {
            "bf16": {"enabled": True},
            "data_types": {"grad_accum_dtype": "fp32"},
            "zero_optimization": {"stage": 1},
        },
        "fp32 accumulation": {
            "bf16": {"enabled": True},
            "data_types": {"grad_accum_dtype": "fp32"},
            "zero_optimization": {"stage": 2},
        },
    }
    said: dict[str, str] = {}
    original = ds_engine.overlap_gradients
    for name, extra in configs.items():

        def noted(engine: Any, wanted: bool, name: str = name) -> str:
            said[name] = original(engine, wanted)
            return said[name]

        ds_engine.overlap_gradients = noted
        model = Model(MoE, 1, False, False)
        engine = tiny.start(flashfusemoe_ds.initialize, model, {**tiny.config(0), **extra})
        engine.destroy()
    return said


def test_the_way_is_said_with_its_reason() -> None:
    (said,) = run_ranks(1, _ways)
    ours = "during backward in 1 + 1 buckets of dense and expert gradients"
    theirs = "during backward by DeepSpeed's overlap_comm: "
    assert said == {
        "stage 0": ours,
        "stage 1": ours,
        "stage 2": ours,
        "off": "after backward: overlap_dense_grads is false",
        "overlap_comm off": "after backward: zero_optimization.overlap_comm is off",
        "one owner": theirs + "use_multi_rank_bucket_allreduce is false",
        "BF16_Optimizer": (
            "after backward: BF16_Optimizer accumulates and reduces float32 copies of the gradients"
        ),
        "fp32 accumulation": (
            theirs + "gradients are accumulated in another dtype than the model's (data_types.grad_accum_dtype)"
        ),
    }  # fmt: skip


class _Engine:
    """As much of an engine as the choice looks at."""

    def __init__(self, optimizer: Any, **attributes: Any) -> None:
        self.optimizer, self.enable_backward_allreduce = optimizer, True
        vars(self).update(attributes)

    def zero_optimization_stage(self) -> int:
        return 0

    def is_deepcompile_enabled(self) -> bool:
        return getattr(self, "deepcompile", False)


def test_engines_that_reduce_by_themselves_are_left_alone() -> None:
    onebit = type("OnebitAdam", (), {"__module__": "deepspeed.runtime.fp16.onebit.adam"})()
    folding = type("Folding", (), {"tp_size": 2})()
    expected = {
        "OnebitAdam compresses and reduces gradients itself": _Engine(onebit),
        "DeepCompile reduces inside its compiled graphs": _Engine(object(), deepcompile=True),
        "enable_backward_allreduce is off": _Engine(object(), enable_backward_allreduce=False),
        "the engine has no optimizer": _Engine(None),
        "AutoEP folded with tensor parallelism corrects gradients before their reduction": _Engine(
            object(), _autoep_folding_spec=folding
        ),
    }
    for reason, engine in expected.items():
        assert engine_overlap.overlap_gradients(engine, True) == f"after backward: {reason}"
