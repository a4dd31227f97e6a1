# SPDX-License-Identifier: GPL-3.0-or-later
"""Every activation's value against torch's own, and its derivative against autograd, in float64."""

from __future__ import annotations

import pytest
import torch

from flashfusemoe_ds.kernels import reference
from flashfusemoe_ds.kernels.activation import ACTIVATIONS, get_activation
from tests.close import relative_error


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_value_and_derivative(name: str) -> None:
    activation = ACTIVATIONS[name]
    h = torch.randn(50, activation.up_width(6), dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 3
    h.requires_grad_()
    expected = reference.activate(h, name)
    da = torch.randn(expected.shape, dtype=torch.float64)
    (dh,) = torch.autograd.grad(expected, h, da)
    value, slope = activation.backward(h.detach(), da)
    assert relative_error(activation.forward(h), expected) < 1e-14
    assert relative_error(value, expected) < 1e-14
    assert relative_error(slope, dh) < 1e-13


def test_an_unknown_name_lists_the_valid_ones() -> None:
    with pytest.raises(ValueError, match=r"activation 'swish' is unknown; valid: swiglu, geglu"):
        get_activation("swish")
