# SPDX-License-Identifier: GPL-3.0-or-later
"""Which backend computes the experts' products: what was asked for, or the fastest that runs on the operands."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from flashfusemoe_ds.kernels.grouped_gemm import ReferenceGemm, TorchGroupedGemm
from flashfusemoe_ds.kernels.products import ExpertProducts, TorchProducts

GEMM_BACKENDS = ("triton", "grouped_mm", "reference")


def check_gemm_backend(requested: str | None) -> None:
    """ValueError unless the name is one of GEMM_BACKENDS, or None for the fastest that runs."""
    if requested not in (None, *GEMM_BACKENDS):
        raise ValueError(
            f"gemm_backend is {requested!r}, which this version does not have; valid: {', '.join(GEMM_BACKENDS)}, or "
            "leave it out"
        )


def why_not_triton(dtype: torch.dtype, device: torch.device) -> str | None:
    """None if the triton backend runs on rows of this kind, else the reason, in words."""
    try:
        # Not at the top: machines without CUDA may lack triton, or have one that does not load.
        from flashfusemoe_ds.kernels.triton_products import TritonProducts
    except ImportError as error:
        return f"triton cannot be imported ({' '.join(str(error).split())})"
    return TritonProducts.why_not(dtype, device)


def why_not_hopper(device: torch.device) -> str | None:
    """None if the triton backend takes its Hopper kernels on this device, else why it takes the portable ones."""
    if device.type != "cuda":
        return f"they run on CUDA, not {device.type}"
    capability = torch.cuda.get_device_capability(device)
    if capability != (9, 0):
        return f"they need compute capability 9.0, not {capability[0]}.{capability[1]}"
    try:
        import flashfusemoe_ds.kernels.hopper_products  # noqa: F401
    except ImportError as error:
        return f"this triton has another Gluon ({' '.join(str(error).split())})"
    return None


def select_products(requested: str | None, x: Tensor, widths: tuple[int, ...], num_experts: int) -> ExpertProducts:
    """The backend for rows like `x` and experts of these widths (D, F, H).

    None leaves the choice to `fastest_products`. ValueError if the requested one cannot run on these operands.
    """
    if torch.compiler.is_compiling():
        from flashfusemoe_ds.kernels import operators  # not at the top: it imports this module, and torch's compiler

        return operators.NamedProducts(operators.select_name(requested, x.dtype, x.device, widths, num_experts))
    return select(requested, x.dtype, x.device, widths, num_experts)


@functools.lru_cache(maxsize=1024)  # every layer asks twice a step, and gets what the first one got
def select(
    requested: str | None, dtype: torch.dtype, device: torch.device, widths: tuple[int, ...], num_experts: int
) -> ExpertProducts:
    """`select_products`, of a dtype and a device."""
    check_gemm_backend(requested)
    operands = (dtype, device, widths, num_experts)
    if requested is None:
        return fastest_products(*operands)
    reason = _why_not(requested, *operands)
    if reason is not None:
        valid = [repr(name) for name in GEMM_BACKENDS if _why_not(name, *operands) is None]
        raise ValueError(f"gemm_backend {requested!r} cannot run here: {reason}; valid here: {', '.join(valid)}")
    return _make(requested, device)


def fastest_products(
    dtype: torch.dtype, device: torch.device, widths: tuple[int, ...], num_experts: int
) -> ExpertProducts:
    """What an omitted gemm_backend stands for.

    On CUDA triton, as fast as grouped_mm with the gathers that it needs or faster, for every product of every shape
    measured on Hopper (docs/kernels.md). A CPU can only interpret Triton, and does not: grouped_mm there where it
    runs, else reference.
    """
    order = ("triton", "grouped_mm", "reference") if device.type == "cuda" else ("grouped_mm", "reference")
    return _make(next(name for name in order if _why_not(name, dtype, device, widths, num_experts) is None), device)


def _why_not(
    name: str, dtype: torch.dtype, device: torch.device, widths: tuple[int, ...], num_experts: int
) -> str | None:
    if name == "triton":
        return why_not_triton(dtype, device)
    if name == "grouped_mm":
        return TorchGroupedGemm.why_not(dtype, device, widths, num_experts)
    return None


def _make(name: str, device: torch.device) -> ExpertProducts:
    if name == "triton":
        if why_not_hopper(device) is None:
            from flashfusemoe_ds.kernels.hopper_products import HopperProducts

            return HopperProducts.on(device)
        from flashfusemoe_ds.kernels.triton_products import TritonProducts

        return TritonProducts.on(device)
    return TorchProducts(TorchGroupedGemm() if name == "grouped_mm" else ReferenceGemm())
