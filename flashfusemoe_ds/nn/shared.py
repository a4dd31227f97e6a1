# SPDX-License-Identifier: GPL-3.0-or-later
"""Shared experts: MLPs that every token passes, beside the routed ones."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flashfusemoe_ds.kernels.activation import get_activation
from flashfusemoe_ds.kernels.dense_mlp import dense_mlp
from flashfusemoe_ds.nn.experts import check_dtypes, under_autocast


class SharedExperts(nn.Module):
    """The sum of `num_shared_experts` MLPs of the routed experts' shape, as two stacked products and one autograd
    node, which keeps the products' inputs x and H alone.

    Parameters: gate_up_proj [n, 2F, D] (up_proj [n, F, D] for a plain activation) and down_proj [n, D, F].
    """

    def __init__(self, num_shared_experts: int, d_model: int, intermediate_size: int, activation: str) -> None:
        super().__init__()
        self.activation = get_activation(activation)
        width = self.activation.up_width(intermediate_size)
        self.up_name = "gate_up_proj" if self.activation.gated else "up_proj"
        self.register_parameter(self.up_name, nn.Parameter(torch.empty(num_shared_experts, width, d_model)))
        self.down_proj = nn.Parameter(torch.empty(num_shared_experts, d_model, intermediate_size))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        for param in self.parameters():
            for matrix in param:
                nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))

    def forward(self, x_TD: Tensor, into_TD: Tensor | None = None) -> Tensor:
        """[T, D] -> [T, D], in autocast's dtype where that is on.

        Args:
            into_TD: of the result's dtype, contiguous; the result is added to it, where autograd allows that in place,
                so that nothing else may need its value.
        """
        if into_TD is not None and (torch.compiler.is_compiling() or not _may_change(into_TD)):
            return into_TD + self.forward(x_TD)
        up, down = getattr(self, self.up_name), self.down_proj  # once: a parametrization computes them
        if torch.compiler.is_compiling():
            return self._traced(x_TD, up, down)
        if not x_TD.is_meta:  # which has no autocast
            x_TD = under_autocast(x_TD)
            check_dtypes(x_TD, up, down)
        return dense_mlp(x_TD, up, down, self.activation, into_TD)

    def _traced(self, x_TD: Tensor, up: Tensor, down: Tensor) -> Tensor:
        """The same in operators that torch.compile knows, and fuses itself."""
        h_TnH = F.linear(x_TD, up.flatten(0, 1)).unflatten(1, (up.shape[0], up.shape[1]))
        # One product adds the experts up: its inner dimension runs over all of them.
        return F.linear(self.activation.forward(h_TnH).flatten(1), down.transpose(0, 1).flatten(1))


def _may_change(t: Tensor) -> bool:
    """Whether a node of ours may write to it: not to a leaf of the graph, nor to a view, which is what a module's
    backward hooks make of its inputs."""
    return not (t._is_view() or (t.is_leaf and t.requires_grad))
