# SPDX-License-Identifier: GPL-3.0-or-later
"""What the kernels of symm_mem compile to for Hopper, one JSON line each: `python -m tests.kernels.peer_census`.

Run it with TRITON_INTERPRET unset, or there is nothing to compile.
"""

from __future__ import annotations

import json
from dataclasses import asdict

import torch
from torch import Tensor

from flashfusemoe_ds.kernels import peer
from flashfusemoe_ds.kernels.peer_slab import Slab
from tests.kernels import census

# Rows move 16 bytes at a time, through shared memory: several tiles are under way at once.
ROWS = ("LDGSTS.E.BYPASS.128", "STG.E.128")
# A stage: everybody's writes, then the ticket, the flags, the wait.
MEETS = ("MEMBAR.ALL.GPU", "ATOMG.E.ADD.64.STRONG.GPU", "MEMBAR.ALL.SYS", "LDG.E.64.STRONG.SYS")
EXPECTS = {
    "stage_dispatch_kernel": (*ROWS, *MEETS),
    "stage_rows_kernel": (*ROWS, *MEETS),
    "fetch_dispatch_kernel": ROWS,
    "fetch_rows_kernel": ROWS,
    "sum_home_kernel": ROWS,
    "give_up_kernel": ("MEMBAR.ALL.SYS",),
}


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def launches(
    num_ranks: int,
    rank: int,
    hidden: int,
    top_k: int,
    num_experts: int,
    dtype: torch.dtype,
    *,
    all_kernels: bool = True,
) -> list[census.Launch]:
    """Every launch of a forward and backward exchange."""
    tokens, room = 4096, num_ranks * 4096
    slab = Slab(num_ranks, tokens, top_k, hidden * dtype.itemsize)
    state = [empty(n, dtype=torch.int64) for n in (num_ranks, 3, 1)]
    peers = peer.Peers(rank, slab, *state, num_programs=24, timeout_ns=600 * 10**9)
    x, y = empty(tokens, hidden, dtype=dtype), empty(room, hidden, dtype=dtype)
    idx, weight = empty(tokens, top_k, dtype=torch.int64), empty(tokens, top_k, dtype=torch.float32)
    with census.record(peer, f"{num_ranks} ranks, {hidden}, {dtype}", ()) as recorded:
        local_experts = num_experts // num_ranks
        pos, plan = peer.stage_dispatch(peers, x, idx, weight, local_experts, room, room * top_k)
        *_, weight_RK, origin = peer.fetch_dispatch(peers, x, plan, top_k, local_experts, room)
        peer.stage_rows(peers, y, plan, home=True, weight_RK=weight_RK)
        peer.sum_home(peers, y, plan, pos, weight_RK)
        if all_kernels:
            peer.stage_rows(peers, x, plan, home=False)
            peer.fetch_rows(peers, x, plan, origin)
            peer.give_up(peers, "combine")
    return recorded


def main() -> None:
    census.INSTRUCTIONS = tuple({"LDL", "STL", *(name for names in EXPECTS.values() for name in names)})
    for launch in (
        *launches(2, 1, 2048, 8, 64, torch.bfloat16),
        *launches(8, 3, 7168, 8, 256, torch.bfloat16, all_kernels=False),
    ):
        row = asdict(census.compile_launch(launch))
        print(json.dumps({**row, "expects": EXPECTS[launch.kernel.__name__]}), flush=True)


if __name__ == "__main__":
    main()
