# SPDX-License-Identifier: GPL-3.0-or-later
"""What a measurement was made on: hardware, driver, versions, commit."""

from __future__ import annotations

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

import torch

PACKAGES = (
    "triton", "deepspeed", "liger-kernel", "scattermoe", "flashfusemoe", "sonic-moe", "quack-kernels",
    "nvidia-cutlass-dsl", "transformers", "deep-ep",
)  # fmt: skip


def _output(*command: str) -> str | None:
    """First line of what a command prints, None where it is missing or fails."""
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=20, cwd=Path(__file__).parent)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip().splitlines()[0] if run.returncode == 0 and run.stdout.strip() else None


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def describe(device: torch.device) -> dict[str, object]:
    """JSON-ready; None where something is unknown."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else "CPU",
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else None,
        "cuda": torch.version.cuda,
        "cpu": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "python": platform.python_version(),
        # torch's own string names its CUDA build, its metadata may not.
        "versions": {
            "torch": torch.__version__,
            **({"nccl": ".".join(map(str, torch.cuda.nccl.version()))} if cuda else {}),
            **{name: v for name in PACKAGES if (v := _version(name))},
        },
        "commit": _output("git", "rev-parse", "HEAD"),
    }
