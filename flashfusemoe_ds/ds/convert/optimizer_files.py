# SPDX-License-Identifier: GPL-3.0-or-later
"""One optimizer file of one rank, taken apart into its parameter groups and put together again.

DeepSpeed 0.19.8 nests the base optimizer's state in one of five ways, by the class around it:

    stage 0, fp32                    the base optimizer's own state_dict
    FP16_UnfusedOptimizer            fp16 or bf16 at stage 0: one fp32 weight per parameter
    FP16_Optimizer                   the same over FusedAdam: one flat fp32 buffer per group
    DeepSpeedZeroOptimizer           stages 1 and 2: this rank's partition of each group's flat buffer, unpadded
    BF16_Optimizer                   bf16 at stage 1 with fp32 gradient accumulation: the same, padded
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from deepspeed.checkpoint.constants import (
    BASE_OPTIMIZER_STATE,
    GROUP_PADDINGS,
    OPTIMIZER_STATE_DICT,
    PARAM_ALIGNMENT_PADDINGS,
    PARAM_SLICE_MAPPINGS,
    PARTITION_COUNT,
    SINGLE_PARTITION_OF_FP32_GROUPS,
    ZERO_STAGE,
)
from torch import Tensor

UNFUSED_WEIGHTS, FUSED_WEIGHTS = "fp32_groups", "fp32_groups_flat"
# What ZeRO saves beside the weights as lists with an entry per group.
ZERO_LISTS = (GROUP_PADDINGS, PARAM_ALIGNMENT_PADDINGS, PARTITION_COUNT, PARAM_SLICE_MAPPINGS)


@dataclass(frozen=True)
class Nesting:
    """How a file nests the state.

    Attributes:
        outer: key of the DeepSpeed optimizer's state.
        inner: key, within, of the base optimizer's; None if they are the same.
        weights: key, within, of the fp32 weights; None if the model's own are trained.
        flat: a group is one flat buffer to the base optimizer.
        zero: of which each rank has a partition.
        cut: which is saved without its padding.
    """

    outer: str
    inner: str | None
    weights: str | None
    flat: bool
    zero: bool = False
    cut: bool = False


PLAIN = Nesting("optimizer", None, None, flat=False)
UNFUSED = Nesting("optimizer", OPTIMIZER_STATE_DICT, UNFUSED_WEIGHTS, flat=False)
FUSED = Nesting("optimizer", OPTIMIZER_STATE_DICT, FUSED_WEIGHTS, flat=True)
BF16 = Nesting(OPTIMIZER_STATE_DICT, BASE_OPTIMIZER_STATE, SINGLE_PARTITION_OF_FP32_GROUPS, flat=True, zero=True)
ZERO = Nesting(
    OPTIMIZER_STATE_DICT, BASE_OPTIMIZER_STATE, SINGLE_PARTITION_OF_FP32_GROUPS, flat=True, zero=True, cut=True
)


@dataclass
class GroupState:
    """One parameter group as saved.

    Attributes:
        options: the group without its parameters: lr, betas, name, moe and so on.
        states: the base optimizer's state of each tensor that it updates: the parameters, or the one flat buffer.
        weights: the fp32 weights, likewise; None if the model's own are trained.
        zero: this group's entries of ZERO_LISTS.
    """

    options: dict[str, Any]
    states: list[dict[str, Any]]
    weights: list[Tensor] | None
    zero: dict[str, Any] = field(default_factory=dict)


def nesting_of(payload: Any, path: Path) -> Nesting:
    """Which one this file has. ValueError for one that is not converted."""
    if isinstance(payload, dict) and isinstance(state := payload.get(OPTIMIZER_STATE_DICT), dict):
        if isinstance(state.get(BASE_OPTIMIZER_STATE), list):
            raise ValueError(f"{path}: checkpoints with zero_optimization.elastic_checkpoint are not converted")
        if isinstance(state.get(BASE_OPTIMIZER_STATE), dict) and SINGLE_PARTITION_OF_FP32_GROUPS in state:
            return ZERO if ZERO_STAGE in state else BF16
    if isinstance(payload, dict) and isinstance(state := payload.get("optimizer"), dict):
        for nesting in (UNFUSED, FUSED):
            if nesting.weights in state and nesting.inner in state:
                return nesting
        if set(state) == {"state", "param_groups"}:
            return PLAIN
    raise ValueError(f"{path} holds no optimizer state of a kind that is converted")


def take_apart(payload: dict[str, Any], nesting: Nesting, path: Path) -> list[GroupState]:
    """The groups of one file, in order. Nothing is copied. ValueError if a part of one is missing."""
    state = payload[nesting.outer]
    base = state if nesting.inner is None else state[nesting.inner]
    try:
        return [_group(state, base, saved, i, nesting) for i, saved in enumerate(base["param_groups"])]
    except (KeyError, IndexError, TypeError) as error:
        raise ValueError(f"{path} does not have all of each parameter group: {error!r}") from error


def _group(state: dict[str, Any], base: dict[str, Any], saved: dict[str, Any], i: int, nesting: Nesting) -> GroupState:
    # An optimizer that knows its parameters' names keeps its own when it loads groups without.
    options = {key: value for key, value in saved.items() if key not in ("params", "param_names")}
    weights = None if nesting.weights is None else state[nesting.weights][i]
    return GroupState(
        options,
        [base["state"].get(index, {}) for index in saved["params"]],
        [weights] if nesting.flat else weights,
        {key: state[key][i] for key in ZERO_LISTS if key in state} if nesting.zero else {},
    )


def put_together(payload: dict[str, Any], nesting: Nesting, groups: list[GroupState]) -> dict[str, Any]:
    """A file like this one, with these groups."""
    numbers = iter(range(sum(len(group.states) for group in groups)))
    state = payload[nesting.outer]
    base = {**(state if nesting.inner is None else state[nesting.inner]), "state": {}, "param_groups": []}
    for group in groups:
        indices = [next(numbers) for _ in group.states]
        base["state"].update({i: state for i, state in zip(indices, group.states, strict=True) if state})
        base["param_groups"].append({**group.options, "params": indices})
    if nesting.inner is None:
        return {**payload, nesting.outer: base}
    state = {**state, nesting.inner: base}
    if nesting.weights is not None:
        state[nesting.weights] = [group.weights[0] if nesting.flat else group.weights for group in groups]
    for key in ZERO_LISTS:
        if nesting.zero and key in state:
            state[key] = [group.zero[key] for group in groups]
    return {**payload, nesting.outer: state}
