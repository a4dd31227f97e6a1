# SPDX-License-Identifier: GPL-3.0-or-later
"""Which parameters belong to experts, and which are replicated on every data-parallel rank."""

from __future__ import annotations

from torch import nn


def is_expert_param(param: nn.Parameter) -> bool:
    """DeepSpeed's own mark (deepspeed.moe.utils.is_moe_param): `allreduce` is set and False."""
    return not getattr(param, "allreduce", True)


def get_dense_params(model: nn.Module, backward_order: bool = True) -> list[nn.Parameter]:
    """The trainable parameters that are no routed expert's: those whose gradients all data-parallel ranks average.

    Args:
        model: any module; routed experts are recognised by DeepSpeed's mark on their parameters.
        backward_order: last used first, the order in which a backward pass finishes their gradients, so that buckets
            built from the list fill early. Registration order, reversed, stands in for it.
    """
    dense = [p for p in model.parameters() if p.requires_grad and not is_expert_param(p)]
    return dense[::-1] if backward_order else dense
