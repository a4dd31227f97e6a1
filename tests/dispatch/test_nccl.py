# SPDX-License-Identifier: GPL-3.0-or-later
"""The all-to-all transport on gloo ranks, in float64, against the dense layer: values and all gradients."""

from __future__ import annotations

import os
import re
import time
from collections import Counter
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.overrides import TorchFunctionMode

from flashfusemoe_ds import FlashFuseMoEConfig
from flashfusemoe_ds.dispatch import nccl
from flashfusemoe_ds.dispatch.base import Geometry, combine, dispatch
from flashfusemoe_ds.dispatch.nccl import NcclDispatcher
from flashfusemoe_ds.dispatch.select import make_dispatcher
from flashfusemoe_ds.kernels import reference
from flashfusemoe_ds.kernels.activation import ACTIVATIONS
from flashfusemoe_ds.kernels.experts import experts
from flashfusemoe_ds.kernels.grouped_gemm import ReferenceGemm
from flashfusemoe_ds.kernels.products import TorchProducts
from flashfusemoe_ds.nn.moe_layer import MoELayer
from flashfusemoe_ds.types import Routing
from tests.close import relative_error
from tests.dispatch.contract import CASES, routes
from tests.distributed import run_ranks

D, F = 6, 5


class CountingComm:
    """torch.distributed with a tally of its collectives."""

    def __init__(self) -> None:
        self.calls: Counter[str] = Counter()

    def get_world_size(self, group: Any) -> int:
        return dist.get_world_size(group)

    def all_to_all_single(self, output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.calls[str(output.dtype).removeprefix("torch.")] += 1
        return dist.all_to_all_single(output, *args, **kwargs)


def tokens_and_routes(case: str, rank: int, world: int, top_k: int, num_experts: int):
    idx, g = routes(case, rank, world, top_k, num_experts)
    rows = len(idx)
    x = torch.randn(rows, D, generator=g, dtype=torch.float64)
    return x, torch.rand(rows, top_k, generator=g, dtype=torch.float64), idx


def weights(num_experts: int) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(0)
    up = torch.randn(num_experts, 2 * F, D, generator=g, dtype=torch.float64)
    return up, torch.randn(num_experts, D, F, generator=g, dtype=torch.float64)


def one_case(rank: int, world: int, case: str, top_k: int, num_experts: int, device: torch.device) -> float:
    """Largest relative error of this rank's output and gradients; the dense layer runs on the CPU."""
    x, weight, idx = tokens_and_routes(case, rank, world, top_k, num_experts)
    up, down = weights(num_experts)
    local = slice(rank * num_experts // world, (rank + 1) * num_experts // world)
    comm = CountingComm()
    dispatcher = NcclDispatcher(dist.group.WORLD, num_experts, comm)
    g = torch.Generator().manual_seed(7)

    leaves = [t.to(device).clone().requires_grad_() for t in (x, weight, up[local], down[local])]
    idx = idx.to(device)
    sent = dispatch(dispatcher, leaves[0], Routing(idx, leaves[1], torch.zeros(num_experts, dtype=torch.long)))
    assert sent.num_routes == int((sent.idx_RK >= 0).sum())
    products = TorchProducts(ReferenceGemm())
    y = experts(sent.x_RD, sent.idx_RK, sent.weight_RK, leaves[2], leaves[3], ACTIVATIONS["swiglu"], products,
                num_routes=sent.num_routes)  # fmt: skip
    out = combine(dispatcher, y, sent.handle)
    assert comm.calls == {"int64": 1, "int32": 1, "float64": 2}, "one count, one metadata, one row exchange each way"
    (out * torch.randn(out.shape, generator=g, dtype=torch.float64).to(device)).sum().backward()
    assert all(leaf.grad is not None for leaf in leaves)

    # The dense layer over every rank's tokens: this rank's share of the output, and the sum of all ranks' gradients.
    dense = [up.requires_grad_(), down.requires_grad_()]
    for r in range(world):
        xr, wr, idr = tokens_and_routes(case, r, world, top_k, num_experts)
        xr.requires_grad_(), wr.requires_grad_()
        expected = reference.experts(xr, idr, wr, *dense, "swiglu")
        direction = torch.randn(expected.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
        (expected * direction).sum().backward()
        if r == rank:
            mine = [expected, xr.grad, torch.where(idr >= 0, wr.grad, 0)]
    mine += [dense[0].grad[local], dense[1].grad[local]]
    actual = [out, *(leaf.grad for leaf in leaves)]
    return max(relative_error(a.cpu(), b) for a, b in zip(actual, mine, strict=True))


def every_case(rank: int, world: int, device: str = "cpu") -> dict[str, float]:
    where = torch.device(device, rank) if device == "cuda" else torch.device(device)
    return {
        f"{case}, K={top_k}, E={num_experts}": one_case(rank, world, case, top_k, num_experts, where)
        for case in CASES
        for top_k, num_experts in ((1, world), (2, 8), (8, 8), (3, 4 * world))
    }


@pytest.mark.parametrize("world", [2, 4])
def test_equals_the_dense_layer_in_float64(world: int) -> None:
    for errors in run_ranks(world, every_case):
        assert {name: e for name, e in errors.items() if not e < 1e-12} == {}


@pytest.mark.gpu
def test_equals_the_dense_layer_over_nccl() -> None:
    world = min(torch.cuda.device_count(), 4)
    if world < 2:
        pytest.skip("needs two GPUs")
    for errors in run_ranks(world, every_case, "cuda", accelerator="cuda"):
        assert {name: e for name, e in errors.items() if not e < 1e-12} == {}


def every_case_by_kernels(rank: int, world: int) -> dict[str, float]:
    """The same exchange around the CUDA path's kernels, run by Triton's interpreter."""
    from flashfusemoe_ds.kernels import triton_exchange, triton_gather_sum

    for name in ("count_rows", "place_rows", "spread_rows"):
        setattr(nccl, name, getattr(triton_exchange, name))
    nccl.gather_sum = lambda rows, slots: triton_gather_sum.gather_sum(rows, slots)[0]
    return {case: one_case(rank, world, case, 3, 8, torch.device("cpu")) for case in CASES}


@pytest.mark.skipif(torch.cuda.is_available(), reason="the tests over NCCL launch them")
def test_the_kernels_move_rows_as_their_twins_do() -> None:
    for errors in run_ranks(2, every_case_by_kernels):
        assert {name: e for name, e in errors.items() if not e < 1e-12} == {}


def equal_bits(rank: int, world: int) -> list[str]:
    """NCCL and kernels against gloo and twins, bit for bit, in bf16; and twice over NCCL."""
    num_experts, top_k, device = 16, 4, torch.device("cuda", rank)
    g = torch.Generator().manual_seed(rank)
    x = torch.randn(300 + 50 * rank, 256, generator=g).bfloat16()
    idx = torch.rand(len(x), num_experts, generator=g).topk(top_k, dim=1)[1]
    weight = torch.rand(len(x), top_k, generator=g)
    groups = [dist.new_group(backend="gloo"), dist.group.WORLD, dist.group.WORLD]
    results = []
    for group, where in zip(groups, (torch.device("cpu"), device, device), strict=True):
        dispatcher = NcclDispatcher(group, num_experts)
        x_TD, idx_TK, weight_TK = (t.to(where) for t in (x, idx, weight))
        torch.cuda.set_sync_debug_mode("error")  # an event is waited for, and nothing else
        sent = dispatcher.start_dispatch(x_TD, idx_TK, weight_TK).wait()
        again = dispatcher.start_redispatch(x_TD, sent.handle).wait()
        y_RD = sent.x_RD.roll(rank, dims=1)  # not the same from every rank
        home = dispatcher.start_combine(y_RD, sent.handle, sent.weight_RK)
        torch.cuda.set_sync_debug_mode("default")
        tensors = (sent.x_RD, sent.idx_RK, sent.weight_RK, again, home.weights.wait(), home.rows.wait())
        results.append([t.cpu() for t in tensors])
    names = ("x", "idx", "weight", "redispatch", "weights home", "rows home")
    return [
        name for name, *same in zip(names, *results, strict=True) if not all(torch.equal(same[0], t) for t in same[1:])
    ]


@pytest.mark.gpu
def test_nccl_and_gloo_give_equal_bits_without_a_hidden_synchronisation() -> None:
    world = min(torch.cuda.device_count(), 4)
    if world < 2:
        pytest.skip("needs two GPUs")
    assert run_ranks(world, equal_bits, accelerator="cuda") == [[]] * world


class Syncs(TorchFunctionMode):
    """Notes what would make the host wait for a GPU."""

    NAMES = frozenset({"tolist", "item", "__bool__", "__int__", "__index__", "__float__", "nonzero", "masked_select",
                       "unique", "equal", "cpu", "numpy"})  # fmt: skip

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.__name__
        masks = name in ("__getitem__", "__setitem__") and getattr(args[1], "dtype", None) is torch.bool
        if name in self.NAMES or masks:
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


class Order:
    """torch.distributed that notes when collectives are started and waited for."""

    def __init__(self) -> None:
        self.log: list[str] = []

    def get_world_size(self, group: Any) -> int:
        return dist.get_world_size(group)

    def all_to_all_single(self, output: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        assert kwargs["async_op"]
        kinds = {torch.int64: "counts", torch.int32: "ids", torch.bfloat16: "rows", torch.float32: "weights"}
        kind = kinds[output.dtype]
        work = dist.all_to_all_single(output, *args, **kwargs)
        self.log.append(f">{kind}")
        return SimpleNamespace(wait=lambda: (self.log.append(f"<{kind}"), work.wait()))


def order_of_collectives(rank: int, world: int) -> tuple[list[str], list[list[str]]]:
    comm = Order()
    dispatcher = NcclDispatcher(dist.group.WORLD, 4, comm)
    idx, weight, x = torch.tensor([[0, 3], [2, 1], [2, 3]]), torch.rand(3, 2), torch.rand(3, 8).bfloat16()
    with Syncs() as before:
        travelling = dispatcher.start_dispatch(x, idx, weight)
        comm.log.append("beside")
    with Syncs() as waiting:
        sent = travelling.wait()
    with Syncs() as after:
        pending = dispatcher.start_redispatch(x, sent.handle)
        comm.log.append("beside")
        pending.wait()
        home = dispatcher.start_combine(sent.x_RD, sent.handle, sent.weight_RK)
        comm.log.append("beside")
        home.weights.wait()
        home.rows.wait()
    return comm.log, [before.seen, waiting.seen, after.seen]


def test_the_host_waits_for_counts_alone_and_what_is_small_goes_first() -> None:
    dispatched = [">counts", "beside", "<counts", ">ids", ">rows", "<ids", "<rows"]
    replayed = [">rows", "beside", "<rows"]
    combined = [">weights", ">rows", "beside", "<weights", "<rows"]
    assert run_ranks(2, order_of_collectives) == [([*dispatched, *replayed, *combined], [[], ["tolist"], []])] * 2


def alone(rank: int, world: int, operation: str, dies: bool, seconds: float) -> tuple[str, float, float] | None:
    """Rank 1 leaves before the named operation. Returns what rank 0 was told, when, and how long teardown took."""
    group = dist.new_group(list(range(world)), timeout=timedelta(seconds=seconds), backend="gloo")
    dispatcher = NcclDispatcher(group, 4)
    dispatcher.layer = "model.layers.3.mlp"
    idx, weight, x = torch.tensor([[0, 3], [2, 1], [2, 3]]), torch.rand(3, 2), torch.rand(3, 8)

    def leave_here(name: str) -> bool:
        if name != operation:
            return False
        dist.barrier()
        if rank == 1 and dies:
            os._exit(7)
        return rank == 1

    start = time.monotonic()
    try:
        if leave_here("exchange of counts"):
            return None
        travelling = dispatcher.start_dispatch(x, idx, weight)
        if operation == "dispatch of ids and weights":
            time.sleep(0.3)  # the counts arrive
        if leave_here("dispatch of ids and weights"):
            return None
        sent = travelling.wait()
        if leave_here("replayed dispatch of rows"):
            return None
        dispatcher.start_redispatch(x, sent.handle).wait()
        if leave_here("combine of weights"):
            return None
        dispatcher.start_combine(sent.x_RD, sent.handle, sent.weight_RK).weights.wait()
        return "nothing", 0.0, 0.0
    except RuntimeError as error:
        if dies:
            raise
        failed = time.monotonic()
        dist.destroy_process_group(group)
        return str(error), failed - start, time.monotonic() - failed
    finally:
        if not dies:
            dist.barrier()  # rank 1 lives until rank 0 is through


OPERATIONS = (
    "exchange of counts", "dispatch of ids and weights", "replayed dispatch of rows", "combine of weights",
)  # fmt: skip
WHO = r"failed on rank 0 of the expert-parallel group of ranks \[0, 1\]: another of them has died, is late, "


def each_operation_alone(rank: int, world: int) -> list[tuple[str, float, float] | None]:
    return [alone(rank, world, operation, False, 1.5) for operation in OPERATIONS]


def test_a_late_rank_is_named_within_the_timeout_and_teardown_does_not_hang() -> None:
    told, _ = run_ranks(2, each_operation_alone)
    for operation, (message, seconds, teardown) in zip(OPERATIONS, told, strict=True):
        assert re.match(f"ep_backend nccl: {operation} of layer model.layers.3.mlp {WHO}", message), message
        assert 1.4 < seconds < 15 and teardown < 5  # gloo keeps time; the machine may be busy


@pytest.mark.parametrize("operation", ["exchange of counts", "combine of weights"])
def test_a_dead_rank_is_named_at_once(operation: str) -> None:
    start = time.monotonic()
    with pytest.raises(RuntimeError, match=f"ep_backend nccl: {operation} of layer model.layers.3.mlp {WHO}"):
        run_ranks(2, alone, operation, True, 100.0)
    assert time.monotonic() - start < 60  # not the timeout


def late_over_nccl(rank: int, world: int) -> tuple[str, float]:
    """What rank 0 is told, and when, as rank 1 stays away after one exchange together."""
    group = dist.new_group(list(range(world)), timeout=timedelta(seconds=10))
    dispatcher = NcclDispatcher(group, 4)
    dispatcher.layer = "model.layers.3.mlp"
    device = torch.device("cuda", rank)
    idx = torch.tensor([[0, 3], [2, 1], [2, 3]], device=device)
    weight, x = torch.rand(3, 2, device=device), torch.rand(3, 8, device=device)
    dispatcher.start_dispatch(x, idx, weight).wait()
    torch.cuda.synchronize()
    if rank == 1:
        time.sleep(20)
        return "", 0.0
    start = time.monotonic()
    try:
        dispatcher.start_dispatch(x, idx, weight).wait()
    except RuntimeError as error:
        return str(error), time.monotonic() - start
    return "nothing", time.monotonic() - start


@pytest.mark.gpu
def test_a_late_rank_is_named_over_nccl() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    (message, seconds), _ = run_ranks(2, late_over_nccl, accelerator="cuda", timeout=90)
    assert re.match(f"ep_backend nccl: exchange of counts of layer model.layers.3.mlp {WHO}", message), message
    assert 8 < seconds < 10  # before NCCL's watchdog, which would end the process


def patience(rank: int, world: int) -> list[float | None]:
    groups = [dist.new_group(timeout=timedelta(seconds=s), backend="gloo") for s in (10, 600)]
    dist.barrier()  # a rank that leaves at once closes sockets that another is still connecting
    return [NcclDispatcher(group, 4)._patience(torch.device("cpu")) for group in groups]


def test_the_host_gives_up_before_the_watchdog_ends_the_process() -> None:
    assert run_ranks(2, patience) == [[9.0, 595.0]] * 2
    late = SimpleNamespace(query=lambda: False, synchronize=None)
    with pytest.raises(RuntimeError, match=r"no answer in 0\.\d s"):
        nccl._wait_on_host(late, 0.05)
    answers = [False, False, True]
    nccl._wait_on_host(SimpleNamespace(query=lambda: answers.pop(0)), 60.0)
    assert not answers


def rows_received(rank: int, world: int) -> tuple[int, list[list[int]], list[list[float]]]:
    """Rank 0 sends three tokens: experts {0, 1} on rank 0, {2, 3} on rank 1, {0, 3} on both."""
    idx = torch.tensor([[0, 1], [2, 3], [0, 3]]) if rank == 0 else torch.zeros(0, 2, dtype=torch.long)
    x = torch.arange(3.0)[: len(idx), None].repeat(1, 2)
    weight = torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])[: len(idx)]
    sent = NcclDispatcher(dist.group.WORLD, 4).start_dispatch(x, idx, weight).wait()
    return sent.idx_RK.tolist(), sent.x_RD[:, 0].tolist(), sent.weight_RK.tolist()


def test_a_token_crosses_once_per_rank_not_once_per_expert() -> None:
    (idx0, x0, w0), (idx1, x1, w1) = run_ranks(2, rows_received)
    assert (idx0, x0) == ([[0, 1], [0, -1]], [0.0, 2.0])
    assert (idx1, x1) == ([[0, 1], [-1, 1]], [1.0, 2.0])
    # float32 weights arrive bit for bit.
    assert torch.equal(torch.tensor(w0)[0], torch.tensor([0.1, 0.2]))
    assert torch.equal(torch.tensor(w1)[1], torch.tensor([0.5, 0.6]))


def large_ids_in_bf16(rank: int, world: int) -> bool:
    """Ids above 256 would not survive a bf16 payload."""
    idx = torch.tensor([[1023, 513], [257, 767]])
    x = torch.ones(2, 8, dtype=torch.bfloat16)
    sent = NcclDispatcher(dist.group.WORLD, 1024).start_dispatch(x, idx, torch.full((2, 2), 1 / 3)).wait()
    ids = sent.idx_RK[sent.idx_RK >= 0] + 512 * rank
    return sorted(ids.tolist()) == ([257, 257] if rank == 0 else [513, 513, 767, 767, 1023, 1023])


def test_large_expert_ids_survive() -> None:
    assert run_ranks(2, large_ids_in_bf16) == [True, True]


def sharded_layer(rank: int, world: int) -> tuple[float, list[str]]:
    """MoELayer.shard_experts against the same layer whole, latent, shared and recompute included; and its errors."""
    torch.manual_seed(0)
    layer = MoELayer(8, 16, 8, 3, num_shared_experts=1, latent_dim=4, recompute_activations=True,
                     gating="softmax").double()  # fmt: skip
    whole = MoELayer(8, 16, 8, 3, num_shared_experts=1, latent_dim=4, gating="softmax").double()
    whole.load_state_dict(layer.state_dict())
    layer.shard_experts(dist.group.WORLD)
    local = slice(rank * 8 // world, (rank + 1) * 8 // world)

    xs = [torch.randn(5 + r, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(r)) for r in range(world)]
    x = xs[rank].clone().requires_grad_()
    layer(x)[0].sin().sum().backward()
    for r in range(world):
        leaf = xs[r].clone().requires_grad_()
        whole(leaf)[0].sin().sum().backward()
        if r == rank:
            expected_dx = leaf.grad
    errors = [relative_error(x.grad, expected_dx)]
    for name, p in layer.named_parameters():
        grad = p.grad.clone()
        expected = dict(whole.named_parameters())[name].grad
        if name.startswith("experts."):
            assert p.allreduce is False
            expected = expected[local]
        else:
            dist.all_reduce(grad)
        errors.append(relative_error(grad, expected))

    said = []
    for attempt in (
        lambda: layer.shard_experts(dist.group.WORLD),
        lambda: MoELayer(8, 16, world + 1, 1).shard_experts(dist.group.WORLD),
        lambda: MoELayer(8, 16, 8, 1).shard_experts(dist.group.WORLD, ep_backend="symm_mem"),
        lambda: overflowing(rank),
    ):
        try:
            attempt()
            said.append("nothing")
        except (ValueError, RuntimeError, ImportError) as error:
            said.append(str(error))
    return max(errors), said


def overflowing(rank: int) -> None:
    """Only rank 0 overflows; every rank must raise."""
    torch.manual_seed(0)
    layer = MoELayer(8, 16, 8, 1, max_tokens_per_expert=4).shard_experts(dist.group.WORLD)
    with torch.no_grad():
        layer.router.weight.fill_(-1.0)[5] = 1.0
    layer(torch.rand(9 if rank == 0 else 2, 8))


@pytest.mark.parametrize("world", [2, 4])
def test_sharded_layer(world: int) -> None:
    for error, said in run_ranks(world, sharded_layer):
        assert error < 1e-12
        assert said[0] == "shard_experts was already called on this layer"
        assert f"ep_group has {world} ranks; its size must divide num_experts ({world + 1})" in said[1]
        assert said[2].startswith("ep_backend 'symm_mem' cannot be used: ")
        assert said[3].startswith("expert 5 was chosen 9 times on one rank, where its limit is 4 ")


def bias_update(rank: int, world: int) -> list[float]:
    from flashfusemoe_ds import Gating

    layer = MoELayer(8, 16, 4, 1, gating=Gating(score="sigmoid", expert_bias=True, bias_update_rate=0.5))
    layer.shard_experts(dist.group.WORLD)
    layer.router.routed_counts += torch.tensor([4, 0, 0, 0]) if rank == 0 else torch.tensor([0, 4, 8, 0])
    layer.update_expert_bias(dist.group.WORLD)
    return layer.router.expert_bias.tolist()


def test_bias_follows_the_load_of_all_ranks() -> None:
    assert run_ranks(2, bias_update) == [[0.0, 0.0, -0.5, 0.5]] * 2


def test_one_rank_needs_no_transport() -> None:
    geometry = Geometry(num_experts=8, hidden_size=4, top_k=2, dtype=torch.float32)
    assert make_dispatcher(FlashFuseMoEConfig(), None, geometry).name == "local"
    group = SimpleNamespace()
    comm = SimpleNamespace(get_world_size=lambda group: 1)
    assert make_dispatcher(FlashFuseMoEConfig(), group, geometry, comm).name == "local"
