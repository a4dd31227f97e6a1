# SPDX-License-Identifier: GPL-3.0-or-later
"""A Transformers model built from its config alone, on the meta device: every parameter's shape, and no memory."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn


def model_from_config(path: Path, dtype: torch.dtype) -> nn.Module:
    """AutoModelForCausalLM of a config.json, or of a folder that has one.

    Raises:
        ImportError: transformers is missing, or older than 5.6.
        ValueError: the file is no config that this transformers knows.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError(
            f'--model {path} is a Transformers config, which needs transformers: pip install "flashfusemoe_ds[hf]"'
        ) from error
    if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < (5, 6):
        raise ImportError(
            f"--model {path} needs transformers >= 5.6, not {transformers.__version__}: "
            'pip install "flashfusemoe_ds[hf]"'
        )
    try:
        config = transformers.AutoConfig.from_pretrained(path)
        with torch.device("meta"):
            return transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    except (ValueError, OSError, KeyError) as error:
        raise ValueError(f"--model {path} is no config of a causal language model: {error}") from error


def top_k_of(model: nn.Module) -> int | None:
    """Experts per token, where the config says it."""
    config = model.config.get_text_config()
    for name in ("num_experts_per_tok", "experts_per_token", "moe_topk", "moe_k"):
        if getattr(config, name, None) is not None:
            return int(getattr(config, name))
    return None
