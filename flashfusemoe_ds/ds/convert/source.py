# SPDX-License-Identifier: GPL-3.0-or-later
"""What a source checkpoint holds: its layout of experts, and what is in each of the optimizer's parameter groups.

All of it is checked here, before anything is written.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from deepspeed.checkpoint.constants import PARAM_SHAPES

from flashfusemoe_ds.ds.checkpoint import LAYOUT_FILE
from flashfusemoe_ds.ds.convert.files import CheckpointFiles, read
from flashfusemoe_ds.ds.convert.flat import undo_round_robin
from flashfusemoe_ds.ds.convert.groups import Arrangement, Content, ExpertParam, guess_contents, join
from flashfusemoe_ds.ds.convert.layers import (
    MoELayerExperts,
    check_stackings,
    read_layers,
    stacked_name,
    stackings_of_file,
    stackings_of_model,
)
from flashfusemoe_ds.ds.convert.optimizer_files import BF16, GroupState, Nesting, nesting_of, take_apart
from flashfusemoe_ds.ds.convert.states import Partitioning, weight_of
from flashfusemoe_ds.ds.expert_layout import ExpertLayout


@dataclass(frozen=True)
class Source:
    """What a checkpoint holds.

    Attributes:
        files: of each optimizer file the groups.
        groups: the parameters of each group of experts, by the group's index, in flat order.
        runs: groups that were cut from one, and what they hold together.
    """

    arrangement: Arrangement
    partitioning: Partitioning
    files: list[list[GroupState]]
    groups: dict[int, list[ExpertParam]]
    runs: list[tuple[list[int], Content]]


def read_source(
    found: CheckpointFiles,
    model_state: dict[str, Any],
    payloads: list[Any],
    classes: Sequence[Any],
    model: str | None,
    max_group_size: int,
) -> Source:
    """Takes the files' content apart.

    Args:
        payloads: the content of the optimizer's files.
        classes: further ones that may be made when the experts' files are read.
        model: "module:function", or None.

    Raises:
        ValueError: it does not fit together, or is not converted.
    """
    nestings = {nesting_of(payload, path) for payload, path in zip(payloads, found.optimizer, strict=True)}
    (nesting,) = nestings if len(nestings) == 1 else (None,)
    if nesting is None or nesting.zero != found.zero:
        raise ValueError(f"{found.folder}: the optimizer's files are of different kinds")
    groups = [take_apart(payload, nesting, path) for payload, path in zip(payloads, found.optimizer, strict=True)]
    _check_groups(groups, found)
    ep_size = _ep_size(groups[0], found)

    record = _layout_record_of(found)
    names = _zero_names(model_state, groups[0], found) if nesting.zero else _recorded_names(record, groups[0])
    layers = read_layers(found.experts, classes)
    for layer in layers:
        if layer.num_experts % ep_size:
            raise ValueError(f"{layer.name} has {layer.num_experts} experts, which ep_size {ep_size} does not divide")
    stacked = _stacked_layers([layer.name for layer in layers], names, record)
    stackings = _stackings(layers, stacked, record, model)
    layers = [replace(layer, stacking=stackings.get(layer.name)) for layer in layers]
    arrangement = Arrangement(tuple(layers), stacked, ep_size)
    partitioning = _partitioning(nesting, len(payloads), arrangement, model_state)
    if found.zero and len(payloads) != model_state["dp_world_size"]:
        raise ValueError(
            f"{found.folder} has {len(payloads)} of {model_state['dp_world_size']} ranks' optimizer files"
        )

    if names is None:
        runs, flat = _guess_groups(found, classes, groups[0], nesting, arrangement, max_group_size)
    else:
        runs, flat = _name_groups(names, groups[0], model_state, arrangement, partitioning, max_group_size)
    return Source(arrangement, partitioning, groups, flat, runs)


def _check_groups(files: list[list[GroupState]], found: CheckpointFiles) -> None:
    """ValueError unless all ranks have the same groups."""
    for path, groups in zip(found.optimizer, files, strict=True):
        if [g.options for g in groups] != [g.options for g in files[0]]:
            raise ValueError(f"{path} has other parameter groups than {found.optimizer[0].name}")


def _ep_size(groups: list[GroupState], found: CheckpointFiles) -> int:
    names = {str(group.options.get("name")) for group in groups if group.options.get("moe", False)}
    if not names:
        raise ValueError(
            f"{found.folder}: no parameter group is of experts alone ('moe': True, as "
            "split_params_into_different_moe_groups_for_optimizer makes them); such a checkpoint is not converted"
        )
    if len(names) > 1:
        raise ValueError(
            f"{found.folder}: its MoE layers have several sizes, {', '.join(sorted(names))}; one is converted (the "
            "order of DeepSpeed's parameter groups is not defined with several)"
        )
    name = names.pop()
    if not name.startswith("ep_size_") or not name[8:].isdigit():
        raise ValueError(f"{found.folder}: the experts' parameter groups are named {name!r}, not ep_size_<number>")
    if not found.zero and len(found.optimizer) != int(name[8:]):
        raise ValueError(f"{found.folder} has {len(found.optimizer)} of {name[8:]} expert-parallel ranks' files")
    return int(name[8:])


def _layout_record_of(found: CheckpointFiles) -> dict[str, Any]:
    path = found.folder / LAYOUT_FILE
    if not path.is_file():
        return {"moe_layers": []}
    try:
        record = json.loads(path.read_text())
        assert len(record["moe_layers"]) == len(found.experts)
        return record
    except (ValueError, KeyError, TypeError, AssertionError) as error:
        raise ValueError(f"{path} cannot be read: {type(error).__name__}: {error}") from error


def _zero_names(model_state: dict[str, Any], groups: list[GroupState], found: CheckpointFiles) -> dict[int, list[str]]:
    shapes = model_state.get(PARAM_SHAPES)
    if shapes is None or len(shapes) != len(groups):
        raise ValueError(f"{found.model} does not name the parameters of the optimizer's {len(groups)} groups")
    return {i: list(shapes[i]) for i, group in enumerate(groups) if group.options.get("moe", False)}


def _recorded_names(record: dict[str, Any], groups: list[GroupState]) -> dict[int, list[str]] | None:
    """The same from this package's layout file, if it is there and has them."""
    experts = [i for i, group in enumerate(groups) if group.options.get("moe", False)]
    recorded = record.get("expert_groups")
    if recorded is None or len(recorded) != len(experts):
        return None
    return dict(zip(experts, recorded, strict=True))


def _stacked_layers(layers: list[str], names: dict[int, list[str]] | None, record: dict[str, Any]) -> tuple[bool, ...]:
    """Which layers the source stacks: by its parameters' names, or, for those that are not trained, by the record."""
    stacked = {layer: m["experts"] == "stacked" for layer, m in zip(layers, record["moe_layers"], strict=False)}
    for name in (name for group in (names or {}).values() for name in group):
        if (parsed := stacked_name(name)) is not None:
            stacked[parsed[0]] = True
    return tuple(stacked.get(layer, False) for layer in layers)


def _stackings(
    layers: Sequence[MoELayerExperts], stacked: tuple[bool, ...], record: dict[str, Any], model: str | None
) -> dict[str, ExpertLayout | None]:
    """How experts are stacked: as the model says, else as the layout file does."""
    recorded = stackings_of_file(record)
    stackings = recorded if model is None else stackings_of_model(model)
    if stackings:
        check_stackings(layers, stackings)
    for layer, is_stacked in zip(layers, stacked, strict=True):
        if is_stacked and stackings.get(layer.name) is None:
            raise ValueError(
                f"the experts of {layer.name} are stacked, and "
                + ("the model's do not fuse" if stackings else f"no {LAYOUT_FILE} says how; name the model: --model")
            )
        if is_stacked and recorded.get(layer.name) not in (None, stackings[layer.name]):
            raise ValueError(
                f"the experts of {layer.name} were stacked as {recorded[layer.name]}; the model's would be as "
                f"{stackings[layer.name]}"
            )
    return stackings


def _partitioning(
    nesting: Nesting, num_files: int, arrangement: Arrangement, model_state: dict[str, Any]
) -> Partitioning:
    config = model_state["ds_config"]
    zero = config.get("zero_optimization")
    zero = zero if isinstance(zero, dict) else {}
    by_zero = nesting.zero and nesting is not BF16
    element = torch.empty(0, dtype=arrangement.layers[0].dtype).element_size()
    if nesting.zero and num_files % arrangement.ep_size:
        raise ValueError(
            f"there are {num_files} data-parallel ranks, which ep_size {arrangement.ep_size} does not divide"
        )
    return Partitioning(
        nesting,
        num_files,
        arrangement.ep_size,
        data_first=bool(config.get("use_data_before_expert_parallelism", False)),
        round_robin=by_zero and bool(zero.get("round_robin_gradients", False)),
        align=16 // math.gcd(16, element) if by_zero and zero.get("parameter_alignment", False) else 1,
    )


def _name_groups(
    names: dict[int, list[str]],
    groups: list[GroupState],
    model_state: dict[str, Any],
    arrangement: Arrangement,
    partitioning: Partitioning,
    max_group_size: int,
) -> tuple[list[tuple[list[int], Content]], dict[int, list[ExpertParam]]]:
    """What each run of groups holds, and each group's parameters in flat order, from the parameters' names."""
    flat: dict[int, list[ExpertParam]] = {}
    for i, listed in names.items():
        params = [arrangement.param(name) for name in listed]
        if None in params:
            unknown = listed[params.index(None)]
            raise ValueError(f"parameter group {i} is of experts, but {unknown} is no tensor of the experts' files")
        if (shapes := model_state.get(PARAM_SHAPES)) is not None:
            for name, param in zip(listed, params, strict=True):
                if tuple(shapes[i][name]) != tuple(arrangement.shape(param)):
                    raise ValueError(
                        f"{name} has the shape {tuple(shapes[i][name])}; by the experts' files it would be "
                        f"{tuple(arrangement.shape(param))}"
                    )
        flat[i] = params
    original = {
        i: undo_round_robin(params, partitioning.num_partitions) if partitioning.round_robin else params
        for i, params in flat.items()
    }
    sizes = [[arrangement.shape(p).numel() for p in original.get(i, ())] for i in range(len(groups))]
    runs = []
    for run in join([g.options for g in groups], sizes, max_group_size):
        content = arrangement.condense([param for i in run for param in original[i]])
        if content is None:
            raise ValueError(
                f"parameter group {run[0]} does not list the tensors of each layer's local experts (at ep_size "
                f"{arrangement.ep_size}) expert by expert, in one order; such a group is not converted"
            )
        runs.append((run, content))
    return runs, flat


def _guess_groups(
    found: CheckpointFiles,
    classes: Sequence[Any],
    groups: list[GroupState],
    nesting: Nesting,
    arrangement: Arrangement,
    max_group_size: int,
) -> tuple[list[tuple[list[int], Content]], dict[int, list[ExpertParam]]]:
    """The same from what is in rank 0's groups, at stage 0 without our record."""
    observed = [group.weights[0].numel() if nesting.flat else _shapes(group) for group in groups]
    sizes = [o if isinstance(o, int) else [0 if s is None else s.numel() for s in o] for o in observed]
    runs = join([g.options for g in groups], sizes, max_group_size)

    def has_weights(position: int, params: list[ExpertParam]) -> bool:
        weights = [weight for i in runs[position] for weight in groups[i].weights or ()]
        if not weights:
            return True  # those of the model itself are trained
        flat = torch.cat([weight.reshape(-1) for weight in weights])
        pieces = flat.split([arrangement.shape(param).numel() for param in params])
        for piece, param in zip(pieces, params, strict=True):
            own = weight_of(arrangement, param, lambda layer, i: read(found.experts[layer][i], classes))
            if not torch.equal(piece.to(own.dtype).view_as(own), own):
                return False
        return True

    joined = [sum((observed[i] for i in run), start=0 if nesting.flat else []) for run in runs]
    contents = guess_contents(arrangement, joined, has_weights)
    flat: dict[int, list[ExpertParam]] = {}
    for run, content in zip(runs, contents, strict=True):
        params = iter(arrangement.expand(content))
        for i in run:
            flat[i], left = [], observed[i] if nesting.flat else len(observed[i])
            while left > 0:
                flat[i].append(next(params))
                left -= arrangement.shape(flat[i][-1]).numel() if nesting.flat else 1
    return list(zip(runs, contents, strict=True)), flat


def _shapes(group: GroupState) -> list[torch.Size | None]:
    """Of a group's parameters, as far as their state shows them."""
    if group.weights is not None:
        return [weight.shape for weight in group.weights]
    tensors = ([t for t in state.values() if isinstance(t, torch.Tensor) and t.dim()] for state in group.states)
    return [found[0].shape if found else None for found in tensors]
