# SPDX-License-Identifier: GPL-3.0-or-later
"""Gradients under stock DeepSpeed's parameter names, for comparison and inspection."""

from __future__ import annotations

from torch import Tensor, nn

from flashfusemoe_ds.ds.fused_experts import STOCK_PREFIX, FusedExperts


def stock_grads(module: nn.Module) -> dict[str, Tensor]:
    """Gradients of all parameters that have one, under the names that `module.state_dict()` uses."""
    grads: dict[str, Tensor] = {}
    for path, child in module.named_modules():
        prefix = f"{path}." if path else ""
        if isinstance(child, FusedExperts):
            stacked = {name: p.grad for name, p in child.stacked().items()}
            if any(g is None for g in stacked.values()):
                continue
            for i in range(child.num_local_experts):
                for name, grad in child.expert_tensors(i, stacked).items():
                    grads[f"{prefix}{STOCK_PREFIX}{i}.{name}"] = grad
        else:
            for name, param in child.named_parameters(recurse=False):
                if param.grad is not None:
                    grads[prefix + name] = param.grad
    return grads
