# SPDX-License-Identifier: GPL-3.0-or-later
"""Memory per GPU and bytes on the wire of a training run, before it is run (docs/planning.md):

    python -m flashfusemoe_ds.plan --config ds.json --model path/to/config.json --gpus 8 --ep_size 1 2 4 8 \
        --sequence_length 4096 --skew 1 1.5 --memory 140

The formulas are planning.py's, the activations of a model's dense part come from plan_trace.py. Needs no GPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from flashfusemoe_ds.config import FlashFuseMoEConfig
from flashfusemoe_ds.dispatch import symm_mem
from flashfusemoe_ds.plan_model import Subject, from_factory, from_shape, from_transformers
from flashfusemoe_ds.plan_trace import GradientRule, trace
from flashfusemoe_ds.planning import (
    MOMENTUM_STATE,
    OPTIMIZER_STATES,
    ExchangeCost,
    Load,
    MoEShape,
    Optimizer,
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

GIB = 2**30
BACKENDS = ("nccl", "symm_mem", "deep_ep")
# Of two H200s of one host, each backend with its default num_sms: docs/planning.md has the times and how these follow.
EXCHANGE_COSTS = {
    "nccl": ExchangeCost(171, (619, 0, 2, 11)),
    "symm_mem": ExchangeCost(201, (203, 9, 6, 0)),
    "deep_ep": ExchangeCost(90, (83, 0, 23, 1)),
}
GRADS_GBPS = 210.0  # that one GPU sends: docs/zero_and_checkpoints.md
OUR_BUCKET, THEIR_BUCKET = 1 << 25, 500_000_000  # elements: ours where the config has none, and DeepSpeed's


# --- what the config says ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    """What a plan takes from a DeepSpeed config.

    Attributes:
        section: this package's, with its defaults.
        stage: of ZeRO, 0 to 3.
        dtype: of the model.
        micro_batch, accumulation: train_micro_batch_size_per_gpu and gradient_accumulation_steps.
        optimizer: the config's, or the client's.
        autoep: whether `expert_parallel` is enabled.
        autoep_size: its ep_size; None without AutoEP.
        bucket_numel: elements that are reduced together.
        staging: bytes that DeepSpeed's ZeRO 1 and 2 allocate at the first gradient.
        max_live: of ZeRO-3, elements that may be gathered at a time.
    """

    section: FlashFuseMoEConfig
    stage: int
    dtype: torch.dtype
    micro_batch: int
    accumulation: int
    optimizer: Optimizer
    autoep: bool
    autoep_size: int | None
    bucket_numel: int
    staging: int
    max_live: int


def read_training(config: Mapping[str, Any], optimizer: str | None = None) -> Training:
    """Reads a DeepSpeed config.

    Args:
        optimizer: the client's, where the config has no section "optimizer".

    Raises:
        ValueError: a setting is missing, wrong, or one that plans do not know.
    """
    section = FlashFuseMoEConfig.from_ds_config(config)
    zero = _section(config, "zero_optimization")
    stage = _number(zero, "zero_optimization.stage", "stage", 0)
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"zero_optimization.stage is {stage}; valid: 0, 1, 2, 3")
    dtype = torch.float32
    for name, kind in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        dtype = kind if _is_enabled(config, name) else dtype
    _refuse_unknown(config, zero)
    parallel = _section(config, "expert_parallel")
    autoep = _is_enabled(config, "expert_parallel")
    ours = section.overlap_dense_grads
    bucket = _number(zero, "zero_optimization.reduce_bucket_size", "reduce_bucket_size",
                     OUR_BUCKET if ours and stage in (1, 2) else THEIR_BUCKET)  # fmt: skip
    buffers = 0
    if stage in (1, 2) and zero.get("contiguous_gradients", True):
        buffers = 2 if zero.get("overlap_comm", False) and not ours else 1
    return Training(
        section=section,
        stage=stage,
        dtype=dtype,
        micro_batch=_number(config, "train_micro_batch_size_per_gpu", "train_micro_batch_size_per_gpu", 1, least=1),
        accumulation=_number(config, "gradient_accumulation_steps", "gradient_accumulation_steps", 1, least=1),
        optimizer=_optimizer(config.get("optimizer"), optimizer),
        autoep=autoep,
        autoep_size=_number(parallel, "expert_parallel.autoep_size", "autoep_size", 1, least=1) if autoep else None,
        bucket_numel=min(bucket, OUR_BUCKET) if ours else bucket,
        staging=buffers * bucket * dtype.itemsize,
        max_live=_number(zero, "zero_optimization.stage3_max_live_parameters", "stage3_max_live_parameters", 10**9),
    )


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = config.get(name) or {}
    if not isinstance(section, Mapping):
        raise ValueError(f"{name} is {section!r}; it must be a JSON object")
    return section


def _is_enabled(config: Mapping[str, Any], name: str) -> bool:
    enabled = _section(config, name).get("enabled", False)
    if not isinstance(enabled, bool):
        raise ValueError(f"{name}.enabled is {enabled!r}; a plan needs true or false")
    return enabled


def _number(section: Mapping[str, Any], name: str, key: str, default: int, *, least: int = 0) -> int:
    value = section.get(key, default)
    # json reads Infinity and NaN too, which have no int.
    whole = value.is_integer() if isinstance(value, float) else isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < least:
        raise ValueError(
            f"{name} is {value!r}; a plan needs a whole number, at least {least} (Trainer fills in 'auto' only when "
            "it runs)"
        )
    return int(value)


def _refuse_unknown(config: Mapping[str, Any], zero: Mapping[str, Any]) -> None:
    """ValueError for what would change the result and is in no formula."""
    found = [f"zero_optimization.{key}" for key in ("offload_optimizer", "offload_param", "zenflow") if zero.get(key)]
    found += [name for name in ("data_types", "torch_autocast") if _section(config, name)]
    for name, key in (("tensor_parallel", "autotp_size"), ("expert_parallel", "expert_tensor_parallel_size")):
        if _number(_section(config, name), f"{name}.{key}", key, 1) > 1:
            found.append(f"{name}.{key}")
    if found:
        raise ValueError(f"{', '.join(found)}: no formula of a plan knows it; plan without it")


def _optimizer(section: Any, named: str | None) -> Optimizer:
    params: Mapping[str, Any] = {}
    if section is not None:
        named = str(_section({"optimizer": section}, "optimizer").get("type", ""))
        params = _section({"optimizer.params": section.get("params")}, "optimizer.params")
    if named is None:
        raise ValueError(f'the config has no "optimizer"; name it: --optimizer {" | ".join(OPTIMIZER_STATES)}')
    name = named.lower()
    if name not in OPTIMIZER_STATES:
        raise ValueError(f"the optimizer is {named!r}; plans know {', '.join(OPTIMIZER_STATES)}")
    state = OPTIMIZER_STATES[name] + (MOMENTUM_STATE if name == "sgd" and params.get("momentum") else 0)
    # DeepSpeed takes kernels of its own for Adam unless told otherwise; a client's is taken for torch's.
    torch_adam = name.startswith("adam") and (section is None or params.get("torch_adam", False))
    return Optimizer(name, state, foreach=bool(torch_adam and not params.get("fused", False)))


# --- a plan ------------------------------------------------------------------------------------------------------


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
        raise ValueError(f"ep_size is {ep_size}; {why}. Valid: {_listed(valid)}")
    section, itemsize = training.section, training.dtype.itemsize
    refusal = _transport_refusal(ep_backend, ep_size, subject, training)
    if refusal is not None:
        raise ValueError(refusal)

    def room(shape: MoEShape) -> tuple[int, int] | None:
        return static_room(shape, ep_size, section.symm_mem) if ep_backend == "symm_mem" else None

    loads = subject.configure(
        ep_size, skew, room, training.dtype, section.recompute_activations, section.overlap.input_grad
    )
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


def _transport_refusal(ep_backend: str, ep_size: int, subject: Subject, training: Training) -> str | None:
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
        cost, counts = rates.exchange(ep_backend), exchange_counts(checkpointing)
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


# --- output ------------------------------------------------------------------------------------------------------


def render(plans: Sequence[Plan], training: Training, subject: Subject, gpus: int, memory_gib: float | None) -> str:
    """The plans side by side, as aligned text."""
    first = plans[0]
    title = (
        f"{first.parameters / 1e9:.3f} B parameters, {first.expert_parameters / 1e9:.3f} B of them in the experts of "
        f"{len(subject.experts)} layers; {gpus} GPUs, ZeRO {training.stage}, "
        f"{str(training.dtype).removeprefix('torch.')}, {training.optimizer.name}; {subject.tokens} tokens per GPU "
        f"and micro batch, {training.accumulation} of them per step"
    )
    rows: list[list[str]] = [
        ["", *(f"ep_size {p.ep_size}" for p in plans)],
        ["transport", *(p.ep_backend for p in plans)],
        ["skew", *(f"{p.skew:g}" for p in plans)],
        ["rows per layer, busiest rank", *(str(p.rows) for p in plans)],
        ["routes per layer, busiest rank", *(str(p.routes) for p in plans)],
        ["GiB per GPU", *([""] * len(plans))],
        *(
            [f"  {label}", *(_gib(value(p.memory)) for p in plans)]
            for label, value in (
                ("parameters", lambda m: m.parameters),
                ("optimizer", lambda m: m.optimizer),
                ("transport's buffers", lambda m: m.transport),
                ("gradients", lambda m: m.gradients),
                ("kept by MoE layers", lambda m: m.moe_kept),
                ("kept by the rest", lambda m: m.dense_kept),
                ("one MoE layer's backward", lambda m: m.layer_peak),
                ("peak in backward", lambda m: m.backward_peak),
                ("peak in step", lambda m: m.step_peak),
                ("peak", lambda m: m.peak),
            )
        ),
        ["MB on the wire per GPU and step", *([""] * len(plans))],
        *(
            [f"  {label}", *(f"{value(p.wire) / 1e6:.1f}" for p in plans)]
            for label, value in (
                ("dispatch and combine", lambda w: w.exchange),
                ("dense gradients", lambda w: w.dense_grads),
                ("experts' gradients", lambda w: w.expert_grads),
                ("parameters", lambda w: w.gathers),
            )
        ),
        ["ms per step, nothing hidden", *([""] * len(plans))],
        ["  dispatch and combine: wire", *(f"{p.wire.exchange_ms:.2f}" for p in plans)],
        [
            "    with fixed costs (host and launches)",
            *(f"{p.wire.exchange_ms + p.wire.exchange_fixed_ms:.2f}" for p in plans),
        ],
        ["  gradients, parameters: wire", *(f"{p.wire.grads_ms:.2f}" for p in plans)],
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    said = [f"{_name(p)}: {note}" for p in plans for note in p.notes]
    if memory_gib is not None:
        said += [
            f"{_name(p)}: {p.memory.peak / GIB:.1f} GiB do not fit in {memory_gib:g}"
            for p in plans
            if p.memory.peak > memory_gib * GIB
        ]
    if first.memory.dense_kept is None:
        said.append("not counted: " + (
            "activations of the dense part; let the factory return (model, batch)" if subject.has_dense else
            "everything but the MoE layers"
        ))  # fmt: skip
    if training.stage == 3:
        said.append("ZeRO-3: all of stage3_max_live_parameters counts as gathered, all the time")
    return "\n".join([title, "", *(line.rstrip() for line in lines), *([""] if said else []), *said])


def _name(plan: Plan) -> str:
    return f"ep_size {plan.ep_size}, {plan.ep_backend}, skew {plan.skew:g}"


def _gib(size: int | None) -> str:
    return "?" if size is None else f"{size / GIB:.2f}"


def fitting(
    subject: Subject,
    training: Training,
    gpus: int,
    plans: Sequence[Plan],
    ep_backend: str,
    memory_gib: float,
    checkpointing: bool,
) -> str | None:
    """Which ep_sizes fit, where one that was asked for does not: at the transport and skew of the first such plan that
    has a transport. None where all plans fit.

    Args:
        ep_backend: the transport to look at where only plans of ep_size 1, which have none, do not fit.
    """
    too_large = [p for p in plans if p.memory.peak > memory_gib * GIB]
    if not too_large:
        return None
    named = next((p for p in too_large if p.ep_backend != "none"), too_large[0])
    backend = ep_backend if named.ep_backend == "none" else named.ep_backend
    fits: list[int] = []
    refused: dict[int, str] = {}
    for n in valid_ep_sizes(subject, gpus):
        refusal = _transport_refusal(backend, n, subject, training)
        if refusal is not None:
            refused[n] = refusal
            continue
        found = make_plan(subject, training, gpus, n, backend, named.skew, checkpointing=checkpointing)
        if found.memory.peak <= memory_gib * GIB:
            fits.append(n)
    said = f"fits: ep_size {_listed(fits)}" if fits else "no ep_size fits"
    if refused:
        said += f"; refused: ep_size {_listed(refused)}: {next(iter(refused.values()))}"
    return f"of the ep_sizes that divide GPUs and experts, with {backend}, at skew {named.skew:g}, {said}"


def _listed(numbers: Iterable[int]) -> str:
    return ", ".join(map(str, numbers))


# --- the command -------------------------------------------------------------------------------------------------


def parse_args(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m flashfusemoe_ds.plan", description="Memory per GPU and bytes on the wire, before a run."
    )
    parser.add_argument("--config", type=Path, required=True, help="the DeepSpeed JSON config")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="a Transformers config.json or its folder, or package.module:factory")
    what.add_argument("--shape", help="T,D,F,E,K of a gated MoE layer, for a quick answer")
    parser.add_argument("--layers", type=int, default=1, help="of --shape (default: 1)")
    parser.add_argument("--gpus", type=int, required=True, help="data-parallel ranks")
    parser.add_argument("--ep_size", type=int, nargs="+", help="default: expert_parallel.autoep_size, or all that can")
    parser.add_argument("--backend", nargs="+", choices=BACKENDS, help="default: the config's ep_backend")
    parser.add_argument("--sequence_length", type=int, help="tokens of a text; times the micro batch, those of a GPU")
    parser.add_argument("--tokens", type=int, help="tokens per GPU and micro batch, instead of --sequence_length")
    parser.add_argument("--skew", type=float, nargs="+", default=[1.0],
                        help="routes of the busiest rank over the mean (default: 1)")  # fmt: skip
    parser.add_argument("--memory", type=float, help="GiB of a GPU: say what does not fit")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="of a Transformers model")
    parser.add_argument("--optimizer", help="the client's, where the config has none")
    parser.add_argument("--exchange_gbps", type=float, help="GB/s of dispatch and combine (default: by backend)")
    parser.add_argument("--exchange_us", type=float, nargs=4,
                        metavar=("DISPATCH", "COMBINE", "REDISPATCH", "COMBINE_GRADS"),
                        help="microseconds of each exchange beside its bytes (default: by backend)")  # fmt: skip
    parser.add_argument("--grads_gbps", type=float, default=GRADS_GBPS, help="GB/s of gradients (default: 210)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of text")
    return parser.parse_args(arguments)


def read_subject(args: argparse.Namespace, training: Training) -> Subject:
    """The model that the arguments name, with its micro batch."""
    for name in ("gpus", "layers", "tokens", "sequence_length", "memory", "exchange_gbps", "grads_gbps"):
        value = getattr(args, name)
        if value is not None and not value > 0:
            raise ValueError(f"--{name} is {value}; it must be positive")
    if any(not 0 <= us < math.inf for us in args.exchange_us or ()):
        raise ValueError(f"--exchange_us is {' '.join(map(str, args.exchange_us))}; all must be 0 or more")
    if any(not 1 <= skew < math.inf for skew in args.skew):
        raise ValueError(f"--skew is {' '.join(map(str, args.skew))}; a maximum over a mean is 1 or more")
    if args.tokens is not None and args.sequence_length is not None:
        raise ValueError("--tokens and --sequence_length are both given; keep one")
    length, tokens = args.sequence_length, args.tokens
    if length is not None:
        tokens = training.micro_batch * length
    if args.shape is not None:
        if tokens is not None or args.gradient_checkpointing:
            raise ValueError("--shape has its own T and nothing to checkpoint; leave out --tokens, --sequence_length "
                             "and --gradient_checkpointing")  # fmt: skip
        return _from_numbers(args.shape, args.layers, training.dtype)
    path = Path(args.model)
    if not path.exists():
        if args.gradient_checkpointing:
            raise ValueError("--gradient_checkpointing is for Transformers configs; a factory's model has its own")
        return from_factory(args.model, training.dtype, tokens)
    if tokens is None:
        raise ValueError("--sequence_length (or --tokens) is missing: nobody else knows how long the texts are")
    if tokens % training.micro_batch:
        raise ValueError(
            f"--tokens is {tokens}; train_micro_batch_size_per_gpu ({training.micro_batch}) must divide it"
        )
    batch = training.micro_batch
    return from_transformers(
        path, training.dtype, batch, tokens // batch, args.gradient_checkpointing, training.autoep
    )


def _from_numbers(text: str, layers: int, dtype: torch.dtype) -> Subject:
    try:
        T, D, F, E, K = (int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--shape is {text!r}; it must be five numbers T,D,F,E,K") from None
    if min(T, D, F, E, K) < 1 or K > E:
        raise ValueError(f"--shape is {text!r}; all must be positive, and K at most E")
    return from_shape(MoEShape(D, F, 2 * F, E, K), T, layers, dtype)


def run(args: argparse.Namespace) -> str:
    """The command's output.

    Raises:
        ValueError, ImportError, OSError: in words for whoever typed it.
    """
    try:
        config = json.loads(args.config.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"--config {args.config} is no JSON: {error}") from None
    if not isinstance(config, Mapping):
        raise ValueError(f"--config {args.config} holds {type(config).__name__}; it must be a JSON object")
    training = read_training(config, args.optimizer)
    subject = read_subject(args, training)
    sizes = args.ep_size or ([training.autoep_size] if training.autoep_size else valid_ep_sizes(subject, args.gpus))
    own = training.section.ep_backend
    backends = args.backend or (list(BACKENDS) if own == "hybrid" else [own])
    fixed = None if args.exchange_us is None else tuple(args.exchange_us)
    rates = Rates(args.exchange_gbps, fixed, args.grads_gbps)
    plans = [
        make_plan(subject, training, args.gpus, n, backend, skew, rates, args.gradient_checkpointing)
        for n in sizes
        for backend in (backends[:1] if n == 1 else backends)
        for skew in (args.skew[:1] if n == 1 else args.skew)
    ]
    if args.json:
        return json.dumps([{**asdict(plan), "peak": plan.memory.peak} for plan in plans], indent=1)
    text = render(plans, training, subject, args.gpus, args.memory)
    if args.memory is None:
        return text
    advice = fitting(subject, training, args.gpus, plans, backends[0], args.memory, args.gradient_checkpointing)
    return text if advice is None else f"{text}\n{advice}"


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit status: 0, or 1 with a line on stderr that says what is wrong."""
    args = parse_args(arguments)
    try:
        print(run(args))
    except (ValueError, ImportError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
