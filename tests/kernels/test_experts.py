# SPDX-License-Identifier: GPL-3.0-or-later
"""The experts stage against its float64 twin: value and the gradient of every input."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashfusemoe_ds.kernels import reference
from flashfusemoe_ds.kernels.activation import ACTIVATIONS
from flashfusemoe_ds.kernels.experts import experts
from flashfusemoe_ds.kernels.grouped_gemm import ReferenceGemm, TorchGroupedGemm
from flashfusemoe_ds.kernels.order import sort_by_expert
from flashfusemoe_ds.kernels.products import TorchProducts
from flashfusemoe_ds.kernels.select import select_products
from tests.close import relative_error, value_and_grads

REFERENCE, GROUPED_MM = TorchProducts(ReferenceGemm()), TorchProducts(TorchGroupedGemm())
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-6}


def make_case(rows: int, top_k: int, num_experts: int, width: int, inner: int, activation: str, seed: int = 0):
    """Inputs (x, weight, w_up, w_down, b_up, b_down) in float64, and ids of which a fifth are -1."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return torch.randn(shape, generator=g, dtype=torch.float64) * scale

    up = ACTIVATIONS[activation].up_width(inner)
    idx = torch.randint(num_experts, (rows, top_k), generator=g)
    idx[torch.rand(rows, top_k, generator=g) < 0.2] = -1
    inputs = (
        normal(rows, width),
        torch.rand(rows, top_k, generator=g, dtype=torch.float64),
        normal(num_experts, up, width, scale=width**-0.5),
        normal(num_experts, width, inner, scale=inner**-0.5),
        normal(num_experts, up),
        normal(num_experts, width),
    )
    return inputs, idx


def compare(
    inputs, idx, activation: str, dtype: torch.dtype, products, bias: bool, recompute: bool, tight: bool
) -> None:
    num_inputs = 6 if bias else 4
    num_routes = int((idx >= 0).sum()) if tight else None

    def truth(x, w, up, down, *biases):
        return reference.experts(x, idx, w, up, down, activation, *biases)

    def fast(x, w, up, down, b_up=None, b_down=None):
        return experts(
            x, idx, w, up, down, ACTIVATIONS[activation], products,
            b_up_eH=b_up, b_down_eD=b_down, num_routes=num_routes, recompute=recompute,
        )  # fmt: skip

    expected = value_and_grads(truth, inputs[:num_inputs], torch.float64)
    actual = value_and_grads(fast, inputs[:num_inputs], dtype)
    for name, a, b in zip(
        ("y", "dx", "dweight", "dw_up", "dw_down", "db_up", "db_down"), actual, expected, strict=False
    ):
        assert relative_error(a, b) <= TOLERANCE[dtype], name


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_float64_equals_the_reference(activation: str, bias: bool, recompute: bool) -> None:
    inputs, idx = make_case(37, 3, 6, 8, 12, activation)
    compare(inputs, idx, activation, torch.float64, REFERENCE, bias, recompute, tight=False)


@pytest.mark.parametrize("tight", [False, True])
@pytest.mark.parametrize("products", [REFERENCE, GROUPED_MM], ids=lambda p: p.name)
@pytest.mark.parametrize("activation", ["swiglu", "gelu"])
def test_float32_backends_equal_the_reference(activation: str, products, tight: bool) -> None:
    inputs, idx = make_case(129, 2, 8, 32, 24, activation)
    compare(inputs, idx, activation, torch.float32, products, True, False, tight)


@settings(max_examples=40, deadline=None)
@given(
    rows=st.integers(0, 20),
    top_k=st.integers(1, 4),
    num_experts=st.integers(1, 9),
    width=st.integers(1, 9),
    inner=st.integers(1, 9),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    bias=st.booleans(),
    tight=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape(rows, top_k, num_experts, width, inner, activation, bias, tight, seed) -> None:
    inputs, idx = make_case(rows, top_k, num_experts, width, inner, activation, seed)
    products = select_products(None, inputs[0], (width, inner), num_experts)
    compare(inputs, idx, activation, torch.float64, products, bias, False, tight)


def test_an_expert_without_rows_gets_zero_gradients_not_none() -> None:
    (x, w, up, down, _, _), idx = make_case(16, 2, 4, 8, 8, "swiglu")
    idx[idx == 2] = 0
    for products in (REFERENCE, GROUPED_MM):
        up32, down32 = up.float().requires_grad_(), down.float().requires_grad_()
        experts(x.float(), idx, w.float(), up32, down32, ACTIVATIONS["swiglu"], products).sum().backward()
        for grad in (up32.grad, down32.grad):
            assert torch.count_nonzero(grad[2]) == 0 and torch.isfinite(grad).all()
            assert torch.count_nonzero(grad[0]) > 0


def test_a_nan_row_stays_in_its_row_and_its_experts() -> None:
    (x, w, up, down, _, _), idx = make_case(8, 1, 4, 8, 8, "swiglu")
    idx[:] = torch.tensor([[0], [1], [2], [3], [-1], [0], [1], [2]])
    x[2] = float("nan")
    leaves = [t.float().requires_grad_() for t in (x, w, up, down)]
    y = experts(leaves[0], idx, *leaves[1:], ACTIVATIONS["swiglu"], GROUPED_MM)
    y.sum().backward()
    assert torch.isnan(y).any(1).tolist() == [False, False, True, False, False, False, False, False]
    assert torch.isnan(leaves[2].grad).flatten(1).any(1).tolist() == [False, False, True, False]


def test_equal_inputs_give_equal_bits() -> None:
    inputs, idx = make_case(200, 4, 8, 16, 16, "swiglu")

    def run():
        return value_and_grads(
            lambda *t: experts(t[0], idx, *t[1:], ACTIVATIONS["swiglu"], GROUPED_MM),
            inputs[:4],
            torch.float32,
        )

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_sorting_is_stable_and_drops_go_last() -> None:
    idx = torch.tensor([[1, 0], [-1, 1], [0, -1]])
    order = sort_by_expert(idx, 3, idx.numel())
    assert order.ends_e.tolist() == [2, 4, 4]
    assert order.route_N[:4].tolist() == [1, 4, 0, 3]
    assert order.pos_RK.tolist() == [[2, 0], [6, 3], [1, 6]]


@pytest.mark.parametrize("recompute", [False, True])
def test_kept_for_backward_is_x_and_h_alone(recompute: bool) -> None:
    rows, top_k, width, inner = 64, 2, 32, 48
    (x, w, up, down, _, _), idx = make_case(rows, top_k, 4, width, inner, "swiglu")
    x, w, up, down = (t.float().requires_grad_() for t in (x, w, up, down))
    kept: dict[int, int] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        experts(x, idx, w, up, down, ACTIVATIONS["swiglu"], GROUPED_MM, recompute=recompute)
    for weight in (up, down):
        del kept[weight.untyped_storage().data_ptr()]
    order = sort_by_expert(idx, 4, idx.numel())
    routing = rows * top_k * 4 + sum(t.nbytes for t in order.tensors())
    assert sum(t.nbytes for t in order.tensors()) <= 12 * rows * top_k + 256
    h = 0 if recompute else rows * top_k * 2 * inner * 4
    assert sum(kept.values()) == rows * width * 4 + h + routing


def test_a_backend_that_cannot_run_is_refused_by_name() -> None:
    with pytest.raises(
        ValueError, match=r"gemm_backend 'grouped_mm' cannot run here: .*multiple of 16 bytes.*'reference'"
    ):
        select_products("grouped_mm", torch.zeros(1), (7,), 4)
    assert select_products(None, torch.zeros(1), (7,), 4).name == "reference"
    assert select_products(None, torch.zeros(1), (8,), 4).name == "grouped_mm"
    assert select_products(None, torch.zeros(1, dtype=torch.float64), (8,), 4).name == "reference"
