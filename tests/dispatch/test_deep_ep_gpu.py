# SPDX-License-Identifier: GPL-3.0-or-later
"""deep_ep between two GPUs, with the DeepEP that is installed, against the nccl transport. Ids name the class it has.

Both transports order rows by rank, then token, and round the sum of two ranks' rows once: nccl and `Buffer` from
float32, `ElasticBuffer` in one addition of bfloat16. So they agree in every bit. With more than two ranks they need
not: `ElasticBuffer` adds up in the order of a token's experts.
"""

from __future__ import annotations

import os
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from flashfusemoe_ds.config import DeepEPConfig
from flashfusemoe_ds.dispatch.base import Geometry
from flashfusemoe_ds.dispatch.deep_ep import DeepEPDispatcher, class_in_package, machine_refusal
from flashfusemoe_ds.dispatch.nccl import NcclDispatcher
from flashfusemoe_ds.dispatch.select import close_dispatcher
from flashfusemoe_ds.nn.moe_layer import MoELayer
from tests.dispatch import contract
from tests.dispatch.test_symm_mem_gpu import error_of, exchange, expected_exchange, layer, tokens_and_routes
from tests.distributed import run_ranks

WORLD = 2
MAX_TOKENS = 512  # ElasticBuffer compiles its kernels for this, the hidden size, the experts and top_k
HIDDEN = 256
DEVICE = "cuda"
BF16 = torch.bfloat16
ON_GPUS = {"accelerator": "cuda", "timeout": 240}


def class_under_test() -> Any:
    reason = machine_refusal()
    if reason is None and torch.cuda.device_count() < WORLD:
        reason = f"it needs {WORLD} GPUs"
    if reason is not None:
        return pytest.param("none", marks=pytest.mark.skip(reason=f"deep_ep: {reason}"))
    return class_in_package()


pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("buffer", [class_under_test()])]


def make(group: dist.ProcessGroup, geometry: Geometry) -> DeepEPDispatcher:
    return DeepEPDispatcher(group, geometry, DeepEPConfig(max_tokens_per_rank=MAX_TOKENS))


# --- rows, weights and gradients ---------------------------------------------------------------------------------


def mistakes(rank: int, world: int, buffer: str) -> list[str]:
    """The contract in bf16, and operations under way at once."""
    assert class_in_package() == buffer
    made: list[DeepEPDispatcher] = []

    def making(group: dist.ProcessGroup, geometry: Geometry) -> DeepEPDispatcher:
        made.append(make(group, geometry))
        return made[-1]

    found = contract.wrong_in_bf16(rank, world, making, HIDDEN, DEVICE)
    found += contract.wrong_when_waited_out_of_order(rank, world, making, Geometry(8, HIDDEN, 2, BF16), DEVICE)
    for dispatcher in made:
        dispatcher.close()
    return found


def test_contract(buffer: str) -> None:
    assert run_ranks(WORLD, mistakes, buffer, **ON_GPUS) == [[]] * WORLD


def differences(rank: int, world: int) -> dict[str, list[int]]:
    """By case, how many entries of (out, dx, dweight, dup, ddown) differ from those over nccl."""
    found = {}
    for top_k, num_experts in contract.top_k_and_experts(world):
        ours = make(dist.group.WORLD, Geometry(num_experts, HIDDEN, top_k, BF16))
        nccl = NcclDispatcher(dist.group.WORLD, num_experts)
        for case in contract.CASES:
            data = tokens_and_routes(case, rank, world, top_k, num_experts, HIDDEN, BF16)
            expected, actual, again = (layer(by, data, num_experts, rank, world) for by in (nccl, ours, ours))
            label = f"{case}, K={top_k}, E={num_experts}"
            found[label] = [int((a != e).sum()) for a, e in zip(actual, expected, strict=True)]
            found[f"{label}, again"] = [int((a != e).sum()) for a, e in zip(again, actual, strict=True)]
        ours.close()
    return found


def test_gradients_equal_those_over_nccl(buffer: str) -> None:
    for found in run_ranks(WORLD, differences, **ON_GPUS):
        assert len(found) == 2 * 4 * len(contract.CASES)
        assert {case: n for case, n in found.items() if any(n)} == {}


# --- layers ------------------------------------------------------------------------------------------------------


def training(rank: int, world: int) -> dict[str, list[float]]:
    """20 steps of one layer, by transport: each step's loss and the sum of its input gradient. Token counts differ
    between ranks and steps; every fourth step one rank has none."""
    curves = {}
    for backend, recompute in (("nccl", False), ("deep_ep", False), ("deep_ep", True)):
        torch.manual_seed(0)
        again = {"recompute_activations": recompute, "recompute_dispatch": recompute}
        moe = MoELayer(HIDDEN, 2 * HIDDEN, 8, 2, num_shared_experts=1, **again)
        moe.to(DEVICE, BF16).shard_experts(dist.group.WORLD, backend, deep_ep={"max_tokens_per_rank": MAX_TOKENS})
        assert moe.dispatcher.name == backend
        optimizer = torch.optim.SGD(moe.parameters(), lr=0.5)
        curve = curves[f"{backend}, {recompute=}"] = []
        for step in range(20):
            g = torch.Generator(DEVICE).manual_seed(10 * (step % 4) + rank)
            num_tokens = (512, 300 + 100 * rank, 400 * rank, 77)[step % 4]
            x = torch.randn(num_tokens, HIDDEN, device=DEVICE, dtype=BF16, generator=g).requires_grad_()
            loss = (moe(x)[0].float() - x.detach().float().roll(1, dims=1)).square().sum() / (512 * world)
            loss.backward()
            for param in moe.parameters():
                if getattr(param, "allreduce", True):
                    dist.all_reduce(param.grad)
            optimizer.step()
            optimizer.zero_grad()
            curve += [loss.item(), x.grad.double().sum().item()]
        close_dispatcher(moe.dispatcher)
    return curves


def test_training_equals_training_over_nccl(buffer: str) -> None:
    for curves in run_ranks(WORLD, training, **ON_GPUS):
        over_nccl = curves.pop("nccl, recompute=False")
        # Steps 0 and 16 have the same 512 tokens.
        assert over_nccl[2 * 16] < 0.9 * over_nccl[0]
        assert len(curves) == 2 and all(curve == over_nccl for curve in curves.values())


# --- a transport's life ------------------------------------------------------------------------------------------


def life(rank: int, world: int, buffer: str) -> tuple[dict[str, str], list[str]]:
    """What each attempt says, and which exchanges between them were wrong."""
    geometry = Geometry(8, HIDDEN, 2, BF16)
    data = tokens_and_routes("uneven", rank, world, 2, 8, HIDDEN, BF16)
    many = [torch.cat([t] * 4)[: MAX_TOKENS + 100] for t in tokens_and_routes("even", rank, world, 2, 8, HIDDEN, BF16)]
    said, wrong = {}, []

    def check(name: str, dispatcher: DeepEPDispatcher, call: Any) -> None:
        expected = expected_exchange(*call, 8, world)
        if not all(torch.equal(a, e) for a, e in zip(exchange(dispatcher, *call), expected, strict=True)):
            wrong.append(name)

    first = make(dist.group.WORLD, geometry)
    check("the first", first, data)
    said["many"] = error_of(lambda: check("many tokens on rank 1", first, many if rank == 1 else data))[0]
    check("after many", first, data)
    torch.use_deterministic_algorithms(True)
    said["deterministic"] = str(machine_refusal())
    torch.utils.deterministic.fill_uninitialized_memory = False
    said["deterministic, memory not filled"] = str(machine_refusal())
    check("deterministic", first, data)
    torch.use_deterministic_algorithms(False)
    said["float32"] = error_of(lambda: first.start_dispatch(data[0].float(), *data[1:]))[0]
    second = make(dist.group.WORLD, geometry)
    first.close(), first.close()
    said["closed"] = error_of(lambda: exchange(first, *data))[0]
    check("the second, when the first was closed", second, data)
    second.close()
    with patch.dict(os.environ):
        os.environ.pop("EP_DISABLE_GIN", None)
        said["with GIN"] = error_of(lambda: make(dist.group.WORLD, geometry).close())[0]
    return said, wrong


def test_life_of_a_transport(buffer: str) -> None:
    for said, wrong in run_ranks(WORLD, life, buffer, **ON_GPUS):
        assert wrong == []
        too_many = f"ValueError: flashfusemoe.deep_ep.max_tokens_per_rank is {MAX_TOKENS}, and in this call 1 of the 2"
        assert said["many"].startswith(too_many if buffer == "ElasticBuffer" else "nothing")
        assert "fill_uninitialized_memory = False" in said["deterministic"]
        assert said["deterministic, memory not filled"] == "None"
        assert "was set up for rows of torch.bfloat16 and got torch.float32" in said["float32"]
        assert said["closed"] == "ValueError: ep_backend deep_ep: the transport was closed, and a layer still uses it"
        assert said["with GIN"] == "nothing" or "EP_DISABLE_GIN=1" in said["with GIN"]
