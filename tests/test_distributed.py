# SPDX-License-Identifier: GPL-3.0-or-later
"""The helper that runs ranks: results in order, every traceback, no hang, no process left."""

from __future__ import annotations

import os
import time
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist

from tests.distributed import run_ranks


def _sum_of_ranks(rank: int, world_size: int, offset: int, folder: str) -> dict[str, object]:
    total = torch.tensor([rank + offset])
    dist.all_reduce(total)
    return _note_pid(rank, folder) | {
        "total": total,
        "threads": torch.get_num_threads(),
        "backend": dist.get_backend(),
        "env": [os.environ[key] for key in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "DS_ACCELERATOR")],
    }


def _one_raises(rank: int, world_size: int, folder: str) -> None:
    _note_pid(rank, folder)
    if rank == 1:
        print("about to fail on purpose")
        raise KeyError("the reason")
    dist.barrier()  # rank 1 never comes
    time.sleep(600)  # gloo may let the barrier fail, so hang on whatever happens


def _one_hangs(rank: int, world_size: int, folder: str) -> int:
    _note_pid(rank, folder)
    if rank == 1:
        _sleep_on_purpose()
    return rank


def _sleep_on_purpose() -> None:
    time.sleep(600)


def _one_exits(rank: int, world_size: int) -> None:
    if rank == 0:
        os._exit(7)


def _note_pid(rank: int, folder: str) -> dict[str, object]:
    Path(folder, f"pid{rank}").write_text(str(os.getpid()))
    return {}


def _assert_all_gone(folder: Path, world_size: int) -> None:
    pids = [int((folder / f"pid{rank}").read_text()) for rank in range(world_size)]
    assert len(set(pids)) == world_size
    assert not [pid for pid in pids if psutil.pid_exists(pid)]


def test_results_come_in_rank_order(tmp_path: Path) -> None:
    results = run_ranks(2, _sum_of_ranks, 10, str(tmp_path))
    assert [int(result["total"]) for result in results] == [21, 21]
    assert [result["env"] for result in results] == [["0", "0", "2", "cpu"], ["1", "1", "2", "cpu"]]
    assert {result["threads"] for result in results} == {1}
    assert {result["backend"] for result in results} == {"gloo"}
    _assert_all_gone(tmp_path, 2)


def test_a_rank_that_raises_is_reported_while_another_hangs(tmp_path: Path) -> None:
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=r"rank\(s\) \[1(, 0)?\]|rank\(s\) \[0, 1\]") as caught:
        run_ranks(2, _one_raises, str(tmp_path), timeout=120)
    text = str(caught.value)
    assert "KeyError: 'the reason'" in text and "_one_raises" in text and "about to fail on purpose" in text
    assert "--- rank 0" in text
    assert time.monotonic() - start < 60, "the error must not wait for the timeout"
    _assert_all_gone(tmp_path, 2)


@pytest.mark.slow
def test_a_rank_that_hangs_is_named_with_its_stack(tmp_path: Path) -> None:
    with pytest.raises(TimeoutError, match=r"rank\(s\) \[1\] of 2 still running after 12 s") as caught:
        run_ranks(2, _one_hangs, str(tmp_path), timeout=12)
    assert "_sleep_on_purpose" in str(caught.value)
    _assert_all_gone(tmp_path, 2)


def test_a_rank_that_dies_is_reported() -> None:
    with pytest.raises(RuntimeError, match="died without a word, exit code 7"):
        run_ranks(2, _one_exits, init=False)
