# SPDX-License-Identifier: GPL-3.0-or-later
"""The experts stage: rows in, the sum over this rank's experts out, with a backward that keeps only X and H.

    forward   gather rows by expert -> up-projection -> activation x weight -> down-projection -> gather-sum
    backward  gather dY -> dA -> (A, dH, dS) recomputed from H -> dX_expanded -> gather-sum | dW_up, dW_down

The routing weight multiplies the activation, before the down-projection. The sum over experts is then unweighted,
which is what a transport that adds up ranks needs, and the backward needs neither Y nor A.

Weights of another dtype than the rows, float32 parameters under autocast, are cast to the rows'. The copies are made
again in the backward, not kept; autograd casts the gradients, one by one, when this node is through.

No floating-point atomics: sums run in a fixed order, so equal inputs give equal bits.

Eager mode wraps the two functions in an autograd Function, torch.compile in the operators of operators.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flashfusemoe_ds.kernels.activation import Activation
from flashfusemoe_ds.kernels.gather_sum import gather_partials, gather_sum, gather_sum_and_partials
from flashfusemoe_ds.kernels.order import ExpertOrder, sort_by_expert
from flashfusemoe_ds.kernels.precision import cast_to, to_keep, without_autocast
from flashfusemoe_ds.kernels.products import ExpertProducts, UpWeights, stacked
from flashfusemoe_ds.kernels.segment_sum import segment_sum


def experts_forward(
    x_RD: Tensor,
    weight_RK: Tensor,
    w_up: UpWeights,
    w_down_eDF: Tensor,
    b_up_eH: Tensor | None,
    b_down_eD: Tensor | None,
    idx_RK: Tensor,
    num_routes: int,
    activation: Activation,
    products: ExpertProducts,
) -> tuple[Tensor, Tensor, ExpertOrder]:
    """The stage without autograd; arguments as in `experts`. Returns y [R, D], H [N, H] and the routes' order."""
    with without_autocast(x_RD.device.type):
        order = sort_by_expert(idx_RK, w_down_eDF.shape[0], num_routes)
        h_NH, a_NF = products.up(x_RD, order, w_up, b_up_eH, weight_RK, activation)
        y_ND = products.down(a_NF, order, w_down_eDF, b_down_eD, weight_RK)
        return gather_sum(y_ND, order.pos_RK), h_NH, order


def row_gradients(
    dout_RD: Tensor,
    x_RD: Tensor,
    h_NH: Tensor | None,
    weight_RK: Tensor,
    w_up: UpWeights,
    w_down_eDF: Tensor,
    b_up_eH: Tensor | None,
    b_down_eD: Tensor | None,
    order: ExpertOrder,
    activation: Activation,
    products: ExpertProducts,
    *,
    overwrite_h: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dH [N, H], the weighted activations A' [N, F] and the partial gradients of the weights dS [P, N].

    Args:
        dout_RD: [R, D] contiguous, the gradient of y.
        h_NH: H as the forward returned it; None to compute it again.
        overwrite_h: let dH take the memory of the H that was passed.
    """
    if h_NH is None:
        h_NH, _ = products.up(x_RD, order, w_up, b_up_eH, weight_RK, activation)
        overwrite_h = True
    return products.dgated(dout_RD, order, w_down_eDF, b_down_eD, h_NH, weight_RK, activation, overwrite_h=overwrite_h)


def parameter_gradients(
    dout_RD: Tensor,
    x_RD: Tensor,
    rows: list[Tensor],
    weight_RK: Tensor,
    w_up: UpWeights,
    b_up_eH: Tensor | None,
    b_down_eD: Tensor | None,
    order: ExpertOrder,
    products: ExpertProducts,
    needs: Sequence[bool],
    *,
    consume_h: bool,
) -> tuple[UpWeights | None, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of (w_up, w_down, b_up, b_down), None where `needs` says that nobody asks.

    Args:
        rows: [dH, A'] of `row_gradients`; taken out of the list, so that each is freed after its last use.
        consume_h: dH lies in the memory of the H that autograd keeps until this node is through. Free it as soon as
            dW_up is there: with dW_down beside it, dH would set the peak of the whole step.
    """
    need_w_up, need_w_down, need_b_up, need_b_down = needs
    dw_up = dw_down = db_up = db_down = None
    a_NF, dh_NH = rows.pop(), rows.pop()
    if need_w_up:
        dw_up = products.dw_up(dh_NH, order, x_RD, w_up)
    if need_b_up:
        db_up = segment_sum(dh_NH, order, b_up_eH.dtype)
    if consume_h:
        dh_NH.untyped_storage().resize_(0)
    del dh_NH
    if need_w_down:
        dw_down = products.dw_down(dout_RD, order, a_NF)
    if need_b_down:
        db_down = segment_sum(dout_RD, order, b_down_eD.dtype, weight_RK)
    return dw_up, dw_down, db_up, db_down


def experts_backward(
    dout_RD: Tensor,
    x_RD: Tensor,
    h_NH: Tensor | None,
    weight_RK: Tensor,
    w_up: UpWeights,
    w_down_eDF: Tensor,
    b_up_eH: Tensor | None,
    b_down_eD: Tensor | None,
    order: ExpertOrder,
    activation: Activation,
    products: ExpertProducts,
    needs: Sequence[bool],
    *,
    consume_h: bool,
    send_input_grads: Callable[[Tensor, Tensor], None] | None = None,
) -> tuple[Tensor | None, ...]:
    """The gradients of (x, weight, w_up, w_down, b_up, b_down), None where `needs` says that nobody asks.

    Args:
        dout_RD: [R, D], the gradient of y.
        h_NH: H as the forward returned it; None to compute it again.
        consume_h: the H that was passed is not needed again: dH takes its memory, which is then freed.
        send_input_grads: gets the gradients of x and weight before those of the parameters are launched, so that they
            can travel meanwhile; `needs` must ask for both.
    """
    need_x, need_weight, *need_parameters = needs
    consume_h = consume_h and h_NH is not None
    # A backward may be called inside autocast, which would cast the products.
    with without_autocast(dout_RD.device.type):
        dout_RD = dout_RD.contiguous()
        dh_NH, a_NF, ds_PN = row_gradients(
            dout_RD, x_RD, h_NH, weight_RK, w_up, w_down_eDF, b_up_eH, b_down_eD, order, activation, products,
            overwrite_h=consume_h,
        )  # fmt: skip
        del h_NH
        dx = dweight = None
        if need_x:
            dx, dweight = gather_sum_and_partials(products.dx(dh_NH, order, w_up), order.pos_RK, ds_PN)
        elif need_weight:
            dweight = gather_partials(ds_PN, order.pos_RK)
        dweight = dweight.to(weight_RK.dtype) if need_weight else None
        if send_input_grads is not None:
            send_input_grads(dx, dweight)
            products = products.yielding()
        rows = [dh_NH, a_NF]
        del dh_NH, a_NF
        dparameters = parameter_gradients(
            dout_RD, x_RD, rows, weight_RK, w_up, b_up_eH, b_down_eD, order, products, need_parameters,
            consume_h=consume_h,
        )  # fmt: skip
        return dx, dweight, *dparameters


class _Experts(torch.autograd.Function):
    """The stage as one autograd node, so that what it keeps is chosen here and not by autograd."""

    @staticmethod
    def forward(ctx, x_RD, weight_RK, w_up, w_down, b_up, b_down, w_gate, idx_RK, num_routes, activation, products,
                recompute):  # fmt: skip
        weights = w_up, w_down, b_up, b_down, w_gate
        w_up, w_down, b_up, b_down, w_gate = cast = cast_to(x_RD.dtype, *weights)
        out_RD, h_NH, order = experts_forward(
            x_RD, weight_RK, join(w_gate, w_up), w_down, b_up, b_down, idx_RK, num_routes, activation, products
        )
        kept_h = None if recompute else h_NH
        ctx.save_for_backward(x_RD, kept_h, weight_RK, *to_keep(weights, cast), *order.tensors())
        ctx.activation, ctx.products = activation, products
        return out_RD

    @staticmethod
    @once_differentiable
    def backward(ctx, dout_RD):
        # Unpacked once: activation checkpointing hands it out once.
        x_RD, kept_h, weight_RK, *saved = ctx.saved_tensors
        w_up, w_down, b_up, b_down, w_gate = cast_to(x_RD.dtype, *saved[:5])
        grads = experts_backward(
            dout_RD, x_RD, kept_h, weight_RK, join(w_gate, w_up), w_down, b_up, b_down, ExpertOrder(*saved[5:]),
            ctx.activation, ctx.products, needs_with_gate(ctx.needs_input_grad),
            # Unless a second backward through this graph may ask for H again.
            consume_h=not graph_is_kept(),
        )  # fmt: skip
        return *gate_last(grads), None, None, None, None, None


def join(w_gate: Tensor | None, w_up: Tensor) -> UpWeights:
    """The up-projection as the products take it. In autograd Functions gate and up are arguments of their own."""
    return w_up if w_gate is None else (w_gate, w_up)


def needs_with_gate(needs: Sequence[bool]) -> tuple[bool, ...]:
    """What is needed of (x, weight, w_up, w_down, b_up, b_down), given that of them and of the gate, which is last."""
    need_x, need_weight, need_up, need_down, need_b_up, need_b_down, need_gate = needs[:7]
    return need_x, need_weight, need_up or need_gate, need_down, need_b_up, need_b_down


def gate_last(grads: Sequence[UpWeights | None]) -> tuple[Tensor | None, ...]:
    """Gradients of (x, weight, w_up, w_down, b_up, b_down) as those of (..., w_gate), gate and up apart."""
    dx, dweight, dw_up, dw_down, db_up, db_down = grads
    dw_gate, dw_up = dw_up if isinstance(dw_up, tuple) else (None, dw_up)
    return dx, dweight, dw_up, dw_down, db_up, db_down, dw_gate


def graph_is_kept() -> bool:
    """Whether the backward that runs was asked to retain its graph (or it is no autograd backward at all)."""
    return torch._C._autograd._get_current_graph_task_keep_graph()


def experts(
    x_RD: Tensor,
    idx_RK: Tensor,
    weight_RK: Tensor,
    w_up: UpWeights,
    w_down_eDF: Tensor,
    activation: Activation,
    products: ExpertProducts,
    *,
    b_up_eH: Tensor | None = None,
    b_down_eD: Tensor | None = None,
    num_routes: int | None = None,
    recompute: bool = False,
) -> Tensor:
    """y[r] = sum over k of weight[r, k] * expert[idx[r, k]](x[r]), differentiable in every floating-point argument.

    Args:
        x_RD: [R, D] rows; any floating dtype, in which everything is computed.
        idx_RK: int [R, K], local expert ids in [0, e) or -1 for "not here".
        weight_RK: float32 [R, K] (float64 with float64 rows); entries where idx is -1 are ignored, gradient 0.
        w_up: [e, 2F, D] gate rows above up rows for a gated activation, or gate and up as two tensors [e, F, D]; else
            [e, F, D]. Weights and biases of another dtype than x are cast to x's.
        w_down_eDF: [e, D, F].
        b_up_eH, b_down_eD: biases [e, H] and [e, D]; both optional.
        num_routes: an upper bound on the entries >= 0 of idx, default R * K; smaller saves memory, never an answer.
        recompute: keep X alone and recompute H in the backward.

    Returns:
        [R, D] in x's dtype. Every weight gets a gradient, zeros for an expert without rows.
    """
    if num_routes is None:
        num_routes = idx_RK.numel()
    if torch.compiler.is_compiling():
        from flashfusemoe_ds.kernels import operators  # not at the top: it imports this module

        if isinstance(w_up, tuple):  # cast first: the two together would be a float32 copy as well
            w_up = cast_to(x_RD.dtype, *w_up)
        weights = cast_to(x_RD.dtype, stacked(w_up), w_down_eDF, b_up_eH, b_down_eD)
        return operators.experts(
            x_RD, weight_RK, *weights, idx_RK, num_routes, activation.name, products.name, recompute
        )[0]
    w_gate, w_up = w_up if isinstance(w_up, tuple) else (None, w_up)
    return _Experts.apply(
        x_RD, weight_RK, w_up, w_down_eDF, b_up_eH, b_down_eD, w_gate, idx_RK, num_routes, activation, products,
        recompute,
    )  # fmt: skip
