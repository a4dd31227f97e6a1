# SPDX-License-Identifier: GPL-3.0-or-later
"""The shared experts' node against float64 autograd, and its activation's kernels against their PyTorch twins."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from flashfusemoe_ds.kernels import dense_mlp, reference, triton_activation
from flashfusemoe_ds.kernels.activation import ACTIVATIONS, get_activation
from tests.close import relative_error
from tests.kernels.test_order import DEVICE

# Triton's interpreter rounds to bf16 towards zero; compiled, it rounds to nearest.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
ULPS = 8  # of float32, in which both compute, with other exponential and error functions
T, D, F = 11, 12, 20


def make_operands(name: str, num: int, tokens: int = T) -> list[Tensor]:
    """x [T, D], up [n, H, D], down [n, D, F] and a tensor [T, D] to add to, float64."""
    g = torch.Generator().manual_seed(num)
    shapes = ((tokens, D), (num, get_activation(name).up_width(F), D), (num, D, F), (tokens, D))
    return [torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes]


def written_out(x: Tensor, up: Tensor, down: Tensor, into: Tensor, name: str) -> Tensor:
    """Every MLP by itself, in the reference's operators."""
    return into + sum(reference.activate(x @ u.T, name) @ d.T for u, d in zip(up, down, strict=True))


def run(operands: list[Tensor], name: str, added: bool = True) -> Tensor:
    x, up, down, into = operands
    # A product, because a leaf cannot be added to in place.
    return dense_mlp.dense_mlp(x, up, down, get_activation(name), into * 1 if added else None)


@pytest.fixture
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The node with the kernels that it takes on CUDA, on CPUs in Triton's interpreter."""
    monkeypatch.setattr(dense_mlp, "_runs_fused", lambda h: h.dtype is not torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("num", [1, 2])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_equals_float64(name: str, num: int, dtype: torch.dtype, interpreted: None) -> None:
    operands = make_operands(name, num)
    direction = torch.randn(T, D, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    for added in (True, False):
        exact = [t.clone().requires_grad_() for t in operands[: 4 if added else 3]]
        expected = written_out(*exact, *(() if added else (torch.zeros(T, D).double(),)), name)
        leaves = [t.to(DEVICE, dtype).requires_grad_() for t in operands]
        actual = run(leaves, name, added)
        grads = torch.autograd.grad(actual, leaves[: len(exact)], direction.to(actual))
        tolerance = 1e-13 if dtype is torch.float64 else 2e-6
        for a, b in zip([actual, *grads], [expected, *torch.autograd.grad(expected, exact, direction)], strict=True):
            assert a.dtype is dtype and relative_error(a.cpu(), b) < tolerance


def test_adds_in_place() -> None:
    x, up, down, into = make_operands("swiglu", 1)
    before = into.clone()
    with torch.no_grad():
        out = dense_mlp.dense_mlp(x, up, down, get_activation("swiglu"), into)
    assert out is into and relative_error(out, written_out(x, up, down, before, "swiglu")) < 1e-13


def test_a_second_backward_and_what_the_first_leaves(interpreted: None) -> None:
    """H is overwritten only by the backward that nothing can follow; then its memory is free before the node is."""
    leaves = [t.float().to(DEVICE).requires_grad_() for t in make_operands("geglu", 2)]
    out = run(leaves, "geglu")
    kept_h = out.grad_fn.saved_tensors[1]
    h = kept_h.clone()
    first = torch.autograd.grad(out, leaves, torch.ones_like(out), retain_graph=True)
    assert torch.equal(kept_h, h)
    second = torch.autograd.grad(out, leaves, torch.ones_like(out))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert kept_h.untyped_storage().nbytes() == 0


@pytest.mark.parametrize("num", [1, 2])
def test_keeps_x_and_h(num: int) -> None:
    x, up, down, into = (t.requires_grad_() for t in make_operands("swiglu", num))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        dense_mlp.dense_mlp(x, up, down, get_activation("swiglu"), into * 1)
    of_node = [tuple(t.shape) for t in kept]
    assert of_node == [(T, D), (T, num * 2 * F), (num, 2 * F, D), (num, D, F)]


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (3,), (0, 2), (1, 3)])
def test_only_the_gradients_that_are_asked_for(needed: tuple[int, ...]) -> None:
    operands = make_operands("relu_squared", 2)
    results = []
    for wanted in (needed, range(4)):
        leaves = [t.clone().requires_grad_(i in wanted) for i, t in enumerate(operands)]
        run(leaves, "relu_squared").sin().sum().backward()
        results.append([leaf.grad for leaf in leaves])
    for i, (some, every) in enumerate(zip(*results, strict=True)):
        assert torch.equal(some, every) if i in needed else some is None


def test_gradients_have_the_strides_of_parameters() -> None:
    """Multi-tensor optimizers fall back to loops where they have not, dimensions of size 1 included."""
    for num in (1, 2):
        leaves = [t.requires_grad_() for t in make_operands("swiglu", num)]
        run(leaves, "swiglu").sum().backward()
        assert [leaf.grad.stride() for leaf in leaves[1:3]] == [leaf.stride() for leaf in leaves[1:3]]


@pytest.mark.parametrize("reentrant", [True, False])
def test_under_activation_checkpointing_and_without_tokens(reentrant: bool, interpreted: None) -> None:
    for tokens in (T, 0):
        leaves = [t.float().to(DEVICE).requires_grad_() for t in make_operands("silu", 1, tokens)]
        expected = torch.autograd.grad(run(leaves, "silu").sin().sum(), leaves)
        for leaf in leaves:
            leaf.grad = None
        checkpoint(lambda *ts: run(list(ts), "silu"), *leaves, use_reentrant=reentrant).sin().sum().backward()
        assert all(torch.equal(leaf.grad, g) for leaf, g in zip(leaves, expected, strict=True))


# ---- the kernels


def check_kernels(name: str, rows: int, width: int, dtype: torch.dtype, overwrite: bool, seed: int = 0) -> None:
    activation, g = get_activation(name), torch.Generator().manual_seed(seed)
    h = (3 * torch.randn(rows, activation.up_width(width), generator=g)).to(DEVICE, dtype)
    da = torch.randn(rows, width, generator=g).to(DEVICE, dtype)
    a, before, da_before = triton_activation.activate(h, activation), h.clone(), da.clone()
    dh, again = triton_activation.activate_backward(h, da, activation, overwrite_h=overwrite)
    expected_dh, expected_a = dense_mlp.activate_backward_torch(before, da_before, activation)
    twin = dense_mlp.activate_torch(before, activation)
    assert again.data_ptr() == da.data_ptr() and (dh.data_ptr() == h.data_ptr() or not overwrite)
    assert overwrite or torch.equal(h, before)
    tolerance = torch.finfo(dtype).eps + ULPS * torch.finfo(torch.float32).eps
    for actual, expected in ((a, twin), (again, expected_a), (dh, expected_dh)):
        assert actual.dtype is dtype and actual.shape == expected.shape
        assert relative_error(actual, expected) < tolerance, name


@settings(max_examples=25, deadline=None)
@given(
    name=st.sampled_from(list(ACTIVATIONS)),
    rows=st.integers(0, 40),
    width=st.integers(1, 90),
    dtype=st.sampled_from(DTYPES),
    overwrite=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_kernels_at_any_shape(name, rows, width, dtype, overwrite, seed) -> None:
    check_kernels(name, rows, width, dtype, overwrite, seed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(3, 1536), (2, 1416), (300, 8)])
def test_kernels_on_wide_rows_and_many(rows: int, width: int, dtype: torch.dtype) -> None:
    for name in ("swiglu", "gelu"):
        check_kernels(name, rows, width, dtype, overwrite=True)


def test_a_broken_number_stays_in_its_place() -> None:
    """NaN and infinities reach the elements that they belong to, and no others."""
    h = torch.randn(4, 16, device=DEVICE)
    h[1, 3], h[2, 9] = float("nan"), float("inf")
    for name in ACTIVATIONS:
        activation = get_activation(name)
        width = 8 if activation.gated else 16
        broken = {(1, 3 % width), (2, 9 % width)}
        a = triton_activation.activate(h, activation)
        dh, _ = triton_activation.activate_backward(h, torch.ones_like(a), activation, overwrite_h=False)
        assert {(i, j) for i, j in (~a.isfinite()).nonzero().tolist()} == broken, name
        assert {(i, j % width) for i, j in (~dh.isfinite()).nonzero().tolist()} <= broken, name
        assert dh[1].isnan().any() or name == "relu"  # whose slope at NaN is 0, as torch's is


@pytest.mark.gpu
def test_rows_beyond_32_bits() -> None:
    """H has more than 2^31 elements."""
    activation, width = get_activation("swiglu"), 2048
    rows = 2**31 // (2 * width) + 5
    h = torch.randn(rows, 2 * width, device="cuda", dtype=torch.bfloat16)
    last = h[-3:].clone()
    a = triton_activation.activate(h, activation)
    assert torch.equal(a[-3:], triton_activation.activate(last, activation))
    da = torch.randn_like(a)
    last_da = da[-3:].clone()
    dh, again = triton_activation.activate_backward(h, da, activation, overwrite_h=True)
    expected_dh, expected_a = triton_activation.activate_backward(last, last_da, activation, overwrite_h=True)
    assert torch.equal(dh[-3:], expected_dh) and torch.equal(again[-3:], expected_a)
