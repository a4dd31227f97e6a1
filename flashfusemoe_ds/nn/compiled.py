# SPDX-License-Identifier: GPL-3.0-or-later
"""What the layers need under torch.compile beyond the kernels' own operators (kernels/operators.py).

A layer whose experts all live on this rank becomes part of one graph. One whose experts are spread over ranks does
not: how many rows arrive is known only on the host, after an exchange, and collectives must not be reordered. There
torch.compile breaks its graph around `outside_graphs`, and what runs in it is eager mode's code.

Imported where a graph is traced, and only there: it loads torch's compiler.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flashfusemoe_ds.nn import limits


@torch.compiler.disable(
    reason="flashfusemoe_ds: how many rows come from other ranks, or go to an expert that is a module of its own, is "
    "known only on the host"
)
def outside_graphs(fn: Callable[..., Any], *args: Any) -> Any:
    """fn(*args) in eager mode, between two graphs; an error under fullgraph=True."""
    return fn(*args)


@torch.compiler.assume_constant_result
def exact_ratio(factor: float) -> tuple[int, int]:
    """`limits.exact_ratio` as a constant of the graph: its parser cannot be traced."""
    return limits.exact_ratio(factor)


@torch.library.custom_op(
    "flashfusemoe::refuse_overflow",
    mutates_args=(),
    schema="(Tensor idx_TK, Tensor counts_E, SymInt limit, str settings) -> Tensor",
    tags=(torch.Tag.cudagraph_unsafe,),  # it waits for the device
)
def refuse_overflow(idx_TK: Tensor, counts_E: Tensor, limit: int, settings: str) -> Tensor:
    """`limits.refuse_overflow` on this rank. Returns a copy of idx [T, K]: a node whose result nobody reads would be
    removed from the graph, and nothing may run before it that needs the check."""
    limits.refuse_overflow(counts_E, limit, settings)
    return idx_TK.clone(memory_format=torch.contiguous_format)


@refuse_overflow.register_fake
def _(idx_TK, counts_E, limit, settings):
    return idx_TK.new_empty(idx_TK.shape)
