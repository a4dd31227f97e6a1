# SPDX-License-Identifier: GPL-3.0-or-later
"""`HopperProducts`: the experts' six products on H100 and H200, in warp-specialised Gluon.

The kernels are in hopper_rows.py, hopper_dgated.py and hopper_weights.py; this file makes their TMA descriptors and
launches them. What they do not take goes to `TritonProducts`, which this class extends: float32, widths that are not
multiples of 8, and where W's rows run along the summed dimension (dgated, dX) a dimension that is no multiple of 64,
since the last step would read the next expert's weights, times zeros, and zero times NaN is NaN.
Operands, results and rounding are those of `TritonProducts`, so either may compute any product of one step.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from flashfusemoe_ds.kernels import hopper_dgated, hopper_rows, hopper_weights
from flashfusemoe_ds.kernels.activation import Activation
from flashfusemoe_ds.kernels.hopper_pipeline import BLOCK_K, BLOCK_M, BLOCK_N, HALF_M, SWIZZLED
from flashfusemoe_ds.kernels.launch import Bound, Descriptor, launch
from flashfusemoe_ds.kernels.order import ExpertOrder
from flashfusemoe_ds.kernels.products import UpWeights
from flashfusemoe_ds.kernels.sizes import cdiv
from flashfusemoe_ds.kernels.triton_curves import CURVE_OF
from flashfusemoe_ds.kernels.triton_products import TritonProducts

_TALL = (BLOCK_M.value, BLOCK_K.value)  # rows along the summed dimension
_FLAT = (BLOCK_K.value, BLOCK_N.value)  # the summed dimension down the rows
_HALF = (HALF_M.value, BLOCK_N.value)
_SMALL = (HALF_M.value, HALF_M.value)
_TILE_N = 2 * BLOCK_N.value


def _descriptor(tensor: Tensor, block: tuple[int, int]) -> Descriptor:
    """Of a contiguous tensor as a matrix of its last dimension."""
    return Descriptor(tensor, block, SWIZZLED.value)


@functools.cache
def _up_bound(activation: Activation, apart: bool, bias: bool, even_k: bool) -> Bound:
    return Bound(
        hopper_rows.rows_kernel,
        GATHER=True,
        W_TRANSPOSED=True,
        ACTIVATE=True,
        PAIRED=activation.gated,
        APART=apart,
        CURVE=CURVE_OF[activation.name],
        BIAS=bias,
        EVEN_K=even_k,
        num_warps=4,
    )


@functools.cache
def _project_bound(transposed: bool, apart: bool, bias: bool) -> Bound:
    return Bound(
        hopper_rows.rows_kernel,
        GATHER=False,
        W_TRANSPOSED=transposed,
        ACTIVATE=False,
        PAIRED=False,
        APART=apart,
        CURVE="",
        BIAS=bias,
        EVEN_K=True,
        num_warps=4,
    )


@functools.cache
def _dgated_bound(activation: Activation) -> Bound:
    return Bound(hopper_dgated.dgated_kernel, CURVE=CURVE_OF[activation.name], GATED=activation.gated, num_warps=4)


@functools.cache
def _weight_grad_bound(gather_left: bool, tma_store: bool, apart: bool) -> Bound:
    return Bound(
        hopper_weights.weight_grad_kernel, GATHER_LEFT=gather_left, TMA_STORE=tma_store, APART=apart, num_warps=4
    )


@dataclass(frozen=True)
class HopperProducts(TritonProducts):
    """The six products on compute capability 9.0; see ExpertProducts for what each returns."""

    @staticmethod
    def takes(*tensors: Tensor) -> bool:
        """Whether TMA can address them: 16-bit, rows of a multiple of 16 bytes, an aligned and whole allocation."""
        for t in tensors:
            if t.element_size() != 2 or t.shape[-1] % 8 or t.data_ptr() % 16 or not t.numel() or not t.is_contiguous():
                return False
        return True

    def _grid(self, most: int) -> tuple[int]:
        return (min(self.num_sms, most),)

    def up(
        self,
        x_RD: Tensor,
        order: ExpertOrder,
        w_up: UpWeights,
        b_up_eH: Tensor | None,
        weight_RK: Tensor,
        activation: Activation,
    ) -> tuple[Tensor, Tensor]:
        weights = w_up if isinstance(w_up, tuple) else (w_up,)
        first, second = weights[0], weights[-1]
        apart = second is not first
        _, w_rows, d = first.shape
        up_width = 2 * w_rows if apart else w_rows
        f = up_width // 2 if activation.gated else up_width
        if f % 8 or not order.num_routes or not self.takes(x_RD, *weights):
            return super().up(x_RD, order, w_up, b_up_eH, weight_RK, activation)
        h_NH, a_NF = x_RD.new_empty(order.num_routes, up_width), x_RD.new_empty(order.num_routes, f)
        column_tiles = cdiv(f, BLOCK_N.value if activation.gated else _TILE_N)
        launch(
            _up_bound(activation, apart, b_up_eH is not None, d % BLOCK_K.value == 0),
            self._grid(order.max_tiles * column_tiles),
            x_RD,
            _descriptor(first, _TALL),
            _descriptor(second, _TALL),
            x_RD if b_up_eH is None else b_up_eH.contiguous(),
            weight_RK.contiguous(),
            order.row_N,
            order.route_N,
            order.tiles_M4,
            order.num_tiles_1,
            a_NF,
            _descriptor(a_NF, _HALF),
            h_NH,
            _descriptor(h_NH, _HALF),
            column_tiles,
            d // 8,
            f // 8,
            w_rows,
        )
        return h_NH, a_NF

    def down(
        self,
        a_NF: Tensor,
        order: ExpertOrder,
        w_down_eDF: Tensor,
        b_down_eD: Tensor | None,
        weight_RK: Tensor,
    ) -> Tensor:
        if w_down_eDF.shape[1] % 8 or not self.takes(a_NF, w_down_eDF):
            return super().down(a_NF, order, w_down_eDF, b_down_eD, weight_RK)
        return self._project_rows(a_NF, order, w_down_eDF, w_down_eDF, b_down_eD, weight_RK, transposed=True)

    def dx(self, dh_NH: Tensor, order: ExpertOrder, w_up: UpWeights) -> Tensor:
        weights = w_up if isinstance(w_up, tuple) else (w_up,)
        if weights[0].shape[1] % BLOCK_K.value or not self.takes(dh_NH, *weights):
            return super().dx(dh_NH, order, w_up)
        return self._project_rows(dh_NH, order, weights[0], weights[-1], None, None, transposed=False)

    def _project_rows(
        self,
        rows_NK: Tensor,
        order: ExpertOrder,
        w: Tensor,
        w2: Tensor,
        bias: Tensor | None,
        weight_RK: Tensor | None,
        *,
        transposed: bool,
    ) -> Tensor:
        """[N, K] -> [N, W], W being w's second dimension if transposed and its third if not; w2 is w, or has the rest
        of K."""
        width = w.shape[1] if transposed else w.shape[2]
        out = rows_NK.new_empty(order.num_routes, width)
        out_desc, block = _descriptor(out, _HALF), _TALL if transposed else _FLAT
        column_tiles = cdiv(width, _TILE_N)
        launch(
            _project_bound(transposed, w2 is not w, bias is not None),
            self._grid(order.max_tiles * column_tiles),
            _descriptor(rows_NK, _TALL),
            _descriptor(w, block),
            _descriptor(w2, block),
            rows_NK if bias is None else bias.contiguous(),
            rows_NK if bias is None else weight_RK.contiguous(),
            order.row_N,
            order.route_N,
            order.tiles_M4,
            order.num_tiles_1,
            out,
            out_desc,
            out,
            out_desc,
            column_tiles,
            rows_NK.shape[1] // 8,
            width // 8,
            w.shape[1],
        )
        return out

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
        _, d, f = w_down_eDF.shape
        if d % BLOCK_K.value or not self.takes(dout_RD, w_down_eDF, h_NH):
            return super().dgated(
                dout_RD, order, w_down_eDF, b_down_eD, h_NH, weight_RK, activation, overwrite_h=overwrite_h
            )
        dh_NH = h_NH if overwrite_h else torch.empty_like(h_NH)
        a_NF = h_NH.new_empty(order.num_routes, f)
        column_tiles = cdiv(f, _TILE_N)
        ds_PN = h_NH.new_empty(column_tiles + (b_down_eD is not None), order.num_routes, dtype=torch.float32)
        launch(
            _dgated_bound(activation),
            self._grid(order.max_tiles * column_tiles),
            dout_RD,
            _descriptor(w_down_eDF, _FLAT),
            weight_RK.contiguous(),
            order.row_N,
            order.route_N,
            order.tiles_M4,
            order.num_tiles_1,
            _descriptor(h_NH, _TALL),
            dh_NH,
            a_NF,
            ds_PN,
            order.num_routes,
            column_tiles,
            d // 8,
            f // 8,
        )
        if b_down_eD is not None:
            self._bias_dot(dout_RD, order, b_down_eD, ds_PN[column_tiles])
        return dh_NH, a_NF, ds_PN

    def dw_down(self, dout_RD: Tensor, order: ExpertOrder, a_NF: Tensor) -> Tensor:
        if not self.takes(dout_RD, a_NF):
            return super().dw_down(dout_RD, order, a_NF)
        out_eDF = a_NF.new_empty(order.ends_e.numel(), dout_RD.shape[1], a_NF.shape[1])
        self._sum_outer(dout_RD, a_NF, order, out_eDF, out_eDF, gather_left=True)
        return out_eDF

    def dw_up(self, dh_NH: Tensor, order: ExpertOrder, x_RD: Tensor, w_up: UpWeights) -> UpWeights:
        width, apart = dh_NH.shape[1], isinstance(w_up, tuple)
        # Stored in blocks of 64 rows, none of which may lie in both tensors.
        if not self.takes(dh_NH, x_RD) or (apart and width % (2 * HALF_M.value)):
            return super().dw_up(dh_NH, order, x_RD, w_up)
        shape = order.ends_e.numel(), width // 2 if apart else width, x_RD.shape[1]
        first = dh_NH.new_empty(*shape)
        second = dh_NH.new_empty(*shape) if apart else first
        self._sum_outer(dh_NH, x_RD, order, first, second, gather_left=False)
        return (first, second) if apart else first

    def _sum_outer(
        self, left: Tensor, right: Tensor, order: ExpertOrder, out: Tensor, out2: Tensor, *, gather_left: bool
    ) -> None:
        """Writes each expert's left' right to out [e, M, N], or its halves of M / 2 rows to out and out2."""
        num_experts, m, n = order.ends_e.numel(), left.shape[1], right.shape[1]
        gathered, lying = (left, right) if gather_left else (right, left)
        tile_m, tile_n = (BLOCK_M.value, _TILE_N) if gather_left else (_TILE_N, BLOCK_M.value)
        m_tiles, n_tiles = cdiv(m, tile_m), cdiv(n, tile_n)
        num_tiles = num_experts * m_tiles * n_tiles
        launch(
            _weight_grad_bound(gather_left, m % HALF_M.value == 0, out2 is not out),
            (min(self.num_sms * self.waves, num_tiles),),
            gathered,
            lying,
            _descriptor(lying, _FLAT),
            order.row_N,
            order.by_size_e3,
            out,
            _descriptor(out, _SMALL),
            _descriptor(out2, _SMALL),
            num_tiles,
            m_tiles,
            n_tiles,
            m // 8,
            n // 8,
        )
