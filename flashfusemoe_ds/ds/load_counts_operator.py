# SPDX-License-Identifier: GPL-3.0-or-later
"""`load_counts.tally` as a torch.library operator: one node of torch.compile's graphs.

An operator, because whether the forward is a recomputed one is known only when the graph runs.

Imported where a graph is traced, and only there.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flashfusemoe_ds.ds.load_counts import add_unless_recomputed


@torch.library.custom_op(
    "flashfusemoe::tally",
    mutates_args=("sums",),
    schema="(Tensor(a!) sums, Tensor? counts_E, Tensor? idx_TK, Tensor? aux_loss, Tensor? z_loss) -> ()",
    tags=(torch.Tag.cudagraph_unsafe,),  # a replay would not ask whether it is a recomputation
)
def tally(
    sums: Tensor, counts_E: Tensor | None, idx_TK: Tensor | None, aux_loss: Tensor | None, z_loss: Tensor | None
) -> None:
    """See `load_counts.tally`."""
    add_unless_recomputed(sums, counts_E, idx_TK, aux_loss, z_loss)


@tally.register_fake
def _(sums, counts_E, idx_TK, aux_loss, z_loss):
    return None
