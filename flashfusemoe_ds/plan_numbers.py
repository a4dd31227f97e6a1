# SPDX-License-Identifier: GPL-3.0-or-later
"""The numbers of a plan: one GPU's memory and the wire's bytes and times, for one ep_size, transport and skew.

`make_plan` puts a model (plan_model.py) and a config (plan_config.py) into the formulas of planning.py, and what
plan_trace.py counts of activations beside them. What comes out is a `Plan`; plan_text.py prints it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from flashfusemoe_ds.dispatch import symm_mem
from flashfusemoe_ds.plan_config import Training
from flashfusemoe_ds.plan_model import Subject
from flashfusemoe_ds.plan_trace import GradientRule, trace
from flashfusemoe_ds.planning import (
    ExchangeCost,
    Load,
    MoEShape,
    ParamGroup,
    all_gather_bytes,
    all_reduce_bytes,
    exchange_bytes,
    exchange_counts,
    exchange_us,
    param_groups,
    state_bytes,
    static_room,
    step_bytes,
    transport_bytes,
)

BACKENDS = ("nccl", "symm_mem", "deep_ep")
# Of two H200s of one host, each backend with its default num_sms: docs/planning.md has the times and how these follow.
EXCHANGE_COSTS = {
    "nccl": ExchangeCost(171, (619, 0, 2, 11)),
    "symm_mem": ExchangeCost(201, (203, 9, 6, 0)),
    "deep_ep": ExchangeCost(90, (83, 0, 23, 1)),
}
GRADS_GBPS = 210.0  # that one GPU sends: docs/zero_and_checkpoints.md


@dataclass(frozen=True)
class Memory:
    """Bytes of one GPU. The first six are there all the time or at some time; not all of them at once.

    Attributes:
        parameters: with what ZeRO-3 may have gathered.
        gradients: at the end of a backward.
        optimizer: float32 copies of the parameters, and the optimizer's states.
        transport: buffers of the exchange.
        moe_kept: what all MoE layers keep for the backward; one of them where the model is checkpointed.
        dense_kept: what the rest of the model keeps, and at ep_size 1 the MoE layers' input; None if not known.
        layer_peak: the most that one MoE layer's backward needs beside what is kept, weights' gradients included.
        backward_peak: the most during forward and backward, with everything.
        step_peak: the most during the optimizer's step.
    """

    parameters: int
    gradients: int
    optimizer: int
    transport: int
    moe_kept: int
    dense_kept: int | None
    layer_peak: int
    backward_peak: int
    step_peak: int

    @property
    def after_init(self) -> int:
        """Parameters and optimizer, once the first step has made the optimizer's states, and the transport's."""
        return self.parameters + self.optimizer + self.transport

    @property
    def peak(self) -> int:
        return max(self.backward_peak, self.step_peak)


@dataclass(frozen=True)
class Wire:
    """Bytes that the busiest GPU receives in one optimizer step, and milliseconds at the given rates, nothing hidden.

    Attributes:
        exchange: dispatch and combine of all layers and micro batches, forward and backward.
        dense_grads, expert_grads: their reduction.
        gathers: updated parameters (ZeRO 1 and 2), or parameters for forward and backward (ZeRO-3).
        exchange_ms: of the exchange's bytes.
        exchange_fixed_ms: what its operations take beside that, whatever their size: host, launches, latency.
        grads_ms: of the bytes of gradients and parameters.
    """

    exchange: int
    dense_grads: int
    expert_grads: int
    gathers: int
    exchange_ms: float
    exchange_fixed_ms: float
    grads_ms: float


@dataclass(frozen=True)
class Plan:
    """One choice of ep_size, transport and skew.

    Attributes:
        rows, routes: of the busiest rank, in the layer that has most.
        parameters: elements of the whole model, of which `expert_parameters` are experts'.
        notes: what follows by a rule.
    """

    ep_size: int
    ep_backend: str
    skew: float
    rows: int
    routes: int
    parameters: int
    expert_parameters: int
    memory: Memory
    wire: Wire
    notes: tuple[str, ...]


@dataclass(frozen=True)
class Rates:
    """What a machine takes.

    Attributes:
        exchange_gbps, exchange_us: an ExchangeCost's; None: the backend's in EXCHANGE_COSTS.
        grads_gbps: GB/s of gradients that one GPU sends.
    """

    exchange_gbps: float | None = None
    exchange_us: tuple[float, float, float, float] | None = None
    grads_gbps: float = GRADS_GBPS

    def exchange(self, ep_backend: str) -> ExchangeCost:
        """A backend's cost: what was given, else what is known of it."""
        known = EXCHANGE_COSTS[ep_backend]
        return ExchangeCost(
            known.gbps if self.exchange_gbps is None else self.exchange_gbps,
            known.fixed_us if self.exchange_us is None else self.exchange_us,
        )


def valid_ep_sizes(subject: Subject, gpus: int) -> list[int]:
    """The ep_sizes that divide the GPUs and every layer's experts, ascending; only 1 where an engine spreads none."""
    experts = math.gcd(gpus, *(shape.num_experts for shape in subject.shapes()))
    return [1] if subject.one_rank else [n for n in range(1, experts + 1) if experts % n == 0]


def make_plan(
    subject: Subject,
    training: Training,
    gpus: int,
    ep_size: int,
    ep_backend: str = "nccl",
    skew: float = 1.0,
    rates: Rates = Rates(),
    checkpointing: bool = False,
) -> Plan:
    """Plans one choice.

    Raises:
        ValueError: ep_size does not divide the GPUs or a layer's experts; more tokens than the transport takes.
    """
    valid = valid_ep_sizes(subject, gpus)
    if ep_size not in valid:
        why = "the model has MoELayers, which an engine does not spread" if subject.one_rank else (
            f"it must divide the {gpus} GPUs and every layer's experts"
        )  # fmt: skip
        raise ValueError(f"ep_size is {ep_size}; {why}. Valid: {listed(valid)}")
    section, itemsize = training.section, training.dtype.itemsize
    refusal = transport_refusal(ep_backend, ep_size, subject, training)
    if refusal is not None:
        raise ValueError(refusal)

    def room(shape: MoEShape) -> tuple[int, int] | None:
        return static_room(shape, ep_size, section.symm_mem) if ep_backend == "symm_mem" else None

    loads = subject.configure(ep_size, skew, room, training.dtype, section)
    experts = subject.expert_params()
    if not subject.experts_apart and ep_size == 1:
        apart: set[torch.nn.Parameter] = set()
    else:
        apart = experts
    trained = [p for p in subject.model.parameters() if p.requires_grad]
    frozen = sum(p.numel() for p in subject.model.parameters() if not p.requires_grad)
    in_order = [p for p in trained if p not in apart], [p for p in trained if p in apart]
    groups = param_groups(*([p.numel() for p in params] for params in in_order), gpus, ep_size)
    kept_by_rank = itertools.chain.from_iterable(group.owned_by_busiest for group in groups)
    owned = {p for p, kept in zip(itertools.chain(*in_order), kept_by_rank, strict=True) if kept}
    states = state_bytes(groups, training.stage, itemsize, training.optimizer)
    rule = GradientRule(
        training.stage,
        ranks=lambda p: gpus // ep_size if p in apart else gpus,
        owned=lambda p: p in owned,
        bucket_numel=training.bucket_numel,
        staging=training.staging,
    )
    transport = transport_bytes(ep_backend, subject.shapes(), ep_size, training.dtype, section)
    parameters = states.parameters + frozen * itemsize
    if training.stage == 3:
        parameters += min(training.max_live, sum(group.numel for group in groups)) * itemsize
    static = parameters + states.optimizer + transport
    kept, backward = _activations(subject, training, rule, states.gradients)
    layer_peak = max(max(phase.bytes for phase in layer.phases()) for layer in subject.experts)
    memory = Memory(
        parameters=parameters,
        gradients=states.gradients,
        optimizer=states.optimizer,
        transport=transport,
        moe_kept=kept[0],
        dense_kept=kept[1],
        layer_peak=layer_peak,
        backward_peak=static + backward,
        step_peak=static + step_bytes(groups, training.stage, itemsize, training.optimizer),
    )
    sharded = sum(p.numel() for p in experts) * ep_size
    numel = sum(p.numel() for p in subject.model.parameters() if p not in experts) + sharded
    return Plan(
        ep_size,
        ep_backend if ep_size > 1 else "none",
        skew,
        rows=max(load.rows for load in loads),
        routes=max(load.routes for load in loads),
        parameters=numel,
        expert_parameters=sharded,
        memory=memory,
        wire=_wire(subject, training, loads, groups, ep_size, ep_backend, rates, checkpointing),
        notes=tuple(_notes(subject, training, ep_size, ep_backend, skew, rates)),
    )


def _activations(
    subject: Subject, training: Training, rule: GradientRule, gradients: int
) -> tuple[tuple[int, int | None], int]:
    """What MoE layers and the rest of the model keep, and the peak of forward and backward beyond what is static."""
    of_layers = [layer.kept() for layer in subject.experts]
    moe_kept = sum(sum(kept.values()) for kept in of_layers)
    if subject.loss is None:
        return (moe_kept, None), moe_kept + gradients
    traced = trace(subject.model, subject.loss, rule, accumulate=training.accumulation > 1, inputs=subject.inputs)
    if not subject.has_dense:
        return (moe_kept, None), traced.peak
    # With one rank X is the layer's own input, which the norm before it may have kept: it counts as the rest's.
    shared = sum(kept["X"] for kept in of_layers) if subject.experts[0].load.ep_size == 1 else 0
    if traced.kept < moe_kept - shared:  # checkpointed: one layer at a time is there, while it is computed again
        return (max(sum(kept.values()) for kept in of_layers), traced.kept), traced.peak
    return (moe_kept - shared, traced.kept - moe_kept + shared), traced.peak


def transport_refusal(ep_backend: str, ep_size: int, subject: Subject, training: Training) -> str | None:
    """Why a transport cannot exchange this model's rows; None if it can."""
    if ep_backend not in BACKENDS:
        return f"ep_backend is {ep_backend!r}; a plan takes {', '.join(BACKENDS)}"
    if ep_size == 1 or ep_backend == "nccl":
        return None
    most = getattr(training.section, ep_backend).max_tokens_per_rank
    if subject.tokens > most:
        return (
            f"flashfusemoe.{ep_backend}.max_tokens_per_rank is {most}, and there are {subject.tokens} tokens per GPU "
            "and micro batch; set it to at least that"
        )
    if ep_backend == "symm_mem":
        for shape in subject.shapes():
            reason = symm_mem.geometry_refusal(ep_size, shape.geometry(training.dtype), training.section.symm_mem)
            if reason is not None:
                return f"ep_backend symm_mem: {reason}"
    return None


def _wire(
    subject: Subject, training: Training, loads: Sequence[Load], groups: Sequence[ParamGroup], ep_size: int,
    ep_backend: str, rates: Rates, checkpointing: bool,
) -> Wire:  # fmt: skip
    itemsize, stage = training.dtype.itemsize, training.stage
    exchange, moving_us, fixed_us = 0, 0.0, 0.0
    if ep_size > 1:
        cost, counts = rates.exchange(ep_backend), exchange_counts(checkpointing, training.section)
        for shape, load in zip(subject.shapes(), loads, strict=True):
            sizes = exchange_bytes(shape, load.received, itemsize)
            exchange += sum(size * count for size, count in zip(sizes, counts, strict=True))
            moving, fixed = exchange_us(sizes, counts, cost)
            moving_us, fixed_us = moving_us + moving, fixed_us + fixed
    # At stages 2 and 3 every micro batch's gradients are reduced; before, those of the step.
    times = training.accumulation if stage >= 2 else 1
    dense = [group for group in groups if not group.experts]
    experts = [group for group in groups if group.experts]

    def reduced(which: Sequence[ParamGroup]) -> int:
        move = all_gather_bytes if stage == 3 else all_reduce_bytes
        return times * sum(move(group.numel * itemsize, group.ranks) for group in which)

    gathered = sum(all_gather_bytes(group.padded * itemsize, group.ranks) for group in groups)
    gathers = {0: 0, 3: 2 * training.accumulation * gathered}.get(stage, gathered)
    grads = (reduced(dense), reduced(experts))
    return Wire(
        exchange * training.accumulation,
        *grads,
        gathers,
        exchange_ms=moving_us * training.accumulation / 1e3,
        exchange_fixed_ms=fixed_us * training.accumulation / 1e3,
        grads_ms=(sum(grads) + gathers) / rates.grads_gbps / 1e6,
    )


def _notes(
    subject: Subject, training: Training, ep_size: int, ep_backend: str, skew: float, rates: Rates
) -> list[str]:
    if ep_size == 1 or ep_backend == "nccl":
        return []
    notes, settings = [], getattr(training.section, ep_backend)
    usual = type(settings)().num_sms
    if settings.num_sms != usual and None in (rates.exchange_gbps, rates.exchange_us):
        notes.append(
            f"{ep_backend}.num_sms is {settings.num_sms}, and its exchange was measured with {usual}: "
            "measure yours, and give --exchange_gbps and --exchange_us"
        )
    if ep_backend == "symm_mem" and settings.capacity_factor is not None:
        limit = settings.capacity_factor * settings.max_tokens_per_rank
        if skew * subject.tokens > limit:
            notes.append(
                f"symm_mem.capacity_factor {settings.capacity_factor:g} has room for {limit / subject.tokens:.2f} "
                f"times the mean load: at {skew:g} times a step fails"
            )
    return notes


def listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))
