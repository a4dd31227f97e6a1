# SPDX-License-Identifier: GPL-3.0-or-later
"""Tuned kernels compile for Hopper without a spill and with the instructions they are built on; needs no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
# What a program may have, in bytes. Tiles for 8.0 run on 8.6 and 8.9 too, which have 99 KiB and not an A100's 163.
SHARED_LIMIT = {90: 227 * 1024, 80: 99 * 1024}


@pytest.fixture(scope="module")
def rows() -> list[dict]:
    # A process of its own: this one may have imported triton for its interpreter, which compiles nothing.
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.census"]
    run = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
    assert run.returncode == 0, run.stderr[-4000:]
    return [json.loads(line) for line in run.stdout.splitlines()]


def test_no_kernel_spills(rows: list[dict]) -> None:
    assert rows
    spilling = [row for row in rows if row["spilled"] or {"LDL", "STL"} & set(row["instructions"])]
    assert not spilling


def test_every_kernel_has_its_instructions(rows: list[dict]) -> None:
    missing = [(row["name"], e) for row in rows for e in row["expects"] if not row["instructions"].get(e)]
    assert not missing


def test_shared_memory_fits(rows: list[dict]) -> None:
    too_much = [row for row in rows if row["shared"] > SHARED_LIMIT[row["capability"]]]
    assert not too_much
