# SPDX-License-Identifier: GPL-3.0-or-later
"""Which backend computes the experts' products: what was asked for, or the fastest that runs on the operands."""

from __future__ import annotations

from torch import Tensor

from flashfusemoe_ds.kernels.grouped_gemm import ReferenceGemm, TorchGroupedGemm
from flashfusemoe_ds.kernels.products import ExpertProducts, TorchProducts

GEMM_BACKENDS = ("grouped_mm", "reference")


def check_gemm_backend(requested: str | None) -> None:
    """ValueError unless the name is one of GEMM_BACKENDS, or None for the fastest that runs."""
    if requested not in (None, *GEMM_BACKENDS):
        raise ValueError(
            f"gemm_backend is {requested!r}, which this version does not have; valid: {', '.join(GEMM_BACKENDS)}, or "
            "leave it out"
        )


def select_products(requested: str | None, x: Tensor, widths: tuple[int, ...], num_experts: int) -> ExpertProducts:
    """The backend for rows like `x` and experts of these widths (D, F, H).

    Left open (None), it is grouped_mm wherever that runs, else reference. Raises ValueError where the requested one
    cannot run on these operands.
    """
    check_gemm_backend(requested)
    if requested == "reference":
        return TorchProducts(ReferenceGemm())
    why_not = TorchGroupedGemm.why_not(x.dtype, x.device, widths, num_experts)
    if why_not is None:
        return TorchProducts(TorchGroupedGemm())
    if requested is not None:
        raise ValueError(f"gemm_backend {requested!r} cannot run here: {why_not}; valid here: 'reference'")
    return TorchProducts(ReferenceGemm())
