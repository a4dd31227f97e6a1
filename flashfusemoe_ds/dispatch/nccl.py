# SPDX-License-Identifier: GPL-3.0-or-later
"""Expert parallelism over all-to-all: NCCL between GPUs, gloo between CPUs.

Each dispatch is one exchange of counts, one copy of them to the host (its only synchronisation), one all-to-all of
rows and one of their expert ids and weights. Ids and weights travel in an int32 payload of their own, bit for bit:
inside a bf16 row an id above 256 would not survive.

Rows are ordered by destination rank, then by token, so equal inputs give equal bits.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType

import torch
import torch.distributed
from torch import Tensor

from flashfusemoe_ds.dispatch.base import Combined, Pending
from flashfusemoe_ds.types import Dispatched


@dataclass(frozen=True)
class Exchange:
    """One dispatch's routes.

    Attributes:
        token_S, dest_S: int64 [S], token and destination rank of each sent row, ordered by rank, then token.
        slot_TJ: int64 [T, J], where a token's rows lie among the S sent ones, J = min(K, P) at most; S where unused.
        send_counts, recv_counts: rows per rank, on the host.
    """

    token_S: Tensor
    dest_S: Tensor
    slot_TJ: Tensor
    send_counts: list[int]
    recv_counts: list[int]


class NcclDispatcher:
    """All-to-all transport of one expert-parallel group.

    Args:
        group: the process group; its rank p owns experts [p * e, (p + 1) * e).
        num_experts: E, divisible by the group's size.
        comm: module that provides all_to_all_single and get_world_size: torch.distributed, or deepspeed.comm, whose
            communication logger then sees the traffic.
    """

    name = "nccl"

    def __init__(
        self, group: torch.distributed.ProcessGroup, num_experts: int, comm: ModuleType = torch.distributed
    ) -> None:
        self.group, self.comm = group, comm
        self.ep_size = comm.get_world_size(group=group)
        if num_experts % self.ep_size:
            raise ValueError(f"ep_size is {self.ep_size}; it must divide num_experts ({num_experts})")
        self.num_local_experts = num_experts // self.ep_size

    def start_dispatch(self, x_TD: Tensor, idx_TK: Tensor, weight_TK: Tensor) -> Pending[Dispatched]:
        return Pending(lambda: self._dispatch(x_TD, idx_TK, weight_TK))

    def _dispatch(self, x_TD: Tensor, idx_TK: Tensor, weight_TK: Tensor) -> Dispatched:
        rank_TK = torch.where(idx_TK >= 0, idx_TK // self.num_local_experts, -1)
        ranks_P = torch.arange(self.ep_size, device=idx_TK.device)
        routes_TP = (rank_TK.unsqueeze(2) == ranks_P).sum(1)
        exchange, num_routes = self._exchange_counts(routes_TP, max_rows=idx_TK.shape[1])

        top_k = idx_TK.shape[1]
        # Each sent row carries its token's ids, made local to the destination; other ranks' routes become -1.
        idx_SK, dest_S1 = idx_TK[exchange.token_S], exchange.dest_S.unsqueeze(1)
        mine_SK = rank_TK[exchange.token_S] == dest_S1
        idx_SK = torch.where(mine_SK, idx_SK - dest_S1 * self.num_local_experts, -1)
        # Weights first: a view as a wider type needs an aligned start.
        words_SW = torch.cat([weight_TK[exchange.token_S].view(torch.int32), idx_SK.to(torch.int32)], dim=1)
        words_RW = self._start_all_to_all(words_SW, exchange.recv_counts, exchange.send_counts).wait()

        return Dispatched(
            x_RD=self.start_redispatch(x_TD, exchange).wait(),
            idx_RK=words_RW[:, -top_k:].long(),
            weight_RK=words_RW[:, :-top_k].flatten().view(weight_TK.dtype).view(-1, top_k),
            num_routes=num_routes,
            handle=exchange,
        )

    def start_redispatch(self, x_TD: Tensor, handle: Exchange) -> Pending[Tensor]:
        return self._start_all_to_all(x_TD[handle.token_S], handle.recv_counts, handle.send_counts)

    def start_combine(self, y_RD: Tensor, handle: Exchange, weight_RK: Tensor | None = None) -> Combined:
        # Weights first: they are small, and the router's backward waits for them alone.
        weights = None if weight_RK is None else self._start_sum_home(weight_RK, handle)
        return Combined(self._start_sum_home(y_RD, handle), weights)

    def _start_sum_home(self, rows_RW: Tensor, handle: Exchange) -> Pending[Tensor]:
        """Returns rows to the ranks they came from and adds each token's, in rank order, in float32 or better."""
        travelling = self._start_all_to_all(rows_RW, handle.send_counts, handle.recv_counts)

        def add_up() -> Tensor:
            rows_SW = travelling.wait()
            acc = torch.promote_types(rows_SW.dtype, torch.float32)
            padded = torch.cat([rows_SW, rows_SW.new_zeros(1, rows_SW.shape[1])])
            total = torch.zeros(handle.slot_TJ.shape[0], rows_SW.shape[1], dtype=acc, device=rows_SW.device)
            for slot_T in handle.slot_TJ.unbind(1):
                total += padded.index_select(0, slot_T)
            return total.to(rows_SW.dtype)

        return Pending(add_up)

    def _exchange_counts(self, routes_TP: Tensor, max_rows: int) -> tuple[Exchange, int]:
        """Agrees on row counts with every rank. Returns the exchange and the number of routes this rank will compute.

        Args:
            routes_TP: [T, P], how many of a token's routes each rank owns.
            max_rows: a token goes to at most this many ranks (K).
        """
        num_tokens, device = routes_TP.shape[0], routes_TP.device
        hit_PT = (routes_TP > 0).t().contiguous()
        send_P2 = torch.stack([hit_PT.sum(1), routes_TP.sum(0)], dim=1)
        recv_P2 = torch.empty_like(send_P2)
        self.comm.all_to_all_single(recv_P2, send_P2, group=self.group)
        # The one host synchronisation.
        counts = torch.stack([send_P2, recv_P2]).tolist()
        send_counts = [rows for rows, _ in counts[0]]
        recv_counts = [rows for rows, _ in counts[1]]

        num_sent = sum(send_counts)
        slot_PT = torch.where(hit_PT, hit_PT.reshape(-1).cumsum(0).view_as(hit_PT) - 1, num_sent)
        # Every miss writes to the scratch entry at the end, which is cut off.
        sent_S = torch.empty(num_sent + 1, dtype=torch.int64, device=device)
        sent_S = sent_S.scatter_(0, slot_PT.reshape(-1), torch.arange(slot_PT.numel(), device=device))[:-1]
        slot_TJ = slot_PT.t()
        if max_rows < self.ep_size:
            # Used slots grow with the rank and unused ones are largest, so the first K columns hold all of them.
            slot_TJ = slot_TJ.sort(dim=1)[0][:, :max_rows]
        exchange = Exchange(
            token_S=sent_S % max(num_tokens, 1),
            dest_S=sent_S // max(num_tokens, 1),
            slot_TJ=slot_TJ.contiguous(),
            send_counts=send_counts,
            recv_counts=recv_counts,
        )
        return exchange, sum(routes for _, routes in counts[1])

    def _start_all_to_all(self, rows: Tensor, out_counts: list[int], in_counts: list[int]) -> Pending[Tensor]:
        rows, out = rows.contiguous(), rows.new_empty(sum(out_counts), rows.shape[1])
        work = self.comm.all_to_all_single(
            out, rows, output_split_sizes=out_counts, input_split_sizes=in_counts, group=self.group, async_op=True
        )

        def arrived() -> Tensor:
            work.wait()
            assert rows is not None  # kept until here: the collective reads it
            return out

        return Pending(arrived)
