# SPDX-License-Identifier: GPL-3.0-or-later
"""Routes sorted by expert: what every kernel of the experts stage indexes with. No host synchronisation.

Kernels that walk the sorted routes do so in tiles of TILE_ROWS rows that never straddle two experts. The order carries
the map from tile to expert, so that a persistent kernel finds its rows with two loads.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TILE_ROWS = 128


def max_tiles(num_routes: int, num_experts: int) -> int:
    """The most row tiles that any routing of `num_routes` routes can need: known to the host, unlike their number."""
    return num_routes // TILE_ROWS + min(num_routes, num_experts)


@dataclass(frozen=True)
class ExpertOrder:
    """The routes sorted by expert, stably: equal experts keep (row, k) order. All tensors are int32.

    Attributes:
        row_N: [N], the source row of each sorted route. Dropped routes stand at the end, in order.
        route_N: [N], its flat position row * K + k.
        pos_RK: [R, K], where route (r, k) landed in the sorted order; N if dropped.
        ends_e: [e], where each expert's routes end.
        tile_base_e1: [e + 1], how many row tiles the experts before this one have; the last entry is the total.
        tile_expert_M: [max_tiles], the expert of each row tile; 0 past the last tile.
        by_size_e: [e], experts from most to fewest routes, ties by id: the order in which to start unequal work.
    """

    row_N: Tensor
    route_N: Tensor
    pos_RK: Tensor
    ends_e: Tensor
    tile_base_e1: Tensor
    tile_expert_M: Tensor
    by_size_e: Tensor

    @property
    def num_routes(self) -> int:
        """N, an upper bound on the routes that have an expert; rows at or past ends_e[-1] mean nothing."""
        return self.row_N.numel()

    def valid_N1(self) -> Tensor:
        """bool [N, 1]: False for the dropped routes at the end."""
        positions = torch.arange(self.num_routes, device=self.row_N.device)
        return (positions < (self.ends_e[-1] if self.ends_e.numel() else 0)).unsqueeze(1)

    def expert_N(self) -> Tensor:
        """int64 [N], the expert of each sorted route; any valid expert for dropped ones."""
        positions = torch.arange(self.num_routes, device=self.row_N.device)
        return torch.bucketize(positions, self.ends_e.long(), right=True).clamp_(max=self.ends_e.numel() - 1)


def sort_by_expert(idx_RK: Tensor, num_experts: int, num_routes: int) -> ExpertOrder:
    """Sorts routes by expert.

    Args:
        idx_RK: int [R, K], expert ids in [0, num_experts) or -1.
        num_routes: at least the number of entries >= 0; the length N of the sorted order.
    """
    device = idx_RK.device
    flat = idx_RK.reshape(-1).long()
    key = torch.where(flat < 0, num_experts, flat)
    order = torch.argsort(key, stable=True)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=device)
    counts.scatter_add_(0, key, torch.ones_like(key))
    counts = counts[:num_experts]
    pos = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=device))
    route_N = order[:num_routes]

    tile_base = torch.zeros(num_experts + 1, dtype=torch.int64, device=device)
    tile_base[1:] = ((counts + TILE_ROWS - 1) // TILE_ROWS).cumsum(0)
    tiles = torch.arange(max_tiles(num_routes, num_experts), device=device)
    tile_expert = torch.bucketize(tiles, tile_base[1:], right=True)
    return ExpertOrder(
        row_N=(route_N // max(idx_RK.shape[1], 1)).int(),
        route_N=route_N.int(),
        pos_RK=torch.where(flat < 0, num_routes, pos).int().view_as(idx_RK),
        ends_e=counts.cumsum(0).int(),
        tile_base_e1=tile_base.int(),
        tile_expert_M=torch.where(tile_expert < num_experts, tile_expert, 0).int(),
        by_size_e=torch.argsort(counts, descending=True, stable=True).int(),
    )
