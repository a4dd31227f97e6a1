# SPDX-License-Identifier: GPL-3.0-or-later
"""Guards an engine's checkpoints: weights interchange with stock DeepSpeed at any ep_size, optimizer state does not.

Expert weights are saved under stock names, one file per expert, so both sides read them. Optimizer state is saved flat
in parameter order, and stacked experts order it differently from per-expert ones; another ep_size does too. Loading it
anyway would scramble Adam's moments and the fp32 master weights. A small file beside each checkpoint records the
layout; a checkpoint without one is stock DeepSpeed's. `ds.convert` takes optimizer state from one layout to another.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from deepspeed import comm as dist
from deepspeed.moe.layer import MoE as StockMoE
from deepspeed.moe.utils import is_moe_param
from torch import nn

from flashfusemoe_ds.ds.expert_layout import ExpertLayout
from flashfusemoe_ds.ds.fused_experts import FusedExperts

LAYOUT_FILE = "flashfusemoe_layout.json"
# 1 had "experts" and "ep_size" of each layer alone.
LAYOUT_VERSION = 2
# Where DeepSpeed's optimizers, and a plain one, keep the parameters of each group, in the order of their state.
_GROUP_ATTRIBUTES = ("round_robin_bit16_groups", "bf16_groups", "fp16_groups")


def expert_layout(model: nn.Module) -> list[dict[str, Any]]:
    """How each MoE layer's parameters lie, in the model's order.

    Returns:
        Per layer `experts`, "stacked" or "per_expert"; its `ep_size`; its `name` in the model; `stacking`, the fields
        of its ExpertLayout where its experts are stacked, else None.
    """
    return [
        _layer_record(name, layout is not None, layout, m.ep_size)
        for name, m in model.named_modules()
        if isinstance(m, StockMoE)
        for layout in [m.deepspeed_moe.experts.layout if isinstance(m.deepspeed_moe.experts, FusedExperts) else None]
    ]


def layout_record(
    layers: Sequence[tuple[str, bool, ExpertLayout | None]], ep_size: int, expert_groups: list[list[str]] | None
) -> dict[str, Any]:
    """The content of a layout file.

    Args:
        layers: name, whether its experts are stacked, and how they are or would be.
        expert_groups: names of the parameters of each of the optimizer's groups of experts, on rank 0, in the order of
            their state.
    """
    return _record([_layer_record(*layer, ep_size) for layer in layers], expert_groups)


def _record(layers: list[dict[str, Any]], expert_groups: list[list[str]] | None) -> dict[str, Any]:
    return {"version": LAYOUT_VERSION, "moe_layers": layers, "expert_groups": expert_groups}


def _layer_record(name: str, stacked: bool, stacking: ExpertLayout | None, ep_size: int) -> dict[str, Any]:
    return {
        "experts": "stacked" if stacked else "per_expert",
        "ep_size": ep_size,
        "name": name,
        "stacking": None if stacking is None else asdict(stacking),
    }


def stacking_from_json(stacking: Mapping[str, Any] | None) -> ExpertLayout | None:
    """An ExpertLayout from what a layout file has of it."""
    if stacking is None:
        return None
    return ExpertLayout(**{key: tuple(value) if isinstance(value, list) else value for key, value in stacking.items()})


def expert_groups(engine: Any) -> list[list[str]] | None:
    """Names of the parameters in each of the optimizer's groups of experts, in the order of their state; None if there
    is no optimizer, or experts are in groups with others."""
    optimizer = engine.optimizer
    if optimizer is None:
        return None
    groups = next((getattr(optimizer, a) for a in _GROUP_ATTRIBUTES if hasattr(optimizer, a)), None)
    if groups is None:
        groups = [group["params"] for group in optimizer.param_groups]
    found = []
    for group in groups:
        if any(is_moe_param(p) for p in group):
            if not all(is_moe_param(p) and p in engine.param_names for p in group):
                return None
            found.append([engine.param_names[p] for p in group])
    return found


def write_layout(engine: Any, save_dir: str, tag: str) -> None:
    """Records how a checkpoint's optimizer state lies, for conversion. Engines of this package do it by themselves;
    for one of stock DeepSpeed call it after save_checkpoint, on every rank or on rank 0 alone."""
    if dist.get_rank() == 0:
        os.makedirs(os.path.join(save_dir, tag), exist_ok=True)
        with open(os.path.join(save_dir, tag, LAYOUT_FILE), "w") as file:
            json.dump(_record(expert_layout(engine.module), expert_groups(engine)), file, indent=1)


def guard_checkpoints(engine: Any) -> None:
    """Wraps save_checkpoint and load_checkpoint on this engine instance."""
    save, load = engine.save_checkpoint, engine.load_checkpoint

    def save_checkpoint(save_dir: str, tag: str | None = None, *args: Any, **kwargs: Any) -> Any:
        # DeepSpeed's own default; resolved here because the layout file lies in the tag's folder.
        tag = str(f"global_step{engine.global_steps}" if tag is None else tag)
        # Before the save, whose barriers then make it visible to every rank.
        write_layout(engine, save_dir, tag)
        return save(save_dir, tag, *args, **kwargs)

    def load_checkpoint(
        load_dir: str,
        tag: str | None = None,
        load_module_strict: bool = True,
        load_optimizer_states: bool = True,
        load_lr_scheduler_states: bool = True,
        load_module_only: bool = False,
        custom_load_fn: Any = None,
    ) -> Any:
        tag = None if tag is None else str(tag)
        # A universal checkpoint is loaded by parameter name, not by position; DeepSpeed checks it.
        loads_optimizer = load_optimizer_states and not load_module_only and engine.optimizer is not None
        if loads_optimizer and not engine.load_universal_checkpoint():
            # Rank 0 alone looks, so that ranks on other file systems do not decide otherwise.
            verdict = [_judge(engine, load_dir, tag) if dist.get_rank() == 0 else None]
            dist.broadcast_object_list(verdict, src=0)
            if verdict[0] is not None:
                raise ValueError(verdict[0])
        return load(
            load_dir,
            tag,
            load_module_strict=load_module_strict,
            load_optimizer_states=load_optimizer_states,
            load_lr_scheduler_states=load_lr_scheduler_states,
            load_module_only=load_module_only,
            custom_load_fn=custom_load_fn,
        )

    engine.save_checkpoint, engine.load_checkpoint = save_checkpoint, load_checkpoint


def _judge(engine: Any, load_dir: str, tag: str | None) -> str | None:
    """`foreign_optimizer`, with an error as its answer: rank 0 must not raise while the others wait for it."""
    try:
        return foreign_optimizer(engine, load_dir, tag)
    except Exception as error:
        return _refusal(load_dir, str(tag), f"its {LAYOUT_FILE} cannot be read ({type(error).__name__}: {error})")


def foreign_optimizer(engine: Any, load_dir: str, tag: str | None) -> str | None:
    """Why the checkpoint's optimizer state must not be loaded into this engine; None if it may. Reads no tensor."""
    tag = tag or _latest(load_dir)
    if tag is None or not os.path.isdir(os.path.join(load_dir, tag)):
        return None  # nothing there: DeepSpeed says so itself
    ours = expert_layout(engine.module)
    path = os.path.join(load_dir, tag, LAYOUT_FILE)
    if not os.path.isfile(path):
        if any(layer["experts"] == "stacked" for layer in ours):
            return _refusal(
                load_dir, tag, f"it has no {LAYOUT_FILE}, so stock DeepSpeed saved it, per expert; here it is stacked"
            )
        return None
    with open(path) as file:
        record = json.load(file)
    theirs = record["moe_layers"]
    if len(theirs) != len(ours):
        return _refusal(load_dir, tag, f"it has {len(theirs)} MoE layers; the model has {len(ours)}")
    for i, (a, b) in enumerate(zip(theirs, ours, strict=True)):
        for keys in (("experts", "ep_size"), ("up", "down", "packing")):
            saved, here = ({key: part[key] for key in keys if key in part} for part in (_parts(a), _parts(b)))
            if len(saved) == len(here) and saved != here:
                return _refusal(load_dir, tag, f"MoE layer {i} was saved with {saved}; the model has {here}")
    groups = record.get("expert_groups"), expert_groups(engine)
    if None not in groups and groups[0] != groups[1]:
        return _refusal(
            load_dir, tag, "the optimizer's groups list the experts' parameters " + _first_difference(*groups)
        )
    return None


def _parts(layer: Mapping[str, Any]) -> dict[str, Any]:
    """A layer's entry with the fields of its stacking, where it is stacked, beside the others; lists as tuples."""
    stacking = stacking_from_json(layer.get("stacking")) if layer["experts"] == "stacked" else None
    return {**layer, **({} if stacking is None else asdict(stacking))}


def _first_difference(saved: list[list[str]], here: list[list[str]]) -> str:
    for i, (a, b) in enumerate(zip(saved, here, strict=False)):
        for j, (name, other) in enumerate(zip(a, b, strict=False)):
            if name != other:
                return f"in another order: of group {i}, parameter {j} was saved as {name}; here it is {other}"
        if len(a) != len(b):
            return f"otherwise: {len(a)} in group {i}; here {len(b)}"
    return f"in {len(saved)} groups; here there are {len(here)}"


def _latest(load_dir: str) -> str | None:
    path = os.path.join(load_dir, "latest")
    if not os.path.isfile(path):
        return None
    with open(path) as file:
        return file.read().strip()


def _refusal(load_dir: str, tag: str, reason: str) -> str:
    return (
        f"cannot load the optimizer state of {os.path.join(load_dir, tag)}: {reason}. Convert the checkpoint "
        "(python -m flashfusemoe_ds.convert_checkpoint --help), or load its weights alone: "
        "pass load_optimizer_states=False (and load_lr_scheduler_states=False to restart the schedule)"
    )
