# SPDX-License-Identifier: GPL-3.0-or-later
"""PyTorch's products for weights that lie transposed, as GPT-OSS and Aria have them: [e, D, H] and [e, F, D].

The weights reach the products as views, and their gradients are made in the weights' own layout: no copy either way.
The experts stage sees the parameters themselves, which is what ZeRO-3, that swaps their storage, needs.
"""

from __future__ import annotations

from dataclasses import dataclass

from flashfusemoe_ds.kernels.products import TorchProducts


@dataclass(frozen=True)
class TransposedProducts:
    """An ExpertProducts whose w_up is [e, D, H] and whose w_down is [e, F, D], by those of `inner`."""

    inner: TorchProducts

    @property
    def name(self) -> str:
        return self.inner.name

    def yielding(self) -> TransposedProducts:
        return self  # torch's kernels are as they are

    def up(self, x_RD, order, w_up_eDH, b_up_eH, weight_RK, activation):
        return self.inner.up(x_RD, order, w_up_eDH.transpose(1, 2), b_up_eH, weight_RK, activation)

    def down(self, a_NF, order, w_down_eFD, b_down_eD, weight_RK):
        return self.inner.down(a_NF, order, w_down_eFD.transpose(1, 2), b_down_eD, weight_RK)

    def dgated(self, dout_RD, order, w_down_eFD, b_down_eD, h_NH, weight_RK, activation, *, overwrite_h):
        return self.inner.dgated(
            dout_RD, order, w_down_eFD.transpose(1, 2), b_down_eD, h_NH, weight_RK, activation, overwrite_h=overwrite_h
        )

    def dx(self, dh_NH, order, w_up_eDH):
        return self.inner.dx(dh_NH, order, w_up_eDH.transpose(1, 2))

    def dw_down(self, dout_RD, order, a_NF):
        return self.inner.gemm.tn(a_NF, dout_RD.index_select(0, order.row_N), order.ends_e)

    def dw_up(self, dh_NH, order, x_RD, w_up_eDH):
        return self.inner.gemm.tn(x_RD.index_select(0, order.row_N), dh_NH, order.ends_e)
