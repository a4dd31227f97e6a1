# SPDX-License-Identifier: GPL-3.0-or-later
"""An MLP's activation between two dense products: one launch forward, one backward.

Nothing here multiplies matrices, so all is in the bytes: forward H in and A out; backward dA and H in, dH and A out,
where dH may take H's memory and A takes dA's. Every thread moves 16 bytes of each; a row wider than a program is
split over several. The products round A, dA and dH to the dtype; between loads and stores all is float32.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashfusemoe_ds.kernels.activation import Activation
from flashfusemoe_ds.kernels.launch import launch
from flashfusemoe_ds.kernels.sizes import cdiv, next_power_of_2
from flashfusemoe_ds.kernels.triton_curves import CURVE_OF, curve, curve_and_slope

NUM_WARPS = 4


@triton.jit
def _places(num_rows, F: tl.constexpr, GATED: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_F: tl.constexpr):
    """This program's elements of A and, the gate's half for a gated activation, of H; which of them exist."""
    strips: tl.constexpr = (F + BLOCK_F - 1) // BLOCK_F
    program = tl.program_id(0)
    rows = (program // strips).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    columns = (program % strips) * BLOCK_F + tl.arange(0, BLOCK_F)[None, :]
    mask = (rows < num_rows)[:, None] & (columns < F)
    # F is a constant, so that the compiler sees the alignment of multiples of 8 and not only of 16.
    return rows[:, None] * F + columns, rows[:, None] * (2 * F if GATED else F) + columns, mask


@triton.jit(do_not_specialize=["num_rows"])
def _activation_kernel(
    h_ptr,
    a_ptr,
    num_rows,
    F: tl.constexpr,
    CURVE: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    of_a, of_h, mask = _places(num_rows, F, GATED, BLOCK_R, BLOCK_F)
    value = curve(tl.load(h_ptr + of_h, mask=mask, other=0.0).to(tl.float32), CURVE)
    if GATED:
        value *= tl.load(h_ptr + of_h + F, mask=mask, other=0.0).to(tl.float32)
    tl.store(a_ptr + of_a, value.to(a_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def _activation_backward_kernel(
    h_ptr,
    da_ptr,
    dh_ptr,
    num_rows,
    F: tl.constexpr,
    CURVE: tl.constexpr,
    GATED: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    # Every element is read before its place is written, by the same thread: dh_ptr may be h_ptr.
    of_a, of_h, mask = _places(num_rows, F, GATED, BLOCK_R, BLOCK_F)
    da = tl.load(da_ptr + of_a, mask=mask, other=0.0).to(tl.float32)
    value, slope = curve_and_slope(tl.load(h_ptr + of_h, mask=mask, other=0.0).to(tl.float32), CURVE)
    dtype = dh_ptr.dtype.element_ty
    if GATED:
        up = tl.load(h_ptr + of_h + F, mask=mask, other=0.0).to(tl.float32)
        tl.store(dh_ptr + of_h, (da * up * slope).to(dtype), mask=mask)
        tl.store(dh_ptr + of_h + F, (da * value).to(dtype), mask=mask)
        value *= up
    else:
        tl.store(dh_ptr + of_h, (da * slope).to(dtype), mask=mask)
    tl.store(da_ptr + of_a, value.to(da_ptr.dtype.element_ty), mask=mask)


@functools.lru_cache(maxsize=256)
def _block(width: int, element_size: int) -> tuple[int, int]:
    """Rows and columns of a program: 16 bytes of each operand per thread. Of the strips that a row can be cut into,
    those that leave the fewest threads idle past its end."""
    elements = NUM_WARPS * 32 * 16 // element_size
    widest = min(elements, max(64, next_power_of_2(width)))
    block_f = min((widest, widest // 2, widest // 4), key=lambda strip: cdiv(width, strip) * strip)
    return elements // block_f, block_f


def activate(h_NH: Tensor, activation: Activation) -> Tensor:
    """A [N, F] of H [N, H], contiguous."""
    width = h_NH.shape[1] // 2 if activation.gated else h_NH.shape[1]
    a_NF = torch.empty(h_NH.shape[0], width, dtype=h_NH.dtype, device=h_NH.device)
    _launch(_activation_kernel, activation, a_NF, h_NH, a_NF)
    return a_NF


def activate_backward(
    h_NH: Tensor, da_NF: Tensor, activation: Activation, *, overwrite_h: bool
) -> tuple[Tensor, Tensor]:
    """dH [N, H], and A [N, F] again, which takes dA's memory. All contiguous.

    Args:
        overwrite_h: let dH take H's memory.
    """
    dh_NH = h_NH if overwrite_h else torch.empty_like(h_NH)
    _launch(_activation_backward_kernel, activation, da_NF, h_NH, da_NF, dh_NH)
    return dh_NH, da_NF


def _launch(kernel: triton.JITFunction, activation: Activation, a_NF: Tensor, *tensors: Tensor) -> None:
    num_rows, width = a_NF.shape
    block_r, block_f = _block(width, a_NF.element_size())
    launch(
        kernel,
        (cdiv(num_rows, block_r) * cdiv(width, block_f),),
        *tensors,
        num_rows,
        F=width,
        CURVE=CURVE_OF[activation.name],
        GATED=activation.gated,
        BLOCK_R=block_r,
        BLOCK_F=block_f,
        num_warps=NUM_WARPS,
    )
