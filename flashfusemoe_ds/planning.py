# SPDX-License-Identifier: GPL-3.0-or-later
"""What a layer keeps, moves and needs, as formulas: bytes and rows, before anything is run (docs/planning.md).

    expected_load      rows and routes of the busiest rank       <- router's top-k, ep_size, skew
    kept_bytes         what the layer keeps for its backward     <- kernels/experts.py, kernels/order.py
    forward_bytes      what it allocates besides, at most
    backward_phases    the same for the backward, step by step
    transport_bytes    buffers that a transport owns             <- dispatch/
    exchange_bytes     what crosses the wire, exchange_us what it takes
    state_bytes        parameters, gradients, optimizer          <- DeepSpeed's ZeRO
    step_bytes         what the optimizer's step adds

Letters are those of types.py. Everything is per GPU, and of one layer where it says so. tests/test_plan.py holds each
formula against the code that it is about.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from flashfusemoe_ds.config import FlashFuseMoEConfig, SymmMemConfig
from flashfusemoe_ds.dispatch import symm_mem
from flashfusemoe_ds.dispatch.base import Geometry
from flashfusemoe_ds.kernels.order import order_shapes

DS_COLUMNS = 256  # columns of H's half for which dgated writes one partial sum of dS
EXPERT_GROUP_NUMEL = 178_956_971  # DeepSpeed splits the experts' parameters into optimizer groups of at most this
# Bytes of float32 state per parameter, beside the float32 copy of it.
OPTIMIZER_STATES = {"adam": 8, "adamw": 8, "lion": 4, "adagrad": 4, "sgd": 0}
MOMENTUM_STATE = 4  # of sgd with momentum
DEFAULTS = FlashFuseMoEConfig()


# --- rows --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MoEShape:
    """Sizes of one layer, experts of all ranks together.

    Attributes:
        hidden_size: D, of the rows that are dispatched.
        intermediate_size: F.
        up_width: H, 2F for a gated activation, F for a plain one.
        num_experts: E.
        top_k: K.
    """

    hidden_size: int
    intermediate_size: int
    up_width: int
    num_experts: int
    top_k: int

    def geometry(self, dtype: torch.dtype) -> Geometry:
        """What transports know of the layer: its rows, of this dtype, and their routing."""
        return Geometry(self.num_experts, self.hidden_size, self.top_k, dtype)


class Load(NamedTuple):
    """One micro batch in one layer, on the busiest rank of its group.

    Attributes:
        tokens: T, that each rank sends.
        ep_size: P.
        local_experts: e.
        rows: R, that its buffers have.
        routes: N, that its buffers have.
        received: rows that come to it from other ranks.
        sent: rows that a rank sends, its own included.
    """

    tokens: int
    ep_size: int
    local_experts: int
    rows: int
    routes: int
    received: int
    sent: int


def hit_rate(num_experts: int, ep_size: int, top_k: int) -> float:
    """The share of tokens of which a given rank owns at least one expert, where each of the C(E, K) choices is equally
    likely: 1 - C(E - e, K) / C(E, K)."""
    local = num_experts // ep_size
    return 1 - math.comb(num_experts - local, top_k) / math.comb(num_experts, top_k)


def expected_load(
    shape: MoEShape, tokens: int, ep_size: int, skew: float = 1.0, room: tuple[int, int] | None = None
) -> Load:
    """The load of the busiest rank.

    Args:
        tokens: T, of each rank.
        skew: routes of the busiest rank over the mean of the ranks. Its rows grow as much, at most: no routing of so
            many routes has more. Neither can exceed what top_k distinct experts per token allow.
        room: rows and routes that buffers are sized for whatever comes (symm_mem with a capacity_factor).
    """
    local = shape.num_experts // ep_size
    if ep_size == 1:
        return Load(tokens, 1, local, tokens, tokens * shape.top_k, 0, 0)
    everywhere = tokens * ep_size
    mean_rows = everywhere * hit_rate(shape.num_experts, ep_size, shape.top_k)
    rows = math.ceil(min(skew * mean_rows, everywhere))
    routes = math.ceil(min(skew * tokens * shape.top_k, everywhere * min(shape.top_k, local)))
    received = math.ceil(rows * (ep_size - 1) / ep_size)
    if room is not None:
        rows, routes = room
    return Load(tokens, ep_size, local, rows, routes, received, math.ceil(mean_rows))


# --- a layer's memory --------------------------------------------------------------------------------------------


def kept_bytes(shape: MoEShape, load: Load, itemsize: int, section: FlashFuseMoEConfig = DEFAULTS) -> dict[str, int]:
    """What the experts and their exchange keep between forward and backward of one layer, by name.

    X is the layer's own input with one rank or recompute_dispatch, else the rows that were received; the router's
    tensors are not in here.

    Args:
        itemsize: bytes of an element of the rows.
        section: its recompute_activations and recompute_dispatch count, in the backward overlap.input_grad too.
    """
    order = order_shapes((load.rows, shape.top_k), load.local_experts, load.routes)
    kept = {
        "X": (load.tokens if section.recompute_dispatch else load.rows) * shape.hidden_size * itemsize,
        "H": 0 if section.recompute_activations else load.routes * shape.up_width * itemsize,
        "weights": 4 * load.rows * shape.top_k,
        "order": 4 * sum(math.prod(sizes) for sizes in order),
    }
    if load.ep_size > 1:
        kept["slots"] = 4 * load.tokens * min(shape.top_k, load.ep_size)
    return kept


def router_bytes(num_tokens: int, num_experts: int, top_k: int) -> int:
    """What MoELayer's fused router keeps: float32 logits and int64 ids."""
    return num_tokens * (4 * num_experts + 8 * top_k)


def forward_bytes(shape: MoEShape, load: Load, itemsize: int, section: FlashFuseMoEConfig = DEFAULTS) -> int:
    """The most that the forward of one layer has allocated beside what it keeps, its output included."""
    row = shape.hidden_size * itemsize
    activated = load.routes * (shape.intermediate_size * itemsize + row)  # A and the experts' outputs
    if section.recompute_activations:
        activated += load.routes * shape.up_width * itemsize
    received = load.rows * row if section.recompute_dispatch and load.ep_size > 1 else 0
    phases = [received + activated + load.rows * row]
    if load.ep_size > 1:
        slots = load.tokens * min(shape.top_k, load.ep_size)
        phases.append(slots * (row + 8 * shape.top_k))  # rows spread before their number is known, ids and weights
        phases.append(received + (load.rows + load.sent + load.tokens) * row)
    return max(phases)


class Phase(NamedTuple):
    """A moment of a layer's backward, and the bytes that it has beyond what was kept: less where H is freed."""

    name: str
    bytes: int


def backward_phases(shape: MoEShape, load: Load, itemsize: int, section: FlashFuseMoEConfig = DEFAULTS) -> list[Phase]:
    """The backward of one layer, moment by moment; gradients of the experts' weights are counted where they appear."""
    row, parallel = shape.hidden_size * itemsize, load.ep_size > 1
    h = load.routes * shape.up_width * itemsize
    a = load.routes * shape.intermediate_size * itemsize
    partials = 4 * load.routes * -(-shape.intermediate_size // DS_COLUMNS)
    dw_up = load.local_experts * shape.up_width * shape.hidden_size * itemsize
    dw_down = load.local_experts * shape.hidden_size * shape.intermediate_size * itemsize
    dx = load.rows * row
    dout = load.rows * row if parallel else 0  # with one rank, autograd has it already
    if section.recompute_dispatch and parallel:
        dout += load.rows * row  # X, here again
    # dX as it lies, as the other ranks' comes home, and as it is added up.
    home = (load.sent + load.tokens) * row if parallel else 0
    # Where dX is on its way home while dW is computed.
    beside = home if section.overlap.input_grad else 0
    recompute = section.recompute_activations
    again = h if recompute else 0
    phases = [Phase("redispatch", load.sent * row + dout)] if parallel else []
    return [
        *phases,
        Phase("dgated", dout + again + (a if recompute else 0) + a + partials),
        Phase("dX", dout + again + a + partials + load.routes * row + dx),
        Phase("dW_up", dout + again + a + partials + dx + beside + dw_up),
        Phase("dW_down", dout + again - h + a + partials + dx + beside + dw_up + dw_down),
        Phase("home", dout + again - h + partials + dx + home + dw_up + dw_down),
    ]


def transport_bytes(
    ep_backend: str, shapes: Sequence[MoEShape], ep_size: int, dtype: torch.dtype, section: FlashFuseMoEConfig
) -> int:
    """Buffers that a transport owns for the whole run; layers of equal geometry share them. nccl owns none that torch
    allocates, and those of deep_ep are what DeepEP's documentation says, not counted from its code."""
    geometries = {shape.geometry(dtype) for shape in shapes}
    if ep_size == 1 or ep_backend == "nccl":
        return 0
    if ep_backend == "symm_mem":
        return sum(symm_mem.slab_of(ep_size, g, section.symm_mem).num_bytes for g in geometries)
    tokens = section.deep_ep.max_tokens_per_rank
    return sum(ep_size * tokens * g.hidden_size * g.dtype.itemsize for g in geometries)


def static_room(shape: MoEShape, ep_size: int, settings: SymmMemConfig) -> tuple[int, int] | None:
    """Rows and routes of symm_mem's buffers where a capacity_factor fixes them, else None."""
    if settings.capacity_factor is None or ep_size == 1:
        return None
    return symm_mem.room(ep_size, shape.num_experts // ep_size, shape.top_k, settings)


# --- the wire ----------------------------------------------------------------------------------------------------


class Exchanges(NamedTuple):
    """Bytes of one layer's four exchanges, in one direction, on the busiest rank. Or how often each is done."""

    dispatch: int
    combine: int
    redispatch: int
    combine_grads: int


class ExchangeCost(NamedTuple):
    """What an exchange takes on a machine that does nothing else meanwhile: its bytes over a rate, and a fixed part.

    Attributes:
        gbps: GB/s that one GPU receives.
        fixed_us: microseconds of each operation beyond its bytes, in the order of `Exchanges`: launches, latency, and
            in a new dispatch the host's wait for the counts.
    """

    gbps: float
    fixed_us: tuple[float, float, float, float]


def exchange_bytes(shape: MoEShape, num_rows: int, itemsize: int) -> Exchanges:
    """What `num_rows` rows that cross between ranks weigh: each its D elements, with dispatch K ids and K weights of
    four bytes, and with the gradients' way home K weights. Counts, 16 bytes per pair of ranks, are not in here."""
    row, words = num_rows * shape.hidden_size * itemsize, num_rows * shape.top_k * 4
    return Exchanges(row + 2 * words, row, row, row + words)


def exchange_counts(checkpointing: bool, section: FlashFuseMoEConfig = DEFAULTS) -> Exchanges:
    """How often a layer does each in one micro batch. Activation checkpointing runs the forward again, and
    recompute_dispatch sends X again."""
    forwards = 2 if checkpointing else 1
    redispatches = 2 if section.recompute_dispatch else 1
    return Exchanges(dispatch=forwards, combine=forwards, redispatch=redispatches, combine_grads=1)


def exchange_us(sizes: Exchanges, counts: Exchanges, cost: ExchangeCost) -> tuple[float, float]:
    """Microseconds of bytes alone, and those of the fixed parts."""
    moved = sum(size * count for size, count in zip(sizes, counts, strict=True))
    fixed = sum(us * count for us, count in zip(cost.fixed_us, counts, strict=True))
    return moved / cost.gbps / 1e3, fixed


def all_reduce_bytes(size: int, ranks: int) -> int:
    """What a GPU sends in a ring's all-reduce of `size` bytes."""
    return 2 * size * (ranks - 1) // ranks


def all_gather_bytes(size: int, ranks: int) -> int:
    """What a GPU sends in a ring's all-gather, or reduce-scatter, of `size` bytes in all."""
    return size * (ranks - 1) // ranks


# --- parameters, gradients, optimizer ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Optimizer:
    """What a DeepSpeed config says of the optimizer.

    Attributes:
        name: a key of OPTIMIZER_STATES.
        state: bytes of state per parameter.
        foreach: whether its step makes float32 temporaries of a whole parameter group, as torch's Adam does unless
            it is fused.
    """

    name: str
    state: int
    foreach: bool


@dataclass(frozen=True)
class ParamGroup:
    """Parameters that one optimizer step updates together, and the ranks that hold the same.

    Attributes:
        numels: trainable elements on this rank, of each parameter in order.
        ranks: that share them: the data-parallel group, or the experts'.
        experts: whether they are experts'.
    """

    numels: tuple[int, ...]
    ranks: int
    experts: bool

    @property
    def numel(self) -> int:
        return sum(self.numels)

    @property
    def padded(self) -> int:
        """Elements of DeepSpeed's flat buffer: a multiple of two per rank."""
        return -(-self.numel // (2 * self.ranks)) * 2 * self.ranks

    @property
    def partition(self) -> int:
        """Elements that this rank updates at ZeRO stages 1 to 3."""
        return self.padded // self.ranks

    def owned(self, rank: int) -> list[bool]:
        """Of each parameter, whether some of it is in this rank's partition. Its gradient is then kept whole."""
        start, end = rank * self.partition, (rank + 1) * self.partition
        ends = list(itertools.accumulate(self.numels))
        return [first - n < end and first > start for n, first in zip(self.numels, ends, strict=True)]

    @cached_property
    def owned_by_busiest(self) -> list[bool]:
        """`owned` of the rank that keeps the most gradients."""
        return max(map(self.owned, range(self.ranks)), key=lambda owned: sum(itertools.compress(self.numels, owned)))

    @property
    def held(self) -> int:
        """Elements of the gradients that the busiest rank keeps between backward and step at stages 1 and 2."""
        return sum(itertools.compress(self.numels, self.owned_by_busiest))


def param_groups(dense: Sequence[int], experts: Sequence[int], world: int, ep_size: int) -> list[ParamGroup]:
    """DeepSpeed's groups: the dense parameters, then the experts', in runs of at most EXPERT_GROUP_NUMEL elements.

    Args:
        dense, experts: elements of each trainable parameter that this rank holds.
        world: data-parallel ranks.
    """
    runs: list[list[int]] = []
    for numel in experts:
        if runs and sum(runs[-1]) + numel <= EXPERT_GROUP_NUMEL:
            runs[-1].append(numel)
        else:
            runs.append([numel])
    groups = [ParamGroup(tuple(dense), world, experts=False)] if sum(dense) else []
    return groups + [ParamGroup(tuple(run), world // ep_size, experts=True) for run in runs]


class States(NamedTuple):
    """Bytes for the whole run, of one or more groups."""

    parameters: int
    gradients: int
    master: int
    moments: int

    @property
    def optimizer(self) -> int:
        return self.master + self.moments


def state_bytes(groups: Sequence[ParamGroup], stage: int, itemsize: int, optimizer: Optimizer) -> States:
    """What ZeRO holds on the busiest GPU; at stage 3 without the parameters that are gathered for use.

    Args:
        itemsize: bytes of a parameter of the model, and of its gradient.
    """
    if stage == 0:
        numel = sum(group.numel for group in groups)
        master = 4 * numel if itemsize < 4 else 0
        return States(numel * itemsize, numel * itemsize, master, optimizer.state * numel)
    held = sum(group.partition if stage == 3 else group.padded for group in groups)
    part = sum(group.partition for group in groups)
    grads = {1: sum(group.numel for group in groups), 2: sum(group.held for group in groups)}.get(stage, part)
    # A float32 copy of its own even of a float32 model.
    return States(held * itemsize, grads * itemsize, 4 * part, optimizer.state * part)


def step_bytes(groups: Sequence[ParamGroup], stage: int, itemsize: int, optimizer: Optimizer) -> int:
    """The most that the optimizer's step has allocated beyond parameters and optimizer: gradients in two dtypes and
    temporaries. ZeRO takes the gradients' norm, each in float64, then one group after another, and drops a group's
    gradients in the model's dtype once they are copied."""
    if stage == 0:
        largest = 4 * max((group.numel for group in groups), default=0) if optimizer.foreach else 0
        return sum(group.numel for group in groups) * (itemsize + (4 if itemsize < 4 else 0)) + largest
    left = sum(group.partition if stage == 3 else group.held for group in groups) * itemsize
    most = left + 8 * max((min(max(group.numels), group.partition) for group in groups), default=0)
    for group in groups:
        # Several tensors are joined before they are cast; one is cast as it is.
        flat = group.partition * itemsize if sum(group.owned_by_busiest) > 1 else 0
        copying = left + flat + (group.partition * 4 if itemsize < 4 else 0)
        left -= (group.partition if stage == 3 else group.held) * itemsize
        stepping = left + group.partition * (8 if optimizer.foreach else 4)
        most = max(most, copying, stepping)
    return most
