# SPDX-License-Identifier: GPL-3.0-or-later
"""The kernels of symm_mem, P ranks taking turns in one process: rows, integers and sums against plain PyTorch.

What a rank would read over NVLink are tensors of this process. What is missing is the waiting: see
tests/dispatch/test_symm_mem_gpu.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from flashfusemoe_ds.kernels import peer
from flashfusemoe_ds.kernels.peer import Peers
from flashfusemoe_ds.kernels.peer_slab import HEADER_BYTES, NO_ROOM, PEER_FAILED, TIMED_OUT, Failure, Slab
from tests.dispatch.contract import CASES, routes

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ROOM = 2**31 - 1


@pytest.fixture(autouse=True)
def small_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The interpreter pays for every element of a tile, used or not."""
    if "as they are" not in request.node.name:
        for name, size in (("TILE_WORDS", 256), ("SUM_BYTES", 2048), ("PLACE_ENTRIES", 64), ("FLAT", 64)):
            monkeypatch.setattr(peer, name, size)


@dataclass
class Sent:
    """What one rank holds after a dispatch."""

    x_TD: Tensor
    pos_TP: Tensor
    plan: Tensor
    x_RD: Tensor
    idx_RK: Tensor
    weight_RK: Tensor
    origin_R: Tensor

    @property
    def num_rows(self) -> int:
        return int(self.plan[-2])


class Ranks:
    """P ranks of one process. Every exchange runs phase by phase: all ranks stage, then all fetch."""

    def __init__(self, num_ranks: int, num_experts: int, max_tokens: int, top_k: int, row_bytes: int) -> None:
        slab = Slab(num_ranks, max_tokens, top_k, row_bytes)
        self.local_experts = num_experts // num_ranks
        # Junk, not zeros, wherever no flag lies: nothing may be read that was not written.
        self.memory = [torch.full((slab.num_bytes,), 0x5A, dtype=torch.uint8, device=DEVICE) for _ in range(num_ranks)]
        addresses = torch.tensor([m.data_ptr() for m in self.memory], device=DEVICE)
        for m in self.memory:
            m[:HEADER_BYTES] = 0
        self.peers = [
            Peers(rank, slab, addresses, torch.zeros(3, dtype=torch.int64, device=DEVICE), self._failure(), 3, 1,
                  wait=False)
            for rank in range(num_ranks)
        ]  # fmt: skip

    @staticmethod
    def _failure() -> Tensor:
        return torch.zeros(1, dtype=torch.int64, pin_memory=DEVICE == "cuda")

    def dispatch(
        self, xs: list[Tensor], idxs: list[Tensor], weights: list[Tensor], max_rows: int | None = None,
        max_routes: int = ROOM,
    ) -> list[Sent]:  # fmt: skip
        staged = [
            peer.stage_dispatch(peers, x, idx, w, self.local_experts, max_rows or ROOM, max_routes)
            for peers, x, idx, w in zip(self.peers, xs, idxs, weights, strict=True)
        ]
        for peers, (_, plan) in zip(self.peers, staged, strict=True):
            peer.plan_dispatch(peers, plan, max_rows or ROOM, max_routes)
        return [
            Sent(x, *own, *peer.fetch_dispatch(
                peers, x, own[1], idxs[0].shape[1], self.local_experts, max_rows or int(own[1][-2])))
            for peers, x, own in zip(self.peers, xs, staged, strict=True)
        ]  # fmt: skip

    def redispatch(self, xs: list[Tensor], sent: list[Sent]) -> list[Tensor]:
        for peers, x, s in zip(self.peers, xs, sent, strict=True):
            peer.stage_rows(peers, x, s.plan, home=False)
        return [peer.fetch_rows(p, x, s.plan, s.origin_R) for p, x, s in zip(self.peers, xs, sent, strict=True)]

    def combine(
        self, ys: list[Tensor], sent: list[Sent], weights: list[Tensor] | None = None
    ) -> list[tuple[Tensor, Tensor | None]]:
        weights = weights or [None] * len(ys)
        for peers, y, w, s in zip(self.peers, ys, weights, sent, strict=True):
            peer.stage_rows(peers, y, s.plan, home=True, weight_RK=w)
        return [
            peer.sum_home(p, y, s.plan, s.pos_TP, w) for p, y, w, s in zip(self.peers, ys, weights, sent, strict=True)
        ]

    def failures(self) -> list[Failure | None]:
        return [Failure.decode(int(peers.failure)) for peers in self.peers]


def tokens_and_routes(
    case: str, rank: int, world: int, top_k: int, num_experts: int, width: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, D], ids [T, K], weights [T, K] of one rank."""
    idx, g = routes(case, rank, world, top_k, num_experts)
    rows = len(idx)
    x = torch.randn(rows, width, generator=g).to(dtype)
    return x.to(DEVICE), idx.to(DEVICE), torch.rand(rows, top_k, generator=g).to(DEVICE)


def all_ranks(*args, world: int, **kwargs) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    case, *rest = args
    return tuple(
        map(list, zip(*(tokens_and_routes(case, r, world, *rest, **kwargs) for r in range(world)), strict=True))
    )


def expected_rows(xs: list[Tensor], idxs: list[Tensor], weights: list[Tensor], dest: int, local_experts: int):
    """What a rank receives, by one line of indexing per source: x, local ids, weights; and each row's token."""
    kept_x, kept_idx, kept_w, tokens = [], [], [], []
    for x, idx, w in zip(xs, idxs, weights, strict=True):
        here = (idx >= dest * local_experts) & (idx < (dest + 1) * local_experts)
        token = here.any(1).nonzero().flatten()
        kept_x.append(x[token])
        kept_idx.append(torch.where(here, idx - dest * local_experts, -1)[token])
        kept_w.append(w[token])
        tokens.append(token)
    return torch.cat(kept_x), torch.cat(kept_idx), torch.cat(kept_w), tokens


def check_exchange(ranks: Ranks, data: tuple[list[Tensor], list[Tensor], list[Tensor]], max_rows: int | None = None):
    """A dispatch, a redispatch of other rows, a combine with weights: every number against indexing."""
    xs, idxs, weights = data
    world, e = len(xs), ranks.local_experts
    sent = ranks.dispatch(xs, idxs, weights, max_rows=max_rows)
    again = ranks.redispatch([x + 1 for x in xs], sent)
    ys, dws, expected, expected_w = [], [], [torch.zeros_like(x).float() for x in xs], [w * 0 for w in weights]
    for dest, s in enumerate(sent):
        x, idx, w, tokens = expected_rows(xs, idxs, weights, dest, e)
        n = len(x)
        assert int(s.plan[-2]) == n and int(s.plan[-1]) == int((idx >= 0).sum())
        assert torch.equal(s.x_RD[:n], x) and torch.equal(again[dest][:n], x + 1)
        assert torch.equal(s.idx_RK[:n], idx) and torch.equal(s.weight_RK[:n], w)
        assert (s.idx_RK[n:] == -1).all() and len(s.x_RD) == (max_rows or n)
        g = torch.Generator().manual_seed(dest)
        y = torch.full((len(s.x_RD), x.shape[1]), float("nan"))
        y[:n] = torch.randn(n, x.shape[1], generator=g)
        y = y.to(x.dtype).to(DEVICE)
        dw = torch.full((len(s.x_RD), idx.shape[1]), float("nan"), device=DEVICE)
        dw[:n] = torch.where(idx >= 0, torch.randn(idx.shape, generator=g).to(DEVICE), 0)
        ys.append(y), dws.append(dw)
        at = 0
        for source, token in enumerate(tokens):  # in rank order, as the kernel adds
            expected[source][token] += y[at : at + len(token)].float()
            expected_w[source][token] += dw[at : at + len(token)]
            at += len(token)
    home = ranks.combine(ys, sent, dws)
    plain = ranks.combine(ys, sent)
    for source in range(world):
        out, w = home[source]
        if out.dtype is torch.bfloat16 and DEVICE == "cpu":  # the interpreter cuts off where GPUs round
            assert ((out.float() - expected[source]).abs() <= expected[source].abs() * 2**-7).all()
        else:
            assert torch.equal(out, expected[source].to(out.dtype))
        assert torch.equal(plain[source][0], out)
        assert torch.equal(w, expected_w[source])
    assert ranks.failures() == [None] * world


@pytest.mark.parametrize(
    ("world", "top_k", "num_experts", "case"),
    [
        *((2, 8, 8, case) for case in CASES),
        *((2, 1, 2, case) for case in ("uneven", "all to rank 0", "dropped")),
        *((3, 2, 9, case) for case in ("uneven", "a rank without tokens")),
        (4, 8, 8, "uneven"),
    ],
)
def test_every_row_arrives_and_every_sum_comes_home(case: str, world: int, top_k: int, num_experts: int) -> None:
    ranks = Ranks(world, num_experts, 20, top_k, 16 * 4)
    check_exchange(ranks, all_ranks(case, top_k, num_experts, 16, world=world))


@pytest.mark.parametrize("tiles", ["as they are"])
def test_tiles(tiles: str) -> None:
    check_exchange(Ranks(2, 4, 40, 2, 16 * 4), all_ranks("uneven", 2, 4, 16, world=2))


@pytest.mark.parametrize(("dtype", "width"), [(torch.bfloat16, 24), (torch.float16, 8), (torch.float32, 20)])
def test_widths_and_dtypes_that_no_tile_divides(dtype: torch.dtype, width: int) -> None:
    ranks = Ranks(2, 4, 20, 2, width * 4)
    check_exchange(ranks, all_ranks("uneven", 2, 4, width, dtype, world=2))


def test_tiles_strips_and_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of several strips, programs with several tiles, lists of several chunks, and some of them ragged."""
    for name in ("TILE_WORDS", "SUM_BYTES", "FLAT", "PLACE_ENTRIES"):
        monkeypatch.setattr(peer, name, 64 if name == "SUM_BYTES" else 16)
    g = torch.Generator().manual_seed(1)
    ranks = Ranks(2, 4, 40, 2, 20 * 4)
    rows = (24, 13)
    xs = [torch.randn(n, 20, generator=g).to(DEVICE) for n in rows]
    idxs = [torch.stack([torch.randperm(4, generator=g)[:2] for _ in range(n)]).to(DEVICE) for n in rows]
    check_exchange(ranks, (xs, idxs, [torch.rand(n, 2, generator=g).to(DEVICE) for n in rows]))
    check_exchange(ranks, (xs, idxs, [torch.rand(n, 2, generator=g).to(DEVICE) for n in rows]), max_rows=80)


@pytest.mark.parametrize("case", ["uneven", "a rank without tokens", "all dropped"])
def test_room_for_more_rows_than_come(case: str) -> None:
    ranks = Ranks(2, 8, 20, 2, 64)
    check_exchange(ranks, all_ranks(case, 2, 8, 16, world=2), max_rows=40)


def test_buffers_take_turns() -> None:
    """Exchanges of changing routes, interleaved: dispatch, dispatch, combine of the first, combine of the second."""
    ranks = Ranks(2, 4, 20, 2, 64)
    for case in ("uneven", "all to rank 0", "dropped"):
        check_exchange(ranks, all_ranks(case, 2, 4, 16, world=2))
        first = all_ranks("uneven", 2, 4, 16, world=2)
        second = all_ranks("all to rank 0", 2, 4, 16, world=2)
        sent = ranks.dispatch(*first), ranks.dispatch(*second)
        for data, s in zip((first, second), sent, strict=True):
            home = ranks.combine([t.x_RD for t in s], s)
            for x, idx, (out, _) in zip(data[0], data[1], home, strict=True):
                copies = torch.stack([((idx // 2) == p).any(1) for p in range(2)]).sum(0)
                assert torch.equal(out, x * copies.unsqueeze(1))
    assert [int(p.state[0]) for p in ranks.peers] == [3 * (4 + 4)] * 2


def test_equal_inputs_give_equal_bits() -> None:
    ranks, data = Ranks(3, 6, 20, 3, 64), all_ranks("uneven", 3, 6, 16, world=3)
    runs = []
    for _ in range(2):
        sent = ranks.dispatch(*data)
        runs.append([(*vars(s).values(), *ranks.combine([t.x_RD for t in sent], sent)[0][:1]) for s in sent])
    for one, other in zip(*runs, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


def test_narrower_rows_share_the_slab() -> None:
    ranks = Ranks(2, 4, 20, 2, 16 * 4)
    for dtype in (torch.float32, torch.bfloat16, torch.float32):
        check_exchange(ranks, all_ranks("uneven", 2, 4, 16, dtype, world=2))


def test_more_routes_than_room_poison_what_follows() -> None:
    """Rank 0 gets more than it has room for: no expert sees a row, results are NaN, and rank 1 learns of it."""
    ranks, data = Ranks(2, 4, 20, 2, 64), all_ranks("all to rank 0", 2, 4, 16, world=2)
    sent = ranks.dispatch(*data, max_rows=40, max_routes=31)
    assert ranks.failures() == [Failure(NO_ROOM, "dispatch", (), 32), None]
    assert (sent[0].idx_RK == -1).all() and sent[0].x_RD.isnan().all()
    out, _ = ranks.combine([s.x_RD for s in sent], sent)[0]
    assert out.isnan().all()
    assert all(x.isnan().all() for x in ranks.redispatch(data[0], sent)[:1])
    # In the flag that rank 1 would wait for.
    flags = ranks.memory[1][: 2 * 8].view(torch.int64).tolist()
    assert flags[0] == 1 << 62 and flags[1] == 3
    # A failure stays, and the first one is the one that is told.
    ranks.dispatch(*data, max_rows=40, max_routes=31)
    assert ranks.failures()[0] == Failure(NO_ROOM, "dispatch", (), 32)


def test_just_enough_room() -> None:
    ranks, data = Ranks(2, 4, 20, 2, 64), all_ranks("all to rank 0", 2, 4, 16, world=2)
    sent = ranks.dispatch(*data, max_rows=16, max_routes=32)
    assert ranks.failures() == [None, None] and sent[0].num_rows == 16


def test_giving_up() -> None:
    ranks = Ranks(3, 3, 4, 1, 64)
    peer.give_up(ranks.peers[1], "combine")
    assert [int(m[8:16].view(torch.int64)) for m in ranks.memory] == [1 << 62] * 3
    assert ranks.failures()[1] == Failure(PEER_FAILED, "combine", (1,), 0)


def test_failures_by_number() -> None:
    assert Failure.decode(0) is None
    assert Failure.decode(TIMED_OUT + 2 * 16 + 0b1010 * 256) == Failure(TIMED_OUT, "combine", (1, 3), 0)


def test_layout_of_a_slab() -> None:
    slab = Slab(num_ranks=4, max_tokens=10, top_k=3, row_bytes=48)
    offsets = sorted(slab.offsets.values())
    assert all(value % 256 == 0 for value in offsets)
    assert slab.offsets["BUFFER"] - slab.offsets["AT_ROWS"] >= 3 * 10 * 48
    assert slab.num_bytes == HEADER_BYTES + 2 * slab.offsets["BUFFER"]
