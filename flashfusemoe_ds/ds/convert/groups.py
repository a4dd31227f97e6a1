# SPDX-License-Identifier: GPL-3.0-or-later
"""Which parameters of experts the optimizer holds, in which parameter group and order, in either layout.

A group of experts' parameters lists, per MoE layer, either every local expert's own tensors, expert by expert, or the
stacked parameters. `split_params_into_different_moe_groups_for_optimizer` (deepspeed/moe/utils.py) cuts a long group
into several, so groups that it cut are joined first, and cut anew by the target's sizes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import torch

from flashfusemoe_ds.ds.convert.layers import EXPERTS, MoELayerExperts, per_expert_name, stacked_name
from flashfusemoe_ds.ds.fused_experts import STOCK_PREFIX

# Beyond this, subsets of an expert's tensors are too many to try.
MAX_LEAVES = 12


@dataclass(frozen=True)
class ExpertParam:
    """One parameter of experts on one rank.

    Attributes:
        layer: index of the MoE layer.
        expert: local id of its expert; None for a stacked parameter.
        key: the expert's own name for it, or the stacked parameter's.
    """

    layer: int
    expert: int | None
    key: str


@dataclass(frozen=True)
class Arrangement:
    """How a checkpoint lays the experts out: which layers are stacked, over how many ranks."""

    layers: tuple[MoELayerExperts, ...]
    stacked: tuple[bool, ...]
    ep_size: int

    def num_local(self, layer: int) -> int:
        return self.layers[layer].num_experts // self.ep_size

    def keys(self, layer: int) -> dict[str, torch.Size]:
        """The shape of each of a layer's tensors, of one expert alone, in the layer's own order."""
        experts = self.layers[layer]
        return experts.stacked_shapes() if self.stacked[layer] else experts.shapes

    def shape(self, param: ExpertParam) -> torch.Size:
        shape = self.keys(param.layer)[param.key]
        return shape if param.expert is not None else torch.Size((self.num_local(param.layer), *shape))

    def name(self, param: ExpertParam) -> str:
        """As in the model's named_parameters on every rank."""
        own = param.key if param.expert is None else f"{STOCK_PREFIX}{param.expert}.{param.key}"
        return f"{self.layers[param.layer].name}{EXPERTS}{own}"

    def param(self, name: str) -> ExpertParam | None:
        """The inverse of `name`; None for a name that is no expert's here."""
        if per_expert := per_expert_name(name):
            layer, expert, key = per_expert
        elif stacked := stacked_name(name):
            (layer, key), expert = stacked, None
        else:
            return None
        for i, experts in enumerate(self.layers):
            if experts.name == layer and self.stacked[i] == (expert is None) and key in self.keys(i):
                return ExpertParam(i, expert, key)
        return None

    def expand(self, content: Content) -> list[ExpertParam]:
        """A group's parameters in DeepSpeed's order."""
        params = []
        for layer, keys in content:
            experts = [None] if self.stacked[layer] else range(self.num_local(layer))
            params += [ExpertParam(layer, expert, key) for expert in experts for key in keys]
        return params

    def condense(self, params: Sequence[ExpertParam]) -> Content | None:
        """The inverse of `expand`; None if no content expands to these parameters."""
        keys: dict[int, list[str]] = {}
        for param in params:
            if param.expert in (None, 0):
                keys.setdefault(param.layer, []).append(param.key)
        content = [(layer, tuple(names)) for layer, names in keys.items()]
        return content if self.expand(content) == list(params) else None


# Per MoE layer, in order: which of its tensors a group holds.
Content = list[tuple[int, tuple[str, ...]]]


def translate(content: Content, source: Arrangement, target: Arrangement) -> Content:
    """The same group in the target's layout.

    Raises:
        ValueError: the group has only some of the tensors that make up a stacked parameter.
    """
    translated = []
    for layer, keys in content:
        if source.stacked[layer] == target.stacked[layer]:
            translated.append((layer, keys))
            continue
        sources = source.layers[layer].stacking.sources()
        if source.stacked[layer]:
            own = {leaf for key in keys for leaf in sources[key]}
            translated.append((layer, tuple(leaf for leaf in target.keys(layer) if leaf in own)))
            continue
        parts = {name: [leaf in keys for leaf in sources[name]] for name in target.keys(layer)}
        for name, present in parts.items():
            if any(present) != all(present):
                raise ValueError(
                    f"{source.layers[layer].name}: a parameter group holds only some of {', '.join(sources[name])}, "
                    f"which are stacked into {name}; the fused layer cannot be built over such groups either"
                )
        translated.append((layer, tuple(name for name, present in parts.items() if all(present))))
    return translated


def cut(params: Sequence[ExpertParam], arrangement: Arrangement, max_group_size: float) -> list[list[ExpertParam]]:
    """DeepSpeed's cut: a group is closed before the parameter that would make it exceed max_group_size elements."""
    groups: list[list[ExpertParam]] = [[]]
    size = 0
    for param in params:
        numel = arrangement.shape(param).numel()
        if size + numel > max_group_size:
            groups.append([])
            size = 0
        groups[-1].append(param)
        size += numel
    # A parameter beyond the limit leaves an empty group before it, which the engine drops.
    return [group for group in groups if group]


def join(
    options: Sequence[dict[str, Any]], sizes: Sequence[list[int] | int], max_group_size: float
) -> list[list[int]]:
    """Which groups of experts were cut from one: neighbours with the same options, the first without room for more.

    Args:
        options: of every group in the optimizer's order, dense ones too.
        sizes: elements of each group's parameters, or of the whole group where these are not known.

    Returns:
        Runs of indices into `options`, in order; only of groups of experts.
    """
    runs: list[list[int]] = []
    for i, option in enumerate(options):
        if not option.get("moe", False):
            continue
        if runs and runs[-1][-1] == i - 1 and options[i - 1] == option:
            before, here = sizes[i - 1], sizes[i]
            first = here[0] if isinstance(here, list) else here
            if (sum(before) if isinstance(before, list) else before) + first > max_group_size:
                runs[-1].append(i)
                continue
        runs.append([i])
    return runs


def guess_contents(
    arrangement: Arrangement,
    observed: Sequence[list[torch.Size | None] | int],
    has_weights: Callable[[int, list[ExpertParam]], bool],
) -> list[Content]:
    """What groups hold that no names are saved for, from the shapes of their parameters (None where not known) or from
    their number of elements alone, and from their fp32 weights.

    It is taken that a group holds the same tensors of every expert of every layer that has them, in the model's order.

    Args:
        observed: of each group, joined where DeepSpeed cut it.
        has_weights: whether the group of this position may be of these parameters, by its weights.

    Raises:
        ValueError: nothing fits, or more than one thing.
    """
    contents: list[Content] = []
    taken: set[tuple[int, str]] = set()
    for position, shapes in enumerate(observed):
        fits = []
        for content in _candidates(arrangement):
            params = arrangement.expand(content)
            if _fits(params, arrangement, shapes) and has_weights(position, params):
                fits.append(content)
        held = {(layer, key) for content in fits for layer, keys in content for key in keys}
        if len(fits) != 1 or taken & held:
            raise ValueError(
                "the checkpoint does not name the optimizer's parameters (ZeRO stage 0), and "
                f"{'more than one set' if fits else 'no set'} of the experts' tensors fits the parameters in group "
                f"{position} of experts; save once more with flashfusemoe_ds.ds.checkpoint.write_layout(engine, "
                "save_dir, tag) after engine.save_checkpoint, which names them"
            )
        contents += fits
        taken |= held
    return contents


def _candidates(arrangement: Arrangement) -> Iterator[Content]:
    layers = range(len(arrangement.layers))
    names = list(dict.fromkeys(key for layer in layers for key in arrangement.keys(layer)))
    for count in range(len(names), 0, -1):
        if len(names) > MAX_LEAVES and count < len(names):
            return
        for chosen in combinations(names, count):
            content = [(layer, tuple(k for k in arrangement.keys(layer) if k in chosen)) for layer in layers]
            yield [(layer, keys) for layer, keys in content if keys]


def _fits(params: list[ExpertParam], arrangement: Arrangement, observed: list[torch.Size | None] | int) -> bool:
    shapes = [arrangement.shape(param) for param in params]
    if isinstance(observed, int):
        return sum(math.prod(shape) for shape in shapes) == observed
    return len(shapes) == len(observed) and all(o is None or o == s for o, s in zip(observed, shapes, strict=True))
