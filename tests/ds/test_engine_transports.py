# SPDX-License-Identifier: GPL-3.0-or-later
"""What an engine does with its layers' transports: names them for their messages, and closes them together."""

from __future__ import annotations

import flashfusemoe_ds as ffmoe
from flashfusemoe_ds.config import FlashFuseMoEConfig
from flashfusemoe_ds.ds.engine import _summary
from tests.distributed import run_ranks
from tests.ds import tiny


class Closing:
    """Stands for a transport that owns buffers."""

    name, ep_size = "closing", 2

    def __init__(self, log: list[str], label: str) -> None:
        self.log, self.label = log, label

    def close(self) -> None:
        self.log.append(self.label)


def named_and_closed(rank: int, world: int) -> tuple[dict[str, str | None], list[str]]:
    config = {
        "train_micro_batch_size_per_gpu": tiny.TOKENS,
        "optimizer": {"type": "AdamW", "params": {"torch_adam": True, "lr": 1e-3}},
    }
    model = tiny.TinyModel(ffmoe.MoE, ep_size=2)
    engine, *_ = ffmoe.initialize(model=model, model_parameters=model.parameters(), config=config)
    layers = {name: m for name, m in engine.module.named_modules() if hasattr(m, "dispatcher")}
    names = {name: layer.dispatcher.layer for name, layer in layers.items()}
    ffmoe.close(engine)  # nothing to free over all-to-all

    log: list[str] = []
    for name, layer in layers.items():
        layer.dispatcher = Closing(log, name)
    ffmoe.close(engine)
    return names, log


def test_transports_have_their_layers_names_and_close_in_the_models_order() -> None:
    for names, closed in run_ranks(2, named_and_closed):
        assert names == {"moe_a.deepspeed_moe": "moe_a.deepspeed_moe", "moe_b.deepspeed_moe": "moe_b.deepspeed_moe"}
        assert closed == ["moe_a.deepspeed_moe", "moe_b.deepspeed_moe"]


def test_the_log_says_nothing_of_layers_that_an_engine_has_not() -> None:
    """As under AutoEP, whose layers have a line of their own."""
    said = _summary(FlashFuseMoEConfig(), [], "after backward: the engine has no optimizer")
    assert said == "flashfusemoe: gradients are reduced after backward: the engine has no optimizer"
