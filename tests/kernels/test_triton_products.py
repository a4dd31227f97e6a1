# SPDX-License-Identifier: GPL-3.0-or-later
"""TritonProducts: every product, and the stage built on them, against the float64 twin.

On CUDA the kernels run compiled, in every dtype they take; without it in Triton's interpreter, in float32 (its 16-bit
products are wrong). Whatever nobody may read is NaN before the run: operands past the last route, and all outputs.
"""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from flashfusemoe_ds.kernels import triton_products
from flashfusemoe_ds.kernels.activation import ACTIVATIONS
from flashfusemoe_ds.kernels.experts import experts
from flashfusemoe_ds.kernels.grouped_gemm import ReferenceGemm
from flashfusemoe_ds.kernels.order import ExpertOrder, sort_by_expert
from flashfusemoe_ds.kernels.products import TorchProducts
from flashfusemoe_ds.kernels.segment_sum import segment_sum_torch
from flashfusemoe_ds.kernels.select import select_products, why_not_hopper
from flashfusemoe_ds.kernels.triton_curves import CURVE_OF, curve, curve_and_slope
from flashfusemoe_ds.kernels.triton_products import FLOAT32, Tiles, TritonProducts, choose_tiles
from tests.close import relative_error
from tests.kernels.test_experts import compare, make_case

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
REFERENCE = TorchProducts(ReferenceGemm())
# Float32 sums and one rounding to the dtype, which errs by 2**-9 (bfloat16) or 2**-12 (float16) of a value at most;
# with a second one, of dA between dgated's product and its epilogue, and some slack, three times that.
TOLERANCE = {torch.float32: 4e-6, torch.float16: 3 * 2**-11, torch.bfloat16: 3 * 2**-9}
DTYPES = tuple(TOLERANCE) if CUDA else (torch.float32,)
KERNELS = ("portable",) if why_not_hopper(DEVICE) else ("portable", "hopper")
# (rows, top_k, experts, D, F)
SHAPES = {
    "one row": (1, 1, 1, 8, 8),
    "seven rows": (7, 2, 3, 24, 40),
    "odd widths": (33, 2, 3, 13, 7),
    "several tiles of an expert": (150, 2, 2, 40, 72),
    "an expert of 17 tiles": (2150, 1, 1, 16, 8),
    "more experts than rows": (5, 2, 40, 16, 24),
    "several blocks of columns": (70, 2, 3, 200, 264),
    "no rows": (0, 2, 3, 16, 24),
    # Of Hopper's largest tiles; of float32's 64 x 64 in the interpreter, where the former take minutes.
    "several tiles each way": (700, 2, 3, 520, 328) if CUDA else (150, 2, 2, 136, 200),
}

# numpy's, from the interpreter.
pytestmark = pytest.mark.filterwarnings("ignore:(invalid value|overflow) encountered:RuntimeWarning")


@pytest.fixture(scope="module", params=KERNELS)
def products(request: pytest.FixtureRequest) -> TritonProducts:
    device = torch.empty(0, device=DEVICE).device
    if request.param == "portable":
        return TritonProducts.on(device)
    from flashfusemoe_ds.kernels.hopper_products import HopperProducts

    return HopperProducts.on(device)


def poison(t: Tensor, end: int) -> Tensor:
    """Rows at or past `end` become NaN."""
    t = t.clone()
    t[end:] = float("nan")
    return t


@pytest.fixture(autouse=True)
def outputs_are_nan_before_the_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def filled(empty: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def make(*args: Any, **kwargs: Any) -> Tensor:
            t = empty(*args, **kwargs)
            return t.fill_(float("nan")) if t.is_floating_point() else t

        return make

    monkeypatch.setattr(Tensor, "new_empty", filled(Tensor.new_empty))
    monkeypatch.setattr(torch, "empty_like", filled(torch.empty_like))


def up_to_end(order: ExpertOrder, t: Tensor) -> Tensor:
    return t[: int(order.ends_e[-1])]


@dataclasses.dataclass
class Case:
    """Operands in float64, rounded to `dtype`, so that both sides start from the same numbers."""

    x: Tensor
    weight: Tensor
    up: Tensor
    down: Tensor
    b_up: Tensor
    b_down: Tensor
    dout: Tensor
    h: Tensor
    a: Tensor
    dh: Tensor
    order: ExpertOrder

    def to(self, dtype: torch.dtype) -> Case:
        moved = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "order"}
        moved = {n: t.to(torch.float32 if n == "weight" and dtype.itemsize < 8 else dtype) for n, t in moved.items()}
        return Case(**moved, order=self.order)


def operands(shape: tuple[int, int, int, int, int], activation: str, dtype: torch.dtype, seed: int = 0) -> Case:
    rows, top_k, num_experts, d, f = shape
    (x, weight, up, down, b_up, b_down), idx = make_case(rows, top_k, num_experts, d, f, activation, seed)
    order = sort_by_expert(idx.to(DEVICE), num_experts, idx.numel())
    end, n, h = int(order.ends_e[-1]), idx.numel(), ACTIVATIONS[activation].up_width(f)
    g = torch.Generator().manual_seed(seed + 1)

    def normal(*size: int) -> Tensor:
        return torch.randn(size, generator=g, dtype=torch.float64)

    case = Case(x, weight, up, down, b_up, b_down, normal(rows, d), normal(n, h), normal(n, f), normal(n, h), order)
    case = Case(**{f.name: getattr(case, f.name).to(DEVICE) for f in dataclasses.fields(case)[:-1]}, order=order)
    for name in ("h", "a", "dh"):
        setattr(case, name, poison(getattr(case, name), end))
    return case.to(dtype).to(torch.float64)


def check_products(case: Case, products: TritonProducts, activation: str, dtype: torch.dtype, bias: bool) -> None:
    act, order, low = ACTIVATIONS[activation], case.order, case.to(dtype)
    clean = dataclasses.replace(case, **{n: getattr(case, n).nan_to_num() for n in ("h", "a", "dh")})
    b_up, b_down = (case.b_up, case.b_down) if bias else (None, None)
    low_up, low_down = (low.b_up, low.b_down) if bias else (None, None)

    def close(name: str, actual: Tensor, expected: Tensor, by_row: bool = True) -> None:
        assert actual.shape == expected.shape, name
        if by_row:
            actual, expected = up_to_end(order, actual), up_to_end(order, expected)
        assert relative_error(actual, expected) <= TOLERANCE[dtype], name

    h, a = products.up(low.x, order, low.up, low_up, low.weight, act)
    expected_h, expected_a = REFERENCE.up(case.x, order, case.up, b_up, case.weight, act)
    assert h.dtype is a.dtype is dtype
    first_a = a
    close("H", h, expected_h)
    close("A", a, expected_a)
    y = products.down(low.a, order, low.down, low_down, low.weight)
    close("Y", y, REFERENCE.down(case.a, order, case.down, b_down, case.weight))
    expected = REFERENCE.dgated(case.dout, order, case.down, b_down, clean.h, case.weight, act, overwrite_h=False)
    for overwrite in (False, True):
        dh, a, ds = products.dgated(
            low.dout, order, low.down, low_down, low.h.clone(), low.weight, act, overwrite_h=overwrite
        )
        assert ds.dtype is torch.float32
        close("dH", dh, expected[0])
        close("A again", a, expected[1])
        close("dS", ds.double().sum(0), expected[2].sum(0))
    close("dX", products.dx(low.dh, order, low.up), REFERENCE.dx(clean.dh, order, case.up))
    dw_down = products.dw_down(low.dout, order, low.a)
    close("dW_down", dw_down, REFERENCE.dw_down(case.dout, order, clean.a), by_row=False)
    dw_up = products.dw_up(low.dh, order, low.x, low.up)
    close("dW_up", dw_up, REFERENCE.dw_up(clean.dh, order, case.x, case.up), by_row=False)
    if act.gated:
        # Gate and up as two tensors: the same tiles and sums.
        apart = tuple(half.contiguous() for half in low.up.chunk(2, dim=1))
        for one, two in zip(products.up(low.x, order, apart, low_up, low.weight, act), (h, first_a), strict=True):
            assert torch.equal(up_to_end(order, one), up_to_end(order, two)), "H or A, gate and up apart"
        dx_apart = products.dx(low.dh, order, apart)
        assert torch.equal(up_to_end(order, dx_apart), up_to_end(order, products.dx(low.dh, order, low.up)))
        for half, expected_half in zip(
            products.dw_up(low.dh, order, low.x, apart), dw_up.chunk(2, dim=1), strict=True
        ):
            assert half.is_contiguous() and torch.equal(half, expected_half), "dW_up, gate and up apart"
    for name, rows, weight in (("db_up", "dh", None), ("db_down", "dout", "weight")):
        weights = (None, None) if weight is None else (low.weight, case.weight)
        actual = triton_products.segment_sum(getattr(low, rows), order, dtype, weights[0])
        close(name, actual, segment_sum_torch(getattr(clean, rows), order, torch.float64, weights[1]), by_row=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_products_equal_the_twin(shape: str, dtype: torch.dtype, products: TritonProducts) -> None:
    activation, bias = ("swiglu", False) if shape != "odd widths" else ("geglu", True)
    check_products(operands(SHAPES[shape], activation, dtype), products, activation, dtype, bias)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(activation: str, bias: bool, products: TritonProducts) -> None:
    for dtype in DTYPES:
        check_products(operands((9, 2, 3, 24, 40), activation, dtype), products, activation, dtype, bias)


@settings(max_examples=15, deadline=None)
@given(
    rows=st.integers(0, 40),
    top_k=st.integers(1, 4),
    num_experts=st.integers(1, 9),
    # Not 1: a gradient of one number may be a sum that cancels, whose relative error has no bound.
    d=st.integers(4, 70),
    f=st.integers(4, 70),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    bias=st.booleans(),
    recompute=st.booleans(),
    tight=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_the_stage_at_any_shape(
    products, rows, top_k, num_experts, d, f, activation, bias, recompute, tight, seed
) -> None:
    inputs, idx = make_case(rows, top_k, num_experts, d, f, activation, seed)
    inputs, idx = tuple(t.to(DEVICE) for t in inputs), idx.to(DEVICE)
    compare(inputs, idx, activation, torch.float32, products, bias, recompute, tight)


@pytest.mark.skipif(CUDA, reason="tiles for other GPUs may not run on this one")
@pytest.mark.parametrize("capability", [(8, 0), (9, 0)])
@pytest.mark.parametrize("depth", [64, 4096])
def test_the_tuned_tiles_compute_the_same(capability, depth, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tables' tiles, in float32 and without TMA: their slices, halved map tiles and groups."""
    choose = choose_tiles

    def tuned(product: str, _: tuple[int, int], dtype: torch.dtype, _depth: int, width: int) -> Tiles:
        return dataclasses.replace(choose(product, capability, torch.bfloat16, depth, width), tma=False, group=2)

    monkeypatch.setattr(triton_products, "choose_tiles", tuned)
    case = operands((330, 1, 2, 72, 264), "swiglu", torch.float32)
    check_products(case, TritonProducts((0, 0), 3), "swiglu", torch.float32, bias=False)
    case = operands((100, 1, 2, 40, 264), "relu", torch.float32)
    check_products(case, TritonProducts((0, 0), 3), "relu", torch.float32, bias=True)


def test_all_routes_to_one_expert_of_many(products: TritonProducts) -> None:
    (x, w, up, down, _, _), idx = make_case(300, 1, 6, 24, 16, "swiglu")
    idx[:] = 4
    inputs = tuple(t.to(DEVICE) for t in (x, w, up, down))
    compare(inputs, idx.to(DEVICE), "swiglu", torch.float32, products, False, False, tight=False)


def test_an_expert_without_rows_gets_zeros(products: TritonProducts) -> None:
    (x, w, up, down, b_up, b_down), idx = make_case(16, 2, 4, 8, 8, "swiglu")
    idx[idx == 2] = 0
    leaves = [t.float().to(DEVICE).requires_grad_() for t in (x, w, up, down, b_up, b_down)]
    y = experts(
        leaves[0],
        idx.to(DEVICE),
        *leaves[1:4],
        ACTIVATIONS["swiglu"],
        products,
        b_up_eH=leaves[4],
        b_down_eD=leaves[5],
    )
    y.sum().backward()
    for leaf in leaves[2:]:
        assert torch.count_nonzero(leaf.grad[2]) == 0 and torch.isfinite(leaf.grad).all()
        assert torch.count_nonzero(leaf.grad[0]) > 0


def test_a_nan_row_stays_in_its_row_and_its_experts(products: TritonProducts) -> None:
    (x, w, up, down, _, _), idx = make_case(8, 1, 4, 8, 8, "swiglu")
    idx[:] = torch.tensor([[0], [1], [2], [3], [-1], [0], [1], [2]])
    x[2] = float("nan")
    leaves = [t.float().to(DEVICE).requires_grad_() for t in (x, w, up, down)]
    y = experts(leaves[0], idx.to(DEVICE), *leaves[1:], ACTIVATIONS["swiglu"], products)
    y.sum().backward()
    assert torch.isnan(y).any(1).tolist() == [False, False, True, False, False, False, False, False]
    for leaf in leaves[2:]:
        assert torch.isnan(leaf.grad).flatten(1).any(1).tolist() == [False, False, True, False]


def test_equal_inputs_give_equal_bits(products: TritonProducts) -> None:
    inputs, idx = make_case(60, 3, 4, 40, 24, "geglu")

    def run() -> list[Tensor]:
        leaves = [t.float().to(DEVICE).requires_grad_() for t in inputs]
        x, w, up, down, b_up, b_down = leaves
        y = experts(x, idx.to(DEVICE), w, up, down, ACTIVATIONS["geglu"], products, b_up_eH=b_up, b_down_eD=b_down)
        return [y, *torch.autograd.grad(y.square().sum(), leaves)]

    assert all(torch.equal(a, b) for a, b in zip(run(), run(), strict=True))


def test_operands_need_not_be_contiguous_or_aligned(products: TritonProducts) -> None:
    case = operands((20, 2, 3, 24, 40), "swiglu", torch.float32)
    act = ACTIVATIONS["swiglu"]
    expected = products.up(case.x.float(), case.order, case.up.float(), None, case.weight.float(), act)
    x = case.x.float().T.contiguous().T
    shifted = torch.empty(case.up.numel() + 1, device=DEVICE)[1:].view_as(case.up).copy_(case.up)
    weight = case.weight.float().T.contiguous().T
    actual = products.up(x, case.order, shifted, None, weight, act)
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(up_to_end(case.order, a), up_to_end(case.order, b))


@triton.jit
def _curves(g, value, slope, also, NUM: tl.constexpr, CURVE: tl.constexpr):
    at = tl.arange(0, NUM)
    x = tl.load(g + at)
    f, df = curve_and_slope(x, CURVE)
    tl.store(value + at, f)
    tl.store(slope + at, df)
    tl.store(also + at, curve(x, CURVE))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_curves(activation: str) -> None:
    special = torch.tensor([0.0, -0.0, 1e-8, 30.0, -30.0, 100.0, -100.0, 1e4, -1e4, 3e38, -3e38, float("nan")])
    g = torch.cat([special, torch.linspace(-12, 12, 512 - len(special))]).to(DEVICE)
    value, slope, also = (torch.empty_like(g) for _ in range(3))
    _curves[(1,)](g, value, slope, also, NUM=512, CURVE=CURVE_OF[activation])
    expected = ACTIVATIONS[activation].curve(g.double())
    finite = expected[0].abs() < 3e38
    for actual, name in ((value, 0), (also, 0), (slope, 1)):
        difference = (actual.double() - expected[name]).abs() / expected[name].abs().clamp(min=1)
        assert difference[finite & ~g.isnan()].max() <= 1e-6, name
    assert value[g.isnan()].isnan().all() and also[g.isnan()].isnan().all()


def test_tiles_fit_narrow_results() -> None:
    for capability in ((0, 0), (8, 0), (9, 0)):
        for dtype in TOLERANCE:
            for width in (1, 8, 24, 72, 4096):
                for product in FLOAT32:
                    tiles = choose_tiles(product, capability, dtype, 4096, width)
                    assert tiles.bn // tiles.sub >= 16 and tiles.bn <= max(32, 2 * width)


def test_a_dtype_or_device_that_cannot_run_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"gemm_backend 'triton' cannot run here: .*float64; valid here: 'reference'"):
        select_products("triton", torch.zeros(1, dtype=torch.float64, device=DEVICE), (8,), 4)
    assert select_products("triton", torch.zeros(1, device=DEVICE), (7,), 4).name == "triton"
    # Compiled kernels do not run on a CPU: a process of its own, as this one may interpret.
    code = (
        "import torch\nfrom flashfusemoe_ds.kernels.select import select_products\n"
        "try: select_products('triton', torch.zeros(1), (8,), 4)\nexcept ValueError as error: print(error)"
    )
    env = {**os.environ, "TRITON_INTERPRET": "0"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
    assert "the triton backend needs a CUDA GPU, not cpu" in run.stdout


@pytest.mark.gpu
def test_omitted_takes_what_grouped_mm_refuses() -> None:
    for dtype, width in ((torch.float16, 8), (torch.float32, 8), (torch.bfloat16, 7)):
        assert select_products(None, torch.zeros(1, dtype=dtype, device=DEVICE), (width,), 4).name == "triton"


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(1000, 4, 16, 256, 384), (513, 2, 3, 1416, 712), (700, 2, 5, 4096, 520)])
def test_hopper_tiles_and_tma(shape, products: TritonProducts) -> None:
    for activation in ("swiglu", "gelu_tanh"):
        case = operands(shape, activation, torch.bfloat16)
        check_products(case, products, activation, torch.bfloat16, bias=activation == "gelu_tanh")


@pytest.mark.gpu
def test_no_host_synchronisation(products: TritonProducts) -> None:
    inputs, idx = make_case(200, 2, 4, 64, 64, "swiglu")
    leaves = [t.to(DEVICE, torch.bfloat16 if i != 1 else torch.float32) for i, t in enumerate(inputs)]
    x, w, up, down, b_up, b_down = (t.requires_grad_() for t in leaves)
    idx = idx.to(DEVICE)

    def step() -> None:
        y = experts(x, idx, w, up, down, ACTIVATIONS["swiglu"], products, b_up_eH=b_up, b_down_eD=b_down)
        y.backward(torch.ones_like(y))

    step()  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
