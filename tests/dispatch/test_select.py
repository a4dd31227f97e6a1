# SPDX-License-Identifier: GPL-3.0-or-later
"""Which transport the ranks of a group take, alike, and why not another; and what layers share."""

from __future__ import annotations

import gc
import logging
from contextlib import ExitStack
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from flashfusemoe_ds import FlashFuseMoEConfig
from flashfusemoe_ds.dispatch import select
from flashfusemoe_ds.dispatch.agreement import Place, access_refusal
from flashfusemoe_ds.dispatch.base import Geometry
from flashfusemoe_ds.dispatch.select import EP_BACKENDS, check_ep_backend, close_dispatcher, make_dispatcher
from tests.dispatch.fake_deep_ep import as_module, installed, missing, package
from tests.distributed import run_ranks

GEOMETRY = Geometry(num_experts=8, hidden_size=256, top_k=2, dtype=torch.bfloat16)
DEEP_EP = FlashFuseMoEConfig(ep_backend="deep_ep")
HYBRID = FlashFuseMoEConfig(ep_backend="hybrid")


class Heard(logging.Handler):
    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []
        select.logger.addHandler(self)
        select.logger.setLevel(logging.INFO)

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def attempt(fn: Any) -> str:
    try:
        return fn().name
    except (ValueError, ImportError) as error:
        return f"{type(error).__name__}: {error}"


# what is on rank r, by scenario: (release, NCCL), or None where the package is missing
MACHINES: dict[str, list[tuple[str, tuple[int, int, int]] | None]] = {
    "everywhere": [("2.x", (2, 30, 7))] * 4,
    "missing on one": [("2.x", (2, 30, 7)), None, ("2.x", (2, 30, 7)), ("2.x", (2, 30, 7))],
    "missing everywhere": [None] * 4,
    "old NCCL on two": [("2.x", (2, 30, 7)), ("2.x", (2, 28, 9)), ("2.x", (2, 30, 7)), ("2.x", (2, 28, 9))],
    "broken on one": [("2.x", (2, 30, 7)), ("2.x", (2, 30, 7)), ("broken", (2, 30, 7)), ("2.x", (2, 30, 7))],
    "different reasons": [("hybrid-ep", (2, 30, 7)), ("2.x", (2, 28, 9)), ("2.x", (2, 30, 7)), None],
}


def on_machines(rank: int, world: int) -> dict[str, Any]:
    """What every rank hears in each scenario; with symm_mem out of reach, as on a CPU."""
    heard: dict[str, Any] = {}
    log = Heard()
    group = dist.group.WORLD
    for scenario, machines in MACHINES.items():
        with ExitStack() as stack:
            machine = machines[rank]
            stack.enter_context(missing() if machine is None else installed(package(machine[0]), machine[1]))
            log.lines.clear()
            heard[scenario] = {
                "deep_ep": attempt(lambda: make_dispatcher(DEEP_EP, group, GEOMETRY)),
                "check": attempt(lambda: check_ep_backend("deep_ep", group) or NoError()),
                # Three layers, of which two are alike.
                "hybrid": [attempt(lambda g=g: make_dispatcher(HYBRID, group, g)) for g in (GEOMETRY, GEOMETRY, ODD)],
                "log": list(log.lines),
            }
    return heard


ODD = Geometry(num_experts=8, hidden_size=1152, top_k=2, dtype=torch.bfloat16)


class NoError:
    name = "no error"


@pytest.fixture(scope="module")
def heard() -> list[dict[str, Any]]:
    return run_ranks(4, on_machines)


OLD = "DeepEP 2.x needs NCCL 2.30.4 or newer; the NCCL library in this process is 2.28.9"


REFUSALS = {
    "missing on one": "ImportError: ep_backend 'deep_ep' cannot be used: on rank 1: package deep_ep is not installed",
    "missing everywhere": "ImportError: ep_backend 'deep_ep' cannot be used: package deep_ep is not installed",
    "old NCCL on two": f"ValueError: ep_backend 'deep_ep' cannot be used: on ranks 1, 3: {OLD}. Usable here: nccl",
    "broken on one": "ValueError: ep_backend 'deep_ep' cannot be used: on rank 2: the check failed (ValueError: ",
    "different reasons": "ImportError: ep_backend 'deep_ep' cannot be used: on rank 0: package deep_ep has neither",
}


@pytest.mark.parametrize("scenario", REFUSALS)
def test_one_ranks_reason_is_every_ranks_error(heard: list[dict[str, Any]], scenario: str) -> None:
    for rank in heard:
        assert rank[scenario]["deep_ep"].startswith(REFUSALS[scenario])
        assert rank[scenario]["deep_ep"] == rank[scenario]["check"] == heard[0][scenario]["deep_ep"]
        assert rank[scenario]["hybrid"] == ["nccl"] * 3
    if scenario == "different reasons":
        text = heard[0][scenario]["deep_ep"]
        assert f"; on rank 1: {OLD}; on rank 3: package deep_ep is not installed" in text


def test_hybrid_takes_deep_ep_where_it_fits_and_says_so_once(heard: list[dict[str, Any]]) -> None:
    for rank in heard:
        assert rank["everywhere"]["deep_ep"] == "deep_ep" and rank["everywhere"]["check"] == "no error"
        assert rank["everywhere"]["hybrid"] == ["deep_ep", "deep_ep", "nccl"]
    said = heard[0]["everywhere"]["log"]
    assert len(said) == 2
    assert said[0].startswith("ep_backend hybrid takes deep_ep for layers of Geometry(num_experts=8, hidden_size=256")
    assert "hybrid takes nccl" in said[1]
    assert "not deep_ep: hidden size 1152: DeepEP 2.x takes multiples of 256; not symm_mem: " in said[1]
    assert all(rank["everywhere"]["log"] == [] for rank in heard[1:])


def sharing(rank: int, world: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    group = dist.group.WORLD
    module = package("2.x")
    with installed(module):
        layers = [make_dispatcher(DEEP_EP, group, GEOMETRY) for _ in range(3)]
        found["one for equal layers"] = len({id(d) for d in layers}) == 1 and module.log == ["made"]
        other = FlashFuseMoEConfig(ep_backend="deep_ep", deep_ep={"num_sms": 8})
        others = [
            make_dispatcher(HYBRID, group, GEOMETRY),
            make_dispatcher(DEEP_EP, group, Geometry(16, 256, 2, torch.bfloat16)),
            make_dispatcher(other, group, GEOMETRY),
            make_dispatcher(DEEP_EP, dist.new_group(list(range(world))), GEOMETRY),
        ]
        found["hybrid shares with deep_ep"] = others[0] is layers[0]
        found["another for others"] = len({id(d) for d in others}) == 4 and module.log == ["made"] * 4

        # Rank 0 lets go of its transport, the others keep theirs: nobody may share it any more.
        if rank == 0:
            layers, others = [], others[1:]
            gc.collect()
        found["gone on one rank, new on all"] = make_dispatcher(DEEP_EP, group, GEOMETRY) not in layers
        found["made again"] = module.log == ["made"] * 5

        module.log.clear()
        kept = make_dispatcher(DEEP_EP, group, GEOMETRY)
        for _ in range(3):
            close_dispatcher(kept)
        close_dispatcher(make_dispatcher(FlashFuseMoEConfig(), group, GEOMETRY))
        found["closed once"] = module.log.count("destroyed") == 1
        found["not shared when closed"] = make_dispatcher(DEEP_EP, group, GEOMETRY) is not kept
    return found


def test_layers_share_a_transport_while_one_of_them_lives() -> None:
    for found in run_ranks(2, sharing):
        assert all(found.values()), found


def two_groups(rank: int, world: int) -> list[str]:
    """Expert-parallel groups decide by themselves: in the second, one rank has no deep_ep."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    with ExitStack() as stack:
        stack.enter_context(missing() if rank == 3 else installed(package("1.x")))
        return [attempt(lambda c=c: make_dispatcher(c, groups[rank // 2], GEOMETRY)) for c in (HYBRID, DEEP_EP)]


def test_groups_decide_by_themselves_and_name_global_ranks() -> None:
    (first, second, third, fourth) = run_ranks(4, two_groups)
    assert first == second == ["deep_ep", "deep_ep"]
    assert third == fourth
    assert third[0] == "nccl" and "cannot be used: on rank 3: package deep_ep is not installed" in third[1]


def test_peer_access(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process that sees GPUs 0 to 2 and runs on the first; it reaches 1 and not 2, and does not see 3."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 3)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=f"gpu{index}"))
    monkeypatch.setattr(torch.cuda, "can_device_access_peer", lambda mine, other: (mine, other) != (0, 2))

    def refusal(*places: tuple[str, str | None]) -> str | None:
        named = [Place(*place) for place in places]
        return access_refusal(named, named[0])

    assert refusal(("a", "gpu0"), ("a", "gpu1"), ("a", "gpu3"), ("b", "gpu2")) is None
    assert refusal(("a", "gpu0"), ("a", "gpu1"), ("a", "gpu2")) == "GPU 0 has no peer access to GPU 2"
    assert refusal(("a", "gpu0"), ("a", "gpu1"), ("a", "gpu1")) == "two ranks share a GPU"
    assert refusal(("a", None), ("a", None)) is None


def apart(rank: int, world: int, fails: bool) -> list[str]:
    """symm_mem on two hosts, or, on one, whose set-up fails."""
    place = Place(f"host{0 if fails else rank}", None)
    fake = ModuleType("symm_mem")
    fake.machine_refusal, fake.geometry_refusal = lambda: None, lambda *sizes: None

    def fail(*args: Any) -> None:
        raise ValueError("symm_mem cannot be used: rank 1: no memory")

    fake.SymmMemDispatcher = fail
    with (
        missing(),
        patch.object(select, "this_place", lambda: place),
        as_module("flashfusemoe_ds.dispatch.symm_mem", fake),
    ):
        configs = FlashFuseMoEConfig(ep_backend="symm_mem"), HYBRID
        return [attempt(lambda c=c: make_dispatcher(c, dist.group.WORLD, GEOMETRY)) for c in configs]


def test_symm_mem_is_for_one_host_and_may_fail_alike() -> None:
    message = "ep_backend 'symm_mem' cannot be used: it works within one host, and the ranks are on 2"
    for said, name in run_ranks(2, apart, False):
        assert said.startswith(f"ValueError: {message}") and name == "nccl"
    for said, name in run_ranks(2, apart, True):
        assert said == "ValueError: symm_mem cannot be used: rank 1: no memory" and name == "nccl"


def test_without_a_group_the_reasons_are_this_machines() -> None:
    assert select.why_not("nccl") is None and select.why_not("hybrid") is None
    assert "unknown; valid: nccl, deep_ep, symm_mem, hybrid" in str(select.why_not("gloo"))
    with installed(package("2.x")):
        assert select.why_not("deep_ep") is None
        assert select.resolve_hybrid() == ("deep_ep", "deep_ep is usable")
    with installed(package("hybrid-ep")):
        with pytest.raises(ValueError, match=r"neither Buffer nor ElasticBuffer.*Usable here: nccl, hybrid"):
            check_ep_backend("deep_ep")
        assert "deep_ep: package deep_ep has neither Buffer" in select.resolve_hybrid()[1]
    for ep_backend in EP_BACKENDS:
        assert make_dispatcher(FlashFuseMoEConfig(ep_backend=ep_backend), None, GEOMETRY).name == "local"
