# SPDX-License-Identifier: GPL-3.0-or-later
"""Counts on their way from the device to the host, which sizes buffers by them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed
from torch import Tensor


class HostCopy(NamedTuple):
    """Pinned memory, and the event after which the values are in it."""

    values: Tensor
    arrived: torch.cuda.Event


class HostCopies:
    """Copies to the host, all of one shape and dtype, made on one stream. The memory and the event of a copy that was
    read serve again: making them anew costs the host more than the copy.

    Args:
        stream: whose copies wait for nothing but what is on it.
    """

    def __init__(self, stream: torch.cuda.Stream) -> None:
        self._stream = stream
        self._read: list[HostCopy] = []

    def start(self, counts: Tensor, after: torch.distributed.Work | None = None) -> HostCopy:
        """Copies what is there after this collective. `counts` must live until the copy has arrived."""
        copy = self._read.pop() if self._read else _like(counts)
        with torch.cuda.stream(self._stream):
            if after is not None:
                after.wait()
            copy.values.copy_(counts, non_blocking=True)
            copy.arrived.record(self._stream)
        return copy

    def read(self, copy: HostCopy) -> list[Any]:
        """The values of a copy that has arrived, once."""
        values = copy.values.tolist()
        self._read.append(copy)
        return values


def _like(counts: Tensor) -> HostCopy:
    # Made in an evaluation it would be an inference tensor, which a training step could not write to.
    with torch.inference_mode(False):
        values = torch.empty(counts.shape, dtype=counts.dtype, device="cpu", pin_memory=True)
    return HostCopy(values, torch.cuda.Event())
