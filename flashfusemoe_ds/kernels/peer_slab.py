# SPDX-License-Identifier: GPL-3.0-or-later
"""The memory that the GPUs of one host share in an exchange: each rank's slab, and what its kernels note of a failure.

    header   one flag per rank
    buffers  two, which take turns (triton_peer.py says why two are enough)

Layout alone, which takes neither triton nor a GPU; `peer` is what exchanges.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

HEADER_BYTES = 4096  # of a slab: one flag per rank

OPERATIONS = ("dispatch", "redispatch", "combine")
TIMED_OUT, PEER_FAILED, NO_ROOM = 1, 2, 3


@dataclass(frozen=True)
class Slab:
    """Where things lie in a rank's memory, the same on every rank.

    Attributes:
        num_ranks: P.
        max_tokens: C, the most that a rank sends.
        top_k: K.
        row_bytes: the most that a row has, a multiple of 16.
    """

    num_ranks: int
    max_tokens: int
    top_k: int
    row_bytes: int

    @cached_property
    def offsets(self) -> dict[str, int]:
        """From the start of a buffer, in bytes, and BUFFER, the bytes of one."""
        # At most C rows leave with a dispatch, and (P - 1) * C go home: a rank's own stay where they are.
        home = max(1, self.num_ranks - 1) * self.max_tokens
        parts = {
            "AT_COUNTS": 2 * self.num_ranks * 4,
            "AT_LISTS": self.num_ranks * self.max_tokens * 4,
            "AT_IDX": self.max_tokens * self.top_k * 4,
            "AT_WEIGHTS": self.max_tokens * self.top_k * 4,
            "AT_HOME_WEIGHTS": home * self.top_k * 4,
            "AT_ROWS": home * self.row_bytes,
        }
        offsets, end = {}, 0
        for name, size in parts.items():
            offsets[name] = end
            end += -(-size // 256) * 256
        return {**offsets, "BUFFER": end}

    @property
    def num_bytes(self) -> int:
        """Of the whole slab: the flags and two buffers."""
        return HEADER_BYTES + 2 * self.offsets["BUFFER"]

    def at(self, *names: str) -> dict[str, int]:
        return {name: self.offsets[name] for name in ("BUFFER", *names)}


@dataclass(frozen=True)
class Failure:
    """What a kernel noted.

    Attributes:
        why: TIMED_OUT, PEER_FAILED or NO_ROOM.
        operation: of OPERATIONS.
        ranks: that never came, or that gave up.
        num_routes: that did not fit.
    """

    why: int
    operation: str
    ranks: tuple[int, ...]
    num_routes: int

    @staticmethod
    def decode(noted: int) -> Failure | None:
        if not noted:
            return None
        why, operation, detail = noted & 15, OPERATIONS[(noted >> 4) & 15], noted >> 8
        ranks = tuple(r for r in range(detail.bit_length()) if detail >> r & 1)
        return Failure(why, operation, () if why == NO_ROOM else ranks, detail if why == NO_ROOM else 0)
