# SPDX-License-Identifier: GPL-3.0-or-later
"""Engines over tiny Transformers models under AutoEP: their config, a step, and their weights by stock's names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from tests.hf import models
from tests.hf.models import BATCH


def batch(rank: int, step: int) -> dict[str, Tensor]:
    """Another batch for every rank and step."""
    return models.batch(seed=10_000 * rank + step)


def config(ep_size: int, stage: int, optimizer: str = "adamw", **extra: Any) -> dict[str, Any]:
    params = {
        # eps: see tests/ds/tiny.py.
        "adamw": {"type": "AdamW", "params": {"lr": 1e-2, "eps": 1e-3, "weight_decay": 0.01, "torch_adam": True}},
        "sgd": {"type": "SGD", "params": {"lr": 1.0}},
    }
    return {
        "train_micro_batch_size_per_gpu": BATCH,
        "optimizer": params[optimizer],
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 0.0,  # at fp32 stage 0, stock clips by an average of the ranks' own norms
        "zero_allow_untested_optimizer": True,  # SGD
        "expert_parallel": {"enabled": True, "autoep_size": ep_size},
        "steps_per_print": 10**9,
        **extra,
    }


def start(initialize: Callable[..., Any], model: nn.Module, ds_config: dict[str, Any]) -> Any:
    return initialize(model=model, model_parameters=list(model.parameters()), config=ds_config)[0]


def train_step(engine: Any, inputs: dict[str, Tensor]) -> float:
    loss = engine(**inputs).loss
    engine.backward(loss)
    engine.step()
    return float(loss.detach())


def eval_loss(engine: Any, rank: int) -> float:
    engine.eval()
    with torch.no_grad():
        loss = float(engine(**batch(rank, 999)).loss)
    engine.train()
    return loss


def weights(model: nn.Module, ep_rank: int) -> dict[str, Tensor]:
    """The model's weights in float32; of its experts those of this rank, each by its global id."""
    from deepspeed import zero

    named = dict(model.named_parameters())
    with zero.GatheredParameters(list(named.values())):
        own = {name: param.detach().float().clone() for name, param in named.items()}
    result = {}
    for name, value in own.items():
        prefix, _, leaf = name.rpartition(".")
        if prefix.endswith(".experts") and leaf in ("w1", "w2", "w3"):
            for i, expert in enumerate(value):
                result[f"{prefix}.{leaf}.{ep_rank * len(value) + i}"] = expert
        else:
            result[name.replace(".router.gate.", ".gate.")] = value
    return result


def plain_weights(model: nn.Module) -> dict[str, Tensor]:
    """The same of a plain Transformers model, whose experts are all here, under the same names."""
    result = {}
    for name, value in model.named_parameters():
        prefix, _, leaf = name.rpartition(".")
        if leaf == "gate_up_proj" and value.dim() == 3:
            for i, expert in enumerate(value.detach()):
                result[f"{prefix}.w1.{i}"], result[f"{prefix}.w3.{i}"] = expert.float().chunk(2)
        elif leaf == "down_proj" and value.dim() == 3:
            result.update({f"{prefix}.w2.{i}": expert.float() for i, expert in enumerate(value.detach())})
        else:
            # AutoEP's names of Qwen's shared expert.
            name = name.replace(".shared_expert.", ".shared_experts.")
            result[name.replace(".shared_expert_gate.", ".shared_experts_gate.")] = value.detach().float()
    return result
