# SPDX-License-Identifier: GPL-3.0-or-later
"""What the planning command says of its plans: a table of them, and which ep_sizes would fit.

`render` is the table with its notes, `fitting` the line of advice where a plan needs more memory than there is.
"""

from __future__ import annotations

from collections.abc import Sequence

from flashfusemoe_ds.plan_config import Training
from flashfusemoe_ds.plan_model import Subject
from flashfusemoe_ds.plan_numbers import Plan, listed, make_plan, transport_refusal, valid_ep_sizes

GIB = 2**30


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
        refusal = transport_refusal(backend, n, subject, training)
        if refusal is not None:
            refused[n] = refusal
            continue
        found = make_plan(subject, training, gpus, n, backend, named.skew, checkpointing=checkpointing)
        if found.memory.peak <= memory_gib * GIB:
            fits.append(n)
    said = f"fits: ep_size {listed(fits)}" if fits else "no ep_size fits"
    if refused:
        said += f"; refused: ep_size {listed(refused)}: {next(iter(refused.values()))}"
    return f"of the ep_sizes that divide GPUs and experts, with {backend}, at skew {named.skew:g}, {said}"
