# SPDX-License-Identifier: GPL-3.0-or-later
"""A fused Mixture-of-Experts backend for DeepSpeed.

    from flashfusemoe_ds import MoE              # in place of deepspeed.moe.layer.MoE
    import flashfusemoe_ds as ffmoe
    engine, optimizer, _, _ = ffmoe.initialize(args=args, model=model, model_parameters=params)

Names are resolved on first use: importing the package imports neither deepspeed nor triton.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_HOME = {
    "MoE": "ds.moe",
    "initialize": "ds.engine",
    "attach": "ds.engine",
    "close": "ds.engine",
    "get_dense_params": "ds.params",
    "OverlappedGradSync": "ds.grad_overlap",
    "replace_moe": "ds.replace",
    "FlashFuseMoEConfig": "config",
    "Gating": "nn.router",
    "MoELayer": "nn.moe_layer",
    "fused_moe": "nn.functional",
    "register_experts_implementation": "hf.experts",
}

__all__ = [
    "FlashFuseMoEConfig",
    "Gating",
    "MoE",
    "MoELayer",
    "OverlappedGradSync",
    "__version__",
    "attach",
    "close",
    "fused_moe",
    "get_dense_params",
    "initialize",
    "register_experts_implementation",
    "replace_moe",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
