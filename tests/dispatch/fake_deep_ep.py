# SPDX-License-Identifier: GPL-3.0-or-later
"""DeepEP's two Python APIs over all-to-all, for machines without GPUs: what the adapter may call, and how.

Each method first binds its call to the signature recorded from upstream, then enforces what upstream asserts on the
host or on the GPU. Results hold nonsense until their event was waited for, and `ElasticBuffer` hands rows out in a
random order unless told to be deterministic. So this proves the adapter's calls and its gradients, not DeepEP's
kernels.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar, NamedTuple
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor

from flashfusemoe_ds.dispatch import deep_ep as adapter
from flashfusemoe_ds.dispatch import select

# --- signatures --------------------------------------------------------------------------------------------------

# github.com/deepseek-ai/DeepEP, deep_ep/buffer.py at 9af0e0d0e74f3577af1979c9b9e1ac2cad0104ee (tag v1.2.1) and
# deep_ep/buffers/elastic.py at dd758caf451848bd150e1046af3d0a73e5fff38d (2.1.0). Names and defaults; every parameter
# may be given by position or by name.
REQUIRED = inspect.Parameter.empty
SIGNATURES: dict[str, dict[str, Any]] = {
    "Buffer.__init__": {
        "group": REQUIRED, "num_nvl_bytes": 0, "num_rdma_bytes": 0, "low_latency_mode": False, "num_qps_per_rank": 24,
        "allow_nvlink_for_low_latency_mode": True, "allow_mnnvl": False, "explicitly_destroy": False, "comm": None,
    },
    "Buffer.destroy": {},
    "Buffer.set_num_sms": {"new_num_sms": REQUIRED},
    "Buffer.get_dispatch_config": {"num_ranks": REQUIRED},
    "Buffer.get_combine_config": {"num_ranks": REQUIRED},
    "Buffer.get_dispatch_layout": {
        "topk_idx": REQUIRED, "num_experts": REQUIRED, "previous_event": None, "async_finish": False,
        "allocate_on_comm_stream": False,
    },
    "Buffer.dispatch": {
        "x": REQUIRED, "handle": None, "num_tokens_per_rank": None, "num_tokens_per_rdma_rank": None,
        "is_token_in_rank": None, "num_tokens_per_expert": None, "topk_idx": None, "topk_weights": None,
        "expert_alignment": 1, "num_worst_tokens": 0, "config": None, "previous_event": None, "async_finish": False,
        "allocate_on_comm_stream": False,
    },
    "Buffer.combine": {
        "x": REQUIRED, "handle": REQUIRED, "topk_weights": None, "bias": None, "config": None, "previous_event": None,
        "async_finish": False, "allocate_on_comm_stream": False,
    },
    "ElasticBuffer.__init__": {
        "group": REQUIRED, "num_bytes": None, "num_cpu_bytes": 0, "num_max_tokens_per_rank": 0, "hidden": 0,
        "num_topk": 0, "use_fp8_dispatch": False, "deterministic": False, "allow_hybrid_mode": True,
        "allow_multiple_reduction": True, "prefer_overlap_with_compute": True, "sl_idx": 3, "num_allocated_qps": 0,
        "num_cpu_timeout_secs": 300, "num_gpu_timeout_secs": 100, "explicitly_destroy": False,
    },
    "ElasticBuffer.destroy": {},
    "ElasticBuffer.dispatch": {
        "x": REQUIRED, "topk_idx": None, "topk_weights": None, "cumulative_local_expert_recv_stats": None,
        "num_experts": None, "num_max_tokens_per_rank": None, "expert_alignment": None, "num_sms": 0, "num_qps": 0,
        "previous_event": None, "previous_event_before_epilogue": None, "async_with_compute_stream": False,
        "allocate_on_comm_stream": False, "handle": None, "do_handle_copy": True, "do_cpu_sync": None,
        "do_expand": False, "do_zero_padding": False, "use_tma_aligned_col_major_sf": False,
    },
    "ElasticBuffer.combine": {
        "x": REQUIRED, "handle": REQUIRED, "topk_weights": None, "bias": None, "num_sms": 0, "num_qps": 0,
        "previous_event": None, "previous_event_before_epilogue": None, "async_with_compute_stream": False,
        "allocate_on_comm_stream": False,
    },
}  # fmt: skip


def signature(name: str) -> inspect.Signature:
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    return inspect.Signature([inspect.Parameter(n, kind, default=d) for n, d in SIGNATURES[name].items()])


def bound(method: Callable[[Any, SimpleNamespace], Any]) -> Callable[..., Any]:
    """The method takes what upstream's takes, and gets it by name, defaults filled in."""
    expected = signature(method.__qualname__)

    @functools.wraps(method)
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = expected.bind(*args, **kwargs)  # TypeError if upstream would not take it
        given.apply_defaults()
        return method(self, SimpleNamespace(**given.arguments))

    return call


# --- events and the wire -----------------------------------------------------------------------------------------


class EventHandle:
    """A recorded event."""


@dataclass
class EventOverlap:
    """What arrives when the event has happened: copies into tensors that hold nonsense until then, then a hook."""

    event: EventHandle | None
    arriving: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    hook: Callable[[], None] | None = None

    def current_stream_wait(self, release_handle: bool = False) -> None:
        assert self.event is not None, "no event: the call was not asynchronous"
        while self.arriving:
            target, source = self.arriving.pop()
            target.copy_(source)
        if self.hook is not None:
            self.hook()
            self.hook = None


def later(is_async: bool, *tensors: Tensor | None) -> tuple[list[Tensor | None], EventOverlap]:
    """The tensors as they look before they have arrived, and the event of their arrival."""
    if not is_async:
        return list(tensors), EventOverlap(None)
    event, seen = EventOverlap(EventHandle()), []
    for tensor in tensors:
        if tensor is None:
            seen.append(None)
            continue
        nonsense = torch.full_like(tensor, float("nan") if tensor.is_floating_point() else -7)
        event.arriving.append((nonsense, tensor))
        seen.append(nonsense)
    return seen, event


@dataclass
class Plan:
    """Which tokens go where."""

    token_S: Tensor
    num_tokens: int
    send_counts: list[int]
    recv_counts: list[int]


def plan(group: dist.ProcessGroup, goes_TP: Tensor) -> Plan:
    send = goes_TP.sum(0)
    received = torch.empty_like(send)
    dist.all_to_all_single(received, send, group=group)
    token_S = goes_TP.t().nonzero()[:, 1]
    return Plan(token_S, goes_TP.shape[0], send.tolist(), received.tolist())


def carry(group: dist.ProcessGroup, rows: Tensor, out_counts: list[int], in_counts: list[int]) -> Tensor:
    out = rows.new_empty(sum(out_counts), rows.shape[1])
    dist.all_to_all_single(out, rows.contiguous(), out_counts, in_counts, group=group)
    return out


def carry_home(group: dist.ProcessGroup, rows: Tensor, plan: Plan) -> Tensor:
    """The sum over ranks, in rank order."""
    rows = carry(group, rows, plan.send_counts, plan.recv_counts)
    total = torch.zeros(plan.num_tokens, rows.shape[1], dtype=torch.promote_types(rows.dtype, torch.float32))
    return total.index_add_(0, plan.token_S, rows.to(total.dtype)).to(rows.dtype)


def ids_of(idx_TK: Tensor, plan: Plan, group: dist.ProcessGroup, num_local: int) -> Tensor:
    """Local ids of the rows that a rank receives."""
    dest_S = torch.repeat_interleave(torch.arange(group.size()), torch.tensor(plan.send_counts))[:, None]
    ids = idx_TK[plan.token_S]
    ids = torch.where((ids >= 0) & (ids // num_local == dest_S), ids - dest_S * num_local, -1)
    return carry(group, ids.to(idx_TK.dtype), plan.recv_counts, plan.send_counts)


def goes(idx_TK: Tensor, num_ranks: int, num_local: int) -> Tensor:
    """bool [T, P]."""
    dest = torch.where(idx_TK >= 0, idx_TK // num_local, -1)
    return (dest[:, :, None] == torch.arange(num_ranks)).any(1)


@dataclass(frozen=True)
class Rules:
    """What rows and weights must be. Tests against the dense layer in float64 widen them.

    Attributes:
        gin: whether NCCL finds what it needs for GPUs to start network transfers; a host without RDMA has none.
    """

    rows: tuple[torch.dtype, ...] = (torch.bfloat16,)
    weights: tuple[torch.dtype, ...] = (torch.float32,)
    any_hidden: bool = False
    topk_idx: torch.dtype = torch.int64
    gin: bool = True


WIDE = Rules(rows=(torch.bfloat16, torch.float64), weights=(torch.float32, torch.float64), any_hidden=True)


# --- DeepEP 1.x --------------------------------------------------------------------------------------------------


class Config(NamedTuple):
    num_sms: int
    num_max_nvl_chunked_recv_tokens: int

    def get_nvl_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        assert num_ranks < 8 or num_ranks % 8 == 0
        return self.num_sms // 2 * min(num_ranks, 8) * self.num_max_nvl_chunked_recv_tokens * (hidden_bytes + 1540)

    def get_rdma_buffer_size_hint(self, hidden_bytes: int, num_ranks: int) -> int:
        raise RuntimeError("Failed: Assertion error: NVSHMEM is disabled during compilation")


class Handle1(NamedTuple):
    plan: Plan
    num_channels: int


class Buffer:
    """Within a host; a build without NVSHMEM."""

    num_sms = 20
    rules = Rules()
    log: ClassVar[list[str]] = []

    @bound
    def __init__(self, given: SimpleNamespace) -> None:
        self.group, self.num_ranks = given.group, given.group.size()
        assert self.num_ranks in (2, 4, 8)
        assert given.num_rdma_bytes == 0, "num_ranks > NUM_MAX_NVL_PEERS or low_latency_mode"
        assert not given.low_latency_mode
        self.num_nvl_bytes, self.explicitly_destroy, self.runtime = given.num_nvl_bytes, given.explicitly_destroy, True
        dist.barrier(self.group)
        self.log.append("made")

    @bound
    def destroy(self, given: SimpleNamespace) -> None:
        assert self.explicitly_destroy and self.runtime
        dist.barrier(self.group)
        self.runtime = None
        self.log.append("destroyed")

    @classmethod
    @bound
    def set_num_sms(cls, given: SimpleNamespace) -> None:
        assert given.new_num_sms % 2 == 0, "The SM count must be even"
        cls.num_sms = given.new_num_sms

    @classmethod
    @bound
    def get_dispatch_config(cls, given: SimpleNamespace) -> Config:
        return Config(cls.num_sms, cls._chunk(given.num_ranks))

    @classmethod
    @bound
    def get_combine_config(cls, given: SimpleNamespace) -> Config:
        return Config(cls.num_sms, cls._chunk(given.num_ranks))

    @staticmethod
    def _chunk(num_ranks: int) -> int:
        known = {2: 256, 4: 256, 8: 256, 16: 288, 24: 288, 32: 288, 64: 288, 128: 560, 144: 720, 160: 720}
        assert num_ranks in known, f"Unsupported number of EP ranks: {num_ranks}"
        return known[num_ranks]

    @bound
    def get_dispatch_layout(self, given: SimpleNamespace) -> tuple[Any, ...]:
        idx = given.topk_idx
        assert idx.dim() == 2 and idx.is_contiguous() and idx.dtype == self.rules.topk_idx and given.num_experts > 0
        self._check_streams(given)
        per_expert = torch.bincount(idx[idx >= 0].long(), minlength=given.num_experts).int()
        goes_TP = goes(idx, self.num_ranks, given.num_experts // self.num_ranks)
        (*layout,), event = later(given.async_finish, goes_TP.sum(0).int(), per_expert, goes_TP)
        return layout[0], None, layout[1], layout[2], event

    @bound
    def dispatch(self, given: SimpleNamespace) -> tuple[Any, ...]:
        config = given.config or type(self).get_dispatch_config(self.num_ranks)
        self._check_rows(given.x)
        self._check_streams(given)
        assert given.expert_alignment == 1 and given.num_worst_tokens == 0
        if given.handle is not None:
            assert given.topk_idx is None and given.topk_weights is None
            handle = given.handle
            assert handle.num_channels == config.num_sms // 2, "channel_prefix_matrix.size(1) == num_channels"
            assert given.x.shape[0] == handle.plan.num_tokens, "is_token_in_rank.size(0) == x.size(0)"
            rows = carry(self.group, given.x[handle.plan.token_S], handle.plan.recv_counts, handle.plan.send_counts)
            (rows,), event = later(given.async_finish, rows)
            return rows, None, None, None, None, event

        idx, weights = given.topk_idx, given.topk_weights
        goes_TP, per_expert, per_rank = given.is_token_in_rank, given.num_tokens_per_expert, given.num_tokens_per_rank
        assert goes_TP.dtype == torch.bool and goes_TP.is_contiguous()
        assert goes_TP.shape == (given.x.shape[0], self.num_ranks)
        assert per_rank.dtype == per_expert.dtype == torch.int32 and per_rank.shape == (self.num_ranks,)
        assert per_expert.numel() % self.num_ranks == 0
        num_local = per_expert.numel() // self.num_ranks
        assert num_local <= 128
        assert idx.is_contiguous() and idx.dtype == self.rules.topk_idx and idx.shape == weights.shape
        assert weights.is_contiguous() and weights.dtype in self.rules.weights and idx.shape[0] == given.x.shape[0]
        assert idx.shape[1] <= 32
        assert config.get_nvl_buffer_size_hint(given.x.shape[1] * given.x.itemsize, self.num_ranks) <= (
            self.num_nvl_bytes
        )
        routes = plan(self.group, goes_TP)
        wire = functools.partial(carry, self.group, out_counts=routes.recv_counts, in_counts=routes.send_counts)
        rows, ids = wire(given.x[routes.token_S]), ids_of(idx, routes, self.group, num_local)
        counts = torch.bincount(ids[ids >= 0].long(), minlength=num_local).tolist()
        tensors, event = later(given.async_finish, rows, ids, wire(weights[routes.token_S]))
        return *tensors, counts, Handle1(routes, config.num_sms // 2), event

    @bound
    def combine(self, given: SimpleNamespace) -> tuple[Any, ...]:
        config = given.config or type(self).get_combine_config(self.num_ranks)
        self._check_rows(given.x)
        self._check_streams(given)
        handle, weights = given.handle, given.topk_weights
        assert handle.num_channels == config.num_sms // 2, "channel_prefix_matrix.size(1) == num_channels"
        assert given.x.shape[0] == sum(handle.plan.recv_counts), "src_idx.size(0) == num_tokens"
        rows = carry_home(self.group, given.x, handle.plan)
        if weights is not None:
            assert weights.dim() == 2 and weights.is_contiguous() and weights.dtype in self.rules.weights
            assert weights.shape[0] == given.x.shape[0]
            weights = carry_home(self.group, weights, handle.plan)
        (rows, weights), event = later(given.async_finish, rows, weights)
        return rows, weights, event

    def _check_rows(self, x: Tensor) -> None:
        assert self.runtime, "destroyed"
        assert x.dim() == 2 and x.is_contiguous() and x.dtype in self.rules.rows
        if not self.rules.any_hidden:
            assert x.shape[1] * x.itemsize % 32 == 0 and x.shape[1] * x.itemsize // 2 + 8 <= 8192

    @staticmethod
    def _check_streams(given: SimpleNamespace) -> None:
        assert given.previous_event is None or isinstance(given.previous_event, EventOverlap)
        if given.allocate_on_comm_stream:
            assert given.previous_event is not None and given.async_finish


# --- DeepEP 2.x --------------------------------------------------------------------------------------------------


@dataclass
class EPHandle:
    do_expand: bool
    num_experts: int
    num_max_tokens_per_rank: int
    num_sms: int
    topk_idx: Tensor
    num_recv_tokens_per_expert_list: list[int]
    plan: Plan
    order: Tensor  # of the rows, as handed out: a permutation of the order by source
    settled: bool  # what a deterministic buffer's handle is once its event was waited for


class ElasticBuffer:
    rules = Rules()
    log: ClassVar[list[str]] = []

    @bound
    def __init__(self, given: SimpleNamespace) -> None:
        self.group, self.num_ranks = given.group, given.group.size()
        assert given.num_bytes is None and given.num_max_tokens_per_rank > 0 and given.hidden > 0
        if not self.rules.gin and os.environ.get("EP_DISABLE_GIN", "0") == "0":
            raise RuntimeError("Assertion exception (csrc/kernels/backend/nccl.cu:87): NCCL GIN is unavailable.")
        capacities: list[Any] = [None] * self.num_ranks
        mine = given.num_max_tokens_per_rank, given.hidden, given.num_topk
        dist.all_gather_object(capacities, mine, group=self.group)
        assert set(capacities) == {mine}, "must be equal on all ranks"
        self.capacity, self.hidden, self.top_k = mine
        self.deterministic, self.explicitly_destroy, self.runtime = given.deterministic, given.explicitly_destroy, True
        self.compiled_for: tuple[int, ...] | None = None
        self.log.append("made")

    @bound
    def destroy(self, given: SimpleNamespace) -> None:
        assert self.explicitly_destroy and self.runtime
        dist.barrier(self.group)
        self.runtime = None
        self.log.append("destroyed")

    @bound
    def dispatch(self, given: SimpleNamespace) -> tuple[Any, ...]:
        self._check_rows(given.x, given.num_sms)
        self._check_streams(given)
        assert not given.do_expand and not given.do_zero_padding
        if given.handle is not None:
            return self._replay(given, given.handle)

        idx, weights, num_experts = given.topk_idx, given.topk_weights, given.num_experts
        assert given.do_cpu_sync in (None, True), "the worst case's rows are not what the adapter reads"
        assert given.expert_alignment in (None, 1)
        assert given.num_max_tokens_per_rank in (None, self.capacity)
        # Each is a constant of the kernels: another value compiles for seconds.
        constants = num_experts, idx.shape[1], given.num_sms
        self.compiled_for = self.compiled_for or constants
        assert self.compiled_for == constants
        assert idx.is_contiguous() and idx.dtype == self.rules.topk_idx and idx.shape[0] == given.x.shape[0]
        assert idx.shape[1] <= min(32, self.top_k)
        assert int(idx.min()) >= -1 if idx.numel() else True
        assert all(len(set(ids)) == len(ids) for ids in ([i for i in row if i >= 0] for row in idx.tolist()))
        assert weights.shape == idx.shape and weights.is_contiguous() and weights.dtype in self.rules.weights
        assert num_experts % self.num_ranks == 0 and num_experts <= 2048 and num_experts // self.num_ranks <= 256
        num_local = num_experts // self.num_ranks
        routes = plan(self.group, goes(idx, self.num_ranks, num_local))
        wire = functools.partial(carry, self.group, out_counts=routes.recv_counts, in_counts=routes.send_counts)
        tensors = (
            wire(given.x[routes.token_S]),
            ids_of(idx, routes, self.group, num_local),
            wire(weights[routes.token_S]),
        )
        counts = torch.bincount(tensors[1][tensors[1] >= 0].long(), minlength=num_local).tolist()
        order = _random_order(len(tensors[0]))
        handle = EPHandle(False, num_experts, self.capacity, given.num_sms, idx, counts, routes, order, True)
        tensors, event = later(given.async_with_compute_stream, *(t[order] for t in tensors))
        if self.deterministic:
            handle.settled = False
            self._when_there(given, event, lambda: self._settle(handle, tensors))
        return *tensors, handle, event

    def _replay(self, given: SimpleNamespace, handle: EPHandle) -> tuple[Any, ...]:
        assert given.topk_idx is None and given.topk_weights is None
        assert not given.do_cpu_sync, "Cannot do CPU sync with cached handle"
        assert given.num_sms == handle.num_sms and given.do_expand == handle.do_expand
        assert given.num_max_tokens_per_rank in (None, handle.num_max_tokens_per_rank)
        assert given.num_experts in (None, handle.num_experts)
        assert given.x.shape[0] == handle.plan.num_tokens
        assert handle.settled, "the handle's own dispatch was not waited for"
        rows = carry(self.group, given.x[handle.plan.token_S], handle.plan.recv_counts, handle.plan.send_counts)
        # In the order of the handle, whether that is a sorted one or not.
        (rows,), event = later(given.async_with_compute_stream, rows[handle.order])
        return rows, None, None, handle, event

    @bound
    def combine(self, given: SimpleNamespace) -> tuple[Any, ...]:
        handle, weights = given.handle, given.topk_weights
        self._check_rows(given.x, given.num_sms or handle.num_sms)
        self._check_streams(given)
        assert given.num_sms in (0, handle.num_sms)
        assert handle.settled, "the handle's own dispatch was not waited for"
        assert given.x.shape[0] == sum(handle.plan.recv_counts)
        by_source = torch.empty_like(handle.order)
        by_source[handle.order] = torch.arange(len(handle.order))
        rows = carry_home(self.group, given.x[by_source], handle.plan)
        if weights is not None:
            assert weights.shape == (given.x.shape[0], handle.topk_idx.shape[1])
            assert weights.is_contiguous() and weights.dtype in self.rules.weights
            weights = carry_home(self.group, weights[by_source], handle.plan)
        (rows, weights), event = later(given.async_with_compute_stream, rows, weights)
        return rows, weights, event

    @staticmethod
    def _settle(handle: EPHandle, tensors: list[Tensor]) -> None:
        """Sorts in place by source, as upstream's hook does."""
        by_source = torch.argsort(handle.order)
        for tensor in tensors:
            tensor.copy_(tensor[by_source])
        handle.order, handle.settled = torch.arange(len(by_source)), True

    @staticmethod
    def _when_there(given: SimpleNamespace, event: EventOverlap, hook: Callable[[], None]) -> None:
        if given.async_with_compute_stream:
            event.hook = hook
        else:
            hook()

    def _check_rows(self, x: Tensor, num_sms: int) -> None:
        assert self.runtime, "destroyed"
        assert num_sms > 0, "0 asks a heuristic that parses nvidia-smi"
        assert x.dim() == 2 and x.is_contiguous() and x.dtype in self.rules.rows and x.shape[1] == self.hidden
        assert self.rules.any_hidden or x.shape[1] % 256 == 0

    def _check_streams(self, given: SimpleNamespace) -> None:
        if given.previous_event is not None:
            assert isinstance(given.previous_event, EventHandle) and given.allocate_on_comm_stream
        if hasattr(given, "topk_idx"):
            assert given.x.shape[0] <= self.capacity, "num_tokens <= num_max_tokens_per_rank"


def _random_order(num_rows: int) -> Tensor:
    order = list(range(num_rows))
    random.shuffle(order)
    return torch.tensor(order, dtype=torch.long)


# --- the package -------------------------------------------------------------------------------------------------


def package(release: str, rules: Rules | None = None) -> ModuleType:
    """A module `deep_ep` as of "1.x", "2.x" or "hybrid-ep", with classes, and so class attributes, of its own; or one
    that is "broken", on which importlib's find_spec raises.

    `log` in it tells which buffers this process has made and destroyed.
    """
    rules, module = rules or Rules(), ModuleType("deep_ep")
    module.__spec__ = None if release == "broken" else ModuleSpec("deep_ep", None)
    module.log = []
    own = {"rules": rules, "log": module.log}
    if release in ("1.x", "2.x"):
        module.Buffer, module.EventOverlap, module.Config = type("Buffer", (Buffer,), own), EventOverlap, Config
    if release == "2.x":
        module.ElasticBuffer = type("ElasticBuffer", (ElasticBuffer,), own)
    if release == "2.x" or rules.topk_idx != torch.int64:  # 1.2.1, which has 64-bit ids alone, does not say so
        module.topk_idx_t = rules.topk_idx
    return module


@contextlib.contextmanager
def as_module(name: str, module: ModuleType) -> Iterator[None]:
    """Only this name: patch.dict would forget whatever else is imported meanwhile, and torch is not imported twice."""
    before = sys.modules.get(name)
    sys.modules[name] = module
    try:
        yield
    finally:
        del sys.modules[name]
        if before is not None:
            sys.modules[name] = before


@contextlib.contextmanager
def installed(module: ModuleType, nccl: tuple[int, int, int] | None = (2, 30, 7)) -> Iterator[None]:
    """`import deep_ep` gives this module, on a machine that seems to have GPUs and this NCCL. There are none that
    torch would put tensors on."""
    with (
        as_module("deep_ep", module),
        patch.object(adapter, "_gpu_refusal", lambda: None),
        patch.object(adapter, "loaded_nccl_version", lambda: nccl),
        patch.object(torch.cuda, "is_available", lambda: False),
    ):
        yield


@contextlib.contextmanager
def missing() -> Iterator[None]:
    """A machine without GPUs and without the package."""
    with (
        patch.object(select, "find_spec", lambda name: None if name == "deep_ep" else find_spec(name)),
        patch.object(torch.cuda, "is_available", lambda: False),
    ):
        yield
