# SPDX-License-Identifier: GPL-3.0-or-later
"""Expert parallelism over all-to-all: NCCL between GPUs, gloo between CPUs.

    start_dispatch     count rows per rank | the counts travel, then go to the host, beside the current stream
                       place and spread the rows into buffers that need no counts
      what the caller launches before it waits
    wait               the host waits for the counts, the only time that it waits for anything
                       ids and weights travel, then rows | ids and weights are taken apart
    start_redispatch   spread the rows | they travel
    start_combine      weights travel, then rows; each is added up over ranks when it is waited for

Ids and weights travel in an int32 payload of their own, bit for bit: inside a bf16 row an id above 256 would not
survive. Rows are ordered by destination rank, then by token, and added up in rank order, so equal inputs give equal
bits.

A collective that fails, because a rank has died or is late by the group's timeout, raises RuntimeError on the others,
in words that name it. What the GPU runs on its own, after the counts, fails where torch's watchdog sees it.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
import torch.distributed
from torch import Tensor

from flashfusemoe_ds.dispatch.base import Combined, Pending
from flashfusemoe_ds.dispatch.host_copy import HostCopies, HostCopy
from flashfusemoe_ds.dispatch.timeout import group_timeout_s
from flashfusemoe_ds.kernels.exchange import count_rows, place_rows, spread_rows, take_apart
from flashfusemoe_ds.kernels.gather_sum import gather_sum
from flashfusemoe_ds.types import Dispatched


@dataclass(frozen=True)
class Exchange:
    """One dispatch's routes.

    Attributes:
        slot_TJ: int32 [T, J], where a token's rows lie among the sent ones, J = min(K, P); past their end if unused.
        send_counts, recv_counts: rows per rank, on the host.
    """

    slot_TJ: Tensor
    send_counts: list[int]
    recv_counts: list[int]


class NcclDispatcher:
    """All-to-all transport of one expert-parallel group.

    Args:
        group: the process group; its rank p owns experts [p * e, (p + 1) * e).
        num_experts: E, divisible by the group's size.
        comm: what provides all_to_all_single and get_world_size: torch.distributed, or `ds.collectives`, with which
            deepspeed.comm's communication logger sees the traffic.

    Attributes:
        layer: name of the layer that owns it, for messages; whoever knows it may set it.
    """

    name = "nccl"
    layer: str | None = None

    def __init__(self, group: torch.distributed.ProcessGroup, num_experts: int, comm: Any = torch.distributed) -> None:
        self.group, self.comm = group, comm
        self.ep_size = comm.get_world_size(group=group)
        if num_experts % self.ep_size:
            raise ValueError(f"ep_size is {self.ep_size}; it must divide num_experts ({num_experts})")
        self.num_local_experts = num_experts // self.ep_size
        self._copies: HostCopies | None = None  # made on the device of the first rows

    def start_dispatch(self, x_TD: Tensor, idx_TK: Tensor, weight_TK: Tensor) -> Pending[Dispatched]:
        owners = self.num_local_experts, self.ep_size
        counts_2P2, blocks_BP = count_rows(idx_TK, *owners)
        counting = self._start_counts(counts_2P2)
        slot_TJ, words = place_rows(idx_TK, weight_TK, *owners, blocks_BP)
        rows = spread_rows(x_TD, slot_TJ, num_rows=slot_TJ.numel())

        def send() -> Dispatched:
            sent, received = counting.wait()
            exchange = Exchange(slot_TJ, [rows for rows, _ in sent], [rows for rows, _ in received])
            num_sent = sum(exchange.send_counts)
            meta = self._start_out("dispatch of ids and weights", words[:num_sent], exchange)
            travelling = self._start_out("dispatch of rows", rows[:num_sent], exchange)
            idx_RK, weight_RK = take_apart(meta.wait(), idx_TK.shape[1], weight_TK.dtype)
            num_routes = sum(routes for _, routes in received)
            return Dispatched(travelling.wait(), idx_RK, weight_RK, num_routes, exchange)

        return Pending(send)

    def start_redispatch(self, x_TD: Tensor, handle: Exchange) -> Pending[Tensor]:
        rows = spread_rows(x_TD, handle.slot_TJ, sum(handle.send_counts))
        return self._start_out("replayed dispatch of rows", rows, handle)

    def start_combine(self, y_RD: Tensor, handle: Exchange, weight_RK: Tensor | None = None) -> Combined:
        # Weights first: they are small, and the router's backward waits for them alone.
        weights = None if weight_RK is None else self._start_sum_home("combine of weights", weight_RK, handle)
        return Combined(self._start_sum_home("combine of rows", y_RD, handle), weights)

    def _start_out(self, operation: str, rows: Tensor, exchange: Exchange) -> Pending[Tensor]:
        """Sends rows to the ranks they are for."""
        return self._start_all_to_all(operation, rows, exchange.recv_counts, exchange.send_counts)

    def _start_sum_home(self, operation: str, rows_RW: Tensor, exchange: Exchange) -> Pending[Tensor]:
        """Returns rows to the ranks they came from and adds each token's, in rank order, in float32 or better."""
        travelling = self._start_all_to_all(operation, rows_RW, exchange.send_counts, exchange.recv_counts)
        return Pending(lambda: gather_sum(travelling.wait(), exchange.slot_TJ))

    def _start_counts(self, counts_2P2: Tensor) -> Pending[list[list[list[int]]]]:
        """Sends the first half, receives the second; both as lists on the host."""
        operation = "exchange of counts"
        try:
            work = self.comm.all_to_all_single(counts_2P2[1], counts_2P2[0], group=self.group, async_op=True)
            copy = self._start_to_host(work, counts_2P2) if counts_2P2.is_cuda else None
        except RuntimeError as error:
            self._fail(operation, error)

        def read() -> list[list[list[int]]]:
            try:
                if copy is None:
                    work.wait()
                else:
                    _wait_on_host(copy.arrived, self._patience(counts_2P2.device))
            except RuntimeError as error:
                self._fail(operation, error)
            return counts_2P2.tolist() if copy is None else self._copies.read(copy)

        return Pending(read)

    def _start_to_host(self, work: torch.distributed.Work, counts_2P2: Tensor) -> HostCopy:
        """Copies the counts once they are there, on a stream of its own: on the current one, what is launched next
        would wait for the slowest rank."""
        if self._copies is None:
            # It has next to nothing to do, and everybody waits for it.
            self._copies = HostCopies(torch.cuda.Stream(counts_2P2.device, priority=-1))
        return self._copies.start(counts_2P2, after=work)

    def _start_all_to_all(
        self, operation: str, rows: Tensor, out_counts: list[int], in_counts: list[int]
    ) -> Pending[Tensor]:
        rows, out = rows.contiguous(), rows.new_empty(sum(out_counts), rows.shape[1])
        try:
            work = self.comm.all_to_all_single(
                out, rows, output_split_sizes=out_counts, input_split_sizes=in_counts, group=self.group, async_op=True
            )
        except RuntimeError as error:
            self._fail(operation, error)

        def arrive() -> Tensor:
            try:
                work.wait()
            except RuntimeError as error:
                self._fail(operation, error)
            assert rows is not None  # kept until here: the collective reads it
            return out

        return Pending(arrive)

    def _patience(self, device: torch.device) -> float | None:
        """Seconds for which the host waits for the other ranks: a little less than the group's timeout, at which
        torch's watchdog ends the process. None where torch does not say."""
        timeout = group_timeout_s(self.group, device)
        return None if timeout is None else max(0.9 * timeout, timeout - 5)

    def _fail(self, operation: str, error: RuntimeError) -> NoReturn:
        rank, ranks = torch.distributed.get_rank(), torch.distributed.get_process_group_ranks(self.group)
        of_layer = "" if self.layer is None else f" of layer {self.layer}"
        raise RuntimeError(
            f"ep_backend nccl: {operation}{of_layer} failed on rank {rank} of the expert-parallel group of ranks "
            f"{ranks}: another of them has died, is late, or has not called the layers in the same order ({error})"
        ) from error


def _wait_on_host(event: torch.cuda.Event, patience: float | None) -> None:
    """RuntimeError if it has not happened after so many seconds."""
    if patience is None:
        event.synchronize()
        return
    start = time.monotonic()
    while not event.query():
        waited = time.monotonic() - start
        if waited > patience:
            raise RuntimeError(f"no answer in {waited:.1f} s")
        if waited > 1e-3:  # the others are late: let this process's other threads run
            time.sleep(1e-4)
