# SPDX-License-Identifier: GPL-3.0-or-later
"""Matrix products over rows grouped by expert, behind one small interface, so that backends can be mixed.

Rows [N, .] are sorted by expert; `ends_e` (int32 [e], on the rows' device) holds where each expert's rows end. Rows at
or past ends_e[-1] belong to no expert: what a product writes there is undefined and never read.

    nt  x_NI @ w_eOI[expert].T   -> [N, O]     a projection, forward; plus a bias row each, where there is one
    nn  g_NO @ w_eOI[expert]     -> [N, I]     its input gradient
    tn  g_NO.T @ x_NI per expert -> [e, O, I]  its weight gradient; zeros for an expert without rows
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor


class GroupedGemm(Protocol):
    """The three products every backend provides. Operands share one dtype, which is also the result's."""

    name: str

    def nt(self, x_NI: Tensor, w_eOI: Tensor, ends_e: Tensor, bias_NO: Tensor | None = None) -> Tensor: ...

    def nn(self, g_NO: Tensor, w_eOI: Tensor, ends_e: Tensor) -> Tensor: ...

    def tn(self, g_NO: Tensor, x_NI: Tensor, ends_e: Tensor) -> Tensor: ...


class ReferenceGemm:
    """One dense product per expert. Any dtype and device; reads the offsets on the host, which waits for CUDA."""

    name = "reference"

    @staticmethod
    def _segments(ends_e: Tensor) -> list[tuple[int, int]]:
        ends = ends_e.tolist()
        return list(zip([0, *ends[:-1]], ends, strict=True))

    def nt(self, x_NI: Tensor, w_eOI: Tensor, ends_e: Tensor, bias_NO: Tensor | None = None) -> Tensor:
        out = x_NI.new_zeros(x_NI.shape[0], w_eOI.shape[1])
        for e, (start, end) in enumerate(self._segments(ends_e)):
            rows, weight = x_NI[start:end], w_eOI[e].T
            # addmm rounds once; a product and then a sum round twice, which in fp16 costs a bit of accuracy.
            out[start:end] = rows @ weight if bias_NO is None else torch.addmm(bias_NO[start:end], rows, weight)
        return out

    def nn(self, g_NO: Tensor, w_eOI: Tensor, ends_e: Tensor) -> Tensor:
        out = g_NO.new_zeros(g_NO.shape[0], w_eOI.shape[2])
        for e, (start, end) in enumerate(self._segments(ends_e)):
            out[start:end] = g_NO[start:end] @ w_eOI[e]
        return out

    def tn(self, g_NO: Tensor, x_NI: Tensor, ends_e: Tensor) -> Tensor:
        segments = self._segments(ends_e)
        out = g_NO.new_empty(len(segments), g_NO.shape[1], x_NI.shape[1])
        for e, (start, end) in enumerate(segments):
            out[e] = g_NO[start:end].T @ x_NI[start:end]
        return out


class TorchGroupedGemm:
    """`torch._grouped_mm`: CUTLASS grouped GEMMs on Hopper, one batched call on CPUs; offsets stay on the device."""

    name = "grouped_mm"

    @staticmethod
    def why_not(dtype: torch.dtype, device: torch.device, widths: tuple[int, ...], num_experts: int) -> str | None:
        """None if usable, else the reason, in words.

        Limits as seen in torch 2.11 and 2.13: bf16 alone on CUDA (other dtypes raise), no float64 anywhere, strides
        that are multiples of 16 bytes, fewer than 1024 groups.
        """
        if device.type == "cuda" and dtype is not torch.bfloat16:
            return f"torch._grouped_mm on CUDA needs bfloat16, not {dtype}"
        if dtype not in (torch.bfloat16, torch.float16, torch.float32):
            return f"torch._grouped_mm does not take {dtype}"
        itemsize = torch.empty((), dtype=dtype).element_size()
        odd = [w for w in widths if w * itemsize % 16]
        if odd:
            return f"torch._grouped_mm needs rows of a multiple of 16 bytes; widths {odd} in {dtype} are not"
        if num_experts >= 1024:
            return f"torch._grouped_mm takes fewer than 1024 experts, not {num_experts}"
        return None

    def nt(self, x_NI: Tensor, w_eOI: Tensor, ends_e: Tensor, bias_NO: Tensor | None = None) -> Tensor:
        if x_NI.shape[0] == 0:
            return x_NI.new_empty(0, w_eOI.shape[1])
        out = torch._grouped_mm(x_NI, w_eOI.transpose(1, 2), offs=ends_e)
        return out if bias_NO is None else out + bias_NO

    def nn(self, g_NO: Tensor, w_eOI: Tensor, ends_e: Tensor) -> Tensor:
        if g_NO.shape[0] == 0:
            return g_NO.new_empty(0, w_eOI.shape[2])
        return torch._grouped_mm(g_NO, w_eOI, offs=ends_e)

    def tn(self, g_NO: Tensor, x_NI: Tensor, ends_e: Tensor) -> Tensor:
        if g_NO.shape[0] == 0:
            return g_NO.new_zeros(ends_e.numel(), g_NO.shape[1], x_NI.shape[1])
        return torch._grouped_mm(g_NO.T, x_NI, offs=ends_e)
