# SPDX-License-Identifier: GPL-3.0-or-later
"""The optimizer step in float16 and bfloat16: to the bit what DeepSpeed's own computes, with fewer operators."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.moe.utils import is_moe_param
from deepspeed.runtime.fp16.fused_optimizer import FP16_Optimizer
from deepspeed.runtime.fp16.unfused_optimizer import FP16_UnfusedOptimizer
from deepspeed.runtime.utils import has_inf_or_nan
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import flashfusemoe_ds
from flashfusemoe_ds import MoE
from flashfusemoe_ds.ds import overflow_check
from flashfusemoe_ds.ds.grad_norm import global_grad_norm
from flashfusemoe_ds.ds.overflow_check import any_nonfinite, check_overflow_at_once
from flashfusemoe_ds.ds.unfused_step import UnfusedStep, copy_all
from tests.distributed import run_ranks
from tests.ds import tiny

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
STEPS, CLIP = 7, 0.3
# What one gradient holds in some steps: of the last, in bfloat16, the norm alone is infinite.
BROKEN_STEPS = {1: -math.inf, 3: math.nan, 5: 1e30}

PRECISIONS: dict[str, dict[str, Any]] = {
    "bf16": {"bf16": {"enabled": True}},
    "fp16, dynamic": {"fp16": {"enabled": True, "initial_scale_power": 6, "loss_scale_window": 1, "hysteresis": 1}},
    "fp16, static": {"fp16": {"enabled": True, "loss_scale": 128.0}},
}
CASES = list(itertools.product(PRECISIONS, (0.0, CLIP), ("dense", 1, 2)))


class Dense(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(2))


# ---- any_nonfinite


def _contents(dtype: torch.dtype, device: str) -> Iterator[Tensor]:
    """Finite and broken tensors: at the ends, inside, not contiguous, large, small, empty."""
    largest = torch.finfo(dtype).max
    for value in (0.0, largest, -largest, math.inf, -math.inf, math.nan):
        for place in (0, 130_000, -1):
            tensor = torch.randn(70_001, 2, dtype=torch.float32, device=device).to(dtype)
            tensor.view(-1)[place] = value
            yield tensor
            yield tensor.t()
            yield tensor[::3]
    yield torch.empty(0, 3, dtype=dtype, device=device)
    yield torch.tensor(math.nan, dtype=dtype, device=device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_tensor_is_judged_as_by_deepspeed(dtype: torch.dtype, device: str) -> None:
    answers = set()
    for tensor in _contents(dtype, device):
        found = any_nonfinite([tensor])
        assert found.shape == () and found.dtype == torch.bool
        assert bool(found) == bool(has_inf_or_nan(tensor))
        answers.add(bool(found))
    assert answers == {True, False}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("bad", [math.inf, -math.inf, math.nan])
def test_one_broken_tensor_among_many_dtypes_and_layouts_is_found(
    bad: float, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(overflow_check, "MOST_AT_ONCE", 4)

    def many() -> list[Tensor]:
        dense = [torch.full((5, 2), torch.finfo(d).max, dtype=d, device=device) for d in DTYPES for _ in range(3)]
        # Twice at one place: the sum would overflow, the stored values do not.
        values = torch.full((2, 3), 6e4, dtype=torch.float16, device=device)
        sparse = torch.sparse_coo_tensor(torch.tensor([[1, 1]], device=device), values, (4, 3), check_invariants=True)
        return [*dense, torch.empty(0, device=device), torch.ones(3), sparse]

    assert not any_nonfinite(many())
    for i in range(len(many())):
        tensors = many()
        values = tensors[i]._values() if tensors[i].is_sparse else tensors[i]
        if values.numel():
            values.view(-1)[-1] = bad
            assert any_nonfinite(tensors), f"tensor {i} of {len(tensors)}"


def test_nothing_is_finite() -> None:
    assert not any_nonfinite([]) and not any_nonfinite([torch.empty(0)])


# ---- conversions


@pytest.mark.parametrize("device", DEVICES)
def test_copies_round_as_copy_does(device: str) -> None:
    sources = [torch.randn(33, 7, device=device, dtype=d) * 1e3 for d in DTYPES for _ in DTYPES]
    sources += [s.t() for s in sources]
    targets = [torch.empty_like(s, dtype=d) for s, d in zip(sources, itertools.cycle(DTYPES), strict=False)]
    copy_all(targets, sources)
    for target, source in zip(targets, sources, strict=True):
        assert torch.equal(target, source.to(target.dtype))


# ---- whole steps


def _model(kind: str | int, rank: int) -> nn.Module:
    if kind == "dense":
        torch.manual_seed(0)
        return Dense()
    return tiny.build(MoE, kind, rank, tiny.global_weights())


def _engine(precision: str, clip: float, kind: str | int, rank: int) -> Any:
    ds_config = tiny.config(0, clip=clip, accumulation=1, flashfusemoe={}, **PRECISIONS[precision])
    return tiny.start(flashfusemoe_ds.initialize, _model(kind, rank), ds_config)


def _back_to_deepspeed(engine: Any) -> None:
    """DeepSpeed's own step and check; for clipping, with our norm put in place of the one it computed."""
    optimizer = engine.optimizer
    del optimizer.step, optimizer.overflow_checker.has_overflow_serial
    if optimizer.clip_grad == 0:
        return
    stock = optimizer.unscale_and_clip_grads

    def unscale_and_clip_grads(total_norm: float) -> float:
        params, masters = (itertools.chain(*groups) for groups in (optimizer.fp16_groups, optimizer.fp32_groups))
        norm = float(global_grad_norm([(p, m.grad) for p, m in zip(params, masters, strict=True)]))
        optimizer._global_grad_norm = norm / optimizer.loss_scale_config.cur_scale
        return stock(norm)

    optimizer.unscale_and_clip_grads = unscale_and_clip_grads


def _set_gradients(engine: Any, step: int, kind: str | int, rank: int) -> None:
    """Dense gradients that ranks share, experts' of their own; one unused; one broken in some steps."""
    params = list(engine.module.parameters())
    same, own = (torch.Generator().manual_seed(1000 * seed + step) for seed in (0, 1 + (rank if kind == 2 else 0)))
    scale = engine.optimizer.loss_scale_config.cur_scale
    for i, param in enumerate(params):
        noise = torch.randn(param.shape, generator=own if is_moe_param(param) else same)
        param.grad = None if i == step % 2 else (noise * 0.2 * scale).to(param.dtype)
    # At EP=2 inf and NaN are in an expert of rank 1 alone. Experts do not count in DeepSpeed's own norm.
    bad = BROKEN_STEPS.get(step)
    in_expert = kind != "dense" and not (bad is not None and math.isfinite(bad))
    if bad is not None and (rank == 1 or not (in_expert and kind == 2)):
        [p for p in params if p.grad is not None and is_moe_param(p) == in_expert][-1].grad.view(-1)[0] = bad


def _run(engine: Any, kind: str | int, rank: int) -> list[Any]:
    """After each step: norm, what is left in .grad, loss scale, weights, master weights; in the end Adam's state."""
    optimizer, found = engine.optimizer, []
    assert type(optimizer) is FP16_UnfusedOptimizer
    for step in range(STEPS):
        _set_gradients(engine, step, kind, rank)
        returned = optimizer.step()
        assert returned == optimizer.overflow == (step in BROKEN_STEPS)
        norm = optimizer._global_grad_norm if optimizer.clip_grad or optimizer.overflow else None
        cleared = [p.grad is None for p in engine.module.parameters()]
        assert all(m.grad is None for group in optimizer.fp32_groups for m in group)
        optimizer.zero_grad()
        config = optimizer.loss_scale_config
        found.append((norm, cleared, config.cur_scale, config.cur_iter))
        found += [p.detach().clone() for p in engine.module.parameters()]
        found += [m.detach().clone() for group in optimizer.fp32_groups for m in group]
    for state in optimizer.optimizer.state.values():
        found += [state["exp_avg"], state["exp_avg_sq"], state["step"]]
    return found


def _compare(rank: int, world_size: int) -> dict[Any, list[str]]:
    """By case: what differs between ours and DeepSpeed's."""
    # There are CPUs without products in float16; a step has none.
    get_accelerator().is_fp16_supported = lambda: True
    differences = {}
    for case in CASES:
        precision, clip, kind = case
        runs = []
        for deepspeeds_own in (False, True):
            engine = _engine(precision, clip, kind, rank)
            assert isinstance(engine.optimizer.step.__self__, UnfusedStep)
            if deepspeeds_own:
                _back_to_deepspeed(engine)
                assert engine.optimizer.step.__self__ is engine.optimizer
            runs.append(_run(engine, kind, rank))
            engine.destroy()
        ours, stock = runs
        assert len(ours) == len(stock)
        differences[case] = [
            f"{i}: {a} {b}"
            for i, (a, b) in enumerate(zip(ours, stock, strict=True))
            if not (torch.equal(a, b) if isinstance(a, Tensor) else a == b)
        ]
        assert all(torch.isfinite(x).all() for x in ours if isinstance(x, Tensor))
    return differences


def _huge_expert(rank: int, world_size: int) -> tuple[bool, float, bool]:
    """Gradients that are finite, and whose norm is infinite by one rank's experts."""
    engine = _engine("bf16", CLIP, 2, rank)
    for param in engine.module.parameters():
        param.grad = torch.full_like(param, 1e30 if is_moe_param(param) and rank == 1 else 1.0)
    return _step_once(engine)


def _one_rank_overflows(rank: int, world_size: int) -> tuple[bool, float, bool]:
    """Gradients that the engine does not reduce, infinite on one rank."""
    engine = _engine("bf16", CLIP, "dense", rank)
    engine.enable_backward_allreduce = False
    for param in engine.module.parameters():
        param.grad = torch.full_like(param, math.inf if rank == 1 else 1.0)
    return _step_once(engine)


def _step_once(engine: Any) -> tuple[bool, float, bool]:
    """Whether the step says that it was skipped, the norm, and whether the weights are what they were."""
    before = [p.detach().clone() for p in engine.module.parameters()]
    skipped = engine.optimizer.step()
    unchanged = all(torch.equal(a, b) for a, b in zip(before, engine.module.parameters(), strict=True))
    return skipped, engine.optimizer._global_grad_norm, unchanged


def _two_ranks(rank: int, world_size: int) -> dict[str, Any]:
    return {
        "differences": _compare(rank, world_size),
        "huge expert": _huge_expert(rank, world_size),
        "one rank": _one_rank_overflows(rank, world_size),
    }


@pytest.fixture(scope="module")
def two_ranks() -> list[dict[str, Any]]:
    return run_ranks(2, _two_ranks, timeout=120)


def test_steps_are_bit_equal_to_deepspeeds(two_ranks) -> None:
    for found in two_ranks:
        assert found["differences"] == {case: [] for case in CASES}


def test_a_norm_that_experts_make_infinite_skips_the_step_on_every_rank(two_ranks) -> None:
    assert [found["huge expert"] for found in two_ranks] == [(True, math.inf, True)] * 2


def test_ranks_that_reduce_by_themselves_agree_about_an_overflow(two_ranks) -> None:
    assert [found["one rank"] for found in two_ranks] == [(True, math.inf, True)] * 2


# ---- what an engine does not reach, and what it costs


def _alone(rank: int, world_size: int) -> dict[str, Any]:
    """Steps of one rank, and the other wrappers."""
    return {
        "unfused": [_mixed_steps(ours) for ours in (True, False)],
        "reads": {(n, ours): _reads(n, ours) for n in (4, 40) for ours in (True, False)},
        "fused": _fused_overflow(),
        "zero": _zero_overflow(),
    }


def _mixed_steps(ours: bool) -> list[Tensor]:
    """Sparse gradients, a float32 weight among bfloat16 ones, a weight without elements."""
    torch.manual_seed(0)
    embedding = nn.Embedding(6, 4, sparse=True, dtype=torch.bfloat16)
    params = [embedding.weight, nn.Parameter(torch.randn(4, 3).bfloat16()), nn.Parameter(torch.randn(5))]
    params.append(nn.Parameter(torch.empty(0, 3).bfloat16()))
    optimizer = FP16_UnfusedOptimizer(torch.optim.SGD(params, lr=0.1), low_precision_dtype=torch.bfloat16)
    if ours:
        UnfusedStep(optimizer, lambda pairs: global_grad_norm(pairs))
        check_overflow_at_once(optimizer)
    for step in range(3):
        embedding(torch.tensor([1, 4, 1, step])).square().sum().backward()
        params[1].grad = torch.randn(3, 4).bfloat16().t()  # strides of its own
        params[2].grad = torch.randn(5)
        params[3].grad = torch.empty(0, 3).bfloat16() if step else None
        if step == 1:
            params[0].grad._values()[0, 0] = math.nan
        assert optimizer.step() == (step == 1)
        optimizer.zero_grad()
    return [p.detach().clone() for p in params]


class _Operators(TorchDispatchMode):
    """Counts operators, and those by which the host reads a value."""

    def __init__(self) -> None:
        super().__init__()
        self.all = self.reads = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.all += 1
        self.reads += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def _reads(num_params: int, ours: bool) -> int:
    params = [nn.Parameter(torch.randn(2, 2).bfloat16()) for _ in range(num_params)]
    optimizer = FP16_UnfusedOptimizer(
        torch.optim.AdamW(params, fused=True), low_precision_dtype=torch.bfloat16, clip_grad=CLIP
    )
    if ours:
        UnfusedStep(optimizer, lambda pairs: global_grad_norm(pairs))
        check_overflow_at_once(optimizer)
    for param in params:
        param.grad = torch.randn_like(param)
    with _Operators() as count:
        optimizer.step()
    return count.reads


def _fused_overflow() -> list[bool]:
    """FP16_Optimizer, which DeepSpeed's Adam kernels get; here around torch's."""
    params = [nn.Parameter(torch.randn(2, 2).bfloat16()) for _ in range(3)]
    found = []
    for bad in (0.0, math.inf, math.nan):
        optimizer = FP16_Optimizer(torch.optim.AdamW(params), low_precision_dtype=torch.bfloat16)
        check_overflow_at_once(optimizer)
        assert "has_overflow_serial" in vars(optimizer.overflow_checker)
        params[0].grad, params[1].grad = torch.ones(2, 2).bfloat16(), torch.full((2, 2), bad).bfloat16()
        found.append(bool(optimizer.overflow_checker.has_overflow(params)))
    return found


def _zero_overflow() -> dict[tuple[int, float], tuple[bool, bool]]:
    """Ours and DeepSpeed's answers, by stage and by what one gradient of the partition holds."""
    found = {}
    for stage in (1, 2):
        ds_config = tiny.config(stage, accumulation=1, flashfusemoe={}, bf16={"enabled": True})
        ds_config["data_types"] = {"grad_accum_dtype": "bf16"}
        optimizer = tiny.start(flashfusemoe_ds.initialize, Dense(), ds_config).optimizer
        assert "has_overflow_partitioned_grads_serial" in vars(optimizer)
        for bad in (0.0, math.inf, -math.inf, math.nan):
            optimizer.averaged_gradients = {
                i: [torch.ones(3).bfloat16(), None, torch.tensor([1.0, bad]).bfloat16()]
                for i in range(len(optimizer.bit16_groups))
            }
            stock = SimpleNamespace(
                bit16_groups=optimizer.bit16_groups,
                averaged_gradients=optimizer.averaged_gradients,
                _has_inf_or_nan=has_inf_or_nan,
            )
            theirs = type(optimizer).has_overflow_partitioned_grads_serial(stock)
            ours = optimizer.has_overflow_partitioned_grads_serial()
            assert (ours.shape, ours.dtype, ours.device) == (theirs.shape, theirs.dtype, theirs.device)
            found[stage, bad] = bool(ours), bool(theirs)
            assert optimizer.has_overflow() == bool(theirs)
    return found


@pytest.fixture(scope="module")
def alone() -> dict[str, Any]:
    return run_ranks(1, _alone, timeout=60)[0]


def test_sparse_gradients_and_mixed_dtypes_are_bit_equal(alone) -> None:
    ours, stock = alone["unfused"]
    assert all(torch.equal(a, b) for a, b in zip(ours, stock, strict=True))


def test_the_host_reads_as_often_for_any_number_of_parameters(alone) -> None:
    reads = alone["reads"]
    assert reads[4, True] == reads[40, True] <= 3
    assert reads[40, False] > 40


def test_the_fused_wrapper_finds_overflow(alone) -> None:
    assert alone["fused"] == [False, True, True]


def test_zero_finds_overflow_where_deepspeed_does(alone) -> None:
    assert len(alone["zero"]) == 8
    for (_, bad), answers in alone["zero"].items():
        assert answers == (not math.isfinite(bad),) * 2
