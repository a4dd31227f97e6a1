# SPDX-License-Identifier: GPL-3.0-or-later
"""Rows between the GPUs of one host, read by kernels out of each other's memory.

Every rank owns a slab that all ranks can address (peer_slab.py). An exchange is two launches (triton_peer.py):

    stage    a rank writes what it sends into its own slab; the last program to finish tells every rank so, and waits
             until all of them have said so
    fetch    a rank reads, out of all slabs, the rows that are meant for it

Nobody writes into another rank's slab but for one flag. Reading from a peer is a little slower than writing to it (371
against 389 GB/s between two H200s), but rows go straight to where they are used, packed, where written ones would wait
in a slab with gaps for a second copy; and a dispatch needs room for what a rank sends, not for what P ranks may send
to it. No host takes part: how many rows come from where is read off the slabs.

What goes wrong on the device (a rank that never comes, one that gave up, more routes than there is room for) is
written to `state` and to memory of the host, is passed on to the other ranks, and turns every later result into NaN:
the host raises when it next looks, and a result that nobody looked at is never a plausible number.

The entry points are plain functions of tensors; `dispatch/symm_mem.py` owns memory, streams and errors.
"""

from __future__ import annotations

import contextlib
import functools
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from flashfusemoe_ds.kernels import triton_peer
from flashfusemoe_ds.kernels.launch import launch
from flashfusemoe_ds.kernels.peer_slab import OPERATIONS, Slab
from flashfusemoe_ds.kernels.sizes import next_power_of_2

NUM_WARPS = 16
TILE_WORDS = 16384  # int32 words that a program copies at a time: 128 bytes in flight per thread
SUM_BYTES = 65536  # of all ranks together, that a program adds up at a time
PLACE_ENTRIES = 8192  # entries of idx_TK that a program places at a time
STAGES = 3  # tiles of a program that are under way at a time, the one that is written included
FLAT = 2048  # entries of a list that a program copies or fills at a time


@dataclass(frozen=True)
class Peers:
    """One rank's view of all slabs.

    Attributes:
        rank: this one.
        slab: their layout.
        addresses_P: int64 [P] on the device, where each rank's slab starts as this rank sees it.
        state: int64 [3], zero at first: exchanges so far, programs that have finished the current stage, what failed.
        failure: int64 [1], zero at first, in memory that both host and device address: what failed, as
            `peer_slab.Failure.decode` reads it.
        num_programs: of every launch; at most this many multiprocessors are busy.
        timeout_ns: how long to wait for the other ranks.
        wait: False where ranks take turns in one process: each stage returns at once, and
            `plan_dispatch` follows.
        stream: to launch on, the current one if None; memory comes from the current stream's pool in any case.
    """

    rank: int
    slab: Slab
    addresses_P: Tensor
    state: Tensor
    failure: Tensor
    num_programs: int
    timeout_ns: int
    wait: bool = True
    stream: torch.cuda.Stream | None = None

    @cached_property
    def constants(self) -> dict[str, int]:
        num_ranks = self.slab.num_ranks
        return {"RANK": self.rank, "P": num_ranks, "P2": max(2, next_power_of_2(num_ranks))}

    def launch(self, kernel: Any, num_programs: int, *args: Any, num_warps: int = NUM_WARPS, **constants: Any) -> None:
        with contextlib.nullcontext() if self.stream is None else torch.cuda.stream(self.stream):
            launch(kernel, (num_programs,), *args, **constants, num_warps=num_warps)

    @property
    def device_state(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.addresses_P, self.state, self.failure


@functools.lru_cache(maxsize=256)
def _tile(width: int, elements: int) -> tuple[int, int]:
    """Rows and columns of a tile of about `elements`; of the strips of a row, those that leave the least idle."""
    widest = max(4, min(elements, 2048, next_power_of_2(width)))
    columns = min((widest, max(4, widest // 2), max(4, widest // 4)), key=lambda c: -(-width // c) * c)
    return max(1, elements // columns), columns


def _padded(top_k: int) -> int:
    return max(1, next_power_of_2(top_k))


def _as_words(rows: Tensor) -> Tensor:
    return rows.view(torch.int32)


def stage_dispatch(
    peers: Peers, x_TD: Tensor, idx_TK: Tensor, weight_TK: Tensor, local_experts: int, max_rows: int, max_routes: int
) -> tuple[Tensor, Tensor]:
    """First half of a dispatch; `fetch_dispatch` is the other.

    Args:
        x_TD: contiguous; D * element size a multiple of 16.
        idx_TK: int64, contiguous, global expert ids; others than [0, E) go nowhere.
        weight_TK: float32, contiguous.
        max_rows, max_routes: for how many there is room here; more fail.

    Returns:
        pos_TP: int32 [T, P], which of the rows that rank p gets from here the token's is; -1 if it gets none.
        plan: int32 [2 P + 2]: where each rank's rows end among those received here; where this rank's rows start
            among those that rank p sends home (or, at p = rank, among those received); rows and routes received.
    """
    slab, (num_tokens, top_k) = peers.slab, idx_TK.shape
    words = _as_words(x_TD)
    rows, columns = _tile(words.shape[1], TILE_WORDS)
    pos_TP = torch.empty(num_tokens, slab.num_ranks, dtype=torch.int32, device=x_TD.device)
    plan = torch.empty(2 * slab.num_ranks + 2, dtype=torch.int32, device=x_TD.device)
    peers.launch(
        triton_peer.stage_dispatch_kernel,
        slab.num_ranks + peers.num_programs,
        words,
        idx_TK,
        weight_TK,
        pos_TP,
        plan,
        *peers.device_state,
        num_tokens,
        max_rows,
        max_routes,
        peers.timeout_ns,
        LOCAL_EXPERTS=local_experts,
        **peers.constants,
        C=slab.max_tokens,
        K=top_k,
        K2=_padded(top_k),
        W=words.shape[1],
        **slab.at("AT_COUNTS", "AT_LISTS", "AT_IDX", "AT_WEIGHTS", "AT_ROWS"),
        ROWS=rows,
        WORDS=columns,
        STAGES=STAGES,
        CHUNK=max(32, PLACE_ENTRIES // _padded(top_k)),
        FLAT=FLAT,
        WAIT=peers.wait,
    )
    return pos_TP, plan


def plan_dispatch(peers: Peers, plan: Tensor, max_rows: int, max_routes: int) -> None:
    """Fills the plan of `stage_dispatch` once all ranks have staged, where `peers.wait` is False."""
    peers.launch(
        triton_peer.plan_kernel,
        1,
        plan,
        *peers.device_state,
        max_rows,
        max_routes,
        **peers.constants,
        **peers.slab.at("AT_COUNTS"),
        num_warps=1,
    )


def fetch_dispatch(
    peers: Peers, x_TD: Tensor, plan: Tensor, top_k: int, local_experts: int, max_rows: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Second half of a dispatch.

    Args:
        x_TD: as staged; this rank's own rows are read from it.
        max_rows: R, at least the rows received.

    Returns:
        x_RD in x_TD's dtype, idx_RK int64, weight_RK float32, all ordered by rank, then token; past the rows received
        idx_RK is -1 and the rest means nothing. origin_R: int32 [R], rank * max_tokens + token of each row.
    """
    slab, device = peers.slab, x_TD.device
    words = _as_words(x_TD)
    rows, columns = _tile(words.shape[1], TILE_WORDS)
    x_RD = torch.empty(max_rows, x_TD.shape[1], dtype=x_TD.dtype, device=device)
    idx_RK = torch.empty(max_rows, top_k, dtype=torch.int64, device=device)
    weight_RK = torch.empty(max_rows, top_k, dtype=torch.float32, device=device)
    origin_R = torch.empty(max_rows, dtype=torch.int32, device=device)
    peers.launch(
        triton_peer.fetch_dispatch_kernel,
        peers.num_programs,
        words,
        _as_words(x_RD),
        idx_RK,
        weight_RK,
        origin_R,
        plan,
        *peers.device_state[:2],
        max_rows,
        LOCAL_EXPERTS=local_experts,
        **peers.constants,
        C=slab.max_tokens,
        K=top_k,
        K2=_padded(top_k),
        W=words.shape[1],
        **slab.at("AT_LISTS", "AT_IDX", "AT_WEIGHTS", "AT_ROWS"),
        ROWS=rows,
        WORDS=columns,
        STAGES=STAGES,
        PLACES=max(rows, PLACE_ENTRIES // 2 // _padded(top_k)),
        FLAT=FLAT,
    )
    return x_RD, idx_RK, weight_RK, origin_R


def stage_rows(peers: Peers, rows: Tensor, plan: Tensor, *, home: bool, weight_RK: Tensor | None = None) -> None:
    """First half of a redispatch (rows [T, D] to the ranks of their experts) or, if `home`, of a combine ([R, D])."""
    slab, words = peers.slab, _as_words(rows)
    tile_rows, columns = _tile(words.shape[1], TILE_WORDS)
    peers.launch(
        triton_peer.stage_rows_kernel,
        peers.num_programs,
        words,
        words if weight_RK is None else weight_RK,
        plan,
        *peers.device_state,
        rows.shape[0],
        peers.timeout_ns,
        **peers.constants,
        K=1 if weight_RK is None else weight_RK.shape[1],
        W=words.shape[1],
        **slab.at("AT_ROWS", "AT_HOME_WEIGHTS"),
        ROWS=tile_rows,
        WORDS=columns,
        STAGES=STAGES,
        FLAT=FLAT,
        HOME=home,
        HAS_WEIGHTS=weight_RK is not None,
        WAIT=peers.wait,
    )


def fetch_rows(peers: Peers, x_TD: Tensor, plan: Tensor, origin_R: Tensor) -> Tensor:
    """Second half of a redispatch: [R, D], in the order of the dispatch; nothing past the rows received."""
    words = _as_words(x_TD)
    rows, columns = _tile(words.shape[1], TILE_WORDS)
    x_RD = torch.empty(origin_R.shape[0], x_TD.shape[1], dtype=x_TD.dtype, device=x_TD.device)
    peers.launch(
        triton_peer.fetch_rows_kernel,
        peers.num_programs,
        words,
        _as_words(x_RD),
        origin_R,
        plan,
        *peers.device_state[:2],
        origin_R.shape[0],
        RANK=peers.rank,
        P=peers.slab.num_ranks,
        C=peers.slab.max_tokens,
        W=words.shape[1],
        **peers.slab.at("AT_ROWS"),
        ROWS=rows,
        WORDS=columns,
        STAGES=STAGES,
    )
    return x_RD


def sum_home(
    peers: Peers, y_RD: Tensor, plan: Tensor, pos_TP: Tensor, weight_RK: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """Second half of a combine: each token's rows [T, D], and weights [T, K], added in rank order in float32."""
    (num_tokens, _), width = pos_TP.shape, y_RD.shape[1]
    rows, columns = _tile(width, SUM_BYTES // y_RD.element_size() // next_power_of_2(peers.slab.num_ranks))
    out_TD = torch.empty(num_tokens, width, dtype=y_RD.dtype, device=y_RD.device)
    top_k = 1 if weight_RK is None else weight_RK.shape[1]
    weight_TK = None
    if weight_RK is not None:
        weight_TK = torch.empty(num_tokens, top_k, dtype=torch.float32, device=y_RD.device)
    peers.launch(
        triton_peer.sum_home_kernel,
        peers.num_programs,
        y_RD,
        y_RD if weight_RK is None else weight_RK,
        out_TD,
        out_TD if weight_TK is None else weight_TK,
        pos_TP,
        plan,
        *peers.device_state[:2],
        num_tokens,
        **peers.constants,
        K=top_k,
        K2=_padded(top_k),
        D=width,
        **peers.slab.at("AT_ROWS", "AT_HOME_WEIGHTS"),
        ROWS=rows,
        COLUMNS=columns,
        STAGES=STAGES,
        HAS_WEIGHTS=weight_RK is not None,
    )
    return out_TD, weight_TK


def give_up(peers: Peers, operation: str) -> None:
    """Makes every rank that waits for this one, now or later, fail at once."""
    peers.launch(
        triton_peer.give_up_kernel,
        1,
        *peers.device_state,
        OP=OPERATIONS.index(operation),
        **peers.constants,
        num_warps=1,
    )
