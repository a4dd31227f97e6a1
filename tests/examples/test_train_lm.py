# SPDX-License-Identifier: GPL-3.0-or-later
"""The main example under the launcher: two processes, what it leaves behind, an exact resume, its error messages."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.test_docs import blocks

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "examples" / "lm" / "README.md"
COMMAND = "deepspeed --num_gpus 2 examples/train_lm.py --deepspeed_config ds_configs/cpu_zero1.json"
SMALL = ["--num_layers", "2", "--hidden_size", "32", "--mlp_size", "48", "--num_experts", "4", "--expert_size", "24",
         "--context", "32", "--steps", "6", "--warmup_steps", "2", "--log_every", "1", "--eval_every", "3",
         "--eval_batches", "2", "--save_every", "3", "--sample_bytes", "20"]  # fmt: skip


def train(*arguments: str, processes: int = 2) -> subprocess.CompletedProcess[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    return subprocess.run(
        [sys.executable, "-m", "deepspeed.launcher.runner", "--master_port", port,
         *COMMAND.replace("--num_gpus 2", f"--num_gpus {processes}").split()[1:], *SMALL, *arguments],
        cwd=ROOT, env={**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, timeout=240,
    )  # fmt: skip


@pytest.mark.slow
def test_run_and_exact_resume(tmp_path: Path) -> None:
    data = ["--data", str(ROOT / "LICENSE")]
    whole = train("--run_dir", str(tmp_path / "whole"), *data)
    assert whole.returncode == 0, whole.stdout
    assert "nats per byte at step 1" in whole.stdout
    expected = json.loads((tmp_path / "whole" / "metrics.json").read_text())
    assert (tmp_path / "whole" / "run.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "whole" / "sample.txt").stat().st_size >= 20
    losses = [point["loss"] for point in expected["history"]["train"]]
    assert len(losses) == 6 and losses[-1] < losses[0] - 0.1
    assert expected["model"]["ep_size"] == 2

    # The same run, as if it had stopped after step 3.
    checkpoints = tmp_path / "rest" / "checkpoints"
    shutil.copytree(tmp_path / "whole" / "checkpoints", checkpoints)
    tags = sorted(p.name for p in checkpoints.iterdir() if p.is_dir())
    (checkpoints / "latest").write_text(tags[0])
    rest = train("--run_dir", str(tmp_path / "rest"), "--resume", *data)
    assert rest.returncode == 0, rest.stdout
    resumed = json.loads((tmp_path / "rest" / "metrics.json").read_text())
    for kind in ("train", "eval"):
        for a, b in zip(resumed["history"][kind], expected["history"][kind], strict=True):
            assert (a["step"], a["loss"]) == (b["step"], b["loss"])


def test_the_commands_of_the_page() -> None:
    commands = [line for code in blocks(PAGE, "sh") for line in code.splitlines()]
    assert commands == ["make train", COMMAND, f"{COMMAND} --resume"], "test_run_and_exact_resume runs the last two"


def test_mistakes_are_said(tmp_path: Path) -> None:
    for arguments, message in (
        (("--data", str(tmp_path / "nothing")), str(tmp_path / "nothing")),
        (("--ep_size", "3"), "ep_size=3: must divide the 1 processes"),
    ):
        run = train("--run_dir", str(tmp_path), *arguments, processes=1)
        assert run.returncode != 0 and message in run.stdout, run.stdout
