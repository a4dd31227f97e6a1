# SPDX-License-Identifier: GPL-3.0-or-later
"""Expert parallelism between the GPUs of one host: Triton kernels that read each other's memory.

Each exchange is two launches on a stream of its own (kernels/peer.py): stage into this rank's slab of PyTorch
symmetric memory, meet, fetch out of all slabs. Rows cross the wire once per (token, rank), ordered by rank, then by
token, and are added up in rank order in float32, so equal inputs give equal bits, those of the nccl transport.

How many rows a rank gets is counted on the devices. The host needs to know it only to size the experts' buffers:

    capacity_factor left out   the host reads the counts when a dispatch is waited for, and sizes are exact
    capacity_factor given      nothing waits: sizes are capacity_factor * max_tokens_per_rank * top_k routes. More fail
    a CUDA graph is captured   nothing may wait: without a capacity_factor, sizes are those of the worst routing

Nothing is ever dropped. A rank with more tokens than max_tokens_per_rank raises at once and lets the others know. What
only the device sees (more routes than there is room for, a rank that does not come within the process group's timeout)
makes every later result NaN, and the next call, or `raise_if_failed`, raises what happened.
"""

from __future__ import annotations

import math
import os
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any, TypeVar

import torch
import torch.distributed
from torch import Tensor

from flashfusemoe_ds.config import SymmMemConfig
from flashfusemoe_ds.dispatch.agreement import access_refusal, exchange, joint_reason, this_place
from flashfusemoe_ds.dispatch.base import Combined, Geometry, Pending
from flashfusemoe_ds.dispatch.host_copy import HostCopies
from flashfusemoe_ds.dispatch.timeout import group_timeout_s
from flashfusemoe_ds.kernels.peer_slab import HEADER_BYTES, NO_ROOM, TIMED_OUT, Failure, Slab
from flashfusemoe_ds.types import Dispatched

T = TypeVar("T")

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_RANKS = 16
UNBOUNDED = 2**31 - 1


def machine_refusal() -> str | None:
    """Why this process cannot use the transport, None if nothing it sees alone speaks against it. No collective."""
    if not torch.distributed.is_available():
        return "this torch was built without torch.distributed"
    if not torch.cuda.is_available():
        return "it needs CUDA GPUs, and torch sees none"
    if torch.version.hip is not None:
        return "it needs NVIDIA GPUs"
    if torch.cuda.get_device_capability() < (8, 0):
        return "it needs GPUs of compute capability 8.0 or more"
    if find_spec("triton") is None:
        return "package triton is not installed"
    if find_spec("torch.distributed._symmetric_memory") is None:
        return f"torch {torch.__version__} has no symmetric memory"
    return None


def geometry_refusal(ep_size: int, geometry: Geometry, settings: SymmMemConfig) -> str | None:
    """Why these sizes cannot be exchanged, the same on every rank; None if they can."""
    if geometry.num_experts % ep_size:
        return f"ep_size is {ep_size}; it must divide num_experts ({geometry.num_experts})"
    if ep_size > MAX_RANKS:
        return f"ep_size is {ep_size}; at most {MAX_RANKS} GPUs of one host can take part"
    if geometry.dtype not in DTYPES:
        return f"rows are {geometry.dtype}; valid: {', '.join(map(str, DTYPES))}"
    row_bytes = geometry.hidden_size * geometry.dtype.itemsize
    if row_bytes % 16:
        return f"rows of {geometry.hidden_size} {geometry.dtype} have {row_bytes} bytes; it must be a multiple of 16"
    if ep_size * settings.max_tokens_per_rank * geometry.top_k > UNBOUNDED:
        return (
            f"symm_mem.max_tokens_per_rank is {settings.max_tokens_per_rank}; with ep_size {ep_size} and top_k "
            f"{geometry.top_k} it must be at most {UNBOUNDED // (ep_size * geometry.top_k)}"
        )
    return None


def slab_of(ep_size: int, geometry: Geometry, settings: SymmMemConfig) -> Slab:
    """The memory that each rank shares: its layout, which takes neither triton nor a GPU."""
    row_bytes = geometry.hidden_size * geometry.dtype.itemsize
    return Slab(ep_size, settings.max_tokens_per_rank, geometry.top_k, row_bytes)


def room(ep_size: int, num_local_experts: int, top_k: int, settings: SymmMemConfig) -> tuple[int, int]:
    """Rows and routes that one rank's buffers hold where the host does not ask how many there are."""
    rows = ep_size * settings.max_tokens_per_rank
    routes = rows * min(top_k, num_local_experts)
    if settings.capacity_factor is not None:
        routes = min(routes, math.ceil(settings.capacity_factor * settings.max_tokens_per_rank * top_k))
    return min(rows, routes), routes


@dataclass(frozen=True)
class Exchange:
    """One dispatch's routes, all on the device. See kernels/peer.py for the tensors.

    Attributes:
        pos_TP: int32 [T, P], a token's row among those that rank p gets from here, or -1.
        plan: int32 [2 P + 2], where rows start and end.
        origin_R: int32 [R], rank and token of each received row.
    """

    pos_TP: Tensor
    plan: Tensor
    origin_R: Tensor


class SymmMemDispatcher:
    """Peer-to-peer transport of one expert-parallel group, all of whose GPUs are in one host. Construction is
    collective.

    Args:
        group: the process group; its rank p owns experts [p * e, (p + 1) * e).
        geometry: what will be sent, the same on every rank.
        settings: `symm_mem` of the config, the same on every rank.

    Raises:
        ValueError: on every rank alike, if one of them cannot take part.
    """

    name = "symm_mem"

    def __init__(self, group: torch.distributed.ProcessGroup, geometry: Geometry, settings: SymmMemConfig) -> None:
        self.ep_size = torch.distributed.get_world_size(group)
        self.global_ranks = torch.distributed.get_process_group_ranks(group)
        self._check_everybody(group, geometry, settings)

        from flashfusemoe_ds.kernels.peer import Peers  # here triton is known to be installed

        self.settings, self.top_k = settings, geometry.top_k
        self.num_local_experts = geometry.num_experts // self.ep_size
        slab = slab_of(self.ep_size, geometry, settings)
        device = torch.device("cuda", torch.cuda.current_device())
        self._memory, addresses = _share(slab, group, device)
        self.timeout_s = group_timeout_s(group, device) or torch.distributed.default_pg_timeout.total_seconds()
        self._stream = torch.cuda.Stream(device, priority=-1)
        self._inputs_ready = torch.cuda.Event()
        self._copies = HostCopies(self._stream)
        self._peers = Peers(
            rank=torch.distributed.get_rank(group),
            slab=slab,
            addresses_P=torch.tensor(addresses, dtype=torch.int64, device=device),
            state=torch.zeros(3, dtype=torch.int64, device=device),
            failure=torch.zeros(1, dtype=torch.int64, device="cpu", pin_memory=True),
            num_programs=settings.num_sms,
            timeout_ns=int(self.timeout_s * 1e9),
            stream=self._stream,
        )

    @staticmethod
    def _check_everybody(group: torch.distributed.ProcessGroup, geometry: Geometry, settings: SymmMemConfig) -> None:
        """Raises the same ValueError on every rank if one of them cannot take part."""
        places = exchange(group, this_place())
        if len({place.host for place in places}) > 1:
            names = sorted({place.host.split()[0] for place in places})
            raise ValueError(f"symm_mem: the ranks of the group are on several hosts ({', '.join(names)})")
        sizes = exchange(group, (geometry, settings))
        if any(size != sizes[0] for size in sizes):
            raise ValueError(f"symm_mem: ranks differ in what they will exchange: {sizes}")
        _agree(
            group,
            machine_refusal()
            or geometry_refusal(len(places), geometry, settings)
            or access_refusal(places, places[torch.distributed.get_rank(group)]),
        )

    def start_dispatch(self, x_TD: Tensor, idx_TK: Tensor, weight_TK: Tensor) -> Pending[Dispatched]:
        from flashfusemoe_ds.kernels import peer

        self._check_rows("dispatch", x_TD)
        assert weight_TK.dtype is torch.float32, weight_TK.dtype
        x_TD, idx_TK, weight_TK = _aligned(x_TD), idx_TK.contiguous(), weight_TK.contiguous()
        exact = self.settings.capacity_factor is None and not self._capturing()
        max_rows, max_routes = (UNBOUNDED, UNBOUNDED) if exact else self._room()
        self._follow_current_stream()
        pos_TP, plan = peer.stage_dispatch(
            self._peers, x_TD, idx_TK, weight_TK, self.num_local_experts, max_rows, max_routes
        )

        def fetch(max_rows: int, num_routes: int) -> Dispatched:
            x_RD, idx_RK, weight_RK, origin_R = peer.fetch_dispatch(
                self._peers, x_TD, plan, idx_TK.shape[1], self.num_local_experts, max_rows
            )
            return Dispatched(x_RD, idx_RK, weight_RK, num_routes, Exchange(pos_TP, plan, origin_R))

        if not exact:
            sent = fetch(max_rows, max_routes)
            return self._pending(sent, self._done(), x_TD, idx_TK, weight_TK)
        counts = self._copies.start(plan[-2:])

        def read_counts_then_fetch() -> Dispatched:
            counts.arrived.synchronize()
            self.raise_if_failed()
            self._follow_current_stream()
            sent = fetch(*self._copies.read(counts))
            return self._pending(sent, self._done(), x_TD, idx_TK, weight_TK).wait()

        return Pending(read_counts_then_fetch)

    def start_redispatch(self, x_TD: Tensor, handle: Exchange) -> Pending[Tensor]:
        from flashfusemoe_ds.kernels import peer

        self._check_rows("redispatch", x_TD)
        x_TD = _aligned(x_TD)
        self._follow_current_stream()
        peer.stage_rows(self._peers, x_TD, handle.plan, home=False)
        rows = peer.fetch_rows(self._peers, x_TD, handle.plan, handle.origin_R)
        return self._pending(rows, self._done(), x_TD, handle)

    def start_combine(self, y_RD: Tensor, handle: Exchange, weight_RK: Tensor | None = None) -> Combined:
        from flashfusemoe_ds.kernels import peer

        self._check_rows("combine", y_RD, num_tokens=0)
        assert y_RD.shape[0] == handle.origin_R.shape[0]
        y_RD = _aligned(y_RD)
        weight_RK = None if weight_RK is None else weight_RK.contiguous()
        self._follow_current_stream()
        peer.stage_rows(self._peers, y_RD, handle.plan, home=True, weight_RK=weight_RK)
        rows, weights = peer.sum_home(self._peers, y_RD, handle.plan, handle.pos_TP, weight_RK)
        # One exchange carries both; weights are a few bytes in a row.
        done, read = self._done(), (y_RD, weight_RK, handle)
        return Combined(
            self._pending(rows, done, *read), None if weights is None else self._pending(weights, done, *read)
        )

    def raise_if_failed(self) -> None:
        """Raises if a kernel that has run so far has failed. Reads host memory: call it after a synchronisation, such
        as reading the loss, to learn of everything before it.

        Raises:
            RuntimeError: what failed, where, and which ranks were missing. The dispatcher cannot be used any more.
        """
        noted = int(self._peers.failure)
        if noted:
            failure = Failure.decode(noted)
            # Whoever waits for this rank's next exchange waits for one that is not going to come.
            self._give_up(failure.operation)
            raise RuntimeError(self._describe(failure))

    def close(self) -> None:
        """Waits for this rank's exchanges. Its memory is freed when no graph and no other rank uses it any more."""
        self._stream.synchronize()

    def _describe(self, failure: Failure) -> str:
        where = f"symm_mem {failure.operation} failed on rank {self.global_ranks[self._peers.rank]}"
        ranks = ", ".join(str(self.global_ranks[r]) for r in failure.ranks)
        if failure.why == TIMED_OUT:
            return f"{where}: rank(s) {ranks} did not arrive within {self.timeout_s:g} s, the process group's timeout"
        if failure.why == NO_ROOM:
            return (
                f"{where}: {failure.num_routes} routes arrived, and symm_mem.capacity_factor "
                f"({self.settings.capacity_factor:g}) leaves room for {self._room()[1]}. Raise it, or leave it out"
            )
        return f"{where}: rank(s) {ranks} gave up; the reason stands in their own errors"

    def _room(self) -> tuple[int, int]:
        """Rows and routes that buffers are sized for without asking the device."""
        return room(self.ep_size, self.num_local_experts, self.top_k, self.settings)

    def _check_rows(self, operation: str, rows: Tensor, num_tokens: int | None = None) -> None:
        """Raises what the host can see; the other ranks, which are on their way into the exchange, get to know."""
        self.raise_if_failed()
        num_tokens = rows.shape[0] if num_tokens is None else num_tokens
        row_bytes, limit = rows.shape[1] * rows.element_size(), self._peers.slab.row_bytes
        said = None
        if num_tokens > self.settings.max_tokens_per_rank:
            said = f"{num_tokens} tokens; symm_mem.max_tokens_per_rank is {self.settings.max_tokens_per_rank}"
        elif rows.dtype not in DTYPES:
            said = f"rows of {rows.dtype}; valid: {', '.join(map(str, DTYPES))}"
        elif row_bytes > limit or row_bytes % 16:
            said = f"rows of {row_bytes} bytes; valid: multiples of 16 up to {limit}"
        if said is not None:
            self._give_up(operation)
            raise ValueError(f"symm_mem {operation}: rank {self.global_ranks[self._peers.rank]} sends {said}")

    def _give_up(self, operation: str) -> None:
        from flashfusemoe_ds.kernels import peer

        if not self._capturing():
            peer.give_up(self._peers, operation)

    def _capturing(self) -> bool:
        return torch.cuda.is_current_stream_capturing()

    def _follow_current_stream(self) -> None:
        """What is launched next comes after what the current stream has been given: inputs are ready, and whoever had
        the memory of outputs before is done with it."""
        # A stream waits for what was recorded last when it was told to wait: one event serves all exchanges.
        self._inputs_ready.record(torch.cuda.current_stream(self._stream.device))
        self._stream.wait_event(self._inputs_ready)

    def _done(self) -> torch.cuda.Event:
        """When the launches so far are done."""
        done = torch.cuda.Event()
        done.record(self._stream)
        return done

    def _pending(self, result: T, done: torch.cuda.Event, *read: Any) -> Pending[T]:
        """`result`, once the launches that make it are done; keeps what they read until then."""

        def arrived() -> T:
            torch.cuda.current_stream(self._stream.device).wait_event(done)
            assert read is not None  # kept until here: later, the current stream frees it after the launches
            return result

        return Pending(arrived)


def _aligned(rows: Tensor) -> Tensor:
    """Contiguous, at an address that 16 divides: kernels move 16 bytes at a time."""
    rows = rows.contiguous()
    return rows.clone() if rows.data_ptr() % 16 else rows


def _agree(group: torch.distributed.ProcessGroup, refusal: str | None) -> None:
    """Raises on every rank if one of them refuses."""
    reason = joint_reason(group, exchange(group, refusal))
    if reason is not None:
        raise ValueError(f"symm_mem cannot be used: {reason}")


def _share(
    slab: Slab, group: torch.distributed.ProcessGroup, device: torch.device
) -> tuple[tuple[Tensor, Any], list[int]]:
    """Allocates this rank's slab, flags zeroed, and maps those of the other ranks.

    Returns:
        What must live as long as the slab is used, and each rank's slab as an address of this process.
    """
    from torch.distributed import _symmetric_memory as symm_mem

    # Rendezvous would create a multicast object, which nothing here uses and not every machine allows.
    os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
    memory = refusal = None
    try:
        memory = symm_mem.empty(slab.num_bytes, dtype=torch.uint8, device=device)
        memory[:HEADER_BYTES].zero_()
        torch.cuda.synchronize(device)
    except RuntimeError as error:
        refusal = f"{slab.num_bytes / 2**20:.0f} MiB of symmetric memory could not be allocated: {error}"
    _agree(group, refusal)
    shared = None
    try:
        shared = symm_mem.rendezvous(memory, group)
    except RuntimeError as error:
        refusal = f"symmetric memory could not be mapped: {error}"
    _agree(group, refusal)
    # Where the allocator has put the slab inside what it shares may differ between ranks.
    rank = torch.distributed.get_rank(group)
    offsets = exchange(group, memory.data_ptr() - shared.buffer_ptrs[rank])
    return (memory, shared), [base + offset for base, offset in zip(shared.buffer_ptrs, offsets, strict=True)]
