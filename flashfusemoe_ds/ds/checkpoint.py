# SPDX-License-Identifier: GPL-3.0-or-later
"""Guards an engine's checkpoints: weights interchange with stock DeepSpeed at any ep_size, optimizer state does not.

Expert weights are saved under stock names, one file per expert, so both sides read them. Optimizer state is saved flat
in parameter order, and stacked experts order it differently from per-expert ones; another ep_size does too. Loading it
anyway would scramble Adam's moments and the fp32 master weights. A small file beside each checkpoint records the
layout; a checkpoint without one is stock DeepSpeed's.
"""

from __future__ import annotations

import json
import os
from typing import Any

from deepspeed import comm as dist
from deepspeed.moe.layer import MoE as StockMoE
from torch import nn

from flashfusemoe_ds.ds.fused_experts import FusedExperts

LAYOUT_FILE = "flashfusemoe_layout.json"


def expert_layout(model: nn.Module) -> list[dict[str, Any]]:
    """How each MoE layer's parameters lie, in the model's order: "stacked" or "per_expert", and its ep_size."""
    return [
        {
            "experts": "stacked" if isinstance(m.deepspeed_moe.experts, FusedExperts) else "per_expert",
            "ep_size": m.ep_size,
        }
        for m in model.modules()
        if isinstance(m, StockMoE)
    ]


def guard_checkpoints(engine: Any) -> None:
    """Wraps save_checkpoint and load_checkpoint on this engine instance."""
    save, load = engine.save_checkpoint, engine.load_checkpoint

    def save_checkpoint(save_dir: str, tag: str | None = None, *args: Any, **kwargs: Any) -> Any:
        # DeepSpeed's own default; resolved here because the layout file lies in the tag's folder.
        tag = str(f"global_step{engine.global_steps}" if tag is None else tag)
        if dist.get_rank() == 0:
            # Before the save, whose barriers then make it visible to every rank.
            os.makedirs(os.path.join(save_dir, tag), exist_ok=True)
            with open(os.path.join(save_dir, tag, LAYOUT_FILE), "w") as file:
                json.dump({"version": 1, "moe_layers": expert_layout(engine.module)}, file, indent=1)
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
            verdict = [_judge(engine.module, load_dir, tag) if dist.get_rank() == 0 else None]
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


def _judge(model: nn.Module, load_dir: str, tag: str | None) -> str | None:
    """`foreign_optimizer`, with an error as its answer: rank 0 must not raise while the others wait for it."""
    try:
        return foreign_optimizer(model, load_dir, tag)
    except Exception as error:
        return _refusal(load_dir, str(tag), f"its {LAYOUT_FILE} cannot be read ({type(error).__name__}: {error})")


def foreign_optimizer(model: nn.Module, load_dir: str, tag: str | None) -> str | None:
    """Why the checkpoint's optimizer state must not be loaded into this model; None if it may. Reads no tensor."""
    tag = tag or _latest(load_dir)
    if tag is None or not os.path.isdir(os.path.join(load_dir, tag)):
        return None  # nothing there: DeepSpeed says so itself
    ours = expert_layout(model)
    path = os.path.join(load_dir, tag, LAYOUT_FILE)
    if not os.path.isfile(path):
        if any(layer["experts"] == "stacked" for layer in ours):
            return _refusal(
                load_dir, tag, f"it has no {LAYOUT_FILE}, so stock DeepSpeed saved it, per expert; here it is stacked"
            )
        return None
    with open(path) as file:
        theirs = json.load(file)["moe_layers"]
    if len(theirs) != len(ours):
        return _refusal(load_dir, tag, f"it has {len(theirs)} MoE layers; the model has {len(ours)}")
    for i, (a, b) in enumerate(zip(theirs, ours, strict=True)):
        if a != b:
            return _refusal(load_dir, tag, f"MoE layer {i} was saved with {a}; the model has {b}")
    return None


def _latest(load_dir: str) -> str | None:
    path = os.path.join(load_dir, "latest")
    if not os.path.isfile(path):
        return None
    with open(path) as file:
        return file.read().strip()


def _refusal(load_dir: str, tag: str, reason: str) -> str:
    return (
        f"cannot load the optimizer state of {os.path.join(load_dir, tag)}: {reason}. The weights can be loaded: "
        "pass load_optimizer_states=False (and load_lr_scheduler_states=False to restart the schedule)"
    )
