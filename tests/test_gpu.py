# SPDX-License-Identifier: GPL-3.0-or-later
"""What only a GPU can show: 16-bit accuracy against float64, stock parity on CUDA, and no host synchronisation."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
from deepspeed.moe.layer import MoE as StockMoE
from torch import Tensor, nn

from flashfusemoe_ds import FlashFuseMoEConfig, MoE, MoELayer
from flashfusemoe_ds.kernels import reference
from flashfusemoe_ds.kernels.activation import ACTIVATIONS
from flashfusemoe_ds.kernels.experts import experts
from flashfusemoe_ds.kernels.select import select_products
from tests.close import relative_error, rms_error, value_and_grads
from tests.ds.experts_zoo import GatedMLP
from tests.ds.stock_grads import stock_grads
from tests.kernels.test_experts import make_case

pytestmark = pytest.mark.gpu


def eager(idx: Tensor, activation: str) -> Callable[..., Tensor]:
    """The experts one by one in the inputs' dtype: what a user writes by hand, and the yardstick for rounding."""

    def run(x: Tensor, weight: Tensor, w_up: Tensor, w_down: Tensor, b_up: Tensor, b_down: Tensor) -> Tensor:
        out = torch.zeros_like(x)
        for e in range(w_up.shape[0]):
            token, k = (idx == e).nonzero(as_tuple=True)
            h = torch.nn.functional.linear(x[token], w_up[e], b_up[e])
            y = torch.nn.functional.linear(reference.activate(h, activation), w_down[e], b_down[e])
            out = out.index_add(0, token, y * weight[token, k, None])
        return out

    return run


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("activation", ["swiglu", "gelu", "relu_squared"])
@pytest.mark.parametrize("recompute", [False, True])
def test_rounding_is_no_worse_than_eager(activation: str, dtype: torch.dtype, recompute: bool) -> None:
    inputs, idx = make_case(513, 2, 8, 128, 96, activation)
    idx[:, 1] = torch.where(idx[:, 1] == idx[:, 0], -1, idx[:, 1])
    inputs = [t.cuda().to(dtype).double() for t in inputs]  # the same rounded numbers for everybody
    inputs[1] = inputs[1].float().double()
    idx = idx.cuda()

    def fast(x: Tensor, weight: Tensor, *params: Tensor) -> Tensor:
        products = select_products(None, x, (128, 96), 8)
        assert products.name == "triton"
        up, down, b_up, b_down = params
        return experts(
            x, idx, weight.float(), up, down, ACTIVATIONS[activation], products,
            b_up_eH=b_up, b_down_eD=b_down, recompute=recompute,
        )  # fmt: skip

    def truth(x: Tensor, weight: Tensor, up: Tensor, down: Tensor, b_up: Tensor, b_down: Tensor) -> Tensor:
        return reference.experts(x, idx, weight, up, down, activation, b_up, b_down)

    expected = value_and_grads(truth, inputs, torch.float64)
    yardstick = value_and_grads(eager(idx, activation), inputs, dtype)
    actual = value_and_grads(fast, inputs, dtype)
    for name, a, y, e in zip(
        ("y", "dx", "dw", "dup", "ddown", "dbup", "dbdown"), actual, yardstick, expected, strict=True
    ):
        if dtype is torch.float32:
            assert relative_error(a, e) <= 1e-5, name
        else:
            ratio = rms_error(a, e) / rms_error(y, e)
            assert ratio <= 1.2, f"{name}: {ratio:.2f} times the error of eager, {rms_error(y, e):.2e}"


@pytest.mark.parametrize("k", [1, 2, 4])
@pytest.mark.parametrize("drop_tokens", [True, False])
@pytest.mark.parametrize("gating_backend", ["torch", "triton"])
def test_equals_stock_on_cuda(k: int, drop_tokens: bool, gating_backend: str) -> None:
    torch.manual_seed(0)
    settings = dict(hidden_size=64, num_experts=8, k=k, drop_tokens=drop_tokens, use_residual=True)
    stock = StockMoE(expert=GatedMLP(64, 96), **settings).cuda()
    ours = MoE(expert=GatedMLP(64, 96), **settings).cuda()
    with torch.no_grad():
        for p in stock.parameters():
            # As initialised, all experts are equal, and the gate's exact gradient is 0: all that is left is noise.
            p.normal_(std=0.1)
    ours.load_state_dict(stock.state_dict())
    ours.configure(FlashFuseMoEConfig(gating_backend=gating_backend))
    x = torch.randn(4, 100, 64, device="cuda")
    results = []
    for moe in (stock, ours):
        leaf = x.clone().requires_grad_()
        torch.manual_seed(3)
        out, l_aux, counts = moe(leaf)
        (out.sin().sum() + l_aux).backward()
        draws = torch.rand(1, device="cuda")
        results.append(
            {"out": out, "l_aux": l_aux, "counts": counts, "draws": draws, "dx": leaf.grad, **stock_grads(moe)}
        )
    assert torch.equal(results[0]["counts"], results[1]["counts"]) and results[0]["draws"] == results[1]["draws"]
    errors = {name: relative_error(results[1][name], results[0][name]) for name in results[0]}
    assert {name: e for name, e in errors.items() if not e < 1e-5} == {}


@pytest.fixture
def no_host_sync() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def layers() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    shape = dict(hidden_size=64, num_experts=8, drop_tokens=False)
    return {
        "MoELayer": MoELayer(64, 192, 8, 2, num_shared_experts=1, aux_loss_coeff=0.1),
        "MoELayer, recompute": MoELayer(64, 192, 8, 2, recompute_activations=True),
        "MoE top-1": MoE(expert=GatedMLP(64, 96), k=1, **shape),
        "MoE top-2": MoE(expert=GatedMLP(64, 96), k=2, **shape),
        "MoE top-4 with capacity": MoE(64, GatedMLP(64, 96), 8, k=4),
        "MoE with biases": MoE(64, nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64)), 8, k=2),
    }


@pytest.mark.parametrize("name", layers())
def test_no_host_synchronisation(name: str, request: pytest.FixtureRequest) -> None:
    layer = layers()[name].cuda().to(torch.bfloat16)
    x = torch.randn(256, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    layer(x)[0].sum().backward()  # compiles, allocates, initialises cuBLAS
    request.getfixturevalue("no_host_sync")
    out, *_ = layer(x)
    out.sum().backward()


def test_equal_inputs_give_equal_bits_on_cuda() -> None:
    torch.manual_seed(0)
    layer = MoELayer(128, 512, 8, 4, num_shared_experts=1).cuda().to(torch.bfloat16)
    x = torch.randn(1000, 128, device="cuda", dtype=torch.bfloat16)
    runs = []
    for _ in range(3):
        leaf = x.clone().requires_grad_()
        layer.zero_grad()
        out, _ = layer(leaf)
        out.sin().sum().backward()
        runs.append([out, leaf.grad, *(p.grad.clone() for p in layer.parameters())])
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))
