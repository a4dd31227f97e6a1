# SPDX-License-Identifier: GPL-3.0-or-later
"""How much of a collective's time is transfer, and how much is waiting for a rank that comes later.

A collective's kernel starts when its own GPU is ready for it, spins until all ranks of the process group have started
theirs, and ends when the data is there. On every rank what lies between the last rank's start and its own end is
transfer, and what came before is waiting. Waiting is no cost of the collective: ranks that are apart would wait for
each other at their next meeting instead.

Clocks of different GPUs are not comparable, durations are. The last rank to start waits for nobody, so

    transfer = the shortest duration over the ranks of the group, as the last part of each rank's kernel
    waiting  = a rank's own duration - transfer

Collectives of different ranks are the same one if they have the same role, process group and place in the order of
those in a training step. Operation and size must then be equal too; where they, or the numbers, are not, nothing is
split.

Limits:

- Why a rank is late does not matter: its host, its compute, or other communication before this one.
- It takes the ranks of a group to end together. In an all-to-all a rank that receives more than others may end later,
  and that difference counts as its waiting. Data that moves before the last rank has started (in rings of more than
  two ranks, and into buffers that wait for it) counts as waiting too. So transfer is at least what is said.
- A reduction or a broadcast with a root can be over on one rank before another has started it. All its time counts as
  transfer.
- Exchanges through peer memory and DeepEP's are no collectives that a trace names: they are not split.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from device_trace import Collective, Kernel, Role, compute_intervals
from intervals import length, subtract

ROLES = (Role.DENSE, Role.EXPERTS, Role.EXCHANGE)  # the ones that are split
# Operations that no rank can end before all have started.
_MEETINGS = ("allreduce", "reduce_scatter", "allgather", "all_to_all")


@dataclass(frozen=True)
class Part:
    """One rank's part in one collective; ms."""

    collective: Collective
    duration: float


def transfer_and_waiting(
    kernels: list[Kernel], steps: Sequence[int]
) -> tuple[list[dict[str, tuple[float, float]]], list[str]]:
    """Of each of these steps, role -> ms of exposed transfer and of exposed waiting on this rank.

    Left out are roles with a collective that the trace does not name, and roles of which the ranks' collectives do not
    fit together. Sentences, beside the steps, say why they do not. Nothing is there if a rank has no profile. Roles
    and sentences are the same on all ranks. Collective.
    """
    own = [{role: parts(kernels, role, step) for role in ROLES} for step in steps]
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, own)
    if any(len(of_rank) != len(own) for of_rank in everyone):
        return [], []
    split: list[dict[str, tuple[float, float]]] = [{} for _ in steps]
    mismatches = []
    for role in ROLES:
        of_steps = [[of_rank[number][role] for of_rank in everyone] for number in range(len(own))]
        if any(of_rank is None for of_ranks in of_steps for of_rank in of_ranks):
            continue
        try:
            transfers = [transfer_times(of_ranks)[dist.get_rank()] for of_ranks in of_steps]
        except ValueError as error:
            mismatches.append(f"transfer and waiting of {role.value} are unknown: {error}")
            continue
        for of_roles, step, of_parts in zip(split, steps, transfers, strict=True):
            of_roles[role.value] = exposed_parts(kernels, role, step, of_parts)
    return split, mismatches


def parts(kernels: list[Kernel], role: Role, step: int) -> list[Part] | None:
    """This rank's, in the order in which they ran; None if the trace does not tell the collective of one."""
    own = _own(kernels, role, step)
    if any(k.collective is None for k in own):
        return None
    return [Part(k.collective, k.end - k.start) for k in own]


def transfer_times(ranks: Sequence[Sequence[Part]]) -> list[list[float]]:
    """Transfer in ms of each part, from the parts of all ranks in collectives of one role and step.

    Raises:
        ValueError: the ranks of a process group did not take part in the same collectives.
    """
    of_group: dict[str, dict[int, list[int]]] = defaultdict(lambda: defaultdict(list))
    for rank, own in enumerate(ranks):
        for place, part in enumerate(own):
            of_group[part.collective.group][rank].append(place)
    transfers = [[part.duration for part in own] for own in ranks]
    for group, places in of_group.items():
        _check_numbers(group, ranks, places)
        for number, together in enumerate(zip(*places.values(), strict=True)):
            same = {rank: ranks[rank][place] for rank, place in zip(places, together, strict=True)}
            _check_same(group, number, same)
            if any(name in next(iter(same.values())).collective.operation.lower() for name in _MEETINGS):
                shortest = min(part.duration for part in same.values())
                for rank, place in zip(places, together, strict=True):
                    transfers[rank][place] = shortest
    return transfers


def exposed_parts(kernels: list[Kernel], role: Role, step: int, transfers: Sequence[float]) -> tuple[float, float]:
    """ms of a step in which a collective of this role, and no compute kernel, runs on this rank's GPU: transfer, and
    waiting beside which no other collective of the role transfers. Their sum is the role's exposed communication.

    Args:
        transfers: of the parts of this role and step, in their order.
    """
    own, compute = _own(kernels, role, step), compute_intervals(kernels)
    moving = [(k.end - ms, k.end) for k, ms in zip(own, transfers, strict=True)]
    bare = subtract([k.interval for k in own], compute)
    return length(subtract(moving, compute)), length(subtract(bare, moving))


def _own(kernels: list[Kernel], role: Role, step: int) -> list[Kernel]:
    return [k for k in kernels if k.role is role and k.step == step]


def _check_numbers(group: str, ranks: Sequence[Sequence[Part]], places: dict[int, list[int]]) -> None:
    """`places`: of the group's parts among those of each rank that has any."""
    sizes = {ranks[rank][place].collective.ranks for rank, own in places.items() for place in own}
    if sizes != {len(places)}:
        said = " or ".join(map(str, sorted(sizes)))
        raise ValueError(f"process group {group} has {said} ranks, of which {len(places)} show collectives")
    numbers = {rank: len(own) for rank, own in places.items()}
    if len(set(numbers.values())) > 1:
        said = ", ".join(f"{number} on rank {rank}" for rank, number in numbers.items())
        raise ValueError(f"process group {group} has different numbers of collectives: {said}")


def _check_same(group: str, number: int, same: dict[int, Part]) -> None:
    """Sizes of an all-to-all may differ between ranks."""
    said = {}
    for rank, part in same.items():
        collective = part.collective
        size = "" if "all_to_all" in collective.operation else f" of {collective.elements} elements"
        said[rank] = f"{collective.operation}{size}"
    if len(set(said.values())) > 1:
        each = ", ".join(f"{what} on rank {rank}" for rank, what in said.items())
        raise ValueError(f"collective {number} of process group {group} is not one operation: {each}")
