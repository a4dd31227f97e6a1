# SPDX-License-Identifier: GPL-3.0-or-later
"""How a process of the examples starts: alone or under a launcher, with DeepSpeed or with torch.distributed alone."""

from __future__ import annotations

import logging
import os
import socket
import warnings

import torch
import torch.distributed as dist


def start_deepspeed() -> None:
    """Join the other ranks, or be the only one when no launcher started this process."""
    import deepspeed  # not at the top: the examples in plain PyTorch do without it

    be_alone_without_launcher()
    _share_cores()
    deepspeed.utils.logger.setLevel(logging.WARNING)
    # DeepSpeed calls collectives by names that torch has since renamed: nothing a user of this script could act on.
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"torch\.distributed")
    # On CPUs DeepSpeed would first compile a shared-memory all-reduce: half a minute, and a failure without a C++
    # compiler. The exchange goes through gloo either way.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed()


def start_torch() -> torch.device:
    """Join the other ranks if a launcher started this process; returns its GPU, or the CPU where there is none."""
    _share_cores()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    if "RANK" in os.environ:
        dist.init_process_group("gloo" if device.type == "cpu" else "nccl")
    return device


def be_alone_without_launcher() -> None:
    """Sets what a launcher would have set, for one process on a free port, if none did."""
    if "RANK" not in os.environ:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        alone = {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_RANK": 0, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in alone.items()})


def stop() -> None:
    """Leave together: the barrier gives gloo's threads time to let go of the last tensors, which they cannot do once
    the interpreter is ending."""
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def _share_cores() -> None:
    """torch gives every process all cores: two processes on two cores then fight over them."""
    if "OMP_NUM_THREADS" not in os.environ:
        local_processes = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // local_processes))
