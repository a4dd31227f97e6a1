# SPDX-License-Identifier: GPL-3.0-or-later
"""The model's file: what of it depends on the layout of experts. Weights do not: each expert's lie in a file of its
own, under its global id, in either layout and at any ep_size."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deepspeed.checkpoint.constants import (
    BUFFER_NAMES,
    CHECKPOINT_PARALLEL_DIMS,
    FROZEN_PARAM_FRAGMENTS,
    FROZEN_PARAM_SHAPES,
    PARAM_SHAPES,
)

from flashfusemoe_ds.ds.convert.groups import Arrangement, ExpertParam, translate

SHARED_PARAMS = "shared_params"
# What the state of torch's and DeepSpeed's schedulers holds per parameter group.
SCHEDULER_LISTS = (
    "base_lrs",
    "_last_lr",
    "lr_lambdas",
    "min_lrs",
    "max_lrs",
    "min_lr",
    "max_lr",
    "base_momentums",
    "max_momentums",
)


def check_model_state(state: Any, path: Path) -> None:
    """ValueError for a checkpoint of another kind of parallelism."""
    if not isinstance(state, dict) or "module" not in state or "ds_config" not in state:
        raise ValueError(f"{path} is no DeepSpeed model file")
    dims = state.get(CHECKPOINT_PARALLEL_DIMS) or {}
    sizes = {**dims, "mp_world_size": state.get("mp_world_size", 1)}
    if any(size > 1 for size in sizes.values()):
        raise ValueError(f"{path} was saved with tensor or pipeline parallelism ({sizes}); it is not converted")
    if state.get("ds_autoep_layers"):
        raise ValueError(
            f"{path} holds AutoEP layers, which DeepSpeed's universal checkpoints take to another ep_size"
        )


def convert_model_state(
    state: dict[str, Any],
    source: Arrangement,
    target: Arrangement,
    groups: Sequence[list[ExpertParam] | int],
    optimizer: dict[str, Any] | None,
) -> dict[str, Any]:
    """The model's file for the target.

    Args:
        groups: the target's parameter groups in order: the parameters in flat order, or, for a dense group, its index
            in the source.
        optimizer: what the file repeats of the optimizer's state at stage 0: that of rank 0.
    """
    state = dict(state)
    if state.get("optimizer") is not None:
        state["optimizer"] = optimizer
    if (shapes := state.get(PARAM_SHAPES)) is not None:
        state[PARAM_SHAPES] = [
            shapes[group]
            if isinstance(group, int)
            else OrderedDict((target.name(param), tuple(target.shape(param))) for param in group)
            for group in groups
        ]
    if any(source.param(name) for name in state.get(FROZEN_PARAM_SHAPES) or ()):
        # DeepSpeed keeps rank 0's frozen parameters here and gives them to every rank, its experts too. Without, each
        # rank loads those of its own experts from their files, and dense ones from the module's state.
        state[FROZEN_PARAM_SHAPES] = state[FROZEN_PARAM_FRAGMENTS] = None
    if state.get(BUFFER_NAMES):
        state[BUFFER_NAMES] = _buffers(state[BUFFER_NAMES], source, target)
    if state.get(SHARED_PARAMS):
        state[SHARED_PARAMS] = _shared(state[SHARED_PARAMS], source, target)
    return state


def regroup_scheduler(state: Any, origins: Sequence[int], num_groups: int) -> Any:
    """A learning-rate scheduler's state, whose lists have an entry per group, for groups that were cut anew.

    Args:
        origins: for each of the target's groups, that of the source which it comes from.
        num_groups: how many the source has.
    """
    if not isinstance(state, Mapping) or list(origins) == list(range(num_groups)):
        return state
    return {
        key: [value[i] for i in origins]
        if key in SCHEDULER_LISTS and isinstance(value, (list, tuple)) and len(value) == num_groups
        else value
        for key, value in state.items()
    }


def _buffers(names: Sequence[str], source: Arrangement, target: Arrangement) -> list[str]:
    """Names of buffers, on rank 0. Only experts that run one by one have any."""
    converted = []
    for name in names:
        param = source.param(name)
        if param is None:
            converted.append(name)
        elif param.expert == 0:
            experts = range(target.num_local(param.layer))
            converted += [target.name(ExpertParam(param.layer, i, param.key)) for i in experts]
    return converted


def _shared(names: Mapping[str, str], source: Arrangement, target: Arrangement) -> dict[str, str]:
    """Names of parameters that are the same as another, on rank 0: of layers that share their experts.

    Raises:
        ValueError: experts are tied to something else.
    """
    converted = {}
    layers: dict[tuple[int, int], list[str]] = {}
    for name, other in names.items():
        copy, first = source.param(name), source.param(other)
        if copy is None and first is None:
            converted[name] = other
        elif copy is None or first is None or (copy.expert, copy.key) != (first.expert, first.key):
            raise ValueError(
                f"{name} and {other} are tied; experts tied to anything but the same expert of another MoE "
                "layer are not converted"
            )
        elif copy.expert in (None, 0):
            layers.setdefault((copy.layer, first.layer), []).append(copy.key)
    for (copy, first), keys in layers.items():
        pairs = (target.expand(translate([(layer, tuple(keys))], source, target)) for layer in (copy, first))
        converted.update((target.name(a), target.name(b)) for a, b in zip(*pairs, strict=True))
    return converted
