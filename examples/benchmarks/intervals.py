# SPDX-License-Identifier: GPL-3.0-or-later
"""Sets of time intervals: union, difference, length. An interval is a (start, end) pair; touching ones are one."""

from __future__ import annotations

from collections.abc import Iterable

Interval = tuple[float, float]


def union(intervals: Iterable[Interval], gap: float = 0.0) -> list[Interval]:
    """Disjoint, in order; empty ones are left out. Neighbours at most `gap` apart become one."""
    merged: list[Interval] = []
    for start, end in sorted(i for i in intervals if i[1] > i[0]):
        if merged and start <= merged[-1][1] + gap:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def subtract(intervals: Iterable[Interval], holes: Iterable[Interval]) -> list[Interval]:
    """What of `intervals` lies in none of `holes`: disjoint, in order."""
    cut = union(holes)
    rest: list[Interval] = []
    first = 0  # holes before this one end before the current interval starts
    for start, end in union(intervals):
        while first < len(cut) and cut[first][1] <= start:
            first += 1
        at = first
        while at < len(cut) and cut[at][0] < end:
            if cut[at][0] > start:
                rest.append((start, cut[at][0]))
            start = max(start, cut[at][1])
            at += 1
        if start < end:
            rest.append((start, end))
    return rest


def length(intervals: Iterable[Interval]) -> float:
    """Time that at least one of them covers."""
    return sum(end - start for start, end in union(intervals))
