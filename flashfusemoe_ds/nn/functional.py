# SPDX-License-Identifier: GPL-3.0-or-later
"""The whole dropless layer as a function of its weights, on one device: `fused_moe`, and what it checks for."""

from __future__ import annotations

import torch
from torch import Tensor

from flashfusemoe_ds.kernels.activation import Activation, get_activation
from flashfusemoe_ds.kernels.experts import experts
from flashfusemoe_ds.kernels.products import ExpertProducts
from flashfusemoe_ds.kernels.select import select_products
from flashfusemoe_ds.nn.checks import check_coefficient, check_hidden
from flashfusemoe_ds.nn.experts import dtype_under_autocast, under_autocast
from flashfusemoe_ds.nn.router import Gating, fused_rule, gate_and_route, get_gating, named_losses, runs_fused


def route_to_experts(
    x_TD: Tensor,
    rows_TD: Tensor,
    gate_ED: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    activation: Activation,
    products: ExpertProducts,
    gating: Gating,
    top_k: int,
    aux_loss_coeff: float,
    z_loss_coeff: float,
    *,
    b_up: Tensor | None = None,
    b_down: Tensor | None = None,
    bias_E: Tensor | None = None,
    count: bool = False,
    recompute: bool = False,
) -> tuple[Tensor, dict[str, Tensor], Tensor | None]:
    """A dropless layer whose experts are all here: y [T, D], the losses, and the counts [E] where they were asked for.

    One autograd node by the fused kernels where they take the operands, else the router's and the experts' own.

    Args:
        x_TD: what the router sees.
        rows_TD: what the experts see: x itself, or x in autocast's dtype.
    """
    if rows_TD is x_TD and runs_fused(x_TD, gate_ED, top_k) and not torch.compiler.is_compiling():
        from flashfusemoe_ds.kernels.routed_experts import routed_experts  # not at the top, like all of triton

        y_TD, _, counts_E, aux_loss, z_loss = routed_experts(
            x_TD, gate_ED, w_up, w_down, activation, products, fused_rule(gating, top_k), b_up_eH=b_up,
            b_down_eD=b_down, bias_E=bias_E, aux_loss_coeff=aux_loss_coeff, z_loss_coeff=z_loss_coeff, count=count,
            recompute=recompute,
        )  # fmt: skip
        return y_TD, named_losses(aux_loss, z_loss), counts_E
    routing = gate_and_route(x_TD, gate_ED, gating, top_k, aux_loss_coeff, z_loss_coeff, bias_E, count)
    y_TD = experts(
        rows_TD, routing.idx_TK, routing.weight_TK, w_up, w_down, activation, products, b_up_eH=b_up, b_down_eD=b_down,
        recompute=recompute,
    )  # fmt: skip
    return y_TD, routing.losses, routing.counts_E if count else None


def fused_moe(
    hidden_states: Tensor,
    gate_weight: Tensor,
    w_up: Tensor,
    w_down: Tensor,
    *,
    top_k: int,
    activation: str = "swiglu",
    gating: str | Gating = "softmax_topk",
    aux_loss_coeff: float = 0.0,
    z_loss_coeff: float = 0.0,
    recompute_activations: bool = False,
    gemm_backend: str | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Routes every token to its top_k experts and returns the weighted sum of their outputs. Drops nothing.

    Args:
        hidden_states: [*, D].
        gate_weight: [E, D]; logits are computed in float32.
        w_up: [E, 2F, D], gate rows above up rows, for a gated activation; [E, F, D] for a plain one.
        w_down: [E, D, F].

    The other arguments are those of MoELayer.

    Returns:
        Output [*, D] in the input's dtype (autocast's where that is on), and the losses whose coefficient is positive.
    """
    act, variant = get_activation(activation), get_gating(gating)
    if gate_weight.dim() != 2:
        raise ValueError(f"gate_weight has shape {tuple(gate_weight.shape)}; expected [E, D]")
    num_experts, d_model = gate_weight.shape
    check_hidden("fused_moe", hidden_states, d_model, w_up)
    check_coefficient("aux_loss_coeff", aux_loss_coeff)
    check_coefficient("z_loss_coeff", z_loss_coeff)
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k is {top_k}; valid: 1 to num_experts ({num_experts})")
    variant.check(num_experts, top_k)
    if variant.expert_bias:
        raise ValueError("gating.expert_bias is True, but fused_moe keeps no state; use MoELayer")
    intermediate = w_down.shape[2] if w_down.dim() == 3 else -1
    expected_up = (num_experts, act.up_width(intermediate), d_model)
    if tuple(w_up.shape) != expected_up or tuple(w_down.shape) != (num_experts, d_model, intermediate):
        raise ValueError(
            f"w_up is {tuple(w_up.shape)} and w_down {tuple(w_down.shape)}; with activation {activation!r} and "
            f"gate_weight {tuple(gate_weight.shape)} they must be [E, {'2F' if act.gated else 'F'}, D] and [E, D, F]"
        )
    x_TD = hidden_states.reshape(-1, d_model)
    rows_TD, up_dtype, down_dtype = under_autocast(x_TD), dtype_under_autocast(w_up), dtype_under_autocast(w_down)
    if up_dtype != rows_TD.dtype or down_dtype != rows_TD.dtype:
        raise ValueError(f"hidden_states is {rows_TD.dtype}, w_up {up_dtype} and w_down {down_dtype}; they must agree")
    products = select_products(gemm_backend, rows_TD, (d_model, intermediate, w_up.shape[1]), num_experts)
    y_TD, losses, _ = route_to_experts(
        x_TD, rows_TD, gate_weight, w_up, w_down, act, products, variant, top_k, aux_loss_coeff, z_loss_coeff,
        recompute=recompute_activations,
    )  # fmt: skip
    return y_TD.reshape(hidden_states.shape), losses
