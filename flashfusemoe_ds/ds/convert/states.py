# SPDX-License-Identifier: GPL-3.0-or-later
"""The optimizer's state of experts: read parameter by parameter from one layout, built group by group in another."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed.checkpoint.constants import (
    GROUP_PADDINGS,
    PARAM_ALIGNMENT_PADDINGS,
    PARAM_SLICE_MAPPINGS,
    PARTITION_COUNT,
)
from deepspeed.utils.tensor_fragment import fragment_address
from torch import Tensor

from flashfusemoe_ds.ds.convert.flat import FlatLayout, aligned_gaps, round_robin
from flashfusemoe_ds.ds.convert.groups import Arrangement, ExpertParam
from flashfusemoe_ds.ds.convert.layers import EXPERTS, stack_one, unstack_one
from flashfusemoe_ds.ds.convert.optimizer_files import GroupState, Nesting
from flashfusemoe_ds.ds.fused_experts import STOCK_PREFIX

WEIGHT = "fp32 weight"  # among the names of the base optimizer's state, whose keys have no spaces


@dataclass(frozen=True)
class Partitioning:
    """How the ranks of a checkpoint share the groups of experts.

    Attributes:
        nesting: of its optimizer files.
        num_files: data-parallel ranks under ZeRO, else ep_size.
        ep_size: ranks over which the experts are spread.
        data_first: use_data_before_expert_parallelism: neighbours hold the same experts, not the next ones.
        round_robin: zero_optimization.round_robin_gradients.
        align: elements to a multiple of which each parameter begins; 1 for none.
    """

    nesting: Nesting
    num_files: int
    ep_size: int
    data_first: bool
    round_robin: bool
    align: int

    @property
    def num_partitions(self) -> int:
        return self.num_files // self.ep_size if self.nesting.zero else 1

    def file(self, ep_rank: int, partition: int) -> int:
        """The file of this expert-parallel rank and this partition of its groups."""
        return ep_rank * self.num_partitions + partition if self.data_first else partition * self.ep_size + ep_rank

    def flat_order(self, params: Sequence[ExpertParam]) -> list[ExpertParam]:
        """The parameters of a group as they lie in its buffer."""
        return round_robin(params, self.num_partitions) if self.round_robin else list(params)

    def layout(self, numels: Sequence[int]) -> FlatLayout:
        """Of a group whose parameters have these sizes, in flat order."""
        # DeepSpeed aligns each partition to two elements, for NCCL.
        alignment = 2 * self.num_partitions if self.nesting.zero else 1
        return FlatLayout(tuple(numels), aligned_gaps(numels, self.align), self.num_partitions, alignment)


@dataclass(frozen=True)
class ParamState:
    """What the optimizer keeps for one parameter: tensors of its shape, and values for the whole of it."""

    tensors: dict[str, Tensor]
    values: dict[str, Any]


class ExpertStates:
    """The state of all experts in a source checkpoint, one expert's own tensor at a time."""

    def __init__(
        self,
        arrangement: Arrangement,
        partitioning: Partitioning,
        files: list[list[GroupState]],
        groups: dict[int, list[ExpertParam]],
    ) -> None:
        """files: each file's groups; groups: what the groups of experts hold, by index, in flat order."""
        self.arrangement, self.partitioning, self.files, self.groups = arrangement, partitioning, files, groups
        self._place = {param: (g, i) for g, params in groups.items() for i, param in enumerate(params)}
        self._layouts: dict[int, FlatLayout] = {}
        self._flat: dict[tuple[int, int], list[ParamState]] = {}
        for group, params in groups.items():
            if partitioning.nesting.flat:
                self._layouts[group] = partitioning.layout([arrangement.shape(p).numel() for p in params])
            for ep_rank in range(partitioning.ep_size):
                check = self._take_partitions if partitioning.nesting.flat else self._check_params
                check(ep_rank, group)

    def own(self, layer: int, expert: int, leaf: str) -> ParamState:
        """Of one of the expert's own tensors; `expert` is its global id."""
        ep_rank, local = divmod(expert, self.arrangement.num_local(layer))
        if not self.arrangement.stacked[layer]:
            return self._read(ep_rank, ExpertParam(layer, local, leaf), None)
        stacking = self.arrangement.layers[layer].stacking
        name = next(name for name, leaves in stacking.sources().items() if leaf in leaves)
        row = self._read(ep_rank, ExpertParam(layer, None, name), local)
        own = {key: unstack_one(stacking, name, tensor)[leaf] for key, tensor in row.tensors.items()}
        return ParamState(own, row.values)

    def _read(self, ep_rank: int, param: ExpertParam, row: int | None) -> ParamState:
        """Of one parameter, or of one row of a stacked one."""
        group, i = self._place[param]
        shape = self.arrangement.shape(param)
        if not self.partitioning.nesting.flat:
            saved = self.files[ep_rank][group]
            tensors, values = _sort(saved.states[i], shape, f"parameter {i} of group {group}")
            if saved.weights is not None:
                tensors = {WEIGHT: saved.weights[i], **tensors}
            return ParamState({k: t if row is None else t[row] for k, t in tensors.items()}, values)
        layout = self._layouts[group]
        start = layout.offsets[i]
        if row is not None:
            shape = shape[1:]
            start += row * shape.numel()
        partitions = self._flat[ep_rank, group]
        tensors = {
            key: layout.read([p.tensors[key] for p in partitions], start, shape.numel()).view(shape)
            for key in partitions[0].tensors
        }
        return ParamState(tensors, partitions[0].values)

    def _take_partitions(self, ep_rank: int, group: int) -> None:
        """The partitions of one flat group, once. ValueError if they are not as its parameters' sizes promise."""
        layout, parts = self._layouts[group], self.partitioning
        where = f"parameter group {group} of expert-parallel rank {ep_rank}"
        found = []
        for i in range(parts.num_partitions):
            saved = self.files[parts.file(ep_rank, i)][group]
            size = layout.partition_size - (layout.padding(i) if parts.nesting.cut else 0)
            if saved.weights[0].numel() != size:
                raise ValueError(f"{where}: partition {i} has {saved.weights[0].numel()} elements, not {size}")
            for key, value in ((PARTITION_COUNT, parts.num_partitions), (PARAM_ALIGNMENT_PADDINGS, list(layout.gaps))):
                if saved.zero.get(key, value) != value:
                    raise ValueError(f"{where}: {key} is {saved.zero[key]}, not {value} as the config in it says")
            tensors, values = _sort(saved.states[0], torch.Size((layout.partition_size,)), where)
            found.append(ParamState({WEIGHT: saved.weights[0], **tensors}, values))
            if set(found[i].tensors) != set(found[0].tensors) or not _same(values, found[0].values):
                raise ValueError(f"{where}: the state of partition {i} is not of the kind of partition 0's")
        self._flat[ep_rank, group] = found

    def _check_params(self, ep_rank: int, group: int) -> None:
        """ValueError if the parameters of a group that is not flat are not those that its names promise."""
        saved, params = self.files[ep_rank][group], self.groups[group]
        where = f"parameter group {group} of expert-parallel rank {ep_rank}"
        if len(saved.states) != len(params):
            raise ValueError(f"{where} has {len(saved.states)} parameters, not {len(params)}")
        for i, param in enumerate(params):
            shape = self.arrangement.shape(param)
            if saved.weights is not None and saved.weights[i].shape != shape:
                raise ValueError(
                    f"{where}: {self.arrangement.name(param)} has the shape {tuple(saved.weights[i].shape)}, not "
                    f"{tuple(shape)}"
                )
            _sort(saved.states[i], shape, self.arrangement.name(param))


def _sort(state: dict[str, Any], shape: torch.Size, what: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The base optimizer's state of one tensor -> (tensors of its shape, single values)."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, Any] = {}
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape == shape:
            tensors[key] = value
        elif not isinstance(value, Tensor) or value.dim() == 0:
            values[key] = value
        else:
            raise ValueError(
                f"the optimizer's {key!r} for {what} has the shape {tuple(value.shape)}; what belongs to no single "
                f"element of a parameter (of shape {tuple(shape)} here) cannot be converted"
            )
    return tensors, values


def _same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(v, b[k]) if isinstance(v, Tensor) and isinstance(b[k], Tensor) else v == b[k] for k, v in a.items()
    )


class TargetGroup:
    """One group of experts on one expert-parallel rank of the target, built from the source's states."""

    def __init__(
        self,
        states: ExpertStates,
        arrangement: Arrangement,
        partitioning: Partitioning,
        options: dict[str, Any],
        params: list[ExpertParam],
        ep_rank: int,
    ) -> None:
        """params: in flat order."""
        self.partitioning = partitioning
        self.options = {**options, "name": f"ep_size_{arrangement.ep_size}"}
        self.names = [arrangement.name(p) for p in params]
        self.params = [_build(states, arrangement, p, ep_rank) for p in params]
        if partitioning.nesting.flat:
            self.layout = partitioning.layout([arrangement.shape(p).numel() for p in params])
            first = self.params[0]
            for name, param in zip(self.names, self.params, strict=True):
                if set(param.tensors) != set(first.tensors) or not _same(param.values, first.values):
                    raise ValueError(f"{name} and {self.names[0]} share a group, but not {sorted(first.values)}")
            self.flat = {key: self.layout.flatten([p.tensors[key] for p in self.params]) for key in first.tensors}

    def partition(self, i: int, like: GroupState) -> GroupState:
        """What the file of partition i holds; `like` is any group of the source."""
        if not self.partitioning.nesting.flat:
            states = [{**p.values, **{k: t for k, t in p.tensors.items() if k != WEIGHT}} for p in self.params]
            weights = None if like.weights is None else [p.tensors[WEIGHT] for p in self.params]
            return GroupState(self.options, states, weights)
        # Copies: torch.save would write the whole of what a view shares.
        tensors = {key: self.layout.partition(buffer, i).clone() for key, buffer in self.flat.items()}
        weight = tensors.pop(WEIGHT)
        padding = self.layout.padding(i)
        if self.partitioning.nesting.cut:
            weight = weight[: weight.numel() - padding].clone()
        elif i < self.layout.num_partitions - 1:
            padding = 0  # BF16_Optimizer counts the padding of the last partition alone
        else:
            padding = self.layout.total - self.layout.used
        zero = {
            GROUP_PADDINGS: padding,
            PARAM_ALIGNMENT_PADDINGS: list(self.layout.gaps),
            PARTITION_COUNT: self.layout.num_partitions,
            PARAM_SLICE_MAPPINGS: self._slices(i),
        }
        # An optimizer that has not stepped yet has no state.
        state = {**self.params[0].values, **tensors}
        return GroupState(self.options, [state], [weight], {key: zero[key] for key in like.zero})

    def _slices(self, partition: int) -> OrderedDict[str, fragment_address]:
        fragments = self.layout.fragments(partition)
        return OrderedDict((self.names[p], fragment_address(numel=n, start=start)) for p, start, n in fragments)


def _build(states: ExpertStates, arrangement: Arrangement, param: ExpertParam, ep_rank: int) -> ParamState:
    """The state of one parameter of the target."""
    num_local = arrangement.num_local(param.layer)
    if param.expert is not None:
        own = states.own(param.layer, ep_rank * num_local + param.expert, param.key)
        return ParamState({key: tensor.clone() for key, tensor in own.tensors.items()}, _copies(own.values))
    stacking = arrangement.layers[param.layer].stacking
    leaves = stacking.sources()[param.key]
    experts = range(ep_rank * num_local, (ep_rank + 1) * num_local)
    parts = [{leaf: states.own(param.layer, expert, leaf) for leaf in leaves} for expert in experts]
    first = parts[0][leaves[0]]
    for state in (state for own in parts for state in own.values()):
        if set(state.tensors) != set(first.tensors) or not _same(state.values, first.values):
            raise ValueError(
                f"{arrangement.name(param)}: the experts' tensors that are stacked into it differ in "
                f"{', '.join(sorted({*state.values, *first.values}))}: {state.values}, {first.values}"
            )
    tensors = {
        key: torch.stack(
            [stack_one(stacking, param.key, {leaf: s.tensors[key] for leaf, s in own.items()}) for own in parts]
        )
        for key in first.tensors
    }
    return ParamState(tensors, _copies(first.values))


def _copies(values: dict[str, Any]) -> dict[str, Any]:
    """Of its own for each parameter: a step that several share would be counted up by each of them."""
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in values.items()}


def weight_of(
    arrangement: Arrangement, param: ExpertParam, expert_file: Callable[[int, int], dict[str, Tensor]]
) -> Tensor:
    """The model's weight for a parameter of expert-parallel rank 0, from the experts' files (by layer and id)."""
    prefix = f"{arrangement.layers[param.layer].name}{EXPERTS}{STOCK_PREFIX}"
    if param.expert is not None:
        return expert_file(param.layer, param.expert)[f"{prefix}{param.expert}.{param.key}"]
    stacking = arrangement.layers[param.layer].stacking
    rows = []
    for i in range(arrangement.num_local(param.layer)):
        own = expert_file(param.layer, i)
        leaves = {leaf: own[f"{prefix}{i}.{leaf}"] for leaf in stacking.sources()[param.key]}
        rows.append(stack_one(stacking, param.key, leaves))
    return torch.stack(rows)
