# SPDX-License-Identifier: GPL-3.0-or-later
"""How the DeepSpeed tests compare numbers."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

RTOL = 1e-5


def assert_near(name: str, actual: Tensor, expected: Tensor, rtol: float = RTOL) -> None:
    """max|actual - expected| <= rtol * max|expected|; where the reference is all zero, so must the result be."""
    assert actual.shape == expected.shape, f"{name}: shape {tuple(actual.shape)}, expected {tuple(expected.shape)}"
    assert actual.dtype == expected.dtype, f"{name}: {actual.dtype}, expected {expected.dtype}"
    if not expected.numel():
        return
    actual, expected = actual.detach(), expected.detach()
    error, scale = float((actual - expected).abs().max()), float(expected.abs().max())
    # Written so that a NaN on either side fails.
    assert error <= rtol * scale, f"{name}: max|a-b| = {error:.3e} > {rtol:g} * max|b|, max|b| = {scale:.3e}"


def assert_all_near(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor], rtol: float = RTOL) -> None:
    assert set(actual) == set(expected), f"names differ: {sorted(set(actual) ^ set(expected))}"
    for name, tensor in expected.items():
        assert_near(name, actual[name], tensor, rtol)
