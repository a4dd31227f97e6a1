# SPDX-License-Identifier: GPL-3.0-or-later
"""The gather-sum: the kernel against the PyTorch twin, and the twin against float64 sums written out."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flashfusemoe_ds.kernels import triton_gather_sum
from flashfusemoe_ds.kernels.gather_sum import gather_partials, gather_sum, gather_sum_torch
from flashfusemoe_ds.kernels.order import sort_by_expert_torch
from tests.close import relative_error
from tests.kernels.test_order import DEVICE, random_ids

# Triton's interpreter rounds to bf16 towards zero; compiled, it rounds to nearest.
DTYPES = [torch.float32, torch.float16, torch.float64] + ([torch.bfloat16] if DEVICE == "cuda" else [])


def make_case(rows: int, top_k: int, width: int, partials: int = 3, seed: int = 0):
    """y [N, D] and ds [P, N] with NaN where nothing may be read, pos [R, K], extra [R, D]; float64."""
    g = torch.Generator().manual_seed(seed)
    idx = random_ids(rows, top_k, 5, seed=seed)
    order = sort_by_expert_torch(idx, 5, idx.numel())
    y = torch.randn(idx.numel(), width, generator=g, dtype=torch.float64)
    ds = torch.randn(partials, idx.numel(), generator=g, dtype=torch.float64)
    used = int(order.ends_e[-1])
    y[used:], ds[:, used:] = float("nan"), float("nan")
    return y, order.pos_RK, ds, torch.randn(rows, width, generator=g, dtype=torch.float64)


def check(rows: int, top_k: int, width: int, dtype: torch.dtype, partials: int, extra: bool, seed: int = 0) -> None:
    y, pos, ds, extra_RD = make_case(rows, top_k, width, partials, seed)
    y, extra_RD = y.to(DEVICE, dtype), extra_RD.to(DEVICE, dtype) if extra else None
    ds, pos = ds.float().to(DEVICE), pos.to(DEVICE)
    out, dweight = triton_gather_sum.gather_sum(y, pos, ds if partials else None, extra_RD)
    # The same additions in the same order: equal bits.
    assert out.dtype is dtype and torch.equal(out, gather_sum_torch(y, pos, extra_RD))
    if partials:
        assert torch.equal(dweight, gather_partials(ds, pos))
    else:
        assert dweight is None


@settings(max_examples=25, deadline=None)
@given(
    rows=st.integers(0, 20),
    top_k=st.integers(1, 10),
    width=st.integers(1, 70),
    dtype=st.sampled_from(DTYPES),
    partials=st.integers(0, 4),
    extra=st.booleans(),
    seed=st.integers(0, 1000),
)
def test_any_shape(rows, top_k, width, dtype, partials, extra, seed) -> None:
    check(rows, top_k, width, dtype, partials, extra, seed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "top_k", "width"), [(3, 32, 1416), (5, 2, 2880), (300, 1, 8), (2, 8, 1024)])
def test_wide_rows_many_routes(rows: int, top_k: int, width: int, dtype: torch.dtype) -> None:
    check(rows, top_k, width, dtype, 2, True)


def test_the_twin_adds_up() -> None:
    y, pos, ds, extra = make_case(9, 3, 5)
    for actual, source in ((gather_sum_torch(y, pos, extra) - extra, y), (gather_partials(ds, pos).sum(1), ds.sum(0))):
        expected = torch.stack([source[[p for p in row if p < len(y)]].sum(0) for row in pos.tolist()])
        assert relative_error(actual, expected) < 1e-14


def test_gradients_pass_through() -> None:
    """As the experts that are users' own modules need it, on every device."""
    y, pos, _, extra = make_case(9, 3, 5)
    y = y.nan_to_num().to(DEVICE).requires_grad_()
    extra = extra.to(DEVICE).requires_grad_()
    gather_sum(y, pos.to(DEVICE), extra).sum().backward()
    assert y.grad[:, 0].sum() == (pos < len(y)).sum() and torch.equal(extra.grad, torch.ones_like(extra))
