# SPDX-License-Identifier: GPL-3.0-or-later
"""The dense floor: the experts' arithmetic as six large products of torch.mm, without routing, gathers or activation.

Weights are the size of one expert's, and every row meets the same ones. What a grouped layer costs over this is what
sparsity costs it.
"""

from __future__ import annotations

import torch
from shapes import Shape
from torch import Tensor


class Floor:
    """Two products forward, four backward, over N = T * K rows; outputs are allocated once."""

    def __init__(self, shape: Shape, dtype: torch.dtype, generator: torch.Generator) -> None:
        N, D, H, F = shape.N, shape.D, 2 * shape.F, shape.F

        def normal(*size: int) -> Tensor:
            return torch.empty(size, dtype=dtype, device=generator.device).normal_(generator=generator)

        self.x_ND, self.w_up_HD, self.w_down_DF = normal(N, D), normal(H, D), normal(D, F)
        self.a_NF, self.dh_NH = normal(N, F), normal(N, H)
        self.w_up_HD *= D**-0.5
        self.w_down_DF *= F**-0.5
        # y stands in for the output's gradient: the same size, and of unit variance too.
        self.h_NH, self.y_ND, self.da_NF = torch.empty_like(self.dh_NH), normal(N, D), torch.empty_like(self.a_NF)
        self.dx_ND, self.dw_up, self.dw_down = map(torch.empty_like, (self.x_ND, self.w_up_HD, self.w_down_DF))

    def forward(self) -> None:
        torch.mm(self.x_ND, self.w_up_HD.T, out=self.h_NH)
        torch.mm(self.a_NF, self.w_down_DF.T, out=self.y_ND)

    def step(self) -> None:
        self.forward()
        torch.mm(self.y_ND, self.w_down_DF, out=self.da_NF)
        torch.mm(self.dh_NH, self.w_up_HD, out=self.dx_ND)
        torch.mm(self.y_ND.T, self.a_NF, out=self.dw_down)
        torch.mm(self.dh_NH.T, self.x_ND, out=self.dw_up)

    def drop_gradients(self) -> None:
        """Nothing accumulates."""
