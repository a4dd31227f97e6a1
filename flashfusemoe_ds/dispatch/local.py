# SPDX-License-Identifier: GPL-3.0-or-later
"""One rank holds every expert: dispatch and combine are the identity."""

from __future__ import annotations

from torch import Tensor

from flashfusemoe_ds.types import Dispatched


class LocalDispatcher:
    """The transport of ep_size 1. No communication, no copies, no host synchronisation, static shapes."""

    name = "local"
    ep_size = 1

    def dispatch(self, x_TD: Tensor, idx_TK: Tensor, weight_TK: Tensor) -> Dispatched:
        return Dispatched(x_TD, idx_TK, weight_TK, num_routes=idx_TK.numel(), handle=None)

    def redispatch(self, x_TD: Tensor, handle: None) -> Tensor:
        return x_TD

    def combine(self, y_RD: Tensor, handle: None, weight_RK: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        return y_RD, weight_RK
