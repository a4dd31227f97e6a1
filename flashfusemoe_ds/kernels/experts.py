# SPDX-License-Identifier: GPL-3.0-or-later
"""The experts stage: rows in, the sum over this rank's experts out, with a backward that keeps only X and H.

    forward   gather rows by expert -> up-projection -> activation x weight -> down-projection -> gather-sum
    backward  gather dY -> dA -> (A, dH, dS) recomputed from H -> dW_down, dX_expanded, dW_up -> gather-sum

The routing weight multiplies the activation, before the down-projection. The sum over experts is then unweighted,
which is what a transport that adds up ranks needs, and the backward needs neither Y nor A.

No floating-point atomics: sums run in a fixed order, so equal inputs give equal bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flashfusemoe_ds.kernels.activation import Activation
from flashfusemoe_ds.kernels.grouped_gemm import GroupedGemm


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """Elementwise arithmetic runs in float32 for 16-bit tensors and in the tensor's own precision otherwise."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


@dataclass(frozen=True)
class ExpertOrder:
    """The routes sorted by expert, stably: equal experts keep (row, k) order.

    Attributes:
        row_N: int64 [N], the source row of each sorted route.
        route_N: int64 [N], its flat position row * K + k.
        expert_N: int64 [N], its expert; for a dropped route (all of them at the end) any valid expert.
        pos_RK: int64 [R, K], where route (r, k) landed in the sorted order; N if dropped.
        ends_e: int32 [e], where each expert's routes end.
    """

    row_N: Tensor
    route_N: Tensor
    expert_N: Tensor
    pos_RK: Tensor
    ends_e: Tensor

    @property
    def valid_N1(self) -> Tensor:
        """bool [N, 1]: False for the dropped routes at the end, whose rows hold nothing meaningful."""
        num_routes = self.row_N.numel()
        total = self.ends_e[-1] if self.ends_e.numel() else self.ends_e.new_zeros(())
        return (torch.arange(num_routes, device=self.row_N.device) < total).unsqueeze(1)


def sort_by_expert(idx_RK: Tensor, num_experts: int, num_routes: int) -> ExpertOrder:
    """Sorts routes by expert without a host synchronisation.

    Args:
        idx_RK: int [R, K], expert ids in [0, num_experts) or -1.
        num_routes: at least the number of entries >= 0; the length N of the sorted order.
    """
    flat = idx_RK.reshape(-1).long()
    key = torch.where(flat < 0, num_experts, flat)
    order = torch.argsort(key, stable=True)
    counts = torch.zeros(num_experts + 1, dtype=torch.int64, device=flat.device)
    counts.scatter_add_(0, key, torch.ones_like(key))
    pos = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    route_N = order[:num_routes]
    return ExpertOrder(
        row_N=route_N // max(idx_RK.shape[1], 1),
        route_N=route_N,
        expert_N=key[route_N].clamp_(max=num_experts - 1),
        pos_RK=torch.where(flat < 0, num_routes, pos).view_as(idx_RK),
        ends_e=counts[:num_experts].cumsum(0).to(torch.int32),
    )


def gather_sum(y_ND: Tensor, pos_RK: Tensor) -> Tensor:
    """[N, D], [R, K] -> [R, D]: the sum of each row's routes, added in k order, in float32 for 16-bit inputs."""
    num_routes, width = y_ND.shape
    total = torch.zeros(pos_RK.shape[0], width, dtype=compute_dtype(y_ND.dtype), device=y_ND.device)
    if num_routes:
        for pos_R in pos_RK.unbind(1):
            # A select, not a product with 0: rows past the last expert's may hold NaN.
            rows = y_ND.index_select(0, pos_R.clamp(max=num_routes - 1)).to(total.dtype)
            total += torch.where((pos_R < num_routes).unsqueeze(1), rows, 0)
    return total.to(y_ND.dtype)


def _segment_sum(rows_NW: Tensor, ends_e: Tensor) -> Tensor:
    """[N, W] -> [e, W]: bias gradients, summed in compute dtype and in row order."""
    lengths = torch.diff(ends_e.long(), prepend=ends_e.new_zeros(1).long(), append=ends_e.new_full((1,), len(rows_NW)))
    return torch.segment_reduce(rows_NW, "sum", lengths=lengths, axis=0, unsafe=True, initial=0)[:-1]


class _Experts(torch.autograd.Function):
    """The stage as one autograd node, so that what it keeps is chosen here and not by autograd."""

    @staticmethod
    def forward(ctx, x_RD, weight_RK, w_up, w_down, b_up, b_down, idx_RK, num_routes, activation, gemm, recompute):
        order = sort_by_expert(idx_RK, w_up.shape[0], num_routes)
        h_NH = _up(x_RD, order, w_up, b_up, gemm)
        scale_N1 = _route_weights(weight_RK, order)
        a_NF = (activation.forward(h_NH.to(compute_dtype(h_NH.dtype))) * scale_N1).to(x_RD.dtype)
        bias_ND = None if b_down is None else (b_down[order.expert_N] * scale_N1).to(x_RD.dtype)
        y_ND = gemm.nt(a_NF, w_down, order.ends_e, bias_ND)
        out_RD = gather_sum(y_ND, order.pos_RK)

        ctx.save_for_backward(x_RD, None if recompute else h_NH, weight_RK, w_up, w_down, b_up, b_down, idx_RK)
        ctx.num_routes, ctx.activation, ctx.gemm = num_routes, activation, gemm
        return out_RD

    @staticmethod
    @once_differentiable
    def backward(ctx, dout_RD):
        # A backward may be called inside autocast, which would cast the products below.
        with torch.autocast(dout_RD.device.type, enabled=False):
            return _Experts._backward(ctx, dout_RD)

    @staticmethod
    def _backward(ctx, dout_RD):
        x_RD, h_NH, weight_RK, w_up, w_down, b_up, b_down, idx_RK = ctx.saved_tensors
        need_x, need_weight, need_w_up, need_w_down, need_b_up, need_b_down = ctx.needs_input_grad[:6]
        gemm = ctx.gemm
        order = sort_by_expert(idx_RK, w_up.shape[0], ctx.num_routes)
        if h_NH is None:
            h_NH = _up(x_RD, order, w_up, b_up, gemm)
        valid_N1, scale_N1 = order.valid_N1, _route_weights(weight_RK, order)
        acc = compute_dtype(x_RD.dtype)

        dy_ND = dout_RD.index_select(0, order.row_N)
        da_NF = gemm.nn(dy_ND, w_down, order.ends_e).to(acc)
        a_NF, dh_NH = ctx.activation.backward(h_NH.to(acc), da_NF)
        dh_NH = (dh_NH * scale_N1).to(x_RD.dtype)

        dx = dweight = dw_up = dw_down = db_up = db_down = None
        if need_weight:
            ds_N = (da_NF * a_NF).sum(1)
            if b_down is not None:
                ds_N = ds_N + (dy_ND.to(acc) * b_down[order.expert_N]).sum(1)
            ds_N = torch.where(valid_N1[:, 0], ds_N, 0).to(weight_RK.dtype)
            dweight = torch.zeros_like(weight_RK).view(-1).scatter_(0, order.route_N, ds_N).view_as(weight_RK)
        if need_x:
            dx = gather_sum(gemm.nn(dh_NH, w_up, order.ends_e), order.pos_RK)
        if need_w_down:
            dw_down = gemm.tn(dy_ND, (a_NF * scale_N1).to(x_RD.dtype), order.ends_e)
        if need_w_up:
            dw_up = gemm.tn(dh_NH, x_RD.index_select(0, order.row_N), order.ends_e)
        if need_b_down:
            db_down = _segment_sum(dy_ND.to(acc) * scale_N1.to(acc), order.ends_e).to(b_down.dtype)
        if need_b_up:
            db_up = _segment_sum(dh_NH.to(acc), order.ends_e).to(b_up.dtype)
        return dx, dweight, dw_up, dw_down, db_up, db_down, None, None, None, None, None


def _up(x_RD: Tensor, order: ExpertOrder, w_up: Tensor, b_up: Tensor | None, gemm: GroupedGemm) -> Tensor:
    bias_NH = None if b_up is None else b_up[order.expert_N]
    return gemm.nt(x_RD.index_select(0, order.row_N), w_up, order.ends_e, bias_NH)


def _route_weights(weight_RK: Tensor, order: ExpertOrder) -> Tensor:
    return weight_RK.reshape(-1).index_select(0, order.route_N).unsqueeze(1)


def experts(
    x_RD: Tensor,
    idx_RK: Tensor,
    weight_RK: Tensor,
    w_up_eHD: Tensor,
    w_down_eDF: Tensor,
    activation: Activation,
    gemm: GroupedGemm,
    *,
    b_up_eH: Tensor | None = None,
    b_down_eD: Tensor | None = None,
    num_routes: int | None = None,
    recompute: bool = False,
) -> Tensor:
    """y[r] = sum over k of weight[r, k] * expert[idx[r, k]](x[r]), differentiable in every floating-point argument.

    Args:
        x_RD: [R, D] rows; any floating dtype, shared by the weights.
        idx_RK: int [R, K], local expert ids in [0, e) or -1 for "not here".
        weight_RK: float32 [R, K] (float64 with float64 rows); entries where idx is -1 are ignored, gradient 0.
        w_up_eHD: [e, 2F, D] gate rows above up rows for a gated activation, else [e, F, D].
        w_down_eDF: [e, D, F].
        b_up_eH, b_down_eD: biases [e, H] and [e, D]; both optional.
        num_routes: an upper bound on the entries >= 0 of idx, default R * K; smaller saves memory, never an answer.
        recompute: keep X alone and recompute H in the backward.

    Returns:
        [R, D] in x's dtype. Every weight gets a gradient, zeros for an expert without rows.
    """
    if num_routes is None:
        num_routes = idx_RK.numel()
    return _Experts.apply(
        x_RD, weight_RK, w_up_eHD, w_down_eDF, b_up_eH, b_down_eD, idx_RK, num_routes, activation, gemm, recompute
    )
