# SPDX-License-Identifier: GPL-3.0-or-later
"""Routes sorted by expert: what every kernel of the experts stage indexes with. No host synchronisation.

Kernels that walk the sorted routes do so in tiles of TILE_ROWS rows that never straddle two experts. The order carries
the map from tile to expert, so that a persistent kernel finds its rows with two loads.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

TILE_ROWS = 128


def max_tiles(num_routes: int, num_experts: int) -> int:
    """The most row tiles that any routing of `num_routes` routes can need: known to the host, unlike their number."""
    # sym_min: torch.compile may trace with a number of routes that is a symbol, and must not decide on it.
    least = min if isinstance(num_routes, int) and isinstance(num_experts, int) else torch.sym_min
    return num_routes // TILE_ROWS + least(num_routes, num_experts)


@dataclass(frozen=True)
class ExpertOrder:
    """The routes sorted by expert, stably: equal experts keep (row, k) order. All tensors are int32.

    Attributes:
        row_N: [N], the source row of each sorted route. Dropped routes stand at the end, in order.
        route_N: [N], its flat position row * K + k.
        pos_RK: [R, K], where route (r, k) landed in the sorted order; N if dropped.
        ends_e: [e], where each expert's routes end.
        num_tiles_1: [1], the number of row tiles.
        tiles_M4: [max_tiles, 4], for each row tile: its expert, where that expert's routes start and end, and how many
            row tiles the experts before it have; 0 past the last tile. One record, so that a kernel's loads of it do
            not wait for each other.
        by_size_e3: [e, 3], experts from most to fewest routes, ties by id, with where their routes start and end: the
            order in which to start unequal work.
    """

    row_N: Tensor
    route_N: Tensor
    pos_RK: Tensor
    ends_e: Tensor
    num_tiles_1: Tensor
    tiles_M4: Tensor
    by_size_e3: Tensor

    @property
    def num_routes(self) -> int:
        """N, an upper bound on the routes that have an expert; rows at or past ends_e[-1] mean nothing."""
        return self.row_N.numel()

    @property
    def max_tiles(self) -> int:
        """An upper bound on the row tiles, known without asking the device."""
        return self.tiles_M4.shape[0]

    def tensors(self) -> tuple[Tensor, ...]:
        """The fields, in order; ExpertOrder(*tensors) is the same order again."""
        return tuple(vars(self).values())

    def expert_N(self) -> Tensor:
        """int64 [N], the expert of each sorted route; any valid expert for dropped ones."""
        positions = torch.arange(self.num_routes, device=self.row_N.device)
        return torch.bucketize(positions, self.ends_e.long(), right=True).clamp_(max=self.ends_e.numel() - 1)


def order_shapes(idx_shape: tuple[int, ...], num_experts: int, num_routes: int) -> tuple[tuple[int, ...], ...]:
    """The shapes of `sort_by_expert`'s tensors, in their order; any argument may be a symbol."""
    num_routes = torch.sym_min(num_routes, math.prod(idx_shape))
    tiles = max_tiles(num_routes, num_experts)
    return (num_routes,), (num_routes,), tuple(idx_shape), (num_experts,), (1,), (tiles, 4), (num_experts, 3)


def sort_by_expert(idx_RK: Tensor, num_experts: int, num_routes: int) -> ExpertOrder:
    """Sorts routes by expert: in two launches on CUDA, with the same integers as the PyTorch twin elsewhere.

    Args:
        idx_RK: int [R, K], expert ids in [0, num_experts) or -1.
        num_routes: at least the number of entries >= 0; the length N of the sorted order, R * K at most.
    """
    num_routes = min(num_routes, idx_RK.numel())
    if not idx_RK.is_cuda:
        return sort_by_expert_torch(idx_RK, num_experts, num_routes)
    from flashfusemoe_ds.kernels import triton_order  # not at the top: machines without CUDA may lack triton

    tiles = max_tiles(num_routes, num_experts)
    return ExpertOrder(*triton_order.sort_routes(idx_RK, num_experts, num_routes, TILE_ROWS, tiles))


def sort_by_expert_torch(idx_RK: Tensor, num_experts: int, num_routes: int) -> ExpertOrder:
    """The twin, in PyTorch."""
    device = idx_RK.device
    flat = idx_RK.reshape(-1).long()
    key = torch.where(flat < 0, num_experts, flat)
    order = torch.argsort(key, stable=True)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=device)
    counts.scatter_add_(0, key, torch.ones_like(key))
    counts = counts[:num_experts]
    pos = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=device))
    route_N = order[:num_routes]

    ends = counts.cumsum(0)
    starts = ends - counts
    tiles_of_e = (counts + TILE_ROWS - 1) // TILE_ROWS
    tile_ends = tiles_of_e.cumsum(0)
    tiles = torch.arange(max_tiles(num_routes, num_experts), device=device)
    owner = torch.bucketize(tiles, tile_ends, right=True)
    used = owner < num_experts
    owner = torch.where(used, owner, 0)
    records = torch.stack([owner, starts[owner], ends[owner], (tile_ends - tiles_of_e)[owner]], dim=1)
    by_size = torch.argsort(counts, descending=True, stable=True)
    return ExpertOrder(
        row_N=(route_N // max(idx_RK.shape[1], 1)).int(),
        route_N=route_N.int(),
        pos_RK=torch.where(flat < 0, num_routes, pos).int().view_as(idx_RK),
        ends_e=ends.int(),
        num_tiles_1=tile_ends[-1:].int(),
        tiles_M4=torch.where(used.unsqueeze(1), records, 0).int(),
        by_size_e3=torch.stack([by_size, starts[by_size], ends[by_size]], dim=1).int(),
    )
