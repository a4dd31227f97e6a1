# SPDX-License-Identifier: GPL-3.0-or-later
"""Router and experts as one node: against the dense layer in float64, and against the two nodes it stands for."""

from __future__ import annotations

import pytest
import torch

from flashfusemoe_ds.kernels import reference, routing
from flashfusemoe_ds.kernels.activation import get_activation
from flashfusemoe_ds.kernels.experts import experts
from flashfusemoe_ds.kernels.grouped_gemm import ReferenceGemm
from flashfusemoe_ds.kernels.products import TorchProducts
from flashfusemoe_ds.kernels.routed_experts import routed_experts
from flashfusemoe_ds.nn.losses import load_balancing_loss, router_z_loss
from flashfusemoe_ds.nn.router import GATINGS, Gating, count_routes, fused_rule, route
from tests.close import relative_error
from tests.kernels.test_order import DEVICE

PRODUCTS = TorchProducts(ReferenceGemm())
GROUPED = Gating(score="sigmoid", renormalize=True, scaling_factor=2.5, num_groups=4, top_groups=2, expert_bias=True)
AUX, Z = 0.02, 0.01


def operands(tokens: int, num_experts: int, d: int, f: int, activation: str, bias: bool, dtype: torch.dtype):
    g = torch.Generator().manual_seed(3)
    width = get_activation(activation).up_width(f)
    shapes = [(tokens, d), (num_experts, d), (num_experts, width, d), (num_experts, d, f)]
    scales = [1.0, 2 * d**-0.5, d**-0.5, f**-0.5]
    if bias:
        shapes, scales = [*shapes, (num_experts, width), (num_experts, d)], [*scales, 0.3, 0.3]
    values = [
        s * torch.randn(shape, generator=g, dtype=torch.float64) for shape, s in zip(shapes, scales, strict=True)
    ]
    return [v.to(DEVICE, dtype).requires_grad_() for v in values]


def one_node(leaves, activation: str, gating: Gating, top_k: int, bias_E=None, **options):
    x, gate, up, down, *biases = leaves
    b_up, b_down = biases or (None, None)
    return routed_experts(
        x, gate, up, down, get_activation(activation), PRODUCTS, fused_rule(gating, top_k), b_up_eH=b_up,
        b_down_eD=b_down, bias_E=bias_E, aux_loss_coeff=AUX, z_loss_coeff=Z, count=True, **options,
    )  # fmt: skip


def gradients(leaves, y, aux, z):
    direction = torch.randn(y.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(y)
    return torch.autograd.grad((y * direction).sum() + aux + z, leaves)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    ("gating", "top_k", "activation", "bias"),
    [
        (GATINGS["softmax"], 2, "swiglu", False),
        (GATINGS["softmax_topk"], 3, "geglu", True),
        (GATINGS["sigmoid_renorm"], 2, "gelu", True),
        (GROUPED, 4, "relu_squared", False),
    ],
)
def test_equals_the_dense_layer_in_float64(
    gating: Gating, top_k: int, activation: str, bias: bool, recompute: bool
) -> None:
    leaves = operands(37, 8, 24, 16, activation, bias, torch.float32)
    choice_bias = torch.linspace(0, 0.1, 8).to(DEVICE) if gating.expert_bias else None
    y, idx, counts, aux, z = one_node(leaves, activation, gating, top_k, choice_bias, recompute=recompute)

    exact = [leaf.detach().double().cpu().requires_grad_() for leaf in leaves]
    x, gate, up, down, *biases = exact
    b_up, b_down = biases or (None, None)
    logits = x @ gate.T
    wide_bias = None if choice_bias is None else choice_bias.double().cpu()
    expected_idx, weight, probs = route(logits, gating, top_k, wide_bias)
    assert torch.equal(idx.cpu(), expected_idx)  # small enough to be free of near ties
    expected = reference.experts(x, expected_idx, weight, up, down, activation, b_up, b_down)
    expected_counts = count_routes(expected_idx, 8)
    losses = AUX * load_balancing_loss(probs, expected_counts, top_k), Z * router_z_loss(logits)
    assert torch.equal(counts.cpu(), expected_counts)
    for actual, wanted in ((y, expected), (aux, losses[0]), (z, losses[1])):
        assert relative_error(actual.cpu(), wanted) < 3e-6
    for actual, wanted in zip(gradients(leaves, y, aux, z), gradients(exact, expected, *losses), strict=True):
        assert relative_error(actual.cpu(), wanted) < 1e-5


def test_equals_the_two_nodes_it_stands_for() -> None:
    gating, top_k = GATINGS["softmax"], 2
    leaves = operands(50, 4, 16, 8, "swiglu", False, torch.float32)
    y, idx, _, aux, z = one_node(leaves, "swiglu", gating, top_k)
    x, gate, up, down = leaves
    two_idx, weight, _, two_aux, two_z = routing.route(x, gate, fused_rule(gating, top_k), AUX, Z)
    two_y = experts(x, two_idx, weight, up, down, get_activation("swiglu"), PRODUCTS)
    for a, b in ((idx, two_idx), (y, two_y), (aux, two_aux), (z, two_z)):
        assert torch.equal(a, b)
    one, two = gradients(leaves, y, aux, z), gradients(leaves, two_y, two_aux, two_z)
    for name, a, b in zip(("x", "gate", "w_up", "w_down"), one, two, strict=True):
        # dX is added before it is rounded, not after; all else is the same arithmetic.
        assert torch.equal(a, b) if name != "x" else relative_error(a, b) < 1e-6, name


def test_what_nobody_needs_is_none_and_losses_alone_are_enough() -> None:
    leaves = operands(20, 4, 16, 8, "swiglu", False, torch.float32)
    x, gate, up, down = leaves
    y, _, _, aux, z = one_node(leaves, "swiglu", GATINGS["softmax"], 2)
    dx, dgate = torch.autograd.grad(aux + z, [x, gate], retain_graph=True)
    logits = x.detach().double() @ gate.detach().double().T
    logits.requires_grad_()
    idx, _, probs = route(logits, GATINGS["softmax"], 2)
    (dlogits,) = torch.autograd.grad(
        AUX * load_balancing_loss(probs, count_routes(idx, 4), 2) + Z * router_z_loss(logits), logits
    )
    assert relative_error(dx.cpu(), (dlogits @ gate.double()).cpu()) < 1e-5
    assert relative_error(dgate.cpu(), (dlogits.T @ x.double()).cpu()) < 1e-5
    assert torch.autograd.grad(aux, [up], allow_unused=True, retain_graph=True) == (None,)

    # A second backward through a kept graph finds H as it was.
    first = torch.autograd.grad(y.sum(), leaves, retain_graph=True)
    again = torch.autograd.grad(y.sum(), leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))

    x.requires_grad_(False), down.requires_grad_(False)
    y, *_ = one_node(leaves, "swiglu", GATINGS["softmax"], 2)
    y.sum().backward()
    assert x.grad is None and down.grad is None
    assert torch.equal(gate.grad, first[1]) and torch.equal(up.grad, first[2])


def test_no_tokens() -> None:
    leaves = operands(0, 4, 16, 8, "swiglu", False, torch.float32)
    y, idx, counts, aux, z = one_node(leaves, "swiglu", GATINGS["softmax"], 2)
    assert y.shape == (0, 16) and idx.shape == (0, 2) and counts.tolist() == [0] * 4
    grads = torch.autograd.grad(y.sum() + aux + z, leaves)
    assert all(not g.any() and g.shape == leaf.shape for g, leaf in zip(grads, leaves, strict=True))
