# SPDX-License-Identifier: GPL-3.0-or-later
"""Shape legend, and the frozen dataclasses that travel between the stages of the layer.

Shape legend, used as suffixes of tensor names all over the package (`x_TD` is [T, D]):

    T  tokens of this rank, batch and sequence flattened     D  hidden size (the latent size inside a latent layer)
    E  routed experts of the whole layer                     e  experts held by this rank, E // ep_size
    K  experts chosen per token (top-k)                      F  intermediate size of one expert
    R  rows received by dispatch: one per (token, rank)      N  routes computed here: one per (row, local expert)
    H  width of the up-projection's output: 2F for gated activations, F for plain ones
    P  ranks of the expert-parallel group (ep_size)

The data flow is `router -> Routing -> dispatch -> Dispatched -> experts -> combine`, capitals being these classes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Routing:
    """Which experts see each token, and how much each counts.

    Attributes:
        idx_TK: int64 [T, K], global expert ids in [0, E), -1 where the route was dropped.
        weight_TK: float32 [T, K] combine weights, differentiable; 0 where idx_TK is -1.
        counts: routes per expert before any were dropped, int64 [E], or a function that counts them: most steps never
            ask. Read them as counts_E.
        losses: scalar float32 losses by name ("aux_loss", "z_loss"), already times their coefficients.
    """

    idx_TK: Tensor
    weight_TK: Tensor
    counts: Tensor | Callable[[], Tensor]
    losses: dict[str, Tensor] = field(default_factory=dict)

    @property
    def counts_E(self) -> Tensor:
        """int64 [E], routes per expert before any were dropped."""
        # In a graph equal nodes are merged, and the lock in Python 3.11's cached_property cannot be traced.
        return self._count() if torch.compiler.is_compiling() else self._counted

    @cached_property
    def _counted(self) -> Tensor:
        return self._count()

    def _count(self) -> Tensor:
        return self.counts() if callable(self.counts) else self.counts


@dataclass(frozen=True)
class Dispatched:
    """What a rank's experts work on: one row per (token, this rank), never one per route.

    Attributes:
        x_RD: [R, D] rows, in the model's dtype.
        idx_RK: int64 [R, K], local expert ids in [0, e), -1 where the route belongs to another rank or was dropped.
        weight_RK: float32 [R, K]; only entries with idx_RK >= 0 mean anything.
        num_routes: number of entries with idx_RK >= 0 if the host knows it, else an upper bound (R * K). It sizes the
            experts' buffers without a host synchronisation.
        handle: the transport's own record of the exchange; combine and replay need it.
    """

    x_RD: Tensor
    idx_RK: Tensor
    weight_RK: Tensor
    num_routes: int
    handle: Any
