# SPDX-License-Identifier: GPL-3.0-or-later
"""Settings for every test: threads, quiet libraries, the gpu marker, and no rank left behind."""

from __future__ import annotations

import multiprocessing as mp
import os
from collections.abc import Iterator

# Before torch is imported: the ranks of a distributed test share the machine, and two single-threaded runs of the same
# sums are bit-equal.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():
    # Before triton is imported: without a GPU, kernels run in its interpreter.
    os.environ.setdefault("TRITON_INTERPRET", "1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


@pytest.fixture(autouse=True)
def no_rank_left_behind() -> Iterator[None]:
    yield
    left = mp.active_children()
    for process in left:
        process.kill()
        process.join()
    assert not left, f"processes left behind by the test: {[process.name for process in left]}"
