# SPDX-License-Identifier: GPL-3.0-or-later
"""The experts stage and the router as torch.library operators: what torch.compile puts into its graphs.

    flashfusemoe::experts        flashfusemoe::experts_backward     around experts.experts_forward and _backward
    flashfusemoe::route          flashfusemoe::route_backward       around routing.route_forward and gate_gradients

An operator is one opaque node of a graph: torch.compile traces around it, not into Triton launches. Each has a fake
implementation, which derives the results' shapes from the operands' alone. Eager mode does not come here: an autograd
Function costs the host less, and may let dH overwrite H, where an operator changes no operand.

Operators take and return tensors and plain values only. Hence activations and backends travel by name, a result that
was not asked for is an empty tensor, and gradients come as a list of those that are needed.

Imported where a graph is traced, and only there. Triton is not needed for that, nor to run the experts on a CPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flashfusemoe_ds.kernels.activation import get_activation
from flashfusemoe_ds.kernels.experts import experts_backward as _experts_backward
from flashfusemoe_ds.kernels.experts import experts_forward as _experts_forward
from flashfusemoe_ds.kernels.order import ExpertOrder, order_shapes
from flashfusemoe_ds.kernels.products import ExpertProducts
from flashfusemoe_ds.kernels.routing_rule import Rule
from flashfusemoe_ds.kernels.select import select

# ---- backends by name


class NamedProducts:
    """Stands for an ExpertProducts while a graph is traced, whose operators look the backend up again."""

    def __init__(self, name: str) -> None:
        self.name = name


@torch.compiler.assume_constant_result
def select_name(
    requested: str | None, dtype: torch.dtype, device: torch.device, widths: tuple[int, ...], num_experts: int
) -> str:
    """The name of what `select` returns. A constant of the graph: finding out asks the GPU and imports modules, which
    cannot be traced, and depends on nothing else than these arguments."""
    return select(requested, dtype, device, widths, num_experts).name


# ---- experts


def _products(gemm_backend: str, x_RD: Tensor, w_up_eHD: Tensor, w_down_eDF: Tensor) -> ExpertProducts:
    num_experts, d, f = w_down_eDF.shape
    return select(gemm_backend, x_RD.dtype, x_RD.device, (d, f, w_up_eHD.shape[1]), num_experts)


@torch.library.custom_op(
    "flashfusemoe::experts",
    mutates_args=(),
    schema="(Tensor x_RD, Tensor weight_RK, Tensor w_up_eHD, Tensor w_down_eDF, Tensor? b_up_eH, Tensor? b_down_eD, "
    "Tensor idx_RK, SymInt num_routes, str activation, str gemm_backend, bool recompute) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def experts(
    x_RD: Tensor,
    weight_RK: Tensor,
    w_up_eHD: Tensor,
    w_down_eDF: Tensor,
    b_up_eH: Tensor | None,
    b_down_eD: Tensor | None,
    idx_RK: Tensor,
    num_routes: int,
    activation: str,
    gemm_backend: str,
    recompute: bool,
) -> tuple[Tensor, ...]:
    """`experts.experts`, with the activation and the backend by name.

    Returns:
        y [R, D]; H [N, H], which has no gradient, empty with `recompute`; and the seven tensors of the ExpertOrder.
    """
    products = _products(gemm_backend, x_RD, w_up_eHD, w_down_eDF)
    out_RD, h_NH, order = _experts_forward(
        x_RD, weight_RK, w_up_eHD, w_down_eDF, b_up_eH, b_down_eD, idx_RK, num_routes, get_activation(activation),
        products,
    )  # fmt: skip
    return out_RD.contiguous(), h_NH.new_empty(0) if recompute else h_NH.contiguous(), *order.tensors()


@experts.register_fake
def _(x_RD, weight_RK, w_up_eHD, w_down_eDF, b_up_eH, b_down_eD, idx_RK, num_routes, activation, backend, recompute):
    num_experts, up_width, _ = w_up_eHD.shape
    shapes = order_shapes(idx_RK.shape, num_experts, num_routes)
    (num_sorted,) = shapes[0]
    return (
        x_RD.new_empty(x_RD.shape),
        x_RD.new_empty(0) if recompute else x_RD.new_empty(num_sorted, up_width),
        *(idx_RK.new_empty(shape, dtype=torch.int32) for shape in shapes),
    )


@torch.library.custom_op(
    "flashfusemoe::experts_backward",
    mutates_args=(),
    schema="(Tensor dout_RD, Tensor x_RD, Tensor? h_NH, Tensor weight_RK, Tensor w_up_eHD, Tensor w_down_eDF, "
    "Tensor? b_up_eH, Tensor? b_down_eD, Tensor[] order, str activation, str gemm_backend, bool[] needs) -> Tensor[]",
)
def experts_backward(
    dout_RD: Tensor,
    x_RD: Tensor,
    h_NH: Tensor | None,
    weight_RK: Tensor,
    w_up_eHD: Tensor,
    w_down_eDF: Tensor,
    b_up_eH: Tensor | None,
    b_down_eD: Tensor | None,
    order: Sequence[Tensor],
    activation: str,
    gemm_backend: str,
    needs: Sequence[bool],
) -> list[Tensor]:
    """Those gradients of (x, weight, w_up, w_down, b_up, b_down) that `needs` names. H is None if it is not kept."""
    grads = _experts_backward(
        dout_RD, x_RD, h_NH, weight_RK, w_up_eHD, w_down_eDF, b_up_eH, b_down_eD, ExpertOrder(*order),
        get_activation(activation), _products(gemm_backend, x_RD, w_up_eHD, w_down_eDF), needs, consume_h=False,
    )  # fmt: skip
    return [grad.contiguous() for grad in grads if grad is not None]


@experts_backward.register_fake
def _(dout_RD, x_RD, h_NH, weight_RK, w_up_eHD, w_down_eDF, b_up_eH, b_down_eD, order, activation, backend, needs):
    inputs = (x_RD, weight_RK, w_up_eHD, w_down_eDF, b_up_eH, b_down_eD)
    return [t.new_empty(t.shape) for t, needed in zip(inputs, needs, strict=True) if needed]


def _keep_experts(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x_RD, weight_RK, w_up_eHD, w_down_eDF, b_up_eH, b_down_eD, _, _, activation, gemm_backend, recompute = inputs
    _, h_NH, *order = output
    kept_h = None if recompute else h_NH
    ctx.save_for_backward(x_RD, kept_h, weight_RK, w_up_eHD, w_down_eDF, b_up_eH, b_down_eD, *order)
    ctx.activation, ctx.gemm_backend = activation, gemm_backend
    ctx.mark_non_differentiable(h_NH, *order)
    ctx.set_materialize_grads(False)  # else H gets one of zeros


def _differentiate_experts(ctx: Any, dout_RD: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    if dout_RD is None:
        return (None,) * 11
    saved, needs = ctx.saved_tensors, list(ctx.needs_input_grad[:6])
    grads = iter(experts_backward(dout_RD, *saved[:7], saved[7:], ctx.activation, ctx.gemm_backend, needs))
    return *(next(grads) if needed else None for needed in needs), None, None, None, None, None


experts.register_autograd(_differentiate_experts, setup_context=_keep_experts)


# ---- router

# The fields of a routing_rule.Rule and the two losses' coefficients: what `route_by_rule` appends to the operands.
_RULE = (
    "int top_k, bool softmax, bool after_topk, bool renormalize, float scaling_factor, int num_groups, "
    "int top_groups, bool top2_sum, float aux_loss_coeff, float z_loss_coeff"
)


@torch.library.custom_op(
    "flashfusemoe::route",
    mutates_args=(),
    schema=f"(Tensor x_TD, Tensor gate_ED, Tensor? bias_E, bool count, {_RULE}) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
)
def route(x_TD: Tensor, gate_ED: Tensor, bias_E: Tensor | None, count: bool, *rule: Any) -> tuple[Tensor, ...]:
    """`routing.route`; its rule and coefficients, one by one, are the last arguments.

    Returns:
        weight [T, K], idx [T, K], counts [E], the auxiliary and the z-loss, each of these three empty where
        `routing.route` has None, and the logits [T, E], which have no gradient.
    """
    from flashfusemoe_ds.kernels import routing  # not at the top: machines without CUDA may lack triton

    *fields, aux_loss_coeff, z_loss_coeff = rule
    logits_TE, idx_TK, weight_TK, counts_E, aux_loss, z_loss = routing.route_forward(
        x_TD, gate_ED, bias_E, Rule(*fields), aux_loss_coeff, z_loss_coeff, count
    )
    return (
        weight_TK,
        idx_TK,
        idx_TK.new_empty(0) if counts_E is None else counts_E,
        logits_TE.new_empty(0) if aux_loss is None else aux_loss,
        logits_TE.new_empty(0) if z_loss is None else z_loss,
        logits_TE.contiguous(),
    )


@route.register_fake
def _(x_TD, gate_ED, bias_E, count, top_k, *rule):
    *_, aux_loss_coeff, z_loss_coeff = rule
    num_tokens, num_experts = x_TD.shape[0], gate_ED.shape[0]

    def floats(*shape: int) -> Tensor:
        return x_TD.new_empty(shape, dtype=torch.float32)

    return (
        floats(num_tokens, top_k),
        x_TD.new_empty(num_tokens, top_k, dtype=torch.int64),
        x_TD.new_empty(num_experts if count or aux_loss_coeff > 0 else 0, dtype=torch.int64),
        floats() if aux_loss_coeff > 0 else floats(0),
        floats() if z_loss_coeff > 0 else floats(0),
        floats(num_tokens, num_experts),
    )


@torch.library.custom_op(
    "flashfusemoe::route_backward",
    mutates_args=(),
    schema="(Tensor x_TD, Tensor gate_ED, Tensor logits_TE, Tensor idx_TK, Tensor? counts_E, Tensor? dweight_TK, "
    f"Tensor? daux, Tensor? dz, bool need_x, bool need_gate, {_RULE}) -> Tensor[]",
)
def route_backward(
    x_TD: Tensor,
    gate_ED: Tensor,
    logits_TE: Tensor,
    idx_TK: Tensor,
    counts_E: Tensor | None,
    dweight_TK: Tensor | None,
    daux: Tensor | None,
    dz: Tensor | None,
    need_x: bool,
    need_gate: bool,
    *rule: Any,
) -> list[Tensor]:
    """`routing_backward.gate_gradients`: those of the gradients of x and the gate that are needed."""
    from flashfusemoe_ds.kernels.routing_backward import gate_gradients

    *fields, aux_loss_coeff, z_loss_coeff = rule
    grads = gate_gradients(
        x_TD, gate_ED, logits_TE, idx_TK, counts_E, dweight_TK, daux, dz, Rule(*fields), aux_loss_coeff,
        z_loss_coeff, need_x, need_gate,
    )  # fmt: skip
    return [grad.contiguous() for grad in grads if grad is not None]


@route_backward.register_fake
def _(x_TD, gate_ED, logits_TE, idx_TK, counts_E, dweight_TK, daux, dz, need_x, need_gate, *rule):
    return [t.new_empty(t.shape) for t, needed in ((x_TD, need_x), (gate_ED, need_gate)) if needed]


def _keep_route(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x_TD, gate_ED, _, _, *rule = inputs
    _, idx_TK, counts_E, aux_loss, z_loss, logits_TE = output
    *_, aux_loss_coeff, z_loss_coeff = rule
    ctx.save_for_backward(x_TD, gate_ED, logits_TE, idx_TK, counts_E if aux_loss_coeff > 0 else None)
    ctx.rule = rule
    ctx.num_inputs = len(inputs)
    missing = [loss for loss, coeff in ((aux_loss, aux_loss_coeff), (z_loss, z_loss_coeff)) if not coeff > 0]
    ctx.mark_non_differentiable(idx_TK, counts_E, logits_TE, *missing)
    ctx.set_materialize_grads(False)


def _differentiate_route(
    ctx: Any,
    dweight_TK: Tensor | None,
    _didx: None,
    _dcounts: None,
    daux: Tensor | None,
    dz: Tensor | None,
    _dlogits: None,
) -> tuple[Tensor | None, ...]:
    rest = (None,) * (ctx.num_inputs - 2)
    if dweight_TK is None and daux is None and dz is None:
        return None, None, *rest
    needs = ctx.needs_input_grad[:2]
    grads = iter(route_backward(*ctx.saved_tensors, dweight_TK, daux, dz, *needs, *ctx.rule))
    return *(next(grads) if needed else None for needed in needs), *rest


route.register_autograd(_differentiate_route, setup_context=_keep_route)


def route_by_rule(
    x_TD: Tensor,
    gate_ED: Tensor,
    bias_E: Tensor | None,
    rule: Rule,
    aux_loss_coeff: float,
    z_loss_coeff: float,
    count: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """What `routing.route` returns, from the operator."""
    weight_TK, idx_TK, counts_E, aux_loss, z_loss, _ = route(
        x_TD, gate_ED, bias_E, count, *rule, aux_loss_coeff, z_loss_coeff
    )
    return (
        idx_TK,
        weight_TK,
        counts_E if count or aux_loss_coeff > 0 else None,
        aux_loss if aux_loss_coeff > 0 else None,
        z_loss if z_loss_coeff > 0 else None,
    )
