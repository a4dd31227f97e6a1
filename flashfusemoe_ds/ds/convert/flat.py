# SPDX-License-Identifier: GPL-3.0-or-later
"""DeepSpeed's flat buffers: a parameter group end to end, padded, and cut into one equal partition per rank.

Facts from deepspeed 0.19.8: runtime/zero/stage_1_and_2.py (__init__, _round_robin_reorder), runtime/bf16_optimizer.py
(_setup_for_real_optimizer), runtime/fp16/fused_optimizer.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True)
class FlatLayout:
    """Where the parameters of one group lie.

    Attributes:
        numels: elements of each parameter, in flat order.
        gaps: zeros after each parameter (zero_optimization.parameter_alignment; none after the last).
        num_partitions: ranks that share the buffer.
        alignment: the buffer's length is a multiple of it.
    """

    numels: tuple[int, ...]
    gaps: tuple[int, ...]
    num_partitions: int
    alignment: int

    @cached_property
    def used(self) -> int:
        """Elements up to the end of the last parameter."""
        return sum(self.numels) + sum(self.gaps)

    @property
    def total(self) -> int:
        return -(-self.used // self.alignment) * self.alignment

    @property
    def partition_size(self) -> int:
        return self.total // self.num_partitions

    @cached_property
    def offsets(self) -> list[int]:
        sizes = [n + gap for n, gap in zip(self.numels, self.gaps, strict=True)]
        return [0, *accumulate(sizes)][:-1]

    def padding(self, partition: int) -> int:
        """Elements at a partition's end that belong to no parameter."""
        return min(max((partition + 1) * self.partition_size - self.used, 0), self.partition_size)

    def fragments(self, partition: int) -> list[tuple[int, int, int]]:
        """(parameter, start within the partition, elements) of every parameter that has a part in it."""
        low, high = partition * self.partition_size, (partition + 1) * self.partition_size
        found = []
        for i, (offset, numel) in enumerate(zip(self.offsets, self.numels, strict=True)):
            start, end = max(offset, low), min(offset + numel, high)
            if start < end:
                found.append((i, start - low, end - start))
        return found

    def read(self, partitions: Sequence[Tensor], start: int, numel: int) -> Tensor:
        """Elements [start, start + numel) of the buffer, from its partitions (with or without their padding)."""
        parts = []
        for i, partition in enumerate(partitions):
            low = max(start - i * self.partition_size, 0)
            high = min(start + numel - i * self.partition_size, self.partition_size)
            if low < high:
                parts.append(partition[low:high])
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def flatten(self, tensors: Sequence[Tensor]) -> Tensor:
        """The whole buffer of these parameters, zeros in between."""
        buffer = torch.zeros(self.total, dtype=tensors[0].dtype)
        for offset, tensor in zip(self.offsets, tensors, strict=True):
            buffer[offset : offset + tensor.numel()] = tensor.reshape(-1)
        return buffer

    def partition(self, buffer: Tensor, i: int) -> Tensor:
        return buffer[i * self.partition_size : (i + 1) * self.partition_size]


def aligned_gaps(numels: Sequence[int], multiple: int) -> tuple[int, ...]:
    """Zeros after each parameter so that the next begins at a multiple."""
    gaps, end = [], 0
    for numel in numels:
        gaps.append(-(end + numel) % multiple)
        end += numel + gaps[-1]
    return (*gaps[:-1], 0)


def round_robin(items: Sequence[T], num_partitions: int) -> list[T]:
    """zero_optimization.round_robin_gradients: every num_partitions-th item, from each start in turn."""
    return [item for start in range(num_partitions) for item in items[start::num_partitions]]


def undo_round_robin(items: Sequence[T], num_partitions: int) -> list[T]:
    """The inverse of `round_robin`."""
    original: list[T | None] = [None] * len(items)
    for position, item in zip(round_robin(range(len(items)), num_partitions), items, strict=True):
        original[position] = item
    return original
