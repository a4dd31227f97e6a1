# SPDX-License-Identifier: GPL-3.0-or-later
"""What a plan takes from a DeepSpeed config: ZeRO, dtype, batch, optimizer, buckets, this package's section.

`read_training` reads them into a `Training`. It refuses what would change a plan's numbers and is in no formula.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from flashfusemoe_ds.config import FlashFuseMoEConfig
from flashfusemoe_ds.planning import MOMENTUM_STATE, OPTIMIZER_STATES, Optimizer

OUR_BUCKET, THEIR_BUCKET = 1 << 25, 500_000_000  # elements: ours where the config has none, and DeepSpeed's


@dataclass(frozen=True)
class Training:
    """What a plan takes from a DeepSpeed config.

    Attributes:
        section: this package's, with its defaults.
        stage: of ZeRO, 0 to 3.
        dtype: of the model.
        micro_batch, accumulation: train_micro_batch_size_per_gpu and gradient_accumulation_steps.
        optimizer: the config's, or the client's.
        autoep: whether `expert_parallel` is enabled.
        autoep_size: its ep_size; None without AutoEP.
        bucket_numel: elements that are reduced together.
        staging: bytes that DeepSpeed's ZeRO 1 and 2 allocate at the first gradient.
        max_live: of ZeRO-3, elements that may be gathered at a time.
    """

    section: FlashFuseMoEConfig
    stage: int
    dtype: torch.dtype
    micro_batch: int
    accumulation: int
    optimizer: Optimizer
    autoep: bool
    autoep_size: int | None
    bucket_numel: int
    staging: int
    max_live: int


def read_training(config: Mapping[str, Any], optimizer: str | None = None) -> Training:
    """Reads a DeepSpeed config.

    Args:
        optimizer: the client's, where the config has no section "optimizer".

    Raises:
        ValueError: a setting is missing, wrong, or one that plans do not know.
    """
    section = FlashFuseMoEConfig.from_ds_config(config)
    zero = _section(config, "zero_optimization")
    stage = _number(zero, "zero_optimization.stage", "stage", 0)
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"zero_optimization.stage is {stage}; valid: 0, 1, 2, 3")
    dtype = torch.float32
    for name, kind in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
        dtype = kind if _is_enabled(config, name) else dtype
    _refuse_unknown(config, zero)
    parallel = _section(config, "expert_parallel")
    autoep = _is_enabled(config, "expert_parallel")
    ours = section.overlap_dense_grads
    bucket = _number(zero, "zero_optimization.reduce_bucket_size", "reduce_bucket_size",
                     OUR_BUCKET if ours and stage in (1, 2) else THEIR_BUCKET)  # fmt: skip
    buffers = 0
    if stage in (1, 2) and zero.get("contiguous_gradients", True):
        buffers = 2 if zero.get("overlap_comm", False) and not ours else 1
    return Training(
        section=section,
        stage=stage,
        dtype=dtype,
        micro_batch=_number(config, "train_micro_batch_size_per_gpu", "train_micro_batch_size_per_gpu", 1, least=1),
        accumulation=_number(config, "gradient_accumulation_steps", "gradient_accumulation_steps", 1, least=1),
        optimizer=_optimizer(config.get("optimizer"), optimizer),
        autoep=autoep,
        autoep_size=_number(parallel, "expert_parallel.autoep_size", "autoep_size", 1, least=1) if autoep else None,
        bucket_numel=min(bucket, OUR_BUCKET) if ours else bucket,
        staging=buffers * bucket * dtype.itemsize,
        max_live=_number(zero, "zero_optimization.stage3_max_live_parameters", "stage3_max_live_parameters", 10**9),
    )


def _section(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    section = config.get(name) or {}
    if not isinstance(section, Mapping):
        raise ValueError(f"{name} is {section!r}; it must be a JSON object")
    return section


def _is_enabled(config: Mapping[str, Any], name: str) -> bool:
    enabled = _section(config, name).get("enabled", False)
    if not isinstance(enabled, bool):
        raise ValueError(f"{name}.enabled is {enabled!r}; a plan needs true or false")
    return enabled


def _number(section: Mapping[str, Any], name: str, key: str, default: int, *, least: int = 0) -> int:
    value = section.get(key, default)
    # json reads Infinity and NaN too, which have no int.
    whole = value.is_integer() if isinstance(value, float) else isinstance(value, int) and not isinstance(value, bool)
    if not whole or value < least:
        raise ValueError(
            f"{name} is {value!r}; a plan needs a whole number, at least {least} (Trainer fills in 'auto' only when "
            "it runs)"
        )
    return int(value)


def _refuse_unknown(config: Mapping[str, Any], zero: Mapping[str, Any]) -> None:
    """ValueError for what would change the result and is in no formula."""
    found = [f"zero_optimization.{key}" for key in ("offload_optimizer", "offload_param", "zenflow") if zero.get(key)]
    found += [name for name in ("data_types", "torch_autocast") if _section(config, name)]
    for name, key in (("tensor_parallel", "autotp_size"), ("expert_parallel", "expert_tensor_parallel_size")):
        if _number(_section(config, name), f"{name}.{key}", key, 1) > 1:
            found.append(f"{name}.{key}")
    if found:
        raise ValueError(f"{', '.join(found)}: no formula of a plan knows it; plan without it")


def _optimizer(section: Any, named: str | None) -> Optimizer:
    params: Mapping[str, Any] = {}
    if section is not None:
        named = str(_section({"optimizer": section}, "optimizer").get("type", ""))
        params = _section({"optimizer.params": section.get("params")}, "optimizer.params")
    if named is None:
        raise ValueError(f'the config has no "optimizer"; name it: --optimizer {" | ".join(OPTIMIZER_STATES)}')
    name = named.lower()
    if name not in OPTIMIZER_STATES:
        raise ValueError(f"the optimizer is {named!r}; plans know {', '.join(OPTIMIZER_STATES)}")
    state = OPTIMIZER_STATES[name] + (MOMENTUM_STATE if name == "sgd" and params.get("momentum") else 0)
    # DeepSpeed takes kernels of its own for Adam unless told otherwise; a client's is taken for torch's.
    torch_adam = name.startswith("adam") and (section is None or params.get("torch_adam", False))
    return Optimizer(name, state, foreach=bool(torch_adam and not params.get("fused", False)))
