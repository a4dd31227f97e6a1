# SPDX-License-Identifier: GPL-3.0-or-later
"""OverlappedGradSync on gloo ranks, without an engine: the averages that a plain all-reduce gives, in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flashfusemoe_ds import MoELayer, OverlappedGradSync, get_dense_params
from tests.distributed import run_ranks

WORLD, D = 4, 6


class Net(nn.Module):
    """Linears in a row; `use` says which of the last three run."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(D, D) for _ in range(6))
        self.dtype_of_its_own = nn.Linear(D, D)
        self.reentrant = False

    def forward(self, x: Tensor, use: tuple[int, ...] = (3, 4, 5)) -> Tensor:
        for i in (0, 1, 2, *use):
            layer = self.layers[i]
            x = x + (checkpoint(layer, x, use_reentrant=True) if self.reentrant else layer(x)).tanh()
        low = self.dtype_of_its_own.weight.dtype
        return (x + self.dtype_of_its_own(x.to(low)).to(x.dtype)).square().mean()


def net() -> Net:
    torch.manual_seed(0)
    model = Net().double()
    model.dtype_of_its_own.float()
    return model


def x_of(rank: int, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(100 * rank + step)
    return torch.randn(5, D, generator=generator, dtype=torch.float64).requires_grad_()


def averaged(model: nn.Module) -> list[Tensor]:
    """Average gradients by one all-reduce each, unused ones as zeros. Leaves the model's own alone."""
    means = []
    for param in model.parameters():
        grad = torch.zeros_like(param) if param.grad is None else param.grad.clone()
        dist.all_reduce(grad)
        means.append(grad / dist.get_world_size())
    return means


def error(model: nn.Module, expected: list[Tensor]) -> float:
    """The largest relative error; of gradients that should be zero, the absolute one."""
    errors = []
    for param, mean in zip(model.parameters(), expected, strict=True):
        scale = float(mean.abs().max()) or 1.0
        errors.append(float((param.grad - mean).abs().max()) / scale)
    return max(errors)


def both_ways(
    device: torch.device, backward: Callable[[Net, int], None], steps: int = 4, **options: Any
) -> dict[str, float]:
    """The same backwards with and without; the largest relative error of the averages over all steps."""
    plain, model = net().to(device), net().to(device)
    plain.reentrant = model.reentrant = options.pop("reentrant", False)
    sync = OverlappedGradSync(get_dense_params(model), dist.group.WORLD, **options)
    worst = 0.0
    for step in range(steps):
        backward(plain, step)
        expected = averaged(plain)
        backward(model, step)
        sync.finish()
        worst = max(worst, error(model, expected))
        sync.finish()  # changes nothing
        worst = max(worst, error(model, expected))
        model.zero_grad(set_to_none=step % 2 == 0)
        plain.zero_grad()
    return {"error": worst, "buckets": sync.num_buckets}


def every_case(rank: int, world: int, device_type: str = "cpu") -> dict[str, dict[str, float]]:
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device(device_type)

    def backward(use: Callable[[int], tuple[int, ...]] = lambda step: (3, 4, 5)) -> Callable[[Net, int], None]:
        return lambda model, step: model(x_of(rank, step).to(device), use(step)).backward()

    def twice(model: Net, step: int) -> None:
        """Two backwards before each finish: the first round shows it."""
        for micro in range(2):
            model(x_of(rank, 10 * step + micro).to(device)).backward()

    return {
        "plain": both_ways(device, backward()),
        "one bucket": both_ways(device, backward(), num_buckets=1),
        "many buckets": both_ways(device, backward(), num_buckets=50),
        "never used": both_ways(device, backward(lambda step: (4, 5))),
        "used on some ranks": both_ways(device, backward(lambda step: (3, 4, 5)[(rank + step) % 4 :])),
        "reentrant": both_ways(device, backward(), reentrant=True),
        "shared and reentrant": both_ways(device, backward(lambda step: (4, 4)), reentrant=True),
        "two backwards": both_ways(device, twice),
    }


def test_averages_are_those_of_a_plain_all_reduce() -> None:
    for found in run_ranks(WORLD, every_case):
        for name, case in found.items():
            # float32 sums of the one float32 layer; the others agree to 1e-15.
            assert case["error"] < 1e-6, name
        assert found["one bucket"]["buckets"] == 2, "one for each dtype"
        assert 2 < found["plain"]["buckets"] <= 8
        assert found["many buckets"]["buckets"] > found["plain"]["buckets"]


def under_no_sync(rank: int, world: int) -> dict[str, Any]:
    plain, model = net(), net()
    sync = OverlappedGradSync(get_dense_params(model), dist.group.WORLD)
    worst, before_last = 0.0, True
    for step in range(3):
        for micro in range(3):
            plain(x_of(rank, 10 * step + micro)).backward()
        expected = averaged(plain)
        with sync.no_sync():
            for micro in range(2):
                model(x_of(rank, 10 * step + micro)).backward()
            local = [p.grad.clone() for p in model.parameters()]
            with pytest.raises(RuntimeError, match="under no_sync"):
                sync.finish()
        before_last &= all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), local, strict=True))
        model(x_of(rank, 10 * step + 2)).backward()
        sync.finish()
        worst = max(worst, error(model, expected))
        plain.zero_grad(), model.zero_grad()

    # All of it under no_sync: finish still reduces.
    plain(x_of(rank, 0)).backward()
    expected = averaged(plain)
    with sync.no_sync():
        model(x_of(rank, 0)).backward()
    sync.finish()
    worst = max(worst, error(model, expected))
    plain.zero_grad(), model.zero_grad()

    # Without finish: the end of the backward has done it, since every parameter has its gradient.
    plain(x_of(rank, 1)).backward()
    expected = averaged(plain)
    model(x_of(rank, 1)).backward()
    worst = max(worst, error(model, expected))
    plain.zero_grad(), model.zero_grad()

    sync.remove_hooks()
    model(x_of(rank, 2)).backward()
    plain(x_of(rank, 2)).backward()
    local = all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), plain.parameters(), strict=True))
    return {"error": worst, "untouched before the last": before_last, "local without hooks": local}


def test_accumulation_and_the_end_of_a_backward() -> None:
    for found in run_ranks(2, under_no_sync):
        assert found.pop("error") < 1e-6
        assert found == {"untouched before the last": True, "local without hooks": True}


def sharded_experts(rank: int, world: int) -> dict[str, Any]:
    """A MoE layer at ep_size 2 on four ranks, dense and expert gradients, against the same layer whole."""
    torch.manual_seed(0)
    whole, layer = (MoELayer(8, 12, 4, 2).double() for _ in range(2))
    layer.load_state_dict(whole.state_dict())
    pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    twins = [dist.new_group([0, 2]), dist.new_group([1, 3])]
    layer.shard_experts(pairs[rank // 2])
    dense = OverlappedGradSync(get_dense_params(layer), dist.group.WORLD, num_buckets=2)
    experts = OverlappedGradSync(layer.expert_params, twins[rank % 2], num_buckets=2, divisor=world)
    worst = 0.0
    for step in range(3):
        x = torch.randn(7, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(10 * step + rank))
        for model in (whole, layer):
            model(x)[0].sin().sum().backward()
        expected = {name: mean for (name, _), mean in zip(whole.named_parameters(), averaged(whole), strict=True)}
        dense.finish()
        experts.finish()
        for name, param in layer.named_parameters():
            mean = expected[name]
            if name.startswith("experts."):
                mean = mean[2 * (rank % 2) : 2 * (rank % 2) + 2]
            worst = max(worst, float((param.grad - mean).abs().max() / mean.abs().max()))
        if step < 2:
            whole.zero_grad(), layer.zero_grad()
    # One more backward on top of the averages: for a mean over all ranks that would do no harm, here it would.
    message = ""
    try:
        layer(x)[0].sum().backward()
    except RuntimeError as refused:
        message = str(refused)
    return {"error": worst, "message": message}


def test_sharded_experts_are_summed_over_their_holders() -> None:
    for found in run_ranks(WORLD, sharded_experts):
        assert found["error"] < 1e-12
        assert "averaged already" in found["message"] and "no_sync" in found["message"]


def refusals(rank: int, world: int) -> dict[str, str]:
    def message(*args: Any, **kwargs: Any) -> str:
        with pytest.raises(ValueError) as caught:
            OverlappedGradSync(*args, **kwargs)
        return str(caught.value)

    weight, frozen = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3), requires_grad=False)
    found = {
        "none": message([]),
        "twice": message([weight, weight]),
        "frozen": message([weight, frozen]),
        "buckets": message([weight], num_buckets=0),
        "divisor": message([weight], divisor=0.0),
    }
    # A second backward before finish, once buckets leave: in-flight sums would miss it.
    sync = OverlappedGradSync([weight, second := nn.Parameter(torch.ones(2))])
    (weight * second).sum().backward()
    sync.finish()
    weight.grad = second.grad = None
    weight.sum().backward()  # leaves; `second` is still missing, so the end of the backward finishes nothing
    with pytest.raises(RuntimeError) as caught:
        weight.sum().backward()
    found["again"] = str(caught.value)
    return found


def test_refusals_name_the_argument() -> None:
    (found,) = run_ranks(1, refusals)
    assert "params is empty" in found["none"]
    assert "lists a parameter twice" in found["twice"]
    assert found["frozen"].startswith("params[1], of shape (3,)")
    assert "num_buckets is 0" in found["buckets"]
    assert "divisor is 0.0" in found["divisor"]
    assert "accumulated again" in found["again"] and "shape (2,)" in found["again"]
