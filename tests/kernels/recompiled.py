# SPDX-License-Identifier: GPL-3.0-or-later
"""Prints the kernels that another number of rows would compile again, without a GPU: none should be printed.

Between expert-parallel ranks the number of rows changes with every step, and a compilation stops a step for a second.
Run with TRITON_INTERPRET unset, as tests/kernels/test_census.py does.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from flashfusemoe_ds.kernels import (
    deepspeed_routing,
    hopper_products,
    routing,
    routing_backward,
    triton_activation,
    triton_exchange,
    triton_gather_sum,
    triton_order,
    triton_products,
)
from flashfusemoe_ds.kernels.activation import get_activation
from flashfusemoe_ds.kernels.order import max_tiles
from flashfusemoe_ds.kernels.routing_rule import Rule
from tests.kernels.census import Launch, meta_order, record

D, F, EXPERTS, TOP_K, RANKS = 1024, 2048, 8, 2, 2
# Multiples of 16 and not, of rows alone and of routes too; in tiles as well.
ROWS = (8192, 8193, 8200, 8184, 8111)
ACTIVATION = get_activation("swiglu")
RULE = Rule(TOP_K, True, False, True, 1.0, 0, 0, False)


def empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launches(rows: int) -> Iterator[Launch]:
    """Everything that a step over these rows launches, router and transport's packing included."""
    n, h = rows * TOP_K, 2 * F
    order, weight = meta_order(rows, TOP_K, EXPERTS), empty(rows, TOP_K, dtype=torch.float32)
    x, idx = empty(rows, D), empty(rows, TOP_K, dtype=torch.int64)
    up, down = empty(EXPERTS, h, D), empty(EXPERTS, D, F)
    with record(routing, "router") as recorded:
        routing.choose(empty(rows, EXPERTS, dtype=torch.float32), False, None, RULE, 0.01, 0.001, True)
    yield from recorded
    with record(routing_backward, "router's backward") as recorded:
        routing_backward.gate_gradients(
            x, empty(EXPERTS, D), empty(rows, EXPERTS, dtype=torch.float32), idx, None,
            empty(8, n, dtype=torch.float32), None, None, RULE, 0.0, 0.0, True, True, order.pos_RK,
        )  # fmt: skip
    yield from recorded
    with record(deepspeed_routing, "DeepSpeed's gate") as recorded:
        logits = empty(rows, EXPERTS, dtype=torch.float32)
        deepspeed_routing.choose(logits, False, 2, None, None, rows // EXPERTS, None)
        deepspeed_routing.choose(logits, False, 4, None, None, None, lambda probs, idx: torch.empty_like(idx).bool())
    yield from recorded
    with record(triton_order, "order") as recorded:
        triton_order.sort_routes(idx, EXPERTS, n, 128, max_tiles(n, EXPERTS))
    yield from recorded
    with record(triton_gather_sum, "gather-sum") as recorded:
        triton_gather_sum.gather_sum(empty(n, D), order.pos_RK)
        triton_gather_sum.gather_sum(empty(n, D), order.pos_RK, extra_RD=x)
        triton_gather_sum.gather_sum(empty(n, D), order.pos_RK, ds_PN=empty(8, n, dtype=torch.float32))
    yield from recorded
    for module, products in (
        (hopper_products, hopper_products.HopperProducts((9, 0), 132)),
        (triton_products, triton_products.TritonProducts((9, 0), 132)),
    ):
        with record(module, type(products).__name__) as recorded:
            products.up(x, order, up, None, weight, ACTIVATION)
            products.down(empty(n, F), order, down, None, weight)
            products.dgated(x, order, down, None, empty(n, h), weight, ACTIVATION, overwrite_h=True)
            products.dx(empty(n, h), order, up)
            products.dw_down(x, order, empty(n, F))
            products.dw_up(empty(n, h), order, x, up)
        yield from recorded
    with record(triton_activation, "shared experts") as recorded:
        triton_activation.activate(empty(rows, h), ACTIVATION)
        triton_activation.activate_backward(empty(rows, h), empty(rows, F), ACTIVATION, overwrite_h=True)
    yield from recorded
    with record(triton_exchange, "exchange") as recorded:
        _, blocks = triton_exchange.count_rows(idx, EXPERTS // RANKS, RANKS)
        slot, words = triton_exchange.place_rows(idx, weight, EXPERTS // RANKS, RANKS, blocks)
        triton_exchange.spread_rows(x, slot, rows + 1)
        triton_exchange.take_apart(words, idx.shape[1], weight.dtype)
    yield from recorded


def main() -> None:
    compiled = [{launch.name: launch for launch in launches(rows)} for rows in ROWS]
    print(f"{len(compiled[0])} launches at {ROWS} rows")
    for name, launch in compiled[0].items():
        for rows, others in zip(ROWS, compiled, strict=True):
            other = others[name]
            for what in ("signature", "constexprs", "divisible"):
                if getattr(other, what) != getattr(launch, what):
                    print(f"{name}, {rows} rows: {what} {getattr(other, what)} instead of {getattr(launch, what)}")


if __name__ == "__main__":
    main()
