# SPDX-License-Identifier: GPL-3.0-or-later
"""log_expert_load and expert_bias_update_rate: what is written is what a by-stander counts, each forward once."""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import pytest
import torch
import torch._dynamo
from deepspeed.runtime.pipe.module import PipelineModule
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint as torch_checkpoint

import flashfusemoe_ds
from flashfusemoe_ds import FlashFuseMoEConfig, Gating, MoE, MoELayer
from flashfusemoe_ds.ds.expert_load import check_expert_load
from flashfusemoe_ds.ds.load_counts import AUX, FORWARDS, KEPT, count_in_place, find_layers, tally
from flashfusemoe_ds.plot_load import read_history
from tests.distributed import run_ranks
from tests.ds import tiny
from tests.ds.experts_zoo import GatedMLP

EP_SIZE, WORLD, MICRO, STEPS, EVERY = 2, 2, 2, 5, 2  # steps 3 and 4 are written, step 5 is not yet
SAMPLES_PER_STEP = WORLD * MICRO * tiny.TOKENS
CHECKPOINTS: dict[str, Any] = {
    "none": None,
    "torch_reentrant": partial(torch_checkpoint, use_reentrant=True),
    "torch_non_reentrant": partial(torch_checkpoint, use_reentrant=False),
    "deepspeed": deepspeed.checkpointing.checkpoint,
}


def monitored(folder: Path | None, detail: Any, every: int = EVERY, **section: Any) -> dict[str, Any]:
    """Sections of a config that writes expert load as CSV files into `folder`."""
    monitor = (
        {} if folder is None else {"csv_monitor": {"enabled": True, "output_path": str(folder), "job_name": "run"}}
    )
    return {**monitor, "flashfusemoe": {"log_expert_load": detail, "log_expert_load_steps": every, **section}}


def written(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """Series without "Train/MoE/" -> (samples, value)."""
    series = {}
    for path in sorted((folder / "run").glob("Train_MoE_*.csv")):
        header, *rows = csv.reader(path.read_text().splitlines())
        assert header[0] == "step"
        series[path.stem.removeprefix("Train_MoE_")] = [(int(step), float(value)) for step, value in rows]
    return series


# ---- a deepspeed.moe model on two ranks

Seen = dict[str, list[tuple[list[int], int, float]]]  # layer -> (routes per expert, kept routes, l_aux) per forward


def _watched_steps(engine: Any, rank: int) -> Seen:
    """Trains STEPS steps, and notes what each training forward routed, as read from its gate right after it."""
    latest: dict[str, Any] = {}
    for name in ("moe_a", "moe_b"):
        gate = getattr(engine.module, name).deepspeed_moe.gate
        gate.register_forward_hook(lambda _module, _args, out, name=name: latest.__setitem__(name, out))
    seen: Seen = defaultdict(list)
    for step in range(STEPS):
        for micro in range(MICRO):
            loss = engine(*tiny.batch(rank, step, micro))
            for name, (routing, l_aux) in latest.items():
                seen[name].append((routing.counts_E.tolist(), int((routing.idx_TK >= 0).sum()), float(l_aux)))
            engine.backward(loss)
            engine.step()
        engine.eval()
        with torch.no_grad():
            engine(*tiny.batch(rank, 99, step))
        engine.train()
    return dict(seen)


def _count(rank: int, world_size: int, folder: Path) -> dict[str, tuple[Seen, dict[str, list[float]]]]:
    """For each kind of checkpointing what was seen, and the sums that each layer holds after the last step."""
    seen = {}
    for name, checkpoint in CHECKPOINTS.items():
        model = tiny.build(MoE, EP_SIZE, rank, tiny.global_weights(), checkpoint)
        config = tiny.config(stage=1, accumulation=MICRO, **monitored(folder / name, "experts"))
        torch.manual_seed(70 + rank)
        engine = tiny.start(flashfusemoe_ds.initialize, model, config)
        notes = _watched_steps(engine, rank)
        left = {layer: getattr(engine.module, layer).deepspeed_moe.gate.load_sums.tolist() for layer in notes}
        seen[name] = notes, left
        engine.destroy()
    return seen


def expected_series(ranks: list[Seen]) -> dict[str, list[tuple[int, float]]]:
    """Every series by its definition, from what was seen on all ranks."""
    series = defaultdict(list)
    for interval in range(STEPS // EVERY):
        forwards = range(interval * EVERY * MICRO, (interval + 1) * EVERY * MICRO)
        samples = (interval + 1) * EVERY * SAMPLES_PER_STEP
        layers = {}
        for name in ("moe_a", "moe_b"):
            notes = [rank[name][i] for rank in ranks for i in forwards]
            counts = [sum(column) for column in zip(*(note[0] for note in notes), strict=True)]
            share = [count / sum(counts) for count in counts]
            layers[name] = {
                "load_max_over_mean": max(share) * len(share),
                "load_entropy": -sum(p * math.log(p, len(share)) for p in share if p),
                "dropped_share": 1 - sum(note[1] for note in notes) / sum(counts),
                "dead_experts": sum(count == 0 for count in counts),
                "aux_loss": sum(note[2] for note in notes) / len(notes),
            }
            for expert, p in enumerate(share):
                series[f"{name}_expert_{expert}"].append((samples, p * len(share)))
            for metric, value in layers[name].items():
                series[f"{name}_{metric}"].append((samples, value))
        a, b = layers["moe_a"], layers["moe_b"]  # top-2 and top-1 of the same tokens
        for metric in ("load_max_over_mean", "load_entropy", "aux_loss"):
            series[metric].append((samples, (a[metric] + b[metric]) / 2))
        series["load_max_over_mean_worst"].append((samples, max(a["load_max_over_mean"], b["load_max_over_mean"])))
        series["load_entropy_worst"].append((samples, min(a["load_entropy"], b["load_entropy"])))
        series["dropped_share"].append((samples, (2 * a["dropped_share"] + b["dropped_share"]) / 3))
        series["dead_experts"].append((samples, a["dead_experts"] + b["dead_experts"]))
    return series


def test_what_is_written_is_what_was_routed(tmp_path: Path) -> None:
    ranks = run_ranks(WORLD, _count, tmp_path)
    for name in CHECKPOINTS:
        actual, expected = written(tmp_path / name), expected_series([rank[name][0] for rank in ranks])
        assert actual.keys() == expected.keys(), name
        for series, points in expected.items():
            assert [x for x, _ in actual[series]] == [x for x, _ in points], (name, series)
            assert [y for _, y in actual[series]] == pytest.approx([y for _, y in points], rel=1e-5, abs=1e-9), series
        # What is written are ratios, the same if every forward counted twice. The sums of the last step, which no
        # interval has ended yet, are not.
        for notes, left in (rank[name] for rank in ranks):
            for layer, sums in left.items():
                counts, kept, l_aux = zip(*notes[layer][-MICRO:], strict=True)
                last = [*map(sum, zip(*counts, strict=True)), sum(kept), MICRO, sum(l_aux), 0]
                assert sums == pytest.approx(last, rel=1e-6), (name, layer)
        assert all(0 < y < 1 for _, y in actual["dropped_share"])  # else the test would not see what is dropped
        assert all(y > 1.05 for _, y in actual["load_max_over_mean"])

    folder = tmp_path / "none"
    history = read_history(folder)  # the plot command finds all of it again
    assert {name: len(experts) for name, experts in history.experts.items()} == {"moe_a": 8, "moe_b": 4}
    assert history.layers["moe_b"]["aux_loss"] == dict(written(folder)["moe_b_aux_loss"])
    assert history.overall["dead_experts"] == dict(written(folder)["dead_experts"])


# ---- what else runs in a spawn: MoELayer, moving biases, copies that arrive late, mistakes


class _Layers(nn.Module):
    """A MoELayer with everything that is counted, and one that drops nothing; [T, 16] -> loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        gating = Gating(score="sigmoid", renormalize=True, expert_bias=True)
        limits = {"capacity_factor": 1.0, "allow_dropped_tokens": True}
        self.limited = MoELayer(16, 24, 8, 2, gating=gating, aux_loss_coeff=0.2, z_loss_coeff=0.01, **limits)
        self.dropless = MoELayer(16, 24, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        y, losses = self.limited(x)
        return self.dropless(y)[0].square().mean() + sum(losses.values())


def _layers_config(**extra: Any) -> dict[str, Any]:
    return tiny.config(stage=1, accumulation=1, **extra)


def _batch(rank: int, step: int) -> Tensor:
    return torch.randn(tiny.TOKENS, 16, generator=torch.Generator().manual_seed(100 * rank + step)) + 0.5


def _move_biases(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    """Five steps at a rate of 0.05, every one written; what this rank's forwards showed, and the bias after each."""
    config = _layers_config(**monitored(folder, "layers", every=1, expert_bias_update_rate=0.05))
    engine = tiny.start(flashfusemoe_ds.initialize, _Layers(), config)
    router, seen = engine.module.limited.router, defaultdict(list)
    for step in range(5):
        x = _batch(rank, step)
        with torch.no_grad():  # beside the engine, so that it counts nothing
            engine.eval()
            routing = engine.module.limited._limited(router(x))
            engine.train()
        seen["counts"].append(routing.counts_E)
        seen["kept"].append((routing.idx_TK >= 0).sum())
        loss = engine(x)
        seen["aux"].append(routing.losses["aux_loss"] / 0.2)
        seen["z"].append(routing.losses["z_loss"] / 0.01)
        engine.backward(loss)
        engine.step()
        seen["bias"].append(router.expert_bias.clone())
    router.update_expert_bias()  # what JSON asks for is done: nothing is left to move
    seen["bias_after"] = [router.expert_bias.clone()]
    engine.destroy()
    return {name: torch.stack(values) for name, values in seen.items()}


def _arrive_late(rank: int, world_size: int, folder: Path) -> None:
    """As on a GPU whose copies take two more steps, and where the last is there only when somebody waits for it."""
    from flashfusemoe_ds.ds import expert_load

    class Event:
        def __init__(self) -> None:
            self.asked = 0

        def query(self) -> bool:
            self.asked += 1
            return self.asked > 2

        def synchronize(self) -> None:
            self.asked = 3

    stock = expert_load._HostCopy.start
    expert_load._HostCopy.start = lambda sums: expert_load._HostCopy(sums, Event())
    engine = tiny.start(flashfusemoe_ds.initialize, _Layers(), _layers_config(**monitored(folder, "brief", every=2)))
    for step in range(6):
        engine.backward(engine(_batch(rank, step)))
        engine.step()
    flashfusemoe_ds.close(engine)
    expert_load._HostCopy.start = stock
    engine.destroy()


def _refusals(rank: int, world_size: int, folder: Path) -> dict[str, str]:
    """The sentence of every mistake, each made on both ranks at once."""
    layers, dense = _Layers, lambda: nn.Sequential(nn.Linear(16, 16))
    stock = {"replace_moe": False}
    unbiased = {"expert_bias_update_rate": 0.1}
    cases = {
        "no monitor": (layers, monitored(None, True)),
        "no layers": (dense, monitored(folder, "layers")),
        "stock layers": (lambda: nn.Sequential(_stock()), monitored(folder, "brief", **stock)),
        "no bias": (lambda: nn.Sequential(_stock()), {"flashfusemoe": unbiased}),
    }
    said = {}
    for name, (build, sections) in cases.items():
        with pytest.raises(ValueError) as raised:
            tiny.start(flashfusemoe_ds.initialize, build(), _layers_config(**sections))
        said[name] = str(raised.value)
    return said


def _stock() -> nn.Module:
    return tiny.StockMoE(16, GatedMLP(16, 24), num_experts=4)


def _all(rank: int, world_size: int, folder: Path) -> tuple[dict[str, Any], dict[str, str]]:
    moved = _move_biases(rank, world_size, folder / "biases")
    _arrive_late(rank, world_size, folder / "late")
    return moved, _refusals(rank, world_size, folder / "refused")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("load")


@pytest.fixture(scope="module")
def ran(folder: Path) -> list[tuple[dict[str, Any], dict[str, str]]]:
    return run_ranks(WORLD, _all, folder)


def test_biases_move_by_the_load_of_all_ranks(ran: list[Any]) -> None:
    (first, _), (second, _) = ran
    bias = torch.zeros(8)
    for step, counts in enumerate(first["counts"] + second["counts"]):
        load = counts.float()
        bias = bias + 0.05 * torch.sign(load.mean() - load)
        for rank in (first, second):
            assert torch.equal(rank["bias"][step], bias)
    for rank in (first, second):
        assert torch.equal(rank["bias_after"][0], rank["bias"][-1])


def test_a_moe_layer_tells_its_losses_and_what_it_dropped(ran: list[Any], folder: Path) -> None:
    (first, _), (second, _) = ran
    series = {name: [y for _, y in points] for name, points in written(folder / "biases").items()}
    counts = (first["counts"] + second["counts"]).double()
    load = counts / counts.mean(1, keepdim=True)
    assert series["limited_load_max_over_mean"] == pytest.approx(load.max(1)[0].tolist(), rel=1e-6)
    dropped = 1 - (first["kept"] + second["kept"]) / counts.sum(1)
    assert series["limited_dropped_share"] == pytest.approx(dropped.tolist(), rel=1e-5) and min(dropped) > 0
    for name in ("aux", "z"):
        mean = (first[name] + second[name]) / 2
        assert series[f"limited_{name}_loss"] == pytest.approx(mean.tolist(), rel=1e-5)
        assert series[f"{name}_loss"] == series[f"limited_{name}_loss"]  # the only layer that has one
    assert set(series["dropless_dropped_share"]) == {0.0} and "dropless_aux_loss" not in series


def test_late_copies_keep_the_monitor_in_order(ran: list[Any], folder: Path) -> None:
    """W&B drops what is written for a step before the last one written."""
    series = written(folder / "late")
    assert 5 <= len(series) <= 10
    samples = WORLD * tiny.TOKENS
    # Asked at once, a step later, and two steps later, when the monitor's newest number is that of the step before.
    assert {tuple(x for x, _ in points) for points in series.values()} == {(3 * samples, 5 * samples, 6 * samples)}


@pytest.mark.parametrize(
    ("case", "sentence"),
    [
        ("no monitor", "flashfusemoe.log_expert_load is true, but no monitor of DeepSpeed's is enabled"),
        ("no layers", 'flashfusemoe.log_expert_load is "layers", but the model has no MoE layer that counts'),
        ("stock layers", "no MoE layer that counts; found 0, but stock layers, and subclasses of MoELayer"),
        ("no bias", "flashfusemoe.expert_bias_update_rate is 0.1, but no MoE layer has a bias on its choices"),
    ],
)
def test_mistakes_are_refused_on_every_rank(ran: list[Any], case: str, sentence: str) -> None:
    for _, said in ran:
        assert sentence in said[case]


def test_pipeline_stages_are_refused() -> None:
    stages = PipelineModule.__new__(PipelineModule)  # its constructor wants as many ranks
    nn.Module.__init__(stages)
    stages.num_stages = 2
    section = FlashFuseMoEConfig(log_expert_load=True)
    with pytest.raises(ValueError, match=r"log_expert_load is true, which does not work over 2 pipeline stages"):
        check_expert_load(stages, {"wandb": {"enabled": True}}, section)


def test_layers_that_cannot_count_are_named_and_left_alone() -> None:
    class Doubled(MoELayer):
        def forward(self, hidden_states: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            y, losses = super().forward(hidden_states)
            return 2 * y, losses

    model = nn.ModuleDict({"own": Doubled(16, 24, 4, 1), "plain": MoELayer(16, 24, 4, 1), "stock": _stock()})
    for _ in range(2):  # an engine may be built over a model that counts already
        layers, others = find_layers(model)
        assert [layer.name for layer in layers] == ["plain"] and others == ["own", "stock"]
        (layer,) = count_in_place(model, "cpu")
        assert type(model["own"]) is Doubled and not layer.sums.any()
        model["own"](torch.randn(7, 16))
        model["plain"](torch.randn(7, 16))
        assert layer.sums.tolist()[FORWARDS] == 1


# ---- AutoEP


def _autoep(rank: int, world_size: int, folder: Path) -> dict[str, Any]:
    from tests.ds import autoep_engines as hf
    from tests.hf.models import build

    sections = monitored(folder, "experts", every=1, expert_bias_update_rate=1e-3)
    engine = hf.start(
        flashfusemoe_ds.initialize, build("deepseek_v3"), hf.config(2, 1, bf16={"enabled": True}, **sections)
    )
    (layer,) = [m for m in engine.module.modules() if type(m).__name__ == "FusedAutoEPMoELayer"]
    seen = {"bias": [layer.router.e_score_correction_bias.clone()], "counts": []}
    layer.router.register_forward_hook(lambda _module, _args, out: seen["counts"].append(out[2].clone()))
    for step in range(3):
        hf.train_step(engine, hf.batch(rank, step))
        seen["bias"].append(layer.router.e_score_correction_bias.clone())
    engine.destroy()
    return seen


def test_autoep_layers_of_deepseek_v3(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs transformers: pip install flashfusemoe_ds[hf]")
    first, second = run_ranks(2, _autoep, tmp_path)
    series = written(tmp_path)
    name = next(n.removesuffix("_expert_0") for n in series if n.endswith("_expert_0"))
    for step in range(3):
        counts = (first["counts"][step] + second["counts"][step]).float()
        expected = first["bias"][step] + 1e-3 * torch.sign(counts.mean() - counts)
        for rank in (first, second):
            assert rank["bias"][step].dtype is torch.float32
            assert torch.equal(rank["bias"][step + 1], expected)
        load = [series[f"{name}_expert_{expert}"][step][1] for expert in range(8)]
        assert load == pytest.approx((counts / counts.mean()).tolist(), rel=1e-6)
    assert "aux_loss" not in series


# ---- graphs


def _model(kind: str) -> nn.Module:
    if kind == "deepspeed":
        return MoE(16, GatedMLP(16, 24), 8, k=2, top2_2nd_expert_sampling=False)
    return MoELayer(16, 24, 8, 2, gating=Gating(expert_bias=True), aux_loss_coeff=0.1, z_loss_coeff=0.01)


@pytest.mark.parametrize("kind", ["deepspeed", "MoELayer"])
@pytest.mark.parametrize("recompute", ["nothing", "graph", "in_graph"])
def test_a_graph_counts_what_eager_mode_counts(kind: str, recompute: str) -> None:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = _model(kind)
    (layer,) = count_in_place(model, "cpu")
    x = torch.randn(50, 16)
    model(x)
    eager = layer.sums.clone()
    assert eager[FORWARDS] == 1 and eager[AUX] > 0 and eager[:-4].sum() == 100
    assert (eager[KEPT] > 0) == (kind == "deepspeed")

    compile_graph = partial(torch.compile, fullgraph=True, backend="aot_eager")
    if recompute == "nothing":
        run = compile_graph(model)
    elif recompute == "graph":
        run = partial(torch_checkpoint, compile_graph(model), use_reentrant=False)
    else:
        # The checkpoint's own operator cannot hold the attributes that deepspeed.moe's layer sets: no fullgraph here.
        run = torch.compile(partial(torch_checkpoint, model, use_reentrant=False), backend="aot_eager")
    for forwards in (1, 2):
        layer.sums.zero_()
        for _ in range(forwards):
            run(x.clone().requires_grad_())[0].sum().backward()
        torch.testing.assert_close(layer.sums, forwards * eager)
    model.eval()
    layer.sums.zero_()
    run(x)
    assert not layer.sums.any()


# ---- GPUs


def _on_a_gpu(rank: int, world_size: int, folder: Path) -> None:
    """Counting, summing over ranks, moving biases, copying and writing, where whatever waits for the device raises."""
    config = _layers_config(**monitored(folder, "experts", every=2, expert_bias_update_rate=0.05))
    engine = tiny.start(flashfusemoe_ds.initialize, _Layers(), config)
    load = engine._flashfusemoe_expert_load

    def stock_step() -> None:  # DeepSpeed's own may wait
        engine._step_applied = True
        engine.global_steps += 1
        engine.global_samples += tiny.TOKENS

    load._stock_step = stock_step
    counts_E = torch.tensor([40, 0, 8, 8, 8, 8, 8, 16], device="cuda")
    idx_TK = torch.tensor([[0, -1]] * 48, device="cuda")
    loss = torch.tensor(0.3, device="cuda")
    try:
        for step in range(8):
            if step == 4:  # by then there is pinned memory, and communicators stand
                torch.cuda.synchronize()
                torch.cuda.set_sync_debug_mode("error")
            tally(engine.module.limited.router.load_sums, counts_E, idx_TK, loss, loss)
            load.take_model_step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    flashfusemoe_ds.close(engine)


@pytest.mark.gpu
def test_nothing_waits_for_the_device(tmp_path: Path) -> None:
    run_ranks(1, _on_a_gpu, tmp_path, accelerator="cuda")
    series = {name: [y for _, y in points] for name, points in written(tmp_path).items()}
    assert series["limited_load_max_over_mean"] == pytest.approx([40 / 12] * 4)
    assert series["limited_dropped_share"] == pytest.approx([0.5] * 4)
    assert series["limited_dead_experts"] == [1.0] * 4
    assert series["limited_aux_loss"] == pytest.approx([0.3 / 0.2] * 4)
