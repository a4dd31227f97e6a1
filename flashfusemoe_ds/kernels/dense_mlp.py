# SPDX-License-Identifier: GPL-3.0-or-later
"""MLPs that every token passes, as one autograd node that keeps only X and H: the shared experts.

    forward   H = X W_up -> A = activation(H) -> y = A W_down, added to a tensor that is there if there is one
    backward  dA = dY W_down -> (dH, A) from H and dA -> dX, dW_up, dW_down

The products are cuBLAS's. What lies between them is one launch in each direction (triton_activation.py) on CUDA, and
PyTorch elsewhere. n MLPs are one of n times the width: the inner dimension of the second product runs over all.

Shape suffixes: n MLPs; H width of an up-projection's output, F of an activation's (types.py).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from flashfusemoe_ds.kernels.activation import Activation
from flashfusemoe_ds.kernels.experts import graph_is_kept
from flashfusemoe_ds.kernels.precision import cast_to, compute_dtype, to_keep, without_autocast


def activate(h_NH: Tensor, activation: Activation) -> Tensor:
    """A [N, F] of H [N, H], contiguous: computed in float32 for 16-bit tensors, rounded once."""
    if h_NH.is_meta:  # where `plan` counts what a GPU allocates
        return h_NH.new_empty(len(h_NH), h_NH.shape[1] // (2 if activation.gated else 1))
    if _runs_fused(h_NH):
        from flashfusemoe_ds.kernels import triton_activation  # not at the top: machines without CUDA may lack triton

        return triton_activation.activate(h_NH, activation)
    return activate_torch(h_NH, activation)


def activate_backward(
    h_NH: Tensor, da_NF: Tensor, activation: Activation, *, overwrite_h: bool
) -> tuple[Tensor, Tensor]:
    """dH [N, H], and A [N, F] again, from H and dA, all contiguous.

    Args:
        da_NF: not to be used afterwards: A may take its memory.
        overwrite_h: H is not needed again: dH may take its memory.
    """
    if h_NH.is_meta:
        return h_NH if overwrite_h else torch.empty_like(h_NH), da_NF
    if _runs_fused(h_NH):
        from flashfusemoe_ds.kernels import triton_activation

        return triton_activation.activate_backward(h_NH, da_NF, activation, overwrite_h=overwrite_h)
    return activate_backward_torch(h_NH, da_NF, activation)


def activate_torch(h_NH: Tensor, activation: Activation) -> Tensor:
    """The twin of `activate`."""
    return activation.forward(h_NH.to(compute_dtype(h_NH.dtype))).to(h_NH.dtype)


def activate_backward_torch(h_NH: Tensor, da_NF: Tensor, activation: Activation) -> tuple[Tensor, Tensor]:
    """The twin of `activate_backward`, which leaves its operands alone."""
    acc = compute_dtype(h_NH.dtype)
    a_NF, dh_NH = activation.backward(h_NH.to(acc), da_NF.to(acc))
    return dh_NH.to(h_NH.dtype), a_NF.to(h_NH.dtype)


def _runs_fused(h_NH: Tensor) -> bool:
    return h_NH.is_cuda and h_NH.dtype in (torch.bfloat16, torch.float16, torch.float32)


def _side_by_side(w_down_nDF: Tensor) -> Tensor:
    """[n, D, F] -> [D, n * F]; a copy only for n > 1."""
    return w_down_nDF.transpose(0, 1).flatten(1)


def _apart(dw_DnF: Tensor, w_down_nDF: Tensor) -> Tensor:
    """The gradient of `_side_by_side`, with the parameter's own strides, which fused optimizers look at."""
    if len(w_down_nDF) == 1:
        return dw_DnF.view_as(w_down_nDF)
    return dw_DnF.view(-1, len(w_down_nDF), w_down_nDF.shape[2]).transpose(0, 1).contiguous()


class _DenseMLP(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, w_up, w_down, into_TD, activation):
        weights = w_up, w_down
        w_up, w_down = cast = cast_to(x_TD.dtype, *weights)
        with without_autocast(x_TD.device.type):
            h_TnH, w_DnF = F.linear(x_TD, w_up.flatten(0, 1)), _side_by_side(w_down)
            a_TnF = activate(h_TnH.view(-1, w_up.shape[1]), activation).view(-1, w_DnF.shape[1])
            if into_TD is None:
                y_TD = F.linear(a_TnF, w_DnF)
            else:
                ctx.mark_dirty(into_TD)
                # Not addmm_, which DeepSpeed's flops profiler does not see.
                y_TD = torch.addmm(into_TD, a_TnF, w_DnF.t(), out=into_TD)
        ctx.save_for_backward(x_TD, h_TnH, *to_keep(weights, cast))
        ctx.activation = activation
        return y_TD

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_TD):
        # Unpacked once: activation checkpointing hands it out once.
        x_TD, h_TnH, *weights = ctx.saved_tensors
        w_up, w_down = cast_to(x_TD.dtype, *weights)
        need_x, need_up, need_down, need_into, _ = ctx.needs_input_grad
        dx_TD = dw_up = dw_down = None
        # A backward may be called inside autocast, which would cast the products.
        with without_autocast(dy_TD.device.type):
            rows_TD, w_DnF = dy_TD.contiguous(), _side_by_side(w_down)
            h_NH = h_TnH.view(-1, w_up.shape[1])
            if need_x or need_up:
                # Unless a second backward through this graph may ask for H again.
                consume_h = not graph_is_kept()
                da_NF = (rows_TD @ w_DnF).view(-1, w_down.shape[2])
                dh_NH, a_NF = activate_backward(h_NH, da_NF, ctx.activation, overwrite_h=consume_h)
                dh_TnH = dh_NH.view_as(h_TnH)
                if need_x:
                    dx_TD = dh_TnH @ w_up.flatten(0, 1)
                if need_up:
                    dw_up = (dh_TnH.t() @ x_TD).view_as(w_up)
                if consume_h:  # autograd keeps it until this node is through
                    h_TnH.untyped_storage().resize_(0)
            elif need_down:
                a_NF = activate(h_NH, ctx.activation)
            if need_down:
                dw_down = _apart(rows_TD.t() @ a_NF.view(-1, w_DnF.shape[1]), w_down)
        return dx_TD, dw_up, dw_down, dy_TD if need_into else None, None


def dense_mlp(
    x_TD: Tensor, w_up_nHD: Tensor, w_down_nDF: Tensor, activation: Activation, into_TD: Tensor | None = None
) -> Tensor:
    """The sum of n MLPs' outputs [T, D], differentiable in every tensor.

    Args:
        x_TD: any floating dtype, in which everything is computed; weights of another are cast.
        w_up_nHD: [n, 2F, D], gate rows above up rows, for a gated activation; else [n, F, D].
        w_down_nDF: [n, D, F].
        into_TD: [T, D], contiguous; the sum is added to it, in place, and it is returned.
    """
    return _DenseMLP.apply(x_TD, w_up_nHD, w_down_nDF, into_TD, activation)
