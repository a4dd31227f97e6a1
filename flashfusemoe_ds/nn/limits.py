# SPDX-License-Identifier: GPL-3.0-or-later
"""Limits on the routes of one expert: how many they allow, dropping what exceeds them, or refusing it."""

from __future__ import annotations

from fractions import Fraction

import torch
import torch.distributed as dist
from torch import Tensor

from flashfusemoe_ds.types import Routing


def exact_ratio(factor: float) -> tuple[int, int]:
    """Numerator and denominator of a decimal number: of 1.1 11 and 10, where the float is a little over."""
    return Fraction(str(float(factor))).as_integer_ratio()


def capacity(num_routes: int, num_experts: int, factor: float) -> int:
    """ceil(num_routes * factor / num_experts), exactly."""
    if torch.compiler.is_compiling():
        from flashfusemoe_ds.nn import compiled  # not at the top: it imports this module, and torch's compiler

        numerator, denominator = compiled.exact_ratio(factor)
    else:
        numerator, denominator = exact_ratio(factor)
    return -(-num_routes * numerator // (denominator * num_experts))


def limit_routes(routing: Routing, limit: int) -> Routing:
    """Drops each expert's routes beyond `limit` on this rank: its largest weights stay, earlier tokens first if equal.

    Weights of the survivors are left as they are.
    """
    idx_TK, counts_E = routing.idx_TK, routing.counts_E
    num_experts = counts_E.numel()
    flat = idx_TK.reshape(-1)
    key = torch.where(flat < 0, num_experts, flat)
    by_weight = torch.argsort(routing.weight_TK.detach().reshape(-1), descending=True, stable=True)
    order = by_weight[torch.argsort(key[by_weight], stable=True)]
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=flat.device)
    counts.scatter_add_(0, key, torch.ones_like(key))
    start = counts.cumsum(0) - counts
    place = torch.empty_like(order)
    place[order] = torch.arange(order.numel(), device=order.device) - start[key[order]]
    # A NaN weight keeps its route, so that it reaches the output.
    kept_TK = ((place < limit) & (flat >= 0)).view_as(idx_TK) | torch.isnan(routing.weight_TK)
    return Routing(
        torch.where(kept_TK, idx_TK, -1), torch.where(kept_TK, routing.weight_TK, 0), counts_E, routing.losses
    )


def refuse_overflow(counts_E: Tensor, limit: int, settings: str, group: dist.ProcessGroup | None = None) -> None:
    """RuntimeError, naming `settings`, if an expert has more than `limit` routes: on every rank of the group if it has
    on any of them, so that none waits for another. Waits for the device."""
    # Excess and count in one integer, so that one MAX over ranks returns a pair that belongs together.
    worst_E = (counts_E - limit) * 2**32 + counts_E
    if group is not None:
        dist.all_reduce(worst_E, op=dist.ReduceOp.MAX, group=group)
    expert = int(worst_E.argmax())
    excess, most = divmod(int(worst_E[expert]), 2**32)
    if excess > 0:
        raise RuntimeError(
            f"expert {expert} was chosen {most} times on one rank, where its limit is {most - excess} ({settings}); "
            "raise the limit, set allow_dropped_tokens=True, or leave both limits out to drop nothing"
        )
