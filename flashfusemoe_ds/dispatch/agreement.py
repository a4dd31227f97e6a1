# SPDX-License-Identifier: GPL-3.0-or-later
"""How the ranks of a group come to the same decision: they exchange what each knows, and all conclude from all of it.

For set-up only; each exchange is a collective of pickled objects.
"""

from __future__ import annotations

import platform
from pathlib import Path
from typing import NamedTuple, TypeVar

import torch
import torch.distributed

T = TypeVar("T")


class Place(NamedTuple):
    """Where a rank runs: its host, and its GPU's UUID, None without one."""

    host: str
    gpu: str | None


def exchange(group: torch.distributed.ProcessGroup, mine: T) -> list[T]:
    """What each rank says, in rank order. Collective."""
    said: list[T | None] = [None] * torch.distributed.get_world_size(group)
    torch.distributed.all_gather_object(said, mine, group=group)
    return said


def joint_reason(group: torch.distributed.ProcessGroup, reasons: list[str | None]) -> str | None:
    """Of each rank's reason one sentence: `reason` where all have the same, else `on ranks 1, 3: reason; on rank 2:
    another` by global ranks. None where no rank has one."""
    ranks_of: dict[str, list[int]] = {}
    for rank, reason in zip(torch.distributed.get_process_group_ranks(group), reasons, strict=True):
        if reason is not None:
            ranks_of.setdefault(reason, []).append(rank)
    if len(ranks_of) == 1 and None not in reasons:
        return reasons[0]
    parts = [f"on rank{'s' * (len(r) > 1)} {', '.join(map(str, r))}: {reason}" for reason, r in ranks_of.items()]
    return "; ".join(parts) or None


def this_place() -> Place:
    boot_id = Path("/proc/sys/kernel/random/boot_id")  # hosts may share a name
    host = f"{platform.node()} {boot_id.read_text().strip() if boot_id.is_file() else ''}"
    return Place(host, _uuid(torch.cuda.current_device()) if torch.cuda.is_available() else None)


def access_refusal(places: list[Place], mine: Place) -> str | None:
    """Why this rank's GPU cannot work with those of the host's other ranks; None if it can, or if this process does
    not see them."""
    neighbours = [place.gpu for place in places if place.host == mine.host and place.gpu is not None]
    if len(set(neighbours)) < len(neighbours):
        return "two ranks share a GPU"
    if mine.gpu is None:
        return None
    own = torch.cuda.current_device()
    for index in range(torch.cuda.device_count()):
        if index == own or _uuid(index) not in neighbours:
            continue
        if not torch.cuda.can_device_access_peer(own, index):
            return f"GPU {own} has no peer access to GPU {index}"
    return None


def _uuid(index: int) -> str:
    return str(torch.cuda.get_device_properties(index).uuid)
