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
    stock_layers = [m for m in model.modules() if isinstance(m, StockMoE) and not isinstance(m, MoE)]
    tied = _tied_parameters(model)
    converted: dict[int, nn.Module] = {}
    for layer in stock_layers:
        reason = _foreign(layer)
        if reason is not None:
            logger.warning(f"a {type(layer).__name__} layer is left as it is: {reason}")
            continue
        container = layer.deepspeed_moe.experts
        MoE.convert(layer, tied=tied, experts=converted.get(id(container)))
        # Two layers may share their experts. The container is kept in reach, so that its id stays its own.
        converted[id(container)] = layer.deepspeed_moe.experts
        layer.deepspeed_moe.experts.stock = (container,)
    for experts in converted.values():
        del experts.stock
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


def _tied_parameters(model: nn.Module) -> set[int]:
    """Ids of parameters that stand in more than one module."""
    owners = Counter(id(p) for m in model.modules() for p in m._parameters.values() if p is not None)
    return {param for param, count in owners.items() if count > 1}


def remap_groups(model_parameters: Iterable[Any] | None) -> list[Any] | None:
    """deepspeed.initialize's model_parameters (parameters, or groups as dicts), with stacked parameters in the place
    of those they replaced.

    Raises:
        ValueError: only some parts of a stacked parameter are listed, or they lie in groups with different options.
    """
    if model_parameters is None:
        return None
    entries = list(model_parameters)
    if not any(isinstance(entry, dict) for entry in entries):
        return [param for _, group in _remap([{"params": entries}]) for param in group["params"]]
    return [group for _, group in _remap(entries)]


def remap_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Carries a client optimizer, not yet stepped, over to the stacked parameters, in place."""
    if not any(hasattr(p, "fused_into") for group in optimizer.param_groups for p in group["params"]):
        return
    if optimizer.state:
        raise ValueError(
            "the optimizer already has state for experts that replace_moe stacks; build it after replace_moe(model)"
        )
    pairs = _remap(optimizer.param_groups)
    for group, new in pairs:
        group.update(new)
    optimizer.param_groups[:] = [group for group, _ in pairs]


def _remap(groups: list[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Pairs of a group and itself with every replaced parameter's successor once, in its first part's place.

    Groups that this empties are left out.
    """
    home: dict[int, dict[str, Any]] = {}
    parts: Counter[int] = Counter()
    out = []
    for group in groups:
        kept: dict[int, tuple[nn.Parameter, Any]] = {}
        params = list(group["params"])
        for param, name in zip(params, group.get("param_names", [None] * len(params)), strict=True):
            successor = getattr(param, "fused_into", None)
            if successor is None:
                kept[id(param)] = (param, name)
                continue
            parts[id(successor)] += 1
            if home.setdefault(id(successor), group) is group:
                kept.setdefault(id(successor), (successor, name))
            elif _options(home[id(successor)]) != _options(group):
                raise ValueError(
                    "two parameter groups with different options hold experts' parameters that are stacked into one "
                    f"of shape {tuple(successor.shape)}; put the same parameter of all experts of a layer into one "
                    "group"
                )
        new = {**group, "params": [param for param, _ in kept.values()]}
        if "param_names" in group:
            new["param_names"] = [name for _, name in kept.values()]
        if kept or not params:
            out.append((group, new))
    for param in {id(p): p for _, group in out for p in group["params"] if id(p) in parts}.values():
        if parts[id(param)] != param.num_parts:
            raise ValueError(
                f"only {parts[id(param)]} of the {param.num_parts} experts' parameters that are stacked into one of "
                f"shape {tuple(param.shape)} are listed; list all of them, or none to freeze them"
            )
    return out


def _options(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in ("params", "param_names")}
