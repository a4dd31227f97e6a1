# SPDX-License-Identifier: GPL-3.0-or-later
"""One rank holds every expert: dispatch and combine are the identity."""

from __future__ import annotations

from torch import Tensor

from flashfusemoe_ds.dispatch.base import Combined, Pending
from flashfusemoe_ds.types import Dispatched


class LocalDispatcher:
    """The transport of ep_size 1. No communication, no copies, no host synchronisation, static shapes."""

    name = "local"
    ep_size = 1

    def start_dispatch(self, x_TD: Tensor, idx_TK: Tensor, weight_TK: Tensor) -> Pending[Dispatched]:
        return Pending(lambda: Dispatched(x_TD, idx_TK, weight_TK, num_routes=idx_TK.numel(), handle=None))

    def start_redispatch(self, x_TD: Tensor, handle: None) -> Pending[Tensor]:
        return Pending(lambda: x_TD)

    def start_combine(self, y_RD: Tensor, handle: None, weight_RK: Tensor | None = None) -> Combined:
        return Combined(Pending(lambda: y_RD), None if weight_RK is None else Pending(lambda: weight_RK))
