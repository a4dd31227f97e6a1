# SPDX-License-Identifier: GPL-3.0-or-later
"""Layers whose experts are spread over gloo ranks: in float64 against the dense layer, each overlap switch on and off,
under everything that autograd and activation checkpointing do; and the order in which things are launched."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flashfusemoe_ds import FlashFuseMoEConfig, MoE, MoELayer
from flashfusemoe_ds.dispatch.base import Combined, Pending
from flashfusemoe_ds.dispatch.ranges import Range
from tests.close import relative_error
from tests.distributed import run_ranks
from tests.ds.experts_zoo import CustomExpert, GatedMLP
from tests.kept import is_a_copy_of_weights, kept_for_backward
from tests.nn.test_moe_layer import dense_forward

D, EXPERTS = 8, 8
SWITCHES = ("shared_experts", "input_grad", "router_grad")
ALL_ON, ALL_OFF = (dict.fromkeys(SWITCHES, on) for on in (True, False))
# Layers that differ in what stands around the exchange.
LAYERS = {
    "plain": {},
    "shared": {"num_shared_experts": 1},
    "recompute": {"recompute_activations": True},
    "sent again": {"recompute_dispatch": True},
    "latent, two shared, recompute": {
        "latent_dim": 4,
        "num_shared_experts": 2,
        "recompute_activations": True,
        "recompute_dispatch": True,
    },
    "not gated": {"activation": "gelu", "num_shared_experts": 1},
}

Results = dict[str, Tensor]


def whole_layer(changes: dict[str, Any]) -> MoELayer:
    torch.manual_seed(3)
    settings = {"gating": "softmax_renorm", "aux_loss_coeff": 0.1, "z_loss_coeff": 0.01, **changes}
    layer = MoELayer(D, 12, EXPERTS, 3, **settings).double()
    with torch.no_grad():
        layer.router.weight.mul_(100)  # as initialised, all logits are nearly equal
    return layer


def sharded(changes: dict[str, Any], overlap: dict[str, bool]) -> MoELayer:
    return whole_layer(changes).shard_experts(dist.group.WORLD, overlap=overlap)


def tokens(rank: int, world: int) -> Tensor:
    """Uneven, and none on the last of more than two ranks."""
    count = 0 if rank == world - 1 > 1 else 6 + 5 * rank
    return torch.randn(count, D, dtype=torch.float64, generator=torch.Generator().manual_seed(rank))


def loss_of(out: Tensor, losses: dict[str, Tensor]) -> Tensor:
    direction = torch.randn(out.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(9))
    return (out * direction).sum() + (sum(losses.values()) if out.numel() else 0)


def gradients(layer: nn.Module, x: Tensor, out: Tensor) -> Results:
    """Output and every gradient by name, those that are None left out."""
    grads = {name: p.grad for name, p in layer.named_parameters()}
    found = {"out": out.detach(), "x": x.grad, **grads}
    return {name: t for name, t in found.items() if t is not None}


def step(layer: MoELayer, rank: int, world: int) -> Results:
    x = tokens(rank, world).requires_grad_()
    out, losses = layer(x)
    loss_of(out, losses).backward()
    return gradients(layer, x, out)


def dense_step(changes: dict[str, Any], rank: int, world: int) -> Results:
    """What a rank must find: its own output and dx, the sum over ranks of each parameter's gradient."""
    layer = whole_layer(changes)
    for r in range(world):
        x = tokens(r, world).requires_grad_()
        out, losses = dense_forward(layer, x)
        loss_of(out, losses).backward()
        if r == rank:
            mine = {"out": out.detach(), "x": x.grad}
    local = slice(rank * EXPERTS // world, (rank + 1) * EXPERTS // world)
    grads = {name: p.grad[local] if name.startswith("experts.") else p.grad for name, p in layer.named_parameters()}
    return {**mine, **grads}


def against_dense(found: Results, expected: Results) -> list[str]:
    wrong = [] if found.keys() == expected.keys() else [f"{sorted(found)} is not {sorted(expected)}"]
    for name, value in found.items():
        if name not in ("out", "x") and not name.startswith("experts."):
            value = value.clone()
            dist.all_reduce(value)
        error = relative_error(value, expected[name])
        if not error < 1e-12:
            wrong.append(f"{name}: {error}")
    return wrong


def bits(found: Results, expected: Results) -> list[str]:
    if found.keys() != expected.keys():
        return [f"{sorted(found)} is not {sorted(expected)}"]
    return [name for name, value in found.items() if not torch.equal(value, expected[name])]


def every_layer_and_switch(rank: int, world: int) -> list[str]:
    wrong = []
    for name, changes in LAYERS.items():
        first = step(sharded(changes, ALL_ON), rank, world)
        wrong += [f"{name}: {w}" for w in against_dense(first, dense_step(changes, rank, world))]
        dx_when_waited_for = None
        for values in product((True, False), repeat=len(SWITCHES)):
            overlap = dict(zip(SWITCHES, values, strict=True))
            found = step(sharded(changes, overlap), rank, world)
            expected = dict(first)
            if not (overlap["input_grad"] and overlap["router_grad"]) and "num_shared_experts" in changes:
                # Three gradients make dx, and autograd adds them up as they come: one order while the rows' comes
                # last, another while it comes first.
                if dx_when_waited_for is None:
                    dx_when_waited_for = found["x"]
                    if not relative_error(found["x"], first["x"]) < 1e-15:
                        wrong.append(f"{name}: dx is further off than one rounding")
                expected["x"] = dx_when_waited_for
            wrong += [f"{name}, {overlap}: {w}" for w in bits(found, expected)]
    return wrong


@pytest.mark.parametrize("world", [2, 4])
def test_every_switch_gives_the_dense_layer_and_the_same_bits(world: int) -> None:
    assert run_ranks(world, every_layer_and_switch) == [[]] * world


def under(way: str, layer: MoELayer, x: Tensor) -> Results:
    """A step taken in one of the ways that autograd offers."""
    if way.startswith("checkpoint"):
        out, losses = checkpoint(layer, x, use_reentrant=way.endswith("reentrant, old"))
        # Losses that leave a reentrant checkpoint in a dict have no gradient; both ways do without.
        loss_of(out, {}).backward()
    elif way == "anomaly detection":
        with torch.autograd.detect_anomaly(check_nan=True):
            out, losses = layer(x)
            loss_of(out, losses).backward()
    elif way == "no_grad":
        with torch.no_grad():
            out, _ = layer(x)
        assert not out.requires_grad
    elif way == "backward twice":
        out, losses = layer(x)
        loss = loss_of(out, losses)
        loss.backward(retain_graph=True)
        loss.backward()
    elif way == "router alone":
        out, losses = layer(x)
        (layer.router.weight.grad,) = torch.autograd.grad(loss_of(out, losses), [layer.router.weight])
    else:
        out, losses = layer(x)
        loss_of(out, losses).backward()
    return gradients(layer, x, out)


def cast(rank: int, world: int, changes: dict[str, Any]) -> list[str]:
    """float32 parameters under autocast: the dense layer but for rounding, float32 gradients, no cast weight kept."""
    layer, x = sharded(changes, ALL_ON).float(), tokens(rank, world).float().requires_grad_()
    with kept_for_backward() as kept, torch.autocast("cpu", dtype=torch.bfloat16):
        out, losses = layer(x)
    loss_of(out, losses).backward()
    found, expected = gradients(layer, x, out), dense_step(changes, rank, world)
    wrong = [f"kept: {t.dtype} {tuple(t.shape)}" for t in kept if is_a_copy_of_weights(t, layer)]
    wrong += [f"{name} is {t.dtype}" for name, t in found.items() if name != "out" and t.dtype is not torch.float32]
    for name in found:
        if name.startswith("experts.") or name in ("out", "x"):
            error = relative_error(found[name], expected[name])
            wrong += [] if error < 2e-2 else [f"{name}: {error}"]
    return wrong


def every_way(rank: int, world: int) -> list[str]:
    wrong = [f"autocast: {w}" for name in ("plain", "shared") for w in cast(rank, world, LAYERS[name])]
    for changes, overlap in product((LAYERS["latent, two shared, recompute"], LAYERS["shared"]), (ALL_ON, ALL_OFF)):
        plain = step(sharded(changes, overlap), rank, world)
        without_losses = sharded({**changes, "aux_loss_coeff": 0.0, "z_loss_coeff": 0.0}, overlap)
        unlossy = step(without_losses, rank, world)
        experts = {name for name in plain if name.startswith("experts.")}
        expected = {
            "checkpoint": unlossy,
            "checkpoint, reentrant, old": unlossy,
            "anomaly detection": plain,
            "no_grad": {"out": plain["out"]},
            "backward twice": {name: t if name == "out" else 2 * t for name, t in plain.items()},
            "router alone": {name: plain[name] for name in ("out", "router.weight")},
            "x without gradient": {name: t for name, t in plain.items() if name != "x"},
            "frozen experts": {name: t for name, t in plain.items() if name not in experts},
            "frozen down_proj": {name: t for name, t in plain.items() if name != "experts.down_proj"},
            "frozen router": {name: t for name, t in plain.items() if name != "router.weight"},
        }
        for way, results in expected.items():
            layer, x = sharded(changes, overlap), tokens(rank, world).requires_grad_(way != "x without gradient")
            for name, p in layer.named_parameters():
                if way.startswith("frozen") and name.startswith((way[7:], f"experts.{way[7:]}")):
                    p.requires_grad_(False)
            wrong += [f"{overlap}, {way}: {w}" for w in bits(under(way, layer, x), results)]
    return wrong


@pytest.mark.parametrize("world", [2, 4])
def test_every_way_of_taking_a_step(world: int) -> None:
    assert run_ranks(world, every_way) == [[]] * world


class Recorder:
    """Notes what a layer launches and waits for, in order: `>name` for a start, `name` for a call, `<name` for a
    wait."""

    def __init__(self, layer: MoELayer) -> None:
        self.log: list[str] = []
        self.dispatcher, layer.dispatcher = layer.dispatcher, self
        select = layer.experts._products
        layer.experts._products = lambda x: RecordedProducts(select(x), self.log)
        layer.router.weight.register_post_accumulate_grad_hook(lambda _: self.log.append("router's backward"))
        if layer.shared_experts is not None:
            layer.shared_experts.register_forward_pre_hook(lambda *_: self.log.append("shared"))
            layer.shared_experts.down_proj.register_post_accumulate_grad_hook(
                lambda _: self.log.append("shared's backward")
            )

    name, ep_size = "recorder", property(lambda self: self.dispatcher.ep_size)

    def start_dispatch(self, *args: Any) -> Pending[Any]:
        return self._started("dispatch", self.dispatcher.start_dispatch(*args))

    def start_redispatch(self, *args: Any) -> Pending[Any]:
        return self._started("redispatch", self.dispatcher.start_redispatch(*args))

    def start_combine(self, *args: Any) -> Combined:
        rows, weights = self.dispatcher.start_combine(*args)
        rows = self._started("rows", rows)
        return Combined(rows, None if weights is None else self._started("weights", weights))

    def _started(self, name: str, pending: Pending[Any]) -> Pending[Any]:
        self.log.append(f">{name}")

        def finish() -> Any:
            self.log.append(f"<{name}")
            return pending.wait()

        return Pending(finish)


class RecordedProducts:
    def __init__(self, products: Any, log: list[str]) -> None:
        self._products, self._log = products, log

    def yielding(self) -> RecordedProducts:
        return RecordedProducts(self._products.yielding(), self._log)

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._products, name)
        if name in ("up", "down", "dgated", "dx", "dw_down", "dw_up"):
            self._log.append("dw" if name.startswith("dw") else name)  # which of the two is first does not matter
        return value


def launches(rank: int, world: int, overlap: dict[str, bool]) -> tuple[list[str], list[str]]:
    layer = sharded(LAYERS["shared"], overlap)
    recorder = Recorder(layer)
    x = tokens(rank, world).requires_grad_()
    out, losses = layer(x)
    forward = list(recorder.log)
    recorder.log.clear()
    loss_of(out, losses).backward()
    return forward, recorder.log


def order_of_launches(rank: int, world: int) -> dict[str, tuple[list[str], list[str]]]:
    settings = {"all on": ALL_ON, "all off": ALL_OFF}
    settings |= {f"no {name}": {**ALL_ON, name: False} for name in SWITCHES}
    return {name: launches(rank, world, overlap) for name, overlap in settings.items()}


def test_order_of_launches() -> None:
    beside = [">dispatch", "shared", "<dispatch", "up", "down", ">rows", "<rows"]
    after = [">dispatch", "<dispatch", "up", "down", ">rows", "<rows", "shared"]
    received = [">redispatch", "<redispatch", "dgated", "dx"]
    overlapped = [*received, ">rows", ">weights", "dw", "dw", "<weights"]
    for orders in run_ranks(2, order_of_launches):
        forward, backward = orders["all on"]
        assert forward == beside
        # The experts' node is the latest, so it runs first; then whatever waits for no exchange; the rows last.
        assert backward == [*overlapped, "shared's backward", "router's backward", "<rows"]
        forward, backward = orders["no router_grad"]
        assert forward == beside
        assert backward == [*overlapped, "<rows", "shared's backward", "router's backward"]
        forward, backward = orders["no shared_experts"]
        assert forward == after
        assert backward == ["shared's backward", *overlapped, "router's backward", "<rows"]
        for name in ("no input_grad", "all off"):
            forward, backward = orders[name]
            assert forward == (beside if name == "no input_grad" else after)
            backward.remove("shared's backward")
            computed = [*received, "dw", "dw", ">rows", ">weights", "<weights", "<rows"]
            assert backward == [*computed, "router's backward"]


def drop_in(rank: int, world: int) -> list[str]:
    """Switches through DeepSpeed's MoE, with fused experts and with modules of their own, which know some of them."""
    wrong = []
    for kind in (GatedMLP, CustomExpert):
        results = []
        for section in ({"overlap": ALL_ON}, {"overlap": ALL_OFF}, {"recompute_dispatch": True}):
            torch.manual_seed(5)
            moe = MoE(D, kind(D, 7), num_experts=4, ep_size=2, k=2).double()
            moe.set_deepspeed_parallelism()
            moe.configure(FlashFuseMoEConfig.from_section(section))
            x = tokens(rank, world).requires_grad_()
            out, l_aux, _ = moe(x)
            loss_of(out, {"aux": l_aux}).backward()
            results.append(gradients(moe, x, out))
        assert {"out", "x", "deepspeed_moe.gate.wg.weight"} <= results[0].keys()
        assert any(name.startswith("deepspeed_moe.experts.") for name in results[0])
        if kind is GatedMLP:
            assert moe.deepspeed_moe.experts.recompute_dispatch
        wrong += [f"{kind.__name__}: {w}" for result in results[1:] for w in bits(results[0], result)]
    return wrong


def test_switches_of_the_drop_in_layer() -> None:
    assert run_ranks(2, drop_in) == [[], []]


def refused(rank: int, world: int) -> list[str]:
    said = []
    for settings in (
        {"ep_backend": "nvlink"},
        {"overlap": {"shared": True}},
        {"overlap": {"input_grad": 1}},
        {"overlap": True},
        {"num_sms": 8},
        {"symm_mem": {"num_sms": 0}},
    ):
        layer = whole_layer({})
        try:
            layer.shard_experts(dist.group.WORLD, **settings)
            said.append("nothing")
        except ValueError as error:
            said.append(str(error))
        # Refused before anything was changed: the layer is whole and can still be sharded.
        assert layer.experts.down_proj.shape[0] == EXPERTS and layer.dispatcher.name == "local"
        layer.shard_experts(dist.group.WORLD)
    return said


def test_wrong_settings_are_refused_and_named() -> None:
    for said in run_ranks(2, refused):
        backend, unknown, not_bool, not_section, no_key, range_ = said
        assert backend.startswith('flashfusemoe.ep_backend is "nvlink"; valid: ') and "'nccl'" in backend
        assert unknown.startswith("flashfusemoe.overlap.shared: unknown key; ") and "shared_experts" in unknown
        assert not_bool.startswith("flashfusemoe.overlap.input_grad is 1; ")
        assert not_section.startswith("flashfusemoe.overlap is true; ")
        assert no_key.startswith("flashfusemoe.num_sms: unknown key; ")
        assert range_.startswith("flashfusemoe.symm_mem.num_sms is 0; ")


def profiled(rank: int, world: int) -> list[str]:
    layer = sharded(LAYERS["shared"], ALL_ON)
    step(layer, rank, world)
    with torch.autograd.profiler.profile() as profile:  # what torch.profiler wraps; that one takes seconds to start
        step(layer, rank, world)
    return sorted({event.name for event in profile.function_events if event.name.startswith("moe:")})


def test_a_profiler_sees_every_stage() -> None:
    forward = ["dispatch", "beside", "dispatch.wait", "experts", "combine"]
    backward = ["redispatch", "experts", "combine", "combine.wait_weights", "combine.wait_rows"]
    expected = sorted(f"moe:{name}" for name in forward) + sorted(f"moe:backward.{name}" for name in backward)
    assert run_ranks(2, profiled) == [sorted(expected)] * 2


def test_ranges_for_nsight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pushed where there is CUDA, and popped when what is in them fails."""
    log: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda.nvtx, "range_push", log.append)
    monkeypatch.setattr(torch.cuda.nvtx, "range_pop", lambda: log.append("pop"))
    with pytest.raises(KeyError), Range("outer"), Range("inner"):
        raise KeyError
    assert log == ["moe:outer", "moe:inner", "pop", "pop"]
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: False)
    with Range("on a CPU"):
        pass
    assert len(log) == 4
