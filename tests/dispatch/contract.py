# SPDX-License-Identifier: GPL-3.0-or-later
"""What every transport must do, as functions that run on each rank. A transport's test file calls them with a factory.

Nothing here knows a transport: a factory takes the group and a geometry, and is called by all ranks alike.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from itertools import permutations
from typing import Any

import torch
import torch.distributed as dist

from flashfusemoe_ds.dispatch.base import Dispatcher, Geometry, combine, dispatch
from flashfusemoe_ds.kernels import reference
from flashfusemoe_ds.kernels.activation import ACTIVATIONS
from flashfusemoe_ds.kernels.experts import experts
from flashfusemoe_ds.kernels.grouped_gemm import ReferenceGemm
from flashfusemoe_ds.kernels.products import TorchProducts
from flashfusemoe_ds.types import Routing
from tests.close import relative_error

Factory = Callable[[dist.ProcessGroup, Geometry], Dispatcher]

CASES = ("even", "uneven", "a rank without tokens", "no tokens at all", "all to rank 0", "dropped", "all dropped")
F = 5


def top_k_and_experts(world: int) -> tuple[tuple[int, int], ...]:
    """(K, E): one expert per rank, the common, all experts, K that is no power of two."""
    return (1, world), (2, 8), (8, 8), (3, 4 * world)


def routes(
    case: str, rank: int, world: int, top_k: int, num_experts: int, *, seed: int = 100, tokens: int = 8, step: int = 5
) -> tuple[torch.Tensor, torch.Generator]:
    """A rank's expert ids [T, K] in one of CASES, and the generator that drew them, for what else the rank has.

    Args:
        tokens: T where every rank has as many; one fewer where the last has none.
        step: by how much T grows with the rank in "uneven".
    """
    g = torch.Generator().manual_seed(seed + rank)
    few = {"uneven": 3 + step * rank, "a rank without tokens": 0 if rank == world - 1 else tokens - 1}
    rows = {**few, "no tokens at all": 0}.get(case, tokens)
    scores = torch.rand(rows, num_experts, generator=g)
    if case == "all to rank 0":
        scores[:, num_experts // world :] -= 1
    idx = scores.topk(top_k, dim=1)[1]
    if case == "dropped":
        idx[torch.rand(rows, top_k, generator=g) < 0.4] = -1
    if case == "all dropped":
        idx[:] = -1
    return idx, g


def tokens_and_routes(case: str, rank: int, world: int, geometry: Geometry) -> tuple[torch.Tensor, ...]:
    """A rank's rows and weights, both float64, and expert ids; any rank can make any rank's."""
    idx, g = routes(case, rank, world, geometry.top_k, geometry.num_experts)
    rows = len(idx)
    x = torch.randn(rows, geometry.hidden_size, generator=g, dtype=torch.float64)
    return x, torch.rand(idx.shape, generator=g, dtype=torch.float64), idx


def weights(geometry: Geometry) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    up = torch.randn(geometry.num_experts, 2 * F, geometry.hidden_size, generator=g, dtype=torch.float64)
    return up, torch.randn(geometry.num_experts, geometry.hidden_size, F, generator=g, dtype=torch.float64)


def error_against_dense(
    dispatcher: Dispatcher, geometry: Geometry, case: str, rank: int, world: int, device: torch.device
) -> float:
    """Largest relative error of this rank's output and gradients; the dense layer runs on the CPU."""
    x, weight, idx = tokens_and_routes(case, rank, world, geometry)
    up, down = weights(geometry)
    local = slice(rank * geometry.num_experts // world, (rank + 1) * geometry.num_experts // world)
    leaves = [t.to(device, copy=True).requires_grad_() for t in (x, weight, up[local], down[local])]
    routing = Routing(idx.to(device), leaves[1], torch.zeros(geometry.num_experts, dtype=torch.long))
    sent = dispatch(dispatcher, leaves[0], routing)
    assert sent.idx_RK.dtype == torch.int64
    assert sent.num_routes >= int((sent.idx_RK >= 0).sum())
    products = TorchProducts(ReferenceGemm())
    y = experts(sent.x_RD, sent.idx_RK, sent.weight_RK, leaves[2], leaves[3], ACTIVATIONS["swiglu"], products,
                num_routes=sent.num_routes)  # fmt: skip
    out = combine(dispatcher, y, sent.handle)
    (out * direction_of(out).to(device)).sum().backward()
    assert all(leaf.grad is not None for leaf in leaves)

    actual = [out, *(leaf.grad for leaf in leaves)]
    expected = dense_share(geometry, case, rank, world)
    return max(relative_error(a.cpu(), b) for a, b in zip(actual, expected, strict=True))


@cache
def dense_share(geometry: Geometry, case: str, rank: int, world: int) -> list[torch.Tensor]:
    """The dense layer over all ranks' tokens: this rank's share of the output, the sum of all ranks' gradients."""
    up, down = (t.requires_grad_() for t in weights(geometry))
    for r in range(world):
        x, weight, idx = tokens_and_routes(case, r, world, geometry)
        x.requires_grad_(), weight.requires_grad_()
        out = reference.experts(x, idx, weight, up, down, "swiglu")
        (out * direction_of(out)).sum().backward()
        if r == rank:
            mine = [out.detach(), x.grad, torch.where(idx >= 0, weight.grad, 0)]
    local = slice(rank * geometry.num_experts // world, (rank + 1) * geometry.num_experts // world)
    return [*mine, up.grad[local], down.grad[local]]


def direction_of(out: torch.Tensor) -> torch.Tensor:
    """One fixed direction per shape, float64 on the CPU."""
    return torch.randn(out.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)


def errors_of_every_case(
    rank: int, world: int, make: Factory, hidden_size: int, device: str = "cpu"
) -> dict[str, float]:
    """In float64. One dispatcher per geometry, as layers share it, whatever the case."""
    where = torch.device(device, rank) if device == "cuda" else torch.device(device)
    errors = {}
    for top_k, num_experts in top_k_and_experts(world):
        geometry = Geometry(num_experts, hidden_size, top_k, torch.float64)
        dispatcher = make(dist.group.WORLD, geometry)
        for case in CASES:
            name = f"{case}, K={top_k}, E={num_experts}"
            errors[name] = error_against_dense(dispatcher, geometry, case, rank, world, where)
    return errors


def wrong_in_bf16(rank: int, world: int, make: Factory, hidden_size: int, device: str = "cpu") -> list[str]:
    """What is wrong with the bits of each operation, in bf16 and float32. [] if nothing is.

    Rows are small integers, so that sums are exact and every order of summation gives the same bits.
    """
    where = torch.device(device, rank) if device == "cuda" else torch.device(device)
    wrong = []
    for top_k, num_experts in top_k_and_experts(world):
        geometry = Geometry(num_experts, hidden_size, top_k, torch.bfloat16)
        dispatcher = make(dist.group.WORLD, geometry)
        for case in CASES:
            found = _wrong_bits(dispatcher, geometry, case, rank, world, where)
            wrong += [f"{case}, K={top_k}, E={num_experts}: {what}" for what in found]
    return wrong


def _wrong_bits(
    dispatcher: Dispatcher, geometry: Geometry, case: str, rank: int, world: int, device: torch.device
) -> list[str]:
    def rows(r: int) -> tuple[torch.Tensor, ...]:
        x, weight, idx = tokens_and_routes(case, r, world, geometry)
        return (8 * x).round().clamp(-64, 64).bfloat16(), weight.float(), idx

    x, weight, idx = rows(rank)
    local = geometry.num_experts // world
    arriving = dispatcher.start_dispatch(x.to(device), idx.to(device), weight.to(device))
    sent = arriving.wait()
    again = dispatcher.start_dispatch(x.to(device), idx.to(device), weight.to(device)).wait()

    # Ordered by source rank, then by token.
    expected_x, expected_idx, expected_weight = [], [], []
    for r in range(world):
        xr, wr, idr = rows(r)
        mine = (idr >= 0) & (idr // local == rank)
        hit = mine.any(1)
        expected_x.append(xr[hit])
        expected_idx.append(torch.where(mine, idr - rank * local, -1)[hit])
        expected_weight.append(torch.where(mine, wr, 0)[hit])
    expected_x, expected_idx, expected_weight = map(torch.cat, (expected_x, expected_idx, expected_weight))
    valid = (sent.idx_RK >= 0).cpu()
    hits = torch.stack([((idx >= 0) & (idx // local == r)).any(1) for r in range(world)], 1).sum(1, keepdim=True)

    replayed = dispatcher.start_redispatch((-x).to(device), sent.handle)
    masked = torch.where(sent.idx_RK >= 0, sent.weight_RK, 0)
    home = dispatcher.start_combine(sent.x_RD, sent.handle, masked)
    # Later ones may be waited for first, and a combine's weights before or after its rows.
    weights_home, replayed_x, rows_home = home.weights.wait(), replayed.wait(), home.rows.wait()
    other = dispatcher.start_combine(again.x_RD, again.handle, None)
    checks = {
        "rows": torch.equal(sent.x_RD.cpu(), expected_x),
        "ids": sent.idx_RK.dtype == torch.int64 and torch.equal(sent.idx_RK.cpu(), expected_idx),
        "weights": torch.equal(torch.where(valid, sent.weight_RK.cpu(), 0), expected_weight),
        "number of routes": sent.num_routes >= int(valid.sum()),
        "a second dispatch": torch.equal(again.x_RD, sent.x_RD) and torch.equal(again.idx_RK, sent.idx_RK),
        "replayed rows": torch.equal(replayed_x, -sent.x_RD),
        "rows that come home": torch.equal(rows_home.cpu(), x * hits),
        "weights that come home": torch.equal(weights_home.cpu(), torch.where(idx >= 0, weight, 0)),
        "combine without weights": other.weights is None and torch.equal(other.rows.wait(), rows_home),
        "waiting twice": _raises_assertion(arriving.wait) and _raises_assertion(replayed.wait),
    }
    return [name for name, right in checks.items() if not right]


def _raises_assertion(fn: Callable[[], Any]) -> bool:
    try:
        fn()
    except AssertionError:
        return True
    return False


def wrong_when_waited_out_of_order(
    rank: int, world: int, make: Factory, geometry: Geometry, device: str = "cpu"
) -> list[str]:
    """Four operations under way at once, waited for in every order."""
    where = torch.device(device, rank) if device == "cuda" else torch.device(device)
    dispatcher = make(dist.group.WORLD, geometry)
    x, weight, idx = tokens_and_routes("uneven", rank, world, geometry)
    x, weight, idx = x.round().to(where, geometry.dtype), weight.to(where, torch.float32), idx.to(where)
    sent = dispatcher.start_dispatch(x, idx, weight).wait()
    masked = torch.where(sent.idx_RK >= 0, sent.weight_RK, 0)
    expected = None
    wrong = []
    for order in permutations(range(4)):
        first = dispatcher.start_combine(sent.x_RD, sent.handle, masked)
        replay = dispatcher.start_redispatch(x, sent.handle)
        second = dispatcher.start_combine(2 * sent.x_RD, sent.handle)
        pendings = [first.rows, first.weights, replay, second.rows]
        results = [torch.empty(0)] * 4
        for i in order:
            results[i] = pendings[i].wait()
        expected = results if expected is None else expected
        if not all(torch.equal(a, b) for a, b in zip(results, expected, strict=True)):
            wrong.append(f"order {order}")
        if not torch.equal(results[3], 2 * results[0]) or not torch.equal(results[2], sent.x_RD):
            wrong.append(f"values in order {order}")
    return wrong
