# SPDX-License-Identifier: GPL-3.0-or-later
"""The symm_mem transport without GPUs: its dispatcher on gloo ranks, against the nccl transport; settings, refusals.

The slabs are files that all ranks map, the kernels run in Triton's interpreter, and a barrier of gloo stands where
GPUs wait for flags. Streams are left out. tests/dispatch/test_symm_mem_gpu.py has the rest.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from flashfusemoe_ds.config import FlashFuseMoEConfig, SymmMemConfig
from flashfusemoe_ds.dispatch import symm_mem
from flashfusemoe_ds.dispatch.agreement import Place
from flashfusemoe_ds.dispatch.base import Dispatcher, Geometry, Pending, combine, dispatch
from flashfusemoe_ds.dispatch.host_copy import HostCopy
from flashfusemoe_ds.dispatch.nccl import NcclDispatcher
from flashfusemoe_ds.dispatch.symm_mem import SymmMemDispatcher, geometry_refusal, machine_refusal
from flashfusemoe_ds.kernels import peer
from flashfusemoe_ds.kernels.activation import ACTIVATIONS
from flashfusemoe_ds.kernels.experts import experts
from flashfusemoe_ds.kernels.grouped_gemm import ReferenceGemm
from flashfusemoe_ds.kernels.products import TorchProducts
from flashfusemoe_ds.types import Routing
from tests.dispatch.contract import CASES, routes
from tests.distributed import run_ranks

D, F, MAX_TOKENS = 8, 4, 16
GEOMETRY = Geometry(num_experts=8, hidden_size=D, top_k=2, dtype=torch.float32)


class OnCpu(SymmMemDispatcher):
    """The dispatcher with slabs in files and nothing of CUDA."""

    def __init__(self, folder: str, geometry: Geometry, settings: SymmMemConfig) -> None:
        self.ep_size, rank = dist.get_world_size(), dist.get_rank()
        self.global_ranks = list(range(self.ep_size))
        self.settings, self.top_k, self.timeout_s = settings, geometry.top_k, 1.0
        self.num_local_experts = geometry.num_experts // self.ep_size
        slab = symm_mem.slab_of(self.ep_size, geometry, settings)
        paths = [Path(folder) / f"{geometry.num_experts}-{geometry.top_k}-{r}" for r in range(self.ep_size)]
        paths[rank].write_bytes(bytes(slab.num_bytes))
        dist.barrier()
        self._memory = [torch.from_file(str(p), shared=True, size=slab.num_bytes, dtype=torch.uint8) for p in paths]
        zeros = torch.zeros(3, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        addresses = torch.tensor([m.data_ptr() for m in self._memory])
        self._peers = peer.Peers(rank, slab, addresses, *zeros, num_programs=2, timeout_ns=1, wait=False)
        self._copies = SimpleNamespace(
            start=lambda counts: HostCopy(counts.clone(), SimpleNamespace(synchronize=lambda: None)),
            read=lambda copy: copy.values.tolist(),
        )

    def _follow_current_stream(self) -> None:
        pass

    def _capturing(self) -> bool:
        return False

    def _done(self) -> None:
        pass

    def _pending(self, result: Any, done: None, *read: Any) -> Pending[Any]:
        return Pending(lambda: result)


def meet_over_gloo(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small tiles, for the interpreter; a barrier where kernels would wait, then what they would do next."""
    for name, size in (("TILE_WORDS", 64), ("SUM_BYTES", 1024), ("PLACE_ENTRIES", 64), ("FLAT", 32)):
        monkeypatch.setattr(peer, name, size)
    stage_dispatch, stage_rows = peer.stage_dispatch, peer.stage_rows

    def dispatch_then_meet(peers, x, idx, weight, local_experts, max_rows, max_routes):
        pos_TP, plan = stage_dispatch(peers, x, idx, weight, local_experts, max_rows, max_routes)
        dist.barrier()
        peer.plan_dispatch(peers, plan, max_rows, max_routes)
        return pos_TP, plan

    def rows_then_meet(*args: Any, **kwargs: Any) -> None:
        stage_rows(*args, **kwargs)
        dist.barrier()

    monkeypatch.setattr(peer, "stage_dispatch", dispatch_then_meet)
    monkeypatch.setattr(peer, "stage_rows", rows_then_meet)


def tokens_and_routes(case: str, rank: int, world: int, top_k: int, num_experts: int):
    idx, g = routes(case, rank, world, top_k, num_experts)
    rows = len(idx)
    return torch.randn(rows, D, generator=g), torch.rand(rows, top_k, generator=g), idx


def layer(dispatcher: Dispatcher, data: tuple[torch.Tensor, ...], num_experts: int) -> list[torch.Tensor]:
    """What arrives, the output, and all gradients, of a layer of random experts."""
    x, weight, idx = data
    g = torch.Generator().manual_seed(3)
    local = slice(dist.get_rank() * num_experts // dispatcher.ep_size, None)
    local_experts = num_experts // dispatcher.ep_size
    up = torch.randn(num_experts, 2 * F, D, generator=g)[local][:local_experts]
    down = torch.randn(num_experts, D, F, generator=g)[local][:local_experts]
    leaves = [t.clone().requires_grad_() for t in (x, weight, up, down)]
    sent = dispatch(dispatcher, leaves[0], Routing(idx, leaves[1], torch.zeros(num_experts)))
    rows = int((sent.idx_RK >= 0).any(1).sum())
    y = experts(sent.x_RD, sent.idx_RK, sent.weight_RK, *leaves[2:], ACTIVATIONS["swiglu"],
                TorchProducts(ReferenceGemm()), num_routes=sent.num_routes)  # fmt: skip
    out = combine(dispatcher, y, sent.handle)
    (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum().backward()
    arrived = [t[:rows] for t in (sent.x_RD, sent.idx_RK, sent.weight_RK)]
    return [t.detach() for t in (*arrived, out, *(leaf.grad for leaf in leaves))]


# (world, K, E, capacity_factor, cases)
LAYERS = (
    (2, 3, 8, None, CASES),
    (2, 1, 2, 2.0, ("uneven", "a rank without tokens", "all to rank 0")),
    (3, 4, 12, 3.0, ("uneven", "dropped")),
)


def every_case(rank: int, world: int, folder: str) -> dict[str, list[int]]:
    """By case, how many entries differ from those of the nccl transport, in each of `layer`'s tensors."""
    found = {}
    with pytest.MonkeyPatch.context() as monkeypatch:
        meet_over_gloo(monkeypatch)
        for _, top_k, num_experts, factor, cases in (layer for layer in LAYERS if layer[0] == world):
            geometry = replace(GEOMETRY, num_experts=num_experts, top_k=top_k)
            settings = SymmMemConfig(max_tokens_per_rank=MAX_TOKENS, capacity_factor=factor)
            ours, nccl = OnCpu(folder, geometry, settings), NcclDispatcher(dist.group.WORLD, num_experts)
            for case in cases:
                data = tokens_and_routes(case, rank, world, top_k, num_experts)
                pairs = zip(layer(ours, data, num_experts), layer(nccl, data, num_experts), strict=True)
                label = f"{case}, K={top_k}, E={num_experts}, capacity_factor={factor}"
                found[label] = [int((a != b).sum()) if a.shape == b.shape else -1 for a, b in pairs]
            ours.raise_if_failed()
    return found


@pytest.mark.parametrize("world", [2, 3])
def test_equals_nccl_in_every_bit(world: int, tmp_path: Path) -> None:
    for found in run_ranks(world, every_case, str(tmp_path)):
        assert {case: n for case, n in found.items() if any(n)} == {}


def errors(rank: int, world: int, folder: str) -> list[str]:
    """What goes wrong, and what each rank is told at once and later."""
    said = []

    def attempt(fn: Any) -> None:
        try:
            said.append(str(fn()))
        except (ValueError, RuntimeError) as error:
            said.append(f"{type(error).__name__}: {error}")

    def make(name: str, **settings: Any) -> OnCpu:
        (Path(folder) / name).mkdir(exist_ok=True)
        return OnCpu(f"{folder}/{name}", GEOMETRY, SymmMemConfig(max_tokens_per_rank=MAX_TOKENS, **settings))

    with pytest.MonkeyPatch.context() as monkeypatch:
        meet_over_gloo(monkeypatch)
        x, weight, idx = tokens_and_routes("all to rank 0", rank, world, 2, 8)

        # Eight tokens of every rank, two routes each, all to rank 0.
        tight = make("tight", capacity_factor=0.75)
        sent = tight.start_dispatch(x, idx, weight).wait()
        said.append(f"{sent.x_RD.shape[0]} rows, {sent.num_routes} routes, nan {bool(sent.x_RD.isnan().all())}")
        attempt(lambda: tight.start_combine(sent.x_RD, sent.handle) if rank == 0 else "waits for rank 0")
        said.append(str([bool(m[:8].view(torch.int64) >= 1 << 62) for m in tight._memory]))

        dispatcher = make("tokens")
        many = [torch.cat([t] * 3) for t in (x, idx, weight)]
        attempt(lambda: dispatcher.start_dispatch(*many))
        attempt(lambda: dispatcher.start_redispatch(many[0], None))
        dist.barrier()
        wide = make("wide")
        attempt(lambda: wide.start_dispatch(torch.zeros(3, 2 * D), idx[:3], weight[:3]))
        odd = make("odd")
        attempt(lambda: odd.start_dispatch(x[:, :6].contiguous(), idx, weight))
        double = make("double")
        attempt(lambda: double.start_dispatch(x.double()[:, :4].contiguous(), idx, weight))
    return said


def test_errors_say_what_to_change(tmp_path: Path) -> None:
    first, second = run_ranks(2, errors, str(tmp_path))
    assert first[0] == "24 rows, 24 routes, nan True"
    assert first[1] == (
        "RuntimeError: symm_mem dispatch failed on rank 0: 32 routes arrived, and symm_mem.capacity_factor (0.75) "
        "leaves room for 24. Raise it, or leave it out"
    )
    assert first[2] == "[True, True]", "rank 0 must have told everybody"
    assert second[0].startswith("24 rows, 24 routes")
    for rank, said in enumerate((first, second)):
        assert (
            said[3]
            == f"ValueError: symm_mem dispatch: rank {rank} sends 24 tokens; symm_mem.max_tokens_per_rank is 16"
        )
        assert said[4].startswith(f"RuntimeError: symm_mem dispatch failed on rank {rank}: rank(s) {rank} gave up")
        assert said[5].endswith("sends rows of 64 bytes; valid: multiples of 16 up to 32")
        assert said[6].endswith("sends rows of 24 bytes; valid: multiples of 16 up to 32")
        assert "sends rows of torch.float64; valid: torch.bfloat16, torch.float16, torch.float32" in said[7]


def refused_alike(rank: int, world: int) -> list[str]:
    """Set-up that one rank alone speaks against."""
    said = []
    for patch in (
        ("this_place", lambda: Place(f"host{rank} boot", None)),
        ("machine_refusal", lambda: "it has no arms" if rank == 1 else None),
    ):
        with pytest.MonkeyPatch.context() as monkeypatch:
            monkeypatch.setattr(symm_mem, *patch)
            try:
                SymmMemDispatcher(dist.group.WORLD, GEOMETRY, SymmMemConfig())
            except ValueError as error:
                said.append(str(error))
    try:
        SymmMemDispatcher(dist.group.WORLD, GEOMETRY, SymmMemConfig(max_tokens_per_rank=100 + rank))
    except ValueError as error:
        said.append(str(error))
    return said


def test_what_one_rank_cannot_do_no_rank_does() -> None:
    for said in run_ranks(2, refused_alike):
        assert said[0] == "symm_mem: the ranks of the group are on several hosts (host0, host1)"
        assert said[1] == "symm_mem cannot be used: on rank 1: it has no arms"
        assert said[2].startswith("symm_mem: ranks differ in what they will exchange")


@pytest.mark.parametrize(
    ("ep_size", "change", "settings", "reason"),
    [
        (3, {}, {}, "ep_size is 3; it must divide num_experts (8)"),
        (32, {"num_experts": 64}, {}, "ep_size is 32; at most 16 GPUs"),
        (2, {"dtype": torch.float64}, {}, "rows are torch.float64; valid: torch.bfloat16"),
        (2, {"hidden_size": 12, "dtype": torch.bfloat16}, {}, "have 24 bytes; it must be a multiple of 16"),
        (2, {}, {"max_tokens_per_rank": 2**30}, "it must be at most 536870911"),
    ],
)
def test_sizes_that_are_refused(ep_size: int, change: dict, settings: dict, reason: str) -> None:
    assert reason in geometry_refusal(ep_size, replace(GEOMETRY, **change), SymmMemConfig(**settings))
    assert geometry_refusal(2, GEOMETRY, SymmMemConfig()) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without GPUs")
def test_a_machine_without_gpus_is_refused() -> None:
    assert machine_refusal() == "it needs CUDA GPUs, and torch sees none"


def test_capacity_factor_is_positive() -> None:
    assert FlashFuseMoEConfig.from_section({"symm_mem": {"capacity_factor": 2}}).symm_mem.capacity_factor == 2.0
    with pytest.raises(
        ValueError, match=r"flashfusemoe.symm_mem.capacity_factor is 0; input should be greater than 0"
    ):
        FlashFuseMoEConfig.from_section({"symm_mem": {"capacity_factor": 0}})


def room(ep_size: int, top_k: int, local_experts: int, **settings: Any) -> tuple[int, int]:
    dispatcher = object.__new__(SymmMemDispatcher)
    dispatcher.ep_size, dispatcher.top_k, dispatcher.num_local_experts = ep_size, top_k, local_experts
    dispatcher.settings = SymmMemConfig(**settings)
    return dispatcher._room()


def test_room() -> None:
    """Rows and routes: enough for any routing, or as many as the factor says, never more than can come."""
    assert room(4, 8, 2, max_tokens_per_rank=100) == (400, 800)
    assert room(4, 8, 16, max_tokens_per_rank=100, capacity_factor=1.25) == (400, 1000)
    assert room(4, 2, 16, max_tokens_per_rank=100, capacity_factor=1.25) == (250, 250)
    assert room(2, 2, 16, max_tokens_per_rank=100, capacity_factor=50) == (200, 400)
