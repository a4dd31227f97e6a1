# SPDX-License-Identifier: GPL-3.0-or-later
"""Plans against what they are about: the layer's saved tensors, DeepSpeed's optimizer, the transport's messages."""

from __future__ import annotations

import contextlib
import gc
import io
import itertools
import re
import sys
import types
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor

from flashfusemoe_ds import plan, plan_numbers, planning
from flashfusemoe_ds.config import FlashFuseMoEConfig
from flashfusemoe_ds.kernels.activation import get_activation
from flashfusemoe_ds.kernels.experts import experts
from flashfusemoe_ds.kernels.peer_slab import Slab
from flashfusemoe_ds.kernels.select import select_products
from flashfusemoe_ds.plan_model import from_shape, from_transformers
from flashfusemoe_ds.plan_trace import GradientRule, Ledger, trace
from flashfusemoe_ds.planning import MoEShape, Optimizer, expected_load
from tests.distributed import run_ranks
from tests.hf import models

ROOT = Path(__file__).parent.parent
MIB = 2**20
ADAM = {"type": "AdamW", "params": {"torch_adam": True}}


# --- one layer -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("num_experts", "ep_size", "top_k"), [(6, 3, 2), (8, 2, 3), (8, 4, 8), (4, 4, 1)])
def test_hit_rate_counts_every_choice(num_experts: int, ep_size: int, top_k: int) -> None:
    mine = set(range(num_experts // ep_size))
    choices = list(itertools.combinations(range(num_experts), top_k))
    hits = sum(bool(mine & set(choice)) for choice in choices)
    assert planning.hit_rate(num_experts, ep_size, top_k) == pytest.approx(hits / len(choices), abs=1e-12)


def test_skew_makes_rows_until_every_token_comes() -> None:
    shape = MoEShape(64, 32, 64, num_experts=8, top_k=2)
    loads = [expected_load(shape, 100, 4, skew) for skew in (1.0, 1.5, 100.0)]
    assert [load.routes for load in loads] == [200, 300, 800]
    assert loads[0].rows == 186 and loads[1].rows == 279  # 400 tokens, 13 of 28 pairs of experts
    assert loads[2].rows == 400 and loads[2].received == 300
    assert {load.sent for load in loads} == {186}


# T, D, F, E, K, and MiB kept and at most allocated by MoELayer on an H200: docs/kernels.md, "The layer".
MEASURED = {
    "seed": ((8192, 1024, 2048, 8, 2), 145, 289),
    "qwen3": ((16384, 2048, 768, 128, 8), 459, 1486),
    "mixtral": ((8192, 4096, 14336, 8, 2), 961, 3268),
    "dsv3": ((8192, 7168, 2048, 256, 8), 634, 21999),
}


@pytest.mark.parametrize("name", MEASURED)
def test_a_layer_on_an_h200(name: str) -> None:
    (T, D, F, E, K), kept_mib, peak_mib = MEASURED[name]
    row = next(line for line in (ROOT / "docs" / "kernels.md").read_text().splitlines()
               if line.startswith(f"| {name}, floor") and "**ours**" in line)  # fmt: skip
    assert [int(cell) for cell in row.split("|")[6:8]] == [kept_mib, peak_mib]
    shape = MoEShape(D, F, 2 * F, E, K)
    load = expected_load(shape, T, 1)
    kept = sum(planning.kept_bytes(shape, load, 2).values()) + planning.router_bytes(T, E, K)
    phases = [phase.bytes for phase in planning.backward_phases(shape, load, 2)]
    more = max(planning.forward_bytes(shape, load, 2), *phases)
    row = f"| {name} | {kept / MIB:.1f} | {kept_mib} | {(kept + more) / MIB:.1f} | {peak_mib} |"
    assert row in (ROOT / "docs" / "planning.md").read_text()
    assert kept / MIB == pytest.approx(kept_mib, abs=0.5)
    assert (kept + more) / MIB == pytest.approx(peak_mib, rel=2e-3)


def saved_bytes(run: Callable[[], Tensor], leaves: list[Tensor]) -> int:
    """Of what autograd keeps, once per storage, without the leaves."""
    seen = {leaf.untyped_storage().data_ptr() for leaf in leaves}
    sizes: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = run()
    assert out.requires_grad
    return sum(sizes.values())


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(("name", "width"), [("swiglu", 2), ("gelu", 1)])
def test_kept_bytes_are_what_autograd_keeps(name: str, width: int, recompute: bool) -> None:
    T, D, F, E, K = 300, 32, 24, 4, 2
    shape = MoEShape(D, F, width * F, E, K)
    x, up, down = (torch.randn(*s, requires_grad=True) for s in ((T, D), (E, width * F, D), (E, D, F)))
    weight, idx = torch.rand(T, K, requires_grad=True), torch.rand(T, E).topk(K, dim=1)[1]
    products = select_products("reference", x, (D, F, width * F), E)
    kept = saved_bytes(
        lambda: experts(x, idx, weight, up, down, get_activation(name), products, recompute=recompute), [up, down]
    )
    section = FlashFuseMoEConfig(recompute_activations=recompute)
    assert kept == sum(planning.kept_bytes(shape, expected_load(shape, T, 1), 4, section).values())


# --- what exchanges cost ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def cost_of() -> Callable[[list[tuple[str, int, float]]], planning.ExchangeCost]:
    sys.path.insert(0, str(ROOT / "examples" / "benchmarks"))
    from exchange_cost import Sample, fit

    return lambda samples: fit([Sample(*sample) for sample in samples])


def times(rate: float, *fixed_us: float) -> list[tuple[str, int, float]]:
    """At two sizes, of a machine that is as the formula says."""
    return [
        (name, size, us / 1e3 + size / rate / 1e6)
        for size in (10**7, 4 * 10**7)
        for name, us in zip(planning.Exchanges._fields, fixed_us, strict=True)
    ]


def test_fit_finds_rate_and_fixed_parts(cost_of: Callable[..., planning.ExchangeCost]) -> None:
    for fixed in ((600.0, 3.0, 2.0, 11.0), (600.0, 0.0, 0.0, 0.0)):
        cost = cost_of(times(170.0, *fixed))
        assert cost.gbps == pytest.approx(170.0) and cost.fixed_us == pytest.approx(fixed, abs=1e-6)
    # Slopes that differ: the sum over operations is met at every size between.
    mixed = [*times(100.0, 90, 90, 90, 90)[::2], *times(300.0, 90, 90, 90, 90)[1::2]]
    cost = cost_of(mixed)
    planned = sum(cost.fixed_us) / 1e3 + 4 * 2.5e7 / cost.gbps / 1e6
    assert planned == pytest.approx(sum(ms for *_, ms in mixed) / 2)


def test_fit_has_nothing_negative(cost_of: Callable[..., planning.ExchangeCost]) -> None:
    falling = cost_of([("combine", 10, 3.0), ("combine", 20, 2.0), ("dispatch", 10, 5.0), ("dispatch", 20, 5.0)])
    assert falling.gbps == float("inf")
    assert falling.fixed_us == pytest.approx((5000, 2500, 0, 0))
    faster_when_small = cost_of([("combine", 10**6, 0.1), ("combine", 10**7, 2.0)])
    # A line through the origin: x y / x x.
    assert faster_when_small.gbps == pytest.approx((1 + 100) / (0.1 + 20.0))
    assert faster_when_small.fixed_us == (0, 0, 0, 0)


# T, D, F, E, K of transport.py's default, on two ranks.
EXCHANGED = (4096, 2048, 768, 64, 8)


def test_the_costs_of_two_h200s_follow_from_their_times() -> None:
    """docs/planning.md has times, rates and fixed parts: the rate is the fastest operation's, rounded, and the rest of
    each time is its fixed part."""
    T, D, F, E, K = EXCHANGED
    shape = MoEShape(D, F, 2 * F, E, K)
    sizes = planning.exchange_bytes(shape, expected_load(shape, T, 2).received, 2)
    page = (ROOT / "docs" / "planning.md").read_text()
    rows = re.findall(r"^\| `(\w+)`[^|]*\| ([\d, ]+) \| (\d+) \| ([\d, ]+) \|$", page, re.MULTILINE)
    assert [row[0] for row in rows] == list(plan_numbers.EXCHANGE_COSTS) == list(plan_numbers.BACKENDS)
    for name, us, gbps, fixed in rows:
        took, beside = ([int(number) for number in cell.split(",")] for cell in (us, fixed))
        rate = round(max(size / each / 1e3 for size, each in zip(sizes, took, strict=True)))
        rest = [max(0, round(each - size / rate / 1e3)) for size, each in zip(sizes, took, strict=True)]
        assert (rate, rest) == (int(gbps), beside)
        assert plan_numbers.EXCHANGE_COSTS[name] == (rate, tuple(rest))


# --- transports ----------------------------------------------------------------------------------------------------


def test_transports_that_layers_share_count_once() -> None:
    section = FlashFuseMoEConfig.from_section({"symm_mem": {"max_tokens_per_rank": 100}})
    one, other = MoEShape(64, 32, 64, 8, 2), MoEShape(128, 32, 64, 8, 2)
    size = [Slab(4, 100, 2, width * 2).num_bytes for width in (64, 128)]
    of = planning.transport_bytes
    assert of("symm_mem", [one, one], 4, torch.bfloat16, section) == size[0]
    assert of("symm_mem", [one, other, one], 4, torch.bfloat16, section) == sum(size)
    assert of("symm_mem", [one], 1, torch.bfloat16, section) == of("nccl", [one], 4, torch.bfloat16, section) == 0


# --- a whole model --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def configs(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Writes a model's config, returns its folder."""
    pytest.importorskip("transformers")

    def write(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        models.config(name).save_pretrained(folder)
        return folder

    return write


ALONE = GradientRule(0, ranks=lambda p: 1, owned=lambda p: True, bucket_numel=1, staging=0)


def no_room(shape: MoEShape) -> None:
    return None


@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "gpt_oss"])
def test_what_a_model_keeps_is_what_it_keeps_when_run(name: str, configs: Callable[[str], Path]) -> None:
    """The same counting of a forward on the CPU, with our experts in it. Blocks of 512 bytes are the tolerance."""
    from flashfusemoe_ds.hf.experts import register_experts_implementation

    register_experts_implementation()
    model = models.build(name, "flashfusemoe").train()
    ids = torch.zeros(2, 64, dtype=torch.int64)
    ledger = Ledger([*model.parameters(), *model.buffers(), ids])
    with ledger:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
    really = ledger.live
    assert loss.requires_grad

    subject = from_transformers(configs(name), torch.float32, 2, 64, checkpointing=False, autoep=False)
    assert sum(p.numel() for p in model.parameters()) == _numel(subject)
    planned = trace(subject.model, subject.loss, ALONE, accumulate=False,
                    inputs=subject.inputs)  # fmt: skip
    assert planned.kept == pytest.approx(really, rel=3e-3)


def _numel(subject: Any, ep_size: int = 1) -> int:
    subject.configure(ep_size, 1.0, no_room, torch.float32, planning.DEFAULTS)
    return sum(p.numel() for p in subject.model.parameters())


def test_deepseeks_parameters_and_checkpointing(configs: Callable[[str], Path]) -> None:
    subject = from_transformers(configs("deepseek_v3"), torch.float32, 2, 64, checkpointing=False, autoep=True)
    whole = sum(p.numel() for p in models.build("deepseek_v3").parameters())
    assert _numel(subject) == whole
    routed = sum(p.numel() for p in subject.expert_params())
    assert _numel(subject, 4) == whole - routed * 3 // 4
    kept = []
    for checkpointing in (False, True):
        subject = from_transformers(configs("deepseek_v3"), torch.float32, 2, 64, checkpointing, autoep=True)
        _numel(subject)
        kept.append(trace(subject.model, subject.loss, ALONE, accumulate=False,
                          inputs=subject.inputs).kept)  # fmt: skip
    assert kept[1] < 0.3 * kept[0]


def test_the_peak_follows_the_phases() -> None:
    """One layer: the trace's peak is what was kept, X aside, and the largest phase, plus what autograd adds."""
    shape = MoEShape(64, 512, 1024, num_experts=4, top_k=2)
    subject = from_shape(shape, 2000, 1, torch.bfloat16)
    (load,) = subject.configure(1, 1.0, no_room, torch.bfloat16, planning.DEFAULTS)
    found = trace(subject.model, subject.loss, ALONE, accumulate=False,
                  inputs=subject.inputs)  # fmt: skip
    kept = planning.kept_bytes(shape, load, 2)
    held = sum(kept.values()) - kept["X"] + planning.router_bytes(2000, 4, 2)
    most = max(phase.bytes for phase in planning.backward_phases(shape, load, 2))
    assert found.kept == pytest.approx(held, rel=5e-3)
    # Beside them, the gradient of the sum's input: [T, D].
    assert held + most <= found.peak <= held + most + 3 * 2000 * 64 * 2


# --- across ranks, with DeepSpeed -----------------------------------------------------------------------------------


class _Counting(types.ModuleType):
    """torch.distributed, with what all-to-alls send to other ranks counted."""

    def __init__(self, rank: int) -> None:
        super().__init__("counting")
        self.rank, self.sent = rank, 0

    def get_world_size(self, group: Any = None) -> int:
        return torch.distributed.get_world_size(group)

    def all_to_all_single(self, out: Tensor, rows: Tensor, *args: Any, **kwargs: Any) -> Any:
        counts = kwargs.get("input_split_sizes")
        if counts is not None:
            others = sum(counts) - counts[self.rank]
            self.sent += others * rows[:1].numel() * rows.element_size() if others else 0
        return torch.distributed.all_to_all_single(out, rows, *args, **kwargs)


def _exchange(rank: int, world: int, redispatch: bool) -> dict[str, Any]:
    """A forward and backward of one layer's experts at ep_size 2: bytes sent and kept, rows and routes."""
    from flashfusemoe_ds.dispatch.nccl import NcclDispatcher
    from flashfusemoe_ds.nn.experts import GroupedExperts
    from flashfusemoe_ds.nn.parallel_experts import through_experts
    from flashfusemoe_ds.types import Routing

    T, D, F, E, K = 4000, 16, 24, 8, 2
    generator = torch.Generator().manual_seed(rank)
    idx = torch.rand(T, E, generator=generator).topk(K, dim=1)[1]
    weight = torch.rand(T, K, generator=generator).requires_grad_()
    x = torch.randn(T, D, generator=generator).requires_grad_()
    module = GroupedExperts(E // world, D, F, "swiglu", recompute_dispatch=redispatch)
    comm = _Counting(rank)
    transport = NcclDispatcher(torch.distributed.group.WORLD, E, comm)
    box: list[Tensor] = []

    def run() -> Tensor:
        box.append(through_experts(x, Routing(idx, weight, idx.new_empty(0)), module, transport)[0])
        return box[0]

    kept = saved_bytes(run, list(module.parameters()))
    box[0].sum().backward()
    owner = idx // (E // world)
    sent = int(sum((owner == p).any(1).sum() for p in range(world) if p != rank))
    return {
        "kept": kept,
        "sent_bytes": comm.sent,
        "sent_rows": sent,
        "routes_to": [int((owner == p).sum()) for p in range(world)],
        "rows_to": [int((owner == p).any(1).sum()) for p in range(world)],
    }


def _states(rank: int, world: int) -> dict[Any, dict[str, int]]:
    """Bytes of real engines: parameters, float32 copies and optimizer states; in the second step, gradients after the
    backward, and the most that the optimizer's step allocates, gradients included."""
    import flashfusemoe_ds as ffmoe
    from tests.ds import tiny

    found = {}
    for key in ENGINES:
        ep_size, stage, bf16, kind = key
        torch.manual_seed(0)
        ds_config = tiny.config(stage, accumulation=1, bf16={"enabled": bf16})
        ds_config["optimizer"]["params"][kind] = True
        engine = tiny.start(ffmoe.initialize, tiny.TinyModel(ffmoe.MoE, ep_size), ds_config)
        dtype = torch.bfloat16 if bf16 else torch.float32
        batch = [t.to(dtype) for t in tiny.batch(rank, 0, 0)]
        engine.backward(engine(*batch))
        engine.step()
        gc.collect()
        with Ledger([t for t in gc.get_objects() if isinstance(t, Tensor)], block=1) as ledger:
            engine.backward(engine(*batch))
            grads = ledger.peak = ledger.live
            engine.step()
        optimizer = engine.optimizer
        states = getattr(optimizer, "optimizer", optimizer).state.values()
        held, master = engine.module.parameters(), itertools.chain(*getattr(optimizer, "fp32_groups", []))
        if stage:
            held, master = optimizer.bit16_groups_flat, optimizer.single_partition_of_fp32_groups
        found[key] = {
            "parameters": _sizes(held),
            "master": _sizes(master),
            "moments": _sizes(value for state in states for name, value in state.items() if name != "step"),
            "gradients": grads,
            "step": ledger.peak,
        }
        engine.destroy()
    return found


def _sizes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


ENGINES = [(2, 0, False, "foreach"), (1, 0, True, "fused"), (2, 1, True, "foreach"), (1, 2, True, "fused"),
           (2, 2, False, "fused")]  # fmt: skip


class Checks(NamedTuple):
    """What plan_check says at toy size: with synthetic times, with real ones, and its calibration alone; and medians
    of times by a synthetic clock."""

    synthetic: str
    real: str
    calibration: str
    medians: list[float]


SYNTHETIC = planning.ExchangeCost(0.001, (5000.0, 600.0, 500.0, 700.0))


def _plan_check(rank: int, world: int) -> Checks:
    sys.path.insert(0, str(ROOT / "examples" / "benchmarks"))
    import exchange_cost
    import plan_check

    def synthetic_ms(found: list[Any], device: torch.device) -> list[float]:
        us = SYNTHETIC.fixed_us
        return [
            us[planning.Exchanges._fields.index(each.name)] / 1e3 + each.bytes / SYNTHETIC.gbps / 1e6 for each in found
        ]

    def report(*words: str) -> str:
        return plan_check.report(plan_check.parse_args(["--size", "toy", *words]), torch.device("cpu"))

    of_engine = ("--ep_size", "2", "--stage", "1")
    with mock.patch.object(exchange_cost, "slowest_ms", synthetic_ms):
        synthetic = report("--layers", "2", *of_engine, "--gradient_checkpointing")
    real = report("--layers", "1", *of_engine)
    with (
        mock.patch.object(torch.distributed, "get_world_size", return_value=1),
        pytest.raises(ValueError, match="there is one"),
    ):
        report("--calibrate")
    with pytest.raises(ValueError, match="--num_sms is 8, and --backend nccl"):
        report("--calibrate", "--num_sms", "8")
    medians = _medians(exchange_cost, rank)
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        plan_check.main(["--size", "toy", "--calibrate"])
    return Checks(synthetic, real, text.getvalue(), medians)


def _medians(exchange_cost: Any, rank: int) -> list[float]:
    """Of two operations by a clock that they move: the first takes 1 s, 2 s, ... and on rank 1 a hundredth more; the
    second 10 s, on rank 0 a half more."""
    now, calls = [0.0], itertools.count(1)

    def first() -> None:
        now[0] += next(calls) * (1.01 if rank == 1 else 1.0)

    def second() -> None:
        now[0] += 15.0 if rank == 0 else 10.0

    found = [exchange_cost.Operation("dispatch", 0, first), exchange_cost.Operation("combine", 0, second)]
    with mock.patch.object(exchange_cost.time, "perf_counter", lambda: now[0]):
        return exchange_cost.slowest_ms(found, torch.device("cpu"), samples=5)


def _on_two_ranks(rank: int, world: int) -> tuple[list[dict[str, Any]], dict[Any, Any], Checks]:
    exchanges = [_exchange(rank, world, redispatch) for redispatch in (False, True)]
    return exchanges, _states(rank, world), _plan_check(rank, world)


@pytest.fixture(scope="module")
def two_ranks() -> list[tuple[list[dict[str, Any]], dict[Any, Any], Checks]]:
    return run_ranks(2, _on_two_ranks)


@pytest.mark.parametrize("redispatch", [False, True])
def test_wire_bytes_are_what_the_transport_sends(two_ranks: list[Any], redispatch: bool) -> None:
    shape = MoEShape(16, 24, 48, num_experts=8, top_k=2)
    exchanges = [rank[0][redispatch] for rank in two_ranks]
    section = FlashFuseMoEConfig(recompute_dispatch=redispatch)
    times = planning.exchange_counts(checkpointing=False, section=section)
    for rank, seen in enumerate(exchanges):
        back = exchanges[1 - rank]["sent_rows"]  # rows go out with dispatch, those of the other rank with combine
        out, home = (planning.exchange_bytes(shape, rows, 4) for rows in (seen["sent_rows"], back))
        sent_again = times.redispatch * out.redispatch
        assert seen["sent_bytes"] == out.dispatch + sent_again + home.combine + home.combine_grads
    load = expected_load(shape, 4000, 2)
    for rank in range(2):
        rows = sum(seen["rows_to"][rank] for seen in exchanges)
        assert rows == pytest.approx(load.rows, rel=0.02)
        assert exchanges[rank]["sent_rows"] == pytest.approx(load.received, rel=0.02)


@pytest.mark.parametrize("redispatch", [False, True])
def test_kept_bytes_of_an_exchange(two_ranks: list[Any], redispatch: bool) -> None:
    shape = MoEShape(16, 24, 48, num_experts=8, top_k=2)
    exchanges = [rank[0][redispatch] for rank in two_ranks]
    for rank, seen in enumerate(exchanges):
        rows = sum(other["rows_to"][rank] for other in exchanges)
        routes = sum(other["routes_to"][rank] for other in exchanges)
        load = planning.Load(4000, 2, 4, rows, routes, received=0, sent=0)
        kept = planning.kept_bytes(shape, load, 4, FlashFuseMoEConfig(recompute_dispatch=redispatch))
        # The slots are the transport's, which autograd does not see.
        assert seen["kept"] == sum(kept.values()) - kept["slots"]
        assert kept["slots"] == 4 * 4000 * 2


@pytest.mark.parametrize(("ep_size", "stage", "bf16", "kind"), ENGINES)
def test_states_are_a_real_engines(two_ranks: list[Any], ep_size: int, stage: int, bf16: bool, kind: str) -> None:
    from deepspeed.moe.utils import is_moe_param

    import flashfusemoe_ds as ffmoe
    from tests.ds import tiny

    model = tiny.TinyModel(ffmoe.MoE, ep_size)
    sizes = [[p.numel() for p in model.parameters() if is_moe_param(p) is moe] for moe in (False, True)]
    groups = planning.param_groups(*sizes, world=2, ep_size=ep_size)
    itemsize, optimizer = 2 if bf16 else 4, Optimizer("adamw", 8, foreach=kind == "foreach")
    planned = planning.state_bytes(groups, stage, itemsize, optimizer)
    of_ranks = [rank[1][ep_size, stage, bf16, kind] for rank in two_ranks]
    for found in of_ranks:
        assert (found["parameters"], found["master"], found["moments"]) == (
            planned.parameters, planned.master, planned.moments
        )  # fmt: skip
    # Beside the gradients lie an input's, a loss, numbers of routes: up to a kilobyte.
    step = planning.step_bytes(groups, stage, itemsize, optimizer)
    assert step <= max(found["step"] for found in of_ranks) <= step + 1024
    if stage != 1:  # there, those of other ranks are gone by the end of the backward
        busiest = sum(group.held for group in groups) * itemsize if stage else planned.gradients
        assert min(found["gradients"] for found in of_ranks) <= busiest + 1024
        assert busiest <= max(found["gradients"] for found in of_ranks)


def test_plan_check_runs_at_toy_size(two_ranks: list[Any]) -> None:
    checks, other = (rank[2] for rank in two_ranks)
    assert other.calibration == "" and other.real.count("calibrated here: --exchange_gbps") == 1
    assert checks.real.count("| EP 2, ZeRO 1 |") == 6 and checks.real.count("not here") == 3
    for text, batches in ((checks.real, 4), (checks.calibration, 3)):
        rows = re.findall(r"^\| [\d.]+ (?:\| \d+ ){4}\|$", text, re.MULTILINE)
        assert len(rows) == batches
        # What it prints are options of the plan.
        (words,) = re.findall(r"--exchange_gbps .*", text)
        args = plan.parse_args(["--config", "x", "--shape", "x", "--gpus", "2", *words.split()])
        assert args.exchange_gbps > 0 and max(args.exchange_us) > 0


def test_plan_check_on_synthetic_times(two_ranks: list[Any]) -> None:
    """Where times follow the formula, calibration finds its numbers, and what is left between planned and measured
    is rows: a plan has those of the worst rank in every layer."""
    text = two_ranks[0][2].synthetic
    assert "calibrated here: --exchange_gbps 0.001 --exchange_us 5000 600 500 700" in text
    numbers = re.findall(r"\| exchange per step .* \| (MB|ms) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|", text)
    assert [unit for unit, *_ in numbers] == ["MB", "ms", "ms"]
    megabytes, ms = ([float(number) for number in line[1:]] for line in numbers[:2])
    fixed = 2 * (2 * 5.0 + 2 * 0.6 + 0.5 + 0.7)  # two layers, whose forwards run twice
    for size, taken in zip(megabytes[:2], ms[:2], strict=True):
        assert taken == pytest.approx(fixed + size / SYNTHETIC.gbps, rel=1e-3)
    assert 1 <= megabytes[2] < 1.15 and 1 <= ms[2] < megabytes[2]


def test_medians_are_of_the_slowest_rank(two_ranks: list[Any]) -> None:
    # Three calls come before the five samples.
    assert [rank[2].medians for rank in two_ranks] == [pytest.approx([6060.0, 15000.0])] * 2
