# SPDX-License-Identifier: GPL-3.0-or-later
"""Router and experts as one autograd node, where every expert is on this GPU and no route is dropped.

Nothing is computed that `routing.route` and `experts.experts` do not compute. But the experts' partial sums of dS go
straight to the kernel of dlogits, and the router's dX into the gather-sum of the experts', which adds it before it
rounds: that spares two launches, two passes over [T, D], and the host one node of autograd in each direction.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flashfusemoe_ds.kernels.activation import Activation
from flashfusemoe_ds.kernels.experts import (
    experts_forward,
    gate_last,
    graph_is_kept,
    join,
    needs_with_gate,
    parameter_gradients,
    row_gradients,
)
from flashfusemoe_ds.kernels.gather_sum import gather_sum
from flashfusemoe_ds.kernels.order import ExpertOrder
from flashfusemoe_ds.kernels.precision import cast_to, to_keep, without_autocast
from flashfusemoe_ds.kernels.products import ExpertProducts, UpWeights
from flashfusemoe_ds.kernels.routing import route_forward
from flashfusemoe_ds.kernels.routing_backward import gate_gradients
from flashfusemoe_ds.kernels.routing_rule import Rule


class _RoutedExperts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, router_ED, w_up, w_down, b_up, b_down, w_gate, bias_E, rule, aux_loss_coeff, z_loss_coeff,
                count, activation, products, recompute):  # fmt: skip
        weights = w_up, w_down, b_up, b_down, w_gate
        w_up, w_down, b_up, b_down, w_gate = cast = cast_to(x_TD.dtype, *weights)
        logits_TE, idx_TK, weight_TK, counts_E, aux_loss, z_loss = route_forward(
            x_TD, router_ED, bias_E, rule, aux_loss_coeff, z_loss_coeff, count
        )
        out_TD, h_NH, order = experts_forward(
            x_TD, weight_TK, join(w_gate, w_up), w_down, b_up, b_down, idx_TK, idx_TK.numel(), activation, products
        )
        kept_h, kept_counts = None if recompute else h_NH, None if aux_loss is None else counts_E
        ctx.save_for_backward(
            x_TD, kept_h, weight_TK, *to_keep(weights, cast), router_ED, logits_TE, idx_TK, kept_counts,
            *order.tensors(),
        )  # fmt: skip
        ctx.rule, ctx.coeffs, ctx.activation, ctx.products = rule, (aux_loss_coeff, z_loss_coeff), activation, products
        ctx.mark_non_differentiable(*(t for t in (idx_TK, counts_E) if t is not None))
        ctx.set_materialize_grads(False)
        return out_TD, idx_TK, counts_E, aux_loss, z_loss

    @staticmethod
    @once_differentiable
    def backward(ctx, dout_TD, _didx, _dcounts, daux, dz):
        # Unpacked once: activation checkpointing hands it out once.
        x_TD, kept_h, weight_TK, *saved = ctx.saved_tensors
        router_ED, logits_TE, idx_TK, counts_E, *order = saved[5:]
        # `router_ED` stands where `_Experts` has the weights.
        need_x, need_router, *need_parameters = needs_with_gate(ctx.needs_input_grad)
        rest = (None,) * 8

        def router(dweight: Tensor | None, pos_TK: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
            return gate_gradients(
                x_TD, router_ED, logits_TE, idx_TK, counts_E, dweight, daux, dz, ctx.rule, *ctx.coeffs, need_x,
                need_router, pos_TK,
            )  # fmt: skip

        if dout_TD is None:  # only the losses were used
            return *router(None, None), *(None,) * 5, *rest
        w_up, w_down, b_up, b_down, w_gate = cast_to(x_TD.dtype, *saved[:5])
        order, products, w_up = ExpertOrder(*order), ctx.products, join(w_gate, w_up)
        consume_h = kept_h is not None and not graph_is_kept()
        with without_autocast(dout_TD.device.type):
            dout_TD = dout_TD.contiguous()
            dh_NH, a_NF, ds_PN = row_gradients(
                dout_TD, x_TD, kept_h, weight_TK, w_up, w_down, b_up, b_down, order, ctx.activation, products,
                overwrite_h=consume_h,
            )  # fmt: skip
            dx_TD, drouter_ED = router(ds_PN, order.pos_RK)
            if need_x:
                dx_TD = gather_sum(products.dx(dh_NH, order, w_up), order.pos_RK, dx_TD)
            rows = [dh_NH, a_NF]
            del dh_NH, a_NF
            dparameters = parameter_gradients(
                dout_TD, x_TD, rows, weight_TK, w_up, b_up, b_down, order, products, need_parameters,
                consume_h=consume_h,
            )  # fmt: skip
        return *gate_last((dx_TD, drouter_ED, *dparameters)), *rest


def routed_experts(
    x_TD: Tensor,
    router_ED: Tensor,
    w_up: UpWeights,
    w_down_eDF: Tensor,
    activation: Activation,
    products: ExpertProducts,
    rule: Rule,
    *,
    b_up_eH: Tensor | None = None,
    b_down_eD: Tensor | None = None,
    bias_E: Tensor | None = None,
    aux_loss_coeff: float = 0.0,
    z_loss_coeff: float = 0.0,
    count: bool = False,
    recompute: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """`routing.route`, then `experts.experts` with what it chose; arguments as there.

    Returns:
        y [T, D] in x's dtype; idx_TK, counts_E, the auxiliary and the z-loss as `routing.route` returns them.
    """
    w_gate, w_up = w_up if isinstance(w_up, tuple) else (None, w_up)
    return _RoutedExperts.apply(
        x_TD, router_ED, w_up, w_down_eDF, b_up_eH, b_down_eD, w_gate, bias_E, rule, aux_loss_coeff, z_loss_coeff,
        count, activation, products, recompute,
    )  # fmt: skip
