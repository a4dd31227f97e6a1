# SPDX-License-Identifier: GPL-3.0-or-later
"""The kernels of symm_mem compile for Hopper: without spills, 16 bytes an access, with their fences; needs no GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent


def test_compiled_kernels() -> None:
    # A process of its own: this one may have imported triton for its interpreter, which compiles nothing.
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.kernels.peer_census"]
    run = subprocess.run(command, capture_output=True, text=True, env=env, cwd=ROOT)
    assert run.returncode == 0, run.stderr[-4000:]
    rows = [json.loads(line) for line in run.stdout.splitlines()]
    assert len(rows) == 7 + 4
    assert [row["name"] for row in rows if row["spilled"]] == []
    assert [(row["name"], e) for row in rows for e in row["expects"] if not row["instructions"].get(e)] == []
