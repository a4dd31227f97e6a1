# SPDX-License-Identifier: GPL-3.0-or-later
"""DeepEP's transport: both APIs through fakes on gloo ranks, and refusals. DeepEP itself: test_deep_ep_gpu.py."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

from flashfusemoe_ds.config import DeepEPConfig, FlashFuseMoEConfig
from flashfusemoe_ds.dispatch import deep_ep
from flashfusemoe_ds.dispatch.base import Geometry
from flashfusemoe_ds.dispatch.deep_ep import DeepEPDispatcher, geometry_refusal, machine_refusal
from flashfusemoe_ds.dispatch.select import make_dispatcher
from flashfusemoe_ds.nn.moe_layer import MoELayer
from tests.close import relative_error
from tests.dispatch import contract, fake_deep_ep
from tests.dispatch.fake_deep_ep import WIDE, Rules, installed, package
from tests.distributed import run_ranks

RELEASES = ("1.x", "2.x")
BF16 = torch.bfloat16


def make(group: dist.ProcessGroup, geometry: Geometry) -> DeepEPDispatcher:
    return DeepEPDispatcher(group, geometry, DeepEPConfig(num_sms=6, max_tokens_per_rank=64))


# --- the contract, through fakes ---------------------------------------------------------------------------------


def float64_errors(rank: int, world: int) -> dict[str, float]:
    errors = {}
    for release in RELEASES:
        with installed(package(release, WIDE)):
            found = contract.errors_of_every_case(rank, world, make, hidden_size=6)
        errors |= {f"{release}: {name}": error for name, error in found.items()}
    return errors


@pytest.mark.parametrize("world", [2, 4])
def test_equals_the_dense_layer_in_float64(world: int) -> None:
    for errors in run_ranks(world, float64_errors):
        assert len(errors) == 2 * 4 * len(contract.CASES)
        assert {name: e for name, e in errors.items() if not e < 1e-12} == {}


def bf16_mistakes(rank: int, world: int, topk_idx: torch.dtype) -> list[str]:
    """Under DeepEP's own rules for dtypes and sizes."""
    mistakes = []
    for release in RELEASES:
        with installed(package(release, Rules(topk_idx=topk_idx))):
            found = contract.wrong_in_bf16(rank, world, make, hidden_size=256)
            found += contract.wrong_when_waited_out_of_order(rank, world, make, Geometry(8, 256, 2, BF16))
        mistakes += [f"{release}: {mistake}" for mistake in found]
    return mistakes


@pytest.mark.parametrize(("world", "topk_idx"), [(2, torch.int64), (4, torch.int32)])
def test_bits_in_bf16(world: int, topk_idx: torch.dtype) -> None:
    assert run_ranks(world, bf16_mistakes, topk_idx) == [[]] * world


# --- a whole layer -----------------------------------------------------------------------------------------------


def layer_errors(rank: int, world: int) -> dict[str, float]:
    """A sharded layer with everything that runs beside the exchange, and with activation checkpointing: against
    itself over the all-to-all."""

    def gradients(recompute: bool, with_deep_ep: bool) -> list[torch.Tensor]:
        torch.manual_seed(0)
        layer = MoELayer(8, 16, 8, 3, num_shared_experts=1, latent_dim=6).double().shard_experts(dist.group.WORLD)
        if with_deep_ep:
            layer.dispatcher = make(dist.group.WORLD, Geometry(8, 6, 3, torch.float64))
        x = torch.randn(5 + rank, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))
        x.requires_grad_()
        out = checkpoint(layer, x, use_reentrant=False)[0] if recompute else layer(x)[0]
        out.sin().sum().backward()
        return [out, x.grad, *(p.grad for p in layer.parameters())]

    errors = {}
    expected = gradients(recompute=False, with_deep_ep=False)
    for release in RELEASES:
        for recompute in (False, True):
            with installed(package(release, WIDE)):
                actual = gradients(recompute, with_deep_ep=True)
            pairs = zip(actual, expected, strict=True)
            errors[f"{release}, {recompute=}"] = max(relative_error(a, b) for a, b in pairs)
    return errors


def test_layer_equals_the_layer_over_nccl() -> None:
    for errors in run_ranks(2, layer_errors):
        assert {name: e for name, e in errors.items() if not e < 1e-12} == {}


# --- what each release needs of its caller -----------------------------------------------------------------------


def sms_that_others_set(rank: int, world: int) -> tuple[int, int]:
    """1.x takes its number of SMs from a class attribute, and a replay must have the dispatch's."""
    module = package("1.x")
    with installed(module):
        module.Buffer.set_num_sms(20)
        dispatcher = make(dist.group.WORLD, Geometry(4, 256, 2, BF16))
        left = module.Buffer.num_sms
        x, idx = torch.ones(3, 256, dtype=BF16), torch.tensor([[0, 1], [2, 3], [0, 3]])
        sent = dispatcher.start_dispatch(x, idx, torch.ones(3, 2)).wait()
        module.Buffer.set_num_sms(10)
        dispatcher.start_redispatch(x, sent.handle).wait()
        dispatcher.start_combine(sent.x_RD, sent.handle).rows.wait()
        return left, sent.handle.num_channels


def test_num_sms_is_pinned_and_nobody_elses_is_changed() -> None:
    assert run_ranks(2, sms_that_others_set) == [(20, 3)] * 2


def too_many_tokens(rank: int, world: int, release: str, top_k: int) -> tuple[str, bool]:
    """Only the last rank has more tokens than `max_tokens_per_rank`: what this rank hears, and whether the next call
    is right."""
    with installed(package(release)):
        geometry = Geometry(2 * world, 256, top_k, BF16)
        dispatcher = DeepEPDispatcher(dist.group.WORLD, geometry, DeepEPConfig(max_tokens_per_rank=8))

        def send(num_tokens: int) -> bool:
            x = torch.randn(num_tokens, 256, generator=torch.Generator().manual_seed(rank)).to(BF16)
            idx = torch.rand(num_tokens, geometry.num_experts).topk(top_k, dim=1)[1]
            sent = dispatcher.start_dispatch(x, idx, torch.ones(num_tokens, top_k)).wait()
            weights = torch.where(sent.idx_RK >= 0, sent.weight_RK, 0)
            home = dispatcher.start_combine(sent.x_RD, sent.handle, weights)
            home.rows.wait()
            return torch.equal(home.weights.wait(), torch.ones(num_tokens, top_k))

        try:
            send(11 if rank == world - 1 else 8)
            said = "nothing"
        except ValueError as error:
            said = str(error)
        return said, send(8)


@pytest.mark.parametrize(("world", "top_k"), [(2, 4), (4, 1), (4, 3)])
def test_too_many_tokens_on_one_rank_are_refused_on_all(world: int, top_k: int) -> None:
    message = (
        f"flashfusemoe.deep_ep.max_tokens_per_rank is 8, and in this call 1 of the {world} ranks have more tokens, "
        "up to 11; set it to at least that"
    )
    assert run_ranks(world, too_many_tokens, "2.x", top_k) == [(message, True)] * world


def test_buffers_of_1x_do_not_depend_on_tokens() -> None:
    assert run_ranks(2, too_many_tokens, "1.x", 2) == [("nothing", True)] * 2


def without_gin(rank: int, world: int) -> list[str]:
    """NCCL without GIN, as on a host without RDMA: what each attempt says."""
    geometry = Geometry(4, 256, 2, BF16)
    hybrid = FlashFuseMoEConfig(ep_backend="hybrid")

    def made() -> str:
        return make(dist.group.WORLD, geometry).name

    with installed(package("2.x", Rules(gin=False))):
        said = [said_by(made), make_dispatcher(hybrid, dist.group.WORLD, geometry).name]
        with patch.dict(os.environ, EP_DISABLE_GIN="1"):
            return [*said, made(), make_dispatcher(hybrid, dist.group.WORLD, geometry).name]


def test_one_host_without_rdma_is_told_what_to_set() -> None:
    for alone, hybrid, *with_it in run_ranks(2, without_gin):
        assert alone.startswith("ValueError: ep_backend deep_ep: NCCL has no GIN here")
        assert "EP_DISABLE_GIN=1" in alone and hybrid == "nccl"
        assert with_it == ["deep_ep", "deep_ep"]


def life(rank: int, world: int) -> dict[str, tuple[list[str], list[str]]]:
    """Per release, what was made and destroyed, and what each of these attempts says."""
    lives = {}
    for release in RELEASES:
        module = package(release)
        with installed(module):
            dispatcher = make(dist.group.WORLD, Geometry(4, 256, 2, BF16))
            x, route = torch.ones(1, 256, dtype=BF16), (torch.tensor([[0, 2]]), torch.ones(1, 2))

            def without_answer(
                module: ModuleType = module, dispatcher: DeepEPDispatcher = dispatcher, call: tuple = (x, *route)
            ) -> None:
                buffer = getattr(module, "ElasticBuffer", module.Buffer)
                with patch.object(buffer, "dispatch", side_effect=RuntimeError("DeepEP error: CPU recv timeout")):
                    dispatcher.start_dispatch(*call)

            attempts = (
                lambda d=dispatcher, x=x, route=route: d.start_dispatch(x.float(), *route),
                without_answer,
                lambda d=dispatcher: [d.close(), d.close()],
                lambda d=dispatcher, x=x, route=route: d.start_dispatch(x, *route),
            )
            lives[release] = (module.log, [said_by(attempt) for attempt in attempts])
    return lives


def said_by(attempt: Callable[[], object]) -> str:
    try:
        attempt()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


@pytest.mark.parametrize("release", RELEASES)
def test_life_of_a_transport(lives: list[dict[str, tuple[list[str], list[str]]]], release: str) -> None:
    for rank, (log, said) in enumerate(life[release] for life in lives):
        assert log == ["made", "destroyed"]
        assert said[0].startswith(
            "ValueError: ep_backend deep_ep was set up for rows of torch.bfloat16 and got torch.fl"
        )
        assert said[1].startswith(
            f"RuntimeError: ep_backend deep_ep: dispatch failed on rank {rank} of the expert-par"
        )
        assert "[0, 1]" in said[1] and said[1].endswith("(DeepEP error: CPU recv timeout)")
        assert said[2] == "nothing"
        assert said[3] == "ValueError: ep_backend deep_ep: the transport was closed, and a layer still uses it"


@pytest.fixture(scope="module")
def lives() -> list[dict[str, tuple[list[str], list[str]]]]:
    return run_ranks(2, life)


# --- refusals ----------------------------------------------------------------------------------------------------


def geometry(**changes: object) -> Geometry:
    return Geometry(**{"num_experts": 64, "hidden_size": 2048, "top_k": 8, "dtype": BF16, **changes})


# (release, ep_size, geometry, settings, message or None)
GEOMETRIES: dict[str, tuple[str, int, Geometry, DeepEPConfig, str | None]] = {
    "fits 1.x": ("1.x", 8, geometry(), DeepEPConfig(), None),
    "fits 2.x": ("2.x", 2, geometry(), DeepEPConfig(), None),
    "any number of ranks, 2.x": ("2.x", 6, geometry(num_experts=66), DeepEPConfig(), None),
    "hidden 8192, 2.x": ("2.x", 2, geometry(hidden_size=8192), DeepEPConfig(), None),
    "hidden 7936, 1.x": ("1.x", 2, geometry(hidden_size=7936), DeepEPConfig(), None),
    "one rank": ("1.x", 1, geometry(), DeepEPConfig(), "Unsupported number of EP ranks: 1"),
    "three ranks": ("1.x", 3, geometry(num_experts=63), DeepEPConfig(), "ep_size 3: DeepEP 1.x takes 2, 4, 8 and"),
    "six ranks": ("1.x", 6, geometry(num_experts=66), DeepEPConfig(), "ep_size 6: DeepEP 1.x takes 2, 4, 8 and"),
    "sixteen ranks without NVSHMEM": ("1.x", 16, geometry(), DeepEPConfig(), "NVSHMEM is disabled during compilation"),
    "ragged experts": ("2.x", 6, geometry(), DeepEPConfig(), "ep_size is 6; it must divide num_experts (64)"),
    "hidden 8192": ("1.x", 2, geometry(hidden_size=8192), DeepEPConfig(), "DeepEP 1.x takes up to 8176 within a host"),
    "hidden 128": ("1.x", 2, geometry(hidden_size=128), DeepEPConfig(), "hidden size 128: DeepEP 1.x takes mult"),
    "hidden 1152": ("2.x", 2, geometry(hidden_size=1152), DeepEPConfig(), "hidden size 1152: DeepEP 2.x takes mult"),
    "hidden 1152, 1.x": ("1.x", 2, geometry(hidden_size=1152), DeepEPConfig(), "DeepEP 1.x takes multiples of 256"),
    "float16": ("2.x", 2, geometry(dtype=torch.float16), DeepEPConfig(), "rows of float16: DeepEP adds up bfloat16"),
    "float32": ("1.x", 2, geometry(dtype=torch.float32), DeepEPConfig(), "rows of float32: DeepEP adds up bfloat16"),
    "top_k": ("2.x", 2, geometry(top_k=33), DeepEPConfig(), "top_k 33: DeepEP takes up to 32"),
    "experts of a rank, 1.x": ("1.x", 2, geometry(num_experts=512), DeepEPConfig(), "256 experts per rank"),
    "experts of a rank, 2.x": ("2.x", 2, geometry(num_experts=512), DeepEPConfig(), "512 experts, 256 per rank"),
    "capacity": ("2.x", 64, geometry(), DeepEPConfig(max_tokens_per_rank=7), "max_tokens_per_rank is 7, less than"),
}  # fmt: skip


@pytest.mark.parametrize("name", GEOMETRIES)
def test_what_does_not_fit_is_refused(name: str) -> None:
    release, ep_size, asked, settings, message = GEOMETRIES[name]
    with installed(package(release)):
        reason = geometry_refusal(ep_size, asked, settings)
    assert reason is None if message is None else message in str(reason)


@pytest.mark.parametrize(
    ("release", "nccl", "message"),
    [
        ("1.x", (2, 18, 3), None),
        ("2.x", (2, 30, 4), None),
        ("2.x", None, None),
        ("2.x", (2, 28, 9), "DeepEP 2.x needs NCCL 2.30.4 or newer; the NCCL library in this process is 2.28.9"),
        ("hybrid-ep", (2, 30, 7), "package deep_ep has neither Buffer nor ElasticBuffer"),
    ],
)
def test_machines(release: str, nccl: tuple[int, int, int] | None, message: str | None) -> None:
    with installed(package(release), nccl):
        reason = machine_refusal()
    assert reason is None if message is None else str(reason).startswith(message)


def test_an_import_that_fails_keeps_its_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deep_ep.py").write_text("raise AssertionError('Invalid NCCL versions:\\n2.28 v.s. 2.30')\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "deep_ep", raising=False)
    monkeypatch.setattr(deep_ep, "_gpu_refusal", lambda: None)
    monkeypatch.setattr(deep_ep, "loaded_nccl_version", lambda: (2, 28, 9))
    assert machine_refusal() == (
        "package deep_ep does not import (AssertionError: Invalid NCCL versions: 2.28 v.s. 2.30); the NCCL library in "
        "this process is 2.28.9"
    )


def test_more_sms_than_the_gpu_has(monkeypatch: pytest.MonkeyPatch) -> None:
    with installed(package("2.x")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        h200 = SimpleNamespace(multi_processor_count=132)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: h200)
        reason = geometry_refusal(2, geometry(), DeepEPConfig(num_sms=134))
        assert geometry_refusal(2, geometry(), DeepEPConfig(num_sms=132)) is None
    assert reason == "deep_ep.num_sms is 134; this GPU has 132"


def test_deterministic_torch_must_not_fill_buffers() -> None:
    with installed(package("2.x")):
        torch.use_deterministic_algorithms(True)
        try:
            assert "fill_uninitialized_memory = False" in str(machine_refusal())
            torch.utils.deterministic.fill_uninitialized_memory = False
            assert machine_refusal() is None
        finally:
            torch.use_deterministic_algorithms(False)
            torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without GPUs")
def test_without_gpus_and_without_nccl() -> None:
    assert machine_refusal() == "it needs CUDA GPUs, and torch sees none"


def test_the_loaded_nccl_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    class Library:
        def __init__(self, name: str, mode: int) -> None:
            assert name == "libnccl.so.2"

        def ncclGetVersion(self, pointer: object) -> None:
            pointer._obj.value = 23007

    monkeypatch.setattr(deep_ep.ctypes, "CDLL", Library)
    assert deep_ep.loaded_nccl_version() == (2, 30, 7)


# --- the fakes themselves ----------------------------------------------------------------------------------------

X, IDS, ONES = torch.ones(3, 256, dtype=BF16), torch.tensor([[0, 1], [2, 3], [0, 3]]), torch.ones(3, 2)


def elastic_call(**changes: object) -> Callable[[object], object]:
    call = {"x": X, "topk_idx": IDS, "topk_weights": ONES, "num_experts": 4, "num_sms": 6, **changes}
    return lambda buffer: buffer.dispatch(**call)


def elastic_replay(**changes: object) -> Callable[[object], object]:
    def replay(buffer: object) -> object:
        handle = buffer.dispatch(X, IDS, ONES, num_experts=4, num_sms=6)[3]
        return buffer.dispatch(**{"x": X, "handle": handle, "num_sms": 6, **changes})

    return replay


MISUSES: dict[str, Callable[[object], object]] = {
    "a parameter that is not there": elastic_call(async_finish=True),
    "float32 rows": elastic_call(x=X.float()),
    "rows with gaps": elastic_call(x=torch.ones(3, 512, dtype=BF16)[:, ::2]),
    "too many rows": elastic_call(x=torch.ones(65, 256, dtype=BF16)),
    "int32 ids": elastic_call(topk_idx=IDS.int()),
    "an expert twice": elastic_call(topk_idx=torch.tensor([[0, 0], [1, 2], [1, 3]])),
    "SMs by heuristic": elastic_call(num_sms=0),
    "bf16 weights": elastic_call(topk_weights=ONES.to(BF16)),
    "an event without its allocation": elastic_call(previous_event=fake_deep_ep.EventHandle()),
    "a replay with ids": elastic_replay(topk_idx=IDS),
    "a replay with other SMs": elastic_replay(num_sms=8),
    "a replay that expands": elastic_replay(do_expand=True),
    "a replay that counts": elastic_replay(do_cpu_sync=True),
}


def caught_misuses(rank: int, world: int) -> list[str]:
    module = package("2.x")
    caught = []
    for name, misuse in MISUSES.items():
        buffer = module.ElasticBuffer(dist.group.WORLD, num_max_tokens_per_rank=64, hidden=256, num_topk=2)
        elastic_replay()(buffer)
        try:
            misuse(buffer)
        except (TypeError, AssertionError):
            caught.append(name)
    return caught


def test_the_fake_catches_what_deep_ep_would() -> None:
    assert run_ranks(2, caught_misuses) == [list(MISUSES)] * 2
