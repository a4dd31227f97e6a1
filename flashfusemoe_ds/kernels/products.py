# SPDX-License-Identifier: GPL-3.0-or-later
"""The experts' six products as one interface, so that backends can be mixed per product and shape.

    forward   up       gather rows, up-project, activate, weigh:  x_RD -> H [N, H], A = weight * act(H) [N, F]
              down     A -> Y [N, D]
    backward  dgated   gather dY's rows, dA = dY W_down, then from H:  dH [N, H], A [N, F], dS (the weights' gradient)
              dx       dH -> dX [N, D]
              dw_down  dY' A   -> [e, D, F]
              dw_up    dH' X   -> [e, H, D], or gate and up apart

Rows [N, .] are in the order of `ExpertOrder`; "gather" means that row n is read at order.row_N[n]. Rows at or past
order.ends_e[-1] are never read by anyone and may hold anything, NaN included. An expert without rows gets zeros.
`TorchProducts` writes every step out in PyTorch around a `GroupedGemm`; it is the twin that fused backends answer to.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from flashfusemoe_ds.kernels.activation import Activation
from flashfusemoe_ds.kernels.grouped_gemm import GroupedGemm
from flashfusemoe_ds.kernels.order import ExpertOrder
from flashfusemoe_ds.kernels.precision import compute_dtype

UpWeights = Tensor | tuple[Tensor, Tensor]
"""The up-projection: [e, H, D], or, gated, its gate and its up rows as two tensors [e, F, D]."""


def stacked(w_up: UpWeights) -> Tensor:
    """[e, H, D]; a copy if gate and up are apart."""
    return torch.cat(w_up, dim=1) if isinstance(w_up, tuple) else w_up


def like_weights(dw_up_eHD: Tensor, w_up: UpWeights) -> UpWeights:
    """A gradient of [e, H, D] as the weights lie."""
    if not isinstance(w_up, tuple):
        return dw_up_eHD
    gate, up = dw_up_eHD.chunk(2, dim=1)
    return gate.contiguous(), up.contiguous()


class ExpertProducts(Protocol):
    """One backend for the six products. Rows and weights share one dtype; route weights are float32 (or float64)."""

    name: str

    def yielding(self) -> ExpertProducts:
        """The same products in a form that lets other kernels in between, such as those of an exchange between ranks,
        where the backend's own would hold every multiprocessor to their end."""
        ...

    def up(
        self,
        x_RD: Tensor,
        order: ExpertOrder,
        w_up: UpWeights,
        b_up_eH: Tensor | None,
        weight_RK: Tensor,
        activation: Activation,
    ) -> tuple[Tensor, Tensor]:
        """Returns H [N, H] before the activation and A [N, F], the activation times the route's weight."""
        ...

    def down(
        self,
        a_NF: Tensor,
        order: ExpertOrder,
        w_down_eDF: Tensor,
        b_down_eD: Tensor | None,
        weight_RK: Tensor,
    ) -> Tensor:
        """Returns Y [N, D] = A W_down' + weight * b_down."""
        ...

    def dgated(
        self,
        dout_RD: Tensor,
        order: ExpertOrder,
        w_down_eDF: Tensor,
        b_down_eD: Tensor | None,
        h_NH: Tensor,
        weight_RK: Tensor,
        activation: Activation,
        *,
        overwrite_h: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Returns dH [N, H], A [N, F] as `up` had it, and dS [P, N], float partial sums of d(loss)/d(weight) whose sum
        over P is each route's gradient. With overwrite_h, dH may take H's memory."""
        ...

    def dx(self, dh_NH: Tensor, order: ExpertOrder, w_up: UpWeights) -> Tensor:
        """Returns [N, D], to be summed over each row's routes."""
        ...

    def dw_down(self, dout_RD: Tensor, order: ExpertOrder, a_NF: Tensor) -> Tensor:
        """Returns [e, D, F]."""
        ...

    def dw_up(self, dh_NH: Tensor, order: ExpertOrder, x_RD: Tensor, w_up: UpWeights) -> UpWeights:
        """Returns what has the shapes of w_up."""
        ...


@dataclass(frozen=True)
class TorchProducts:
    """Gathers, products and elementwise arithmetic one after another, in PyTorch."""

    gemm: GroupedGemm

    @property
    def name(self) -> str:
        return self.gemm.name

    def yielding(self) -> TorchProducts:
        return self  # torch's kernels are as they are

    def up(self, x_RD, order, w_up, b_up_eH, weight_RK, activation):
        bias_NH = None if b_up_eH is None else b_up_eH[order.expert_N()]
        h_NH = self.gemm.nt(x_RD.index_select(0, order.row_N), stacked(w_up), order.ends_e, bias_NH)
        value_NF = activation.forward(h_NH.to(compute_dtype(h_NH.dtype)))
        return h_NH, (value_NF * route_weights(weight_RK, order)).to(x_RD.dtype)

    def down(self, a_NF, order, w_down_eDF, b_down_eD, weight_RK):
        bias_ND = None
        if b_down_eD is not None:
            bias_ND = (b_down_eD[order.expert_N()] * route_weights(weight_RK, order)).to(a_NF.dtype)
        return self.gemm.nt(a_NF, w_down_eDF, order.ends_e, bias_ND)

    def dgated(self, dout_RD, order, w_down_eDF, b_down_eD, h_NH, weight_RK, activation, *, overwrite_h):
        acc, scale_N1 = compute_dtype(h_NH.dtype), route_weights(weight_RK, order)
        dy_ND = dout_RD.index_select(0, order.row_N)
        da_NF = self.gemm.nn(dy_ND, w_down_eDF, order.ends_e).to(acc)
        a_NF, dh_NH = activation.backward(h_NH.to(acc), da_NF)
        ds_N = (da_NF * a_NF).sum(1)
        if b_down_eD is not None:
            ds_N = ds_N + (dy_ND.to(acc) * b_down_eD[order.expert_N()]).sum(1)
        dtype = h_NH.dtype
        return (dh_NH * scale_N1).to(dtype), (a_NF * scale_N1).to(dtype), ds_N.unsqueeze(0)

    def dx(self, dh_NH, order, w_up):
        return self.gemm.nn(dh_NH, stacked(w_up), order.ends_e)

    def dw_down(self, dout_RD, order, a_NF):
        return self.gemm.tn(dout_RD.index_select(0, order.row_N), a_NF, order.ends_e)

    def dw_up(self, dh_NH, order, x_RD, w_up):
        return like_weights(self.gemm.tn(dh_NH, x_RD.index_select(0, order.row_N), order.ends_e), w_up)


def route_weights(weight_RK: Tensor, order: ExpertOrder) -> Tensor:
    """[N, 1]: the weight of each sorted route."""
    return weight_RK.reshape(-1).index_select(0, order.route_N).unsqueeze(1)
