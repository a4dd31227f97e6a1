# SPDX-License-Identifier: GPL-3.0-or-later
"""Named ranges around the stages of a layer, for torch.profiler and for Nsight Systems.

While nothing records, one costs under a microsecond; torch's `record_function` alone costs five, and Nsight does not
see it.
"""

from __future__ import annotations

from types import TracebackType

import torch
from torch.profiler import record_function

PREFIX = "moe:"


class Range:
    """A context whose launches a profiler shows under `moe:<name>`: in torch.profiler while it records, and as an NVTX
    range wherever there is CUDA."""

    __slots__ = ("_name", "_pushed", "_recorded")

    def __init__(self, name: str) -> None:
        self._name = PREFIX + name

    def __enter__(self) -> None:
        self._recorded: record_function | None = None
        if torch.autograd._profiler_enabled():
            self._recorded = record_function(self._name)
            self._recorded.__enter__()
        self._pushed = torch.cuda.is_initialized()
        if self._pushed:
            torch.cuda.nvtx.range_push(self._name)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pushed:
            torch.cuda.nvtx.range_pop()
        if self._recorded is not None:
            self._recorded.__exit__(kind, error, trace)
