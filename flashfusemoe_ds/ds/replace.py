# SPDX-License-Identifier: GPL-3.0-or-later
"""Turns the stock MoE layers of a model into fused ones, and parameter lists with them.

A layer is converted in place: it, its MOELayer and its gate change class and stay the objects they were, so whatever
else refers to them (hooks, a pipeline's function list, a second name) goes on working. Only recognised experts become
new, stacked parameters; each old parameter points to its successor.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from deepspeed.moe.experts import Experts as StockExperts
from deepspeed.moe.layer import MoE as StockMoE
from deepspeed.moe.sharded_moe import MOELayer as StockMOELayer
from deepspeed.moe.sharded_moe import TopKGate as StockTopKGate
from deepspeed.utils import logger
from torch import nn

from flashfusemoe_ds.ds.expert_layout import has_hooks
from flashfusemoe_ds.ds.moe import MoE


def replace_moe(model: nn.Module) -> nn.Module:
    """Turns every deepspeed.moe.layer.MoE in the model into the fused MoE, in place, weights kept.

    Call it before building an optimizer: recognised experts' parameters become new, stacked ones. `initialize` calls
    it and carries parameter groups and a client optimizer over. Layers with classes of the user's own in them are left
    as they are, with a warning.

    Returns:
        The model.
    """
    layers = []
    for layer in [m for m in model.modules() if isinstance(m, StockMoE) and not isinstance(m, MoE)]:
        reason = _foreign(layer)
        if reason is None:
            layers.append(layer)
        else:
            logger.warning(f"a {type(layer).__name__} layer is left as it is: {reason}")
    tied = _tied_parameters(model, layers)
    converted: dict[int, tuple[nn.Module, nn.Module]] = {}
    for layer in layers:
        # Two layers may share their experts. The old container is kept beside the new, so that its id stays its own.
        container = layer.deepspeed_moe.experts
        MoE.convert(layer, tied=tied, experts=converted.get(id(container), (None, None))[1])
        converted[id(container)] = (container, layer.deepspeed_moe.experts)
    return model


def is_replaceable(layer: StockMoE) -> bool:
    """Whether `replace_moe` would convert this layer: it is a stock one, and nothing of the user's would be lost."""
    return not isinstance(layer, MoE) and _foreign(layer) is None


def _foreign(layer: StockMoE) -> str | None:
    """Why converting the layer would lose something of the user's; None if it would not."""
    moe = layer.deepspeed_moe
    for part, stock in (
        (layer, StockMoE),
        (moe, StockMOELayer),
        (moe.gate, StockTopKGate),
        (moe.experts, StockExperts),
    ):
        if type(part) is not stock:
            return f"{type(part).__name__} subclasses deepspeed's {stock.__name__}"
    if "forward" in vars(moe) or "forward" in vars(moe.gate) or "forward" in vars(moe.experts):
        return "its forward was overridden on the instance"
    if has_hooks(moe.experts):
        return "hooks are registered on its experts' container"
    return None


def _tied_parameters(model: nn.Module, layers: list[StockMoE]) -> set[int]:
    """Ids of parameters in these layers' experts that something else holds too, as such or with their module."""
    owners = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    holders = Counter(id(child) for m in model.modules() for child in m._modules.values() if child is not None)
    sharing = Counter(id(moe.experts) for moe in {id(x.deepspeed_moe): x.deepspeed_moe for x in layers}.values())
    tied = {param for param, count in owners.items() if count > 1}
    for layer in layers:
        container = layer.deepspeed_moe.experts
        # A container that only converted layers share is converted once, for all of them.
        shared = [container] if holders[id(container)] > sharing[id(container)] else []
        shared += [m for m in container.deepspeed_experts.modules() if holders[id(m)] > 1]
        tied.update(id(p) for m in shared for p in m.parameters())
    return tied


def remap_groups(model_parameters: Iterable[Any] | None) -> list[Any] | None:
    """deepspeed.initialize's model_parameters (parameters, or groups as dicts), with stacked parameters in the place
    of those they replaced.

    Raises:
        ValueError: only some parts of a stacked parameter are listed, or they lie in groups with different options.
    """
    if model_parameters is None:
        return None
    entries = as_lists(model_parameters)
    if not any(isinstance(entry, dict) for entry in entries):
        return [param for _, group in _remap([{"params": entries}]) for param in group["params"]]
    return [group for _, group in _remap(entries)]


def as_lists(model_parameters: Iterable[Any]) -> list[Any]:
    """Every generator in it as a list: one that is drawn from later would see the replaced parameters, or none."""
    return [{**e, "params": _as_list(e["params"])} if isinstance(e, dict) else e for e in model_parameters]


def _as_list(params: Any) -> list[Any]:
    return [params] if isinstance(params, torch.Tensor) else list(params)


def remap_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Carries a client optimizer, not yet stepped, over to the stacked parameters, in place."""
    if not any(hasattr(p, "fused_into") for group in optimizer.param_groups for p in group["params"]):
        return
    if optimizer.state:
        raise ValueError(
            "the optimizer already has state for experts that replace_moe stacks; build it after replace_moe(model)"
        )
    pairs = _remap(optimizer.param_groups)
    if len(pairs) < len(optimizer.param_groups) and any("initial_lr" in g for g in optimizer.param_groups):
        raise ValueError(
            "replace_moe joins parameter groups of the optimizer, and a learning-rate scheduler already counts them; "
            "build the scheduler after replace_moe(model)"
        )
    for group, new in pairs:
        group.update(new)
    optimizer.param_groups[:] = [group for group, _ in pairs]


def _remap(groups: list[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Pairs of a group and itself with every replaced parameter's successor once, in its first part's place.

    Groups that this empties are left out.
    """
    home: dict[int, dict[str, Any]] = {}
    parts: Counter[int] = Counter()
    stacked: dict[int, nn.Parameter] = {}
    out = []
    for group in groups:
        kept: dict[int, tuple[Any, Any]] = {}
        params = _as_list(group["params"])
        for entry, name in zip(params, group.get("param_names", [None] * len(params)), strict=True):
            param = entry[1] if isinstance(entry, tuple) else entry  # optimizers also take (name, parameter)
            successor = getattr(param, "fused_into", None)
            if successor is None:
                if param.numel() == 0:
                    raise ValueError("a listed parameter is empty: an expert's before replace_moe, and copied since")
                kept[id(param)] = (entry, name)
                continue
            parts[id(successor)] += 1
            if home.setdefault(id(successor), group) is group:
                kept.setdefault(
                    id(successor), ((entry[0], successor) if isinstance(entry, tuple) else successor, name)
                )
            elif _options(home[id(successor)]) != _options(group):
                raise ValueError(
                    "two parameter groups with different options hold experts' parameters that are stacked into one "
                    f"of shape {tuple(successor.shape)}; put the same parameter of all experts of a layer into one "
                    "group"
                )
            stacked[id(successor)] = successor
        new = {**group, "params": [entry for entry, _ in kept.values()]}
        if "param_names" in group:
            new["param_names"] = [name for _, name in kept.values()]
        if kept or not params:
            out.append((group, new))
    for param in stacked.values():
        if parts[id(param)] != param.num_parts:
            raise ValueError(
                f"{parts[id(param)]} parts are listed of the {param.num_parts} experts' parameters that are stacked "
                f"into one of shape {tuple(param.shape)}; list each of them once, or none to freeze them"
            )
    return out


def _options(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}
