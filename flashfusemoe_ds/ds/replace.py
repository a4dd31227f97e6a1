# SPDX-License-Identifier: GPL-3.0-or-later
"""Turns the stock MoE layers of a model into fused ones, and parameter lists with them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from deepspeed.moe.layer import MoE as StockMoE
from deepspeed.utils import logger
from torch import nn

from flashfusemoe_ds.ds.fused_experts import FusedExperts
from flashfusemoe_ds.ds.moe import MoE

ParamMap = dict[int, nn.Parameter]


def replace_moe(model: nn.Module) -> nn.Module:
    """Replaces every deepspeed.moe.layer.MoE in the model by the fused MoE, weights kept, in place.

    Call it before building an optimizer: recognised experts' parameters become new, stacked ones. `initialize` calls
    it and carries parameter groups and a client optimizer over.

    Returns:
        The model; a new object only if the model itself is a stock MoE.
    """
    return replace_moe_and_map(model)[0]


def replace_moe_and_map(model: nn.Module) -> tuple[nn.Module, ParamMap]:
    """Also returns, by id of each replaced parameter, the stacked one that now holds it."""
    made: dict[int, MoE] = {}
    mapping: ParamMap = {}
    # The stock layers stay referenced until the end: an id is only unique among living objects.
    for stock in [m for m in model.modules() if isinstance(m, StockMoE) and not isinstance(m, MoE)]:
        if type(stock) is not StockMoE:
            logger.warning(f"{type(stock).__name__} subclasses deepspeed.moe.layer.MoE and is left as it is")
            continue
        own = [dict(e.named_parameters()) for e in stock.deepspeed_moe.experts.deepspeed_experts]
        made[id(stock)] = fused = MoE.from_stock(stock)
        if isinstance(fused.deepspeed_moe.experts, FusedExperts):
            experts = fused.deepspeed_moe.experts
            for name, parts in experts.layout.sources().items():
                mapping.update({id(e[part]): getattr(experts, name) for e in own for part in parts})
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if id(child) in made:
                parent._modules[name] = made[id(child)]
    return made.get(id(model), model), mapping


def remap_params(params: Iterable[nn.Parameter], mapping: ParamMap) -> list[nn.Parameter]:
    """The list with every replaced parameter's successor in its first predecessor's place, once."""
    kept: dict[int, nn.Parameter] = {}
    for param in params:
        successor = mapping.get(id(param), param)
        kept.setdefault(id(successor), successor)
    return list(kept.values())


def remap_groups(model_parameters: Iterable[Any] | None, mapping: ParamMap) -> list[Any] | None:
    """deepspeed.initialize's model_parameters (parameters, or groups as dicts) with replaced parameters carried over.

    Raises:
        ValueError: two groups hold parts of what is now one stacked parameter.
    """
    if model_parameters is None:
        return None
    entries = list(model_parameters)
    if not any(isinstance(entry, dict) for entry in entries):
        return remap_params(entries, mapping)
    groups = [{**group, "params": remap_params(group["params"], mapping)} for group in entries]
    _check_disjoint(groups, mapping)
    return groups


def remap_optimizer(optimizer: torch.optim.Optimizer, mapping: ParamMap) -> None:
    """Carries a client optimizer, not yet stepped, over to the stacked parameters, in place."""
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    if held.isdisjoint(mapping):
        return
    if optimizer.state:
        raise ValueError(
            "the optimizer already has state for experts that replace_moe stacks; build it after replace_moe(model)"
        )
    for group in optimizer.param_groups:
        group["params"] = remap_params(group["params"], mapping)
    _check_disjoint(optimizer.param_groups, mapping)


def _check_disjoint(groups: list[dict[str, Any]], mapping: ParamMap) -> None:
    stacked = {id(p) for p in mapping.values()}
    seen: dict[int, int] = {}
    for i, group in enumerate(groups):
        for param in group["params"]:
            first = seen.setdefault(id(param), i)
            if id(param) in stacked and first != i:
                raise ValueError(
                    f"parameter groups {first} and {i} hold experts' parameters that are stacked into one of shape "
                    f"{tuple(param.shape)}; put the same parameter of all experts of a layer into one group"
                )
