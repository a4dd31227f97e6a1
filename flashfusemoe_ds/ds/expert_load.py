# SPDX-License-Identifier: GPL-3.0-or-later
"""Expert load at the step boundary: counts summed over ranks, written to DeepSpeed's monitor, and expert biases moved.

    forward, each micro batch    ds.load_counts adds up on the device
    optimizer step               every `log_expert_load_steps` steps the sums are added up over the data-parallel
                                 ranks, set to zero, and copied to the host behind the GPU's back
    a later step                 once the copy has arrived, rank 0 writes it

Nothing here waits for the device, except `flush` at the end of a run. With `expert_bias_update_rate` the sums are
added up over ranks after every step, because the biases move then.
"""

from __future__ import annotations

import json
import math
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime.pipe.module import PipelineModule
from deepspeed.utils import groups, logger
from torch import Tensor, nn

from flashfusemoe_ds.config import SECTION, FlashFuseMoEConfig
from flashfusemoe_ds.ds.autoep import autoep_enabled
from flashfusemoe_ds.ds.load_counts import (
    AUX,
    EXTRAS,
    FORWARDS,
    KEPT,
    CountedLayer,
    CountingRouter,
    Z,
    count_in_place,
    find_layers,
)
from flashfusemoe_ds.nn.losses import balanced_bias

PREFIX = "Train/MoE"
MONITORS = ("csv_monitor", "tensorboard", "wandb", "comet")  # sections of DeepSpeed's config
OTHERS = "stock layers, and subclasses of MoELayer, are not counted"


def wants_expert_load(section: FlashFuseMoEConfig) -> bool:
    """Whether the section asks for anything of this file."""
    return bool(section.log_expert_load) or section.expert_bias_update_rate is not None


def check_expert_load(model: nn.Module, ds_config: Mapping[str, Any], section: FlashFuseMoEConfig) -> None:
    """Refuses `log_expert_load` and `expert_bias_update_rate` where they cannot be had, as far as that shows before
    DeepSpeed's engine is built; layers that AutoEP will put in do not.

    Raises:
        ValueError: no monitor is enabled, there is nothing to count or no bias to move, or the model is cut into
            pipeline stages.
    """
    if not wants_expert_load(section):
        return
    if section.log_expert_load and not any(_enabled(ds_config, monitor) for monitor in MONITORS):
        raise ValueError(
            f"{_logging(section)}, but no monitor of DeepSpeed's is enabled to write it; enable one of the config's "
            f"sections {', '.join(MONITORS)}"
        )
    if isinstance(model, PipelineModule) and model.num_stages > 1:
        raise ValueError(
            f"{_logging(section) if section.log_expert_load else _moving(section)}, which does not work over "
            f"{model.num_stages} pipeline stages, whose layers are not all on one rank. Valid: one stage"
        )
    if not autoep_enabled(ds_config):
        _check_layers(model, section)


def observe_expert_load(engine: Any, section: FlashFuseMoEConfig) -> None:
    """Puts `log_expert_load` and `expert_bias_update_rate` into effect on an engine whose layers are fused.

    Raises:
        ValueError: see `check_expert_load`.
    """
    if not wants_expert_load(section):
        return
    check_expert_load(engine.module, engine.config, section)
    _check_layers(engine.module, section)
    _, others = find_layers(engine.module)
    if section.log_expert_load and others:
        logger.warning(f"{SECTION}.log_expert_load does not count in {', '.join(others)}: {OTHERS}")
    layers = count_in_place(engine.module, engine.device)
    if section.expert_bias_update_rate is not None:
        _keep_biases_exact(layers)
    engine._flashfusemoe_expert_load = ExpertLoad(engine, layers, section)


def flush_expert_load(engine: Any) -> None:
    """Writes what `log_expert_load` has copied but not yet written, if anything; waits for the device."""
    load = getattr(engine, "_flashfusemoe_expert_load", None)
    if load is not None:
        load.flush()


class ExpertLoad:
    """What follows an engine's optimizer step: its `_take_model_step` and `destroy` replaced on the instance."""

    def __init__(self, engine: Any, layers: Sequence[CountedLayer], section: FlashFuseMoEConfig) -> None:
        self.engine, self.layers = engine, layers
        self.detail, self.every = section.log_expert_load, section.log_expert_load_steps
        self.bias_rate = section.expert_bias_update_rate
        self.group = groups._get_sequence_data_parallel_group()  # ranks of different tokens
        self.sizes = [layer.num_experts + EXTRAS for layer in layers]
        self.interval = torch.zeros(sum(self.sizes), dtype=torch.float64, device=engine.device)  # of all ranks
        self.pending: deque[_HostCopy] = deque()
        # Where the monitor stands. W&B drops what comes with a smaller number than it has seen.
        self.samples = engine.global_samples
        self._stock_step, engine._take_model_step = engine._take_model_step, self.take_model_step
        self._stock_destroy, engine.destroy = engine.destroy, self.destroy

    def take_model_step(self, *args: Any, **kwargs: Any) -> None:
        """In place of DeepSpeedEngine._take_model_step, which runs once per optimizer step, skipped ones included."""
        self._stock_step(*args, **kwargs)
        self.write_arrived()
        self.samples = self.engine.global_samples
        due = bool(self.detail) and self.engine.global_steps % self.every == 0
        if due or self.bias_rate is not None:
            step = self._sum_over_ranks()
            if self.bias_rate is not None and self.engine.was_step_applied():
                self._move_biases(step)
            if self.detail:
                self.interval += step
        if due:
            if dist.get_rank() == 0:  # the only one whose monitor writes
                self.pending.append(_HostCopy.start(self.interval))
            self.interval = torch.zeros_like(self.interval)
            self.write_arrived()

    def write_arrived(self) -> None:
        """Writes the intervals whose copies have arrived, oldest first."""
        while self.pending and self.pending[0].arrived():
            sums = [part.tolist() for part in self.pending.popleft().host.split(self.sizes)]
            values = load_values(self.layers, sums, self.detail)
            self.engine.monitor.write_events([(f"{PREFIX}/{name}", value, self.samples) for name, value in values])

    def flush(self) -> None:
        """Writes everything that is due, waiting for it."""
        for copy in self.pending:
            copy.wait()
        self.write_arrived()

    def destroy(self) -> None:
        """In place of DeepSpeedEngine.destroy."""
        self.flush()
        self._stock_destroy()

    def _sum_over_ranks(self) -> Tensor:
        """What all ranks counted since the last call, of all layers; their sums start anew."""
        rows = [layer.sums for layer in self.layers]
        step = torch.cat(rows)
        torch._foreach_zero_(rows)
        dist.all_reduce(step, group=self.group)
        return step

    @torch.no_grad()
    def _move_biases(self, step: Tensor) -> None:
        for layer, sums in zip(self.layers, step.split(self.sizes), strict=True):
            if layer.bias_name is not None:
                bias_E = getattr(layer.router, layer.bias_name)
                bias_E.copy_(balanced_bias(bias_E, sums[:-EXTRAS], self.bias_rate))
                if isinstance(layer.router, CountingRouter):
                    layer.router.routed_counts.zero_()  # else update_expert_bias would move it once more


@dataclass(frozen=True)
class _HostCopy:
    """A copy on its way to the host, in pinned memory, with the event that says it is there; None once it is."""

    host: Tensor
    event: Any

    @classmethod
    def start(cls, sums: Tensor) -> _HostCopy:
        if sums.device.type == "cpu":
            return cls(sums, None)
        host = torch.empty_like(sums, device="cpu", pin_memory=True)
        host.copy_(sums, non_blocking=True)
        event = get_accelerator().Event()
        event.record()
        return cls(host, event)

    def arrived(self) -> bool:
        return self.event is None or self.event.query()

    def wait(self) -> None:
        if self.event is not None:
            self.event.synchronize()


# ---- what is written


def load_values(
    layers: Sequence[CountedLayer], sums: Sequence[Sequence[float]], detail: bool | str
) -> Iterator[tuple[str, float]]:
    """Names (without "Train/MoE/") and values of an interval's series.

    Args:
        sums: for each layer its E + 4 sums over all ranks.
        detail: log_expert_load of the section: over all layers; "layers" each layer too; "experts" each expert too.
    """
    # A layer that no token reached has no load.
    used = [(layer, row) for layer, row in zip(layers, sums, strict=True) if sum(row[:-EXTRAS]) > 0]
    per_layer = [_layer_values(layer, row) for layer, row in used]
    if used:
        yield from _over_layers(per_layer, used)
    if detail in ("layers", "experts"):
        for (layer, _), values in zip(used, per_layer, strict=True):
            for name, value in values.items():
                yield f"{layer.name}/{name}", value
    if detail == "experts":
        for layer, row in used:
            counts = row[:-EXTRAS]
            width, mean = len(str(layer.num_experts - 1)), sum(counts) / layer.num_experts
            for expert, count in enumerate(counts):
                yield f"{layer.name}/expert_{expert:0{width}d}", count / mean


def _layer_values(layer: CountedLayer, row: Sequence[float]) -> dict[str, float]:
    counts = row[:-EXTRAS]
    routes, forwards = sum(counts), row[FORWARDS]
    shares = [count / routes for count in counts if count]
    entropy = -sum(share * math.log(share) for share in shares)
    values = {
        "load_max_over_mean": max(counts) * layer.num_experts / routes,
        "load_entropy": entropy / math.log(layer.num_experts) if layer.num_experts > 1 else 1.0,
        "dropped_share": 1 - row[KEPT] / routes if layer.drops else 0.0,
        "dead_experts": float(counts.count(0)),
    }
    if layer.aux_loss_coeff:
        values["aux_loss"] = row[AUX] / forwards / layer.aux_loss_coeff
    if layer.z_loss_coeff:
        values["z_loss"] = row[Z] / forwards / layer.z_loss_coeff
    return values


def _over_layers(
    per_layer: Sequence[dict[str, float]], used: Sequence[tuple[CountedLayer, Sequence[float]]]
) -> Iterator[tuple[str, float]]:
    """The series of brief mode."""

    def values(name: str) -> list[float]:
        return [layer[name] for layer in per_layer if name in layer]

    routes = [sum(row[:-EXTRAS]) for _, row in used]
    dropped = sum(share * n for share, n in zip(values("dropped_share"), routes, strict=True))
    yield "load_max_over_mean", _mean(values("load_max_over_mean"))
    yield "load_max_over_mean_worst", max(values("load_max_over_mean"))
    yield "load_entropy", _mean(values("load_entropy"))
    yield "load_entropy_worst", min(values("load_entropy"))
    yield "dropped_share", dropped / sum(routes)
    yield "dead_experts", sum(values("dead_experts"))
    for name in ("aux_loss", "z_loss"):
        if values(name):
            yield name, _mean(values(name))


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


# ---- what is refused


def _logging(section: FlashFuseMoEConfig) -> str:
    return f"{SECTION}.log_expert_load is {json.dumps(section.log_expert_load)}"


def _moving(section: FlashFuseMoEConfig) -> str:
    return f"{SECTION}.expert_bias_update_rate is {section.expert_bias_update_rate}"


def _enabled(ds_config: Mapping[str, Any], monitor: str) -> bool:
    return bool((ds_config.get(monitor) or {}).get("enabled", False))


def _check_layers(model: nn.Module, section: FlashFuseMoEConfig) -> None:
    layers, others = find_layers(model)
    if section.log_expert_load and not layers:
        found = f"; found {', '.join(others)}, but {OTHERS}" if others else ""
        raise ValueError(f"{_logging(section)}, but the model has no MoE layer that counts{found}")
    if section.expert_bias_update_rate is None:
        return
    biased = [layer for layer in layers if layer.bias_name is not None]
    if not biased:
        raise ValueError(
            f"{_moving(section)}, but no MoE layer has a bias on its choices. Layers that have one: AutoEP's of "
            "DeepSeek-V3 (e_score_correction_bias), MoELayer with Gating(expert_bias=True); deepspeed.moe's has none"
        )
    for layer in biased:
        if isinstance(getattr(layer.router, layer.bias_name), nn.Parameter):
            raise ValueError(
                f"{_moving(section)}, but {layer.bias_name} of {layer.name} is a parameter, which the optimizer owns; "
                "it must be a buffer"
            )


def _keep_biases_exact(layers: Sequence[CountedLayer]) -> None:
    """In float32: steps of 1e-3 would vanish in 16 bits."""
    for layer in layers:
        if layer.bias_name is not None:
            setattr(layer.router, layer.bias_name, getattr(layer.router, layer.bias_name).float())
