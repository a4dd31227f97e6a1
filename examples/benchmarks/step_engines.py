# SPDX-License-Identifier: GPL-3.0-or-later
"""Who competes in `step.py`: DeepSpeed engines over the same model, each configured in its own best way.

All get the same weights, precision, optimizer (torch's fused AdamW, which needs no compiler) and clipping. DeepSpeed's
engines differ in how they reduce gradients at ZeRO stages 1 and 2:

    stock        overlap_comm, and DeepSpeed's default reduce_bucket_size of 5e8 elements
    stock_tuned  overlap_comm, and buckets of 2^25 elements, as ours has them: more of them leave during backward
    ours         flashfusemoe_ds.initialize and its defaults

Stage 0 has no such settings. A contender that knows ZeRO-3 (an AutoEP engine; deepspeed.moe layers do not) is one more
entry of CONTENDERS, with 3 among its stages.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import deepspeed
import torch
import torch.distributed
from deepspeed.accelerator import get_accelerator
from deepspeed.utils import groups
from device_trace import Groups
from seed_model import SeedConfig, make_model
from torch import nn

import flashfusemoe_ds
from flashfusemoe_ds.config import SECTION, FlashFuseMoEConfig
from flashfusemoe_ds.ds.engine import check_section

sys.path.append(str(Path(__file__).parents[1]))

from lm.launch import be_alone_without_launcher

TUNED_BUCKET = 1 << 25


@dataclass(frozen=True)
class Training:
    """What all contenders share."""

    model: SeedConfig
    batch: int
    dtype: torch.dtype
    learning_rate: float
    gradient_clipping: float
    ep_backend: str
    seed: int


@dataclass(frozen=True)
class Contender:
    """One way to train the model. `zero` and `section` go into its DeepSpeed config, `zero` at stages above 0."""

    title: str
    ours: bool
    stages: tuple[int, ...]
    initialize: Callable[..., tuple[Any, ...]]
    zero: dict[str, Any]


CONTENDERS = {
    "stock": Contender("DeepSpeed", False, (0, 1, 2), deepspeed.initialize, {"overlap_comm": True}),
    "stock_tuned": Contender(
        "DeepSpeed, buckets of 2^25",
        False,
        (1, 2),
        deepspeed.initialize,
        {"overlap_comm": True, "reduce_bucket_size": TUNED_BUCKET},
    ),
    "ours": Contender("flashfusemoe_ds", True, (0, 1, 2), flashfusemoe_ds.initialize, {}),
}


def check_stages(keys: list[str], stages: list[int]) -> None:
    """ValueError for a stage at which none of these contenders runs."""
    for stage in stages:
        if not any(stage in CONTENDERS[key].stages for key in keys):
            known = "; ".join(f"{key}: {', '.join(map(str, CONTENDERS[key].stages))}" for key in keys)
            raise ValueError(f"--stage {stage}: none of --layers runs at it ({known})")


def check_backend(ep_backend: str) -> None:
    """ValueError or ImportError where ours cannot have this transport on this machine."""
    check_section(FlashFuseMoEConfig.from_ds_config({SECTION: {"ep_backend": ep_backend}}))


def world_size() -> int:
    """Processes of the launcher that started this one; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join() -> torch.device:
    """Joins the launcher's other processes, over NCCL or, without GPUs, gloo; returns this process's device."""
    be_alone_without_launcher()
    # On CPUs DeepSpeed would first compile a shared-memory all-reduce, and fail without a C++ compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    accelerator, local_rank = get_accelerator(), int(os.environ.get("LOCAL_RANK", "0"))
    if accelerator.device_name() == "cuda":
        accelerator.set_device(local_rank)
    elif "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(max(1, cores // world_size()))
    deepspeed.init_distributed(verbose=False)
    return torch.device(accelerator.device_name(), *([local_rank] if accelerator.device_name() == "cuda" else []))


def ds_config(contender: Contender, stage: int, training: Training, device: torch.device) -> dict[str, Any]:
    optimizer = {"torch_adam": True, "lr": training.learning_rate, "betas": [0.9, 0.95], "weight_decay": 0.1}
    if device.type == "cuda":
        optimizer["fused"] = True
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": training.batch,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": training.gradient_clipping,
        "bf16": {"enabled": training.dtype == torch.bfloat16},
        "optimizer": {"type": "AdamW", "params": optimizer},
        "zero_optimization": {"stage": stage, **(contender.zero if stage else {})},
        "steps_per_print": 1_000_000_000,
    }
    return {**config, SECTION: {"ep_backend": training.ep_backend}} if contender.ours else config


def build(key: str, stage: int, training: Training, device: torch.device) -> Any:
    """A DeepSpeed engine. Collective."""
    contender = CONTENDERS[key]
    ep_rank = torch.distributed.get_rank() % training.model.ep_size  # DeepSpeed's groups are of neighbouring ranks
    model: nn.Module = make_model(training.model, training.seed, ep_rank, device, training.dtype)
    engine, *_ = contender.initialize(
        model=model,
        model_parameters=list(model.parameters()),
        config=ds_config(contender, stage, training, device),
    )
    return engine


def group_names() -> Groups:
    """The process groups of this rank's engines, as a profile names them."""
    dense = (groups._get_data_parallel_group(), groups._get_sequence_data_parallel_group(),
             torch.distributed.group.WORLD)  # fmt: skip
    experts = groups._get_expert_data_parallel_group_dict().values()
    return Groups(
        frozenset(group.group_name for group in dense),
        frozenset(group.group_name for group in experts),
        max(group.size() for group in experts),
    )
