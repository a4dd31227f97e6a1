# SPDX-License-Identifier: GPL-3.0-or-later
"""Dispatch, experts and combine across ranks, and what runs beside the exchange.

    forward    count exchange and dispatch | shared experts, on a side stream
               experts
               combine                     | shared experts, if they are still at it
    backward   replayed dispatch of dY     | the shared experts' backward, on their stream
               (and of x, where the received rows were not kept)
               dgated, dX
               combine of dX and dweight   | dW_down, dW_up, then the router's backward

Fused experts are one autograd node with their exchange: only there is dX sent before dW is computed. Experts that are
modules of their own take the transport's two nodes around them, one thing after another.

Each stage is a named range (dispatch/ranges.py): a profiler shows what runs beside what.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from flashfusemoe_ds.config import OverlapConfig
from flashfusemoe_ds.dispatch.base import Combined, Dispatcher, Pending, combine, dispatch
from flashfusemoe_ds.dispatch.ranges import Range
from flashfusemoe_ds.kernels.experts import (
    experts_backward,
    experts_forward,
    gate_last,
    graph_is_kept,
    join,
    needs_with_gate,
)
from flashfusemoe_ds.kernels.order import ExpertOrder
from flashfusemoe_ds.kernels.precision import cast_to, to_keep
from flashfusemoe_ds.nn.experts import GroupedExperts
from flashfusemoe_ds.types import Dispatched, Routing


class LateGradient:
    """Lets the rows' gradient arrive after the router's backward was launched.

    `mark` is the identity, to be called on the rows before the router runs. Autograd runs the latest node first, so
    that in the backward the router's comes between the experts' node, which starts the exchange of dX and returns
    nothing but its shape, and this one, which waits for it.
    """

    def __init__(self) -> None:
        self.arriving: Pending[Tensor] | None = None

    def mark(self, rows_TD: Tensor) -> Tensor:
        return _Late.apply(rows_TD, self)


class _Late(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows_TD, late):
        ctx.late = late
        return rows_TD.view_as(rows_TD)

    @staticmethod
    @once_differentiable
    def backward(ctx, dx_TD):
        arriving, ctx.late.arriving = ctx.late.arriving, None
        if arriving is None:
            return dx_TD, None
        with Range("backward.combine.wait_rows"):
            return arriving.wait(), None


class SideStream:
    """A stream for what may run beside the current one; on CPUs, which have none, the order of calls."""

    def __init__(self) -> None:
        self._stream: torch.cuda.Stream | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> SideStream:
        return SideStream()

    def __reduce__(self) -> Any:
        return SideStream, ()

    def start(self, fn: Callable[[Tensor], Tensor], x: Tensor) -> Pending[Tensor]:
        """fn(x), launched now. Autograd runs its backward on this stream too."""
        if not x.is_cuda:
            with Range("beside"):
                y = fn(x)
            return Pending(lambda: y)
        if self._stream is None or self._stream.device != x.device:
            self._stream = torch.cuda.Stream(x.device)
        side, main = self._stream, torch.cuda.current_stream(x.device)
        side.wait_stream(main)
        with torch.cuda.stream(side), Range("beside"):
            y = fn(x)

        def join() -> Tensor:
            main.wait_stream(side)
            # x needs no record: whoever frees it after this does so after the side stream has read it.
            y.record_stream(main)
            return y

        return Pending(join)


class _ParallelExperts(torch.autograd.Function):
    """Waits for the rows of a started dispatch, runs the experts on them, and brings the sums home.

    x and weight are here to receive gradients; what is computed on is what the dispatch has sent.
    """

    @staticmethod
    def forward(ctx, x_TD, weight_TK, w_up, w_down, b_up, b_down, w_gate, travelling, dispatcher, activation, products,
                recompute, redispatch, overlap, late):  # fmt: skip
        weights = w_up, w_down, b_up, b_down, w_gate
        w_up, w_down, b_up, b_down, w_gate = cast = cast_to(x_TD.dtype, *weights)
        with Range("dispatch.wait"):
            sent = travelling.wait()
        with Range("experts"):
            y_RD, h_NH, order = experts_forward(
                sent.x_RD, sent.weight_RK, join(w_gate, w_up), w_down, b_up, b_down, sent.idx_RK, sent.num_routes,
                activation, products,
            )  # fmt: skip
        # The router keeps x_TD anyway. What this rank received is more, the wider the group and the fuller the rank.
        kept_x, kept_h = x_TD if redispatch else sent.x_RD, None if recompute else h_NH
        ctx.save_for_backward(kept_x, kept_h, sent.weight_RK, *to_keep(weights, cast), *order.tensors())
        ctx.handle, ctx.dispatcher, ctx.activation, ctx.products = sent.handle, dispatcher, activation, products
        ctx.redispatch, ctx.overlap, ctx.late = redispatch, overlap, late
        with Range("combine"):
            return dispatcher.start_combine(y_RD.contiguous(), sent.handle).rows.wait()

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_TD):
        dispatcher, handle = ctx.dispatcher, ctx.handle
        # Unpacked once: activation checkpointing hands it out once.
        x_RD, kept_h, weight_RK, *saved = ctx.saved_tensors
        if ctx.redispatch:
            with Range("backward.redispatch_x"):
                x_RD = dispatcher.start_redispatch(x_RD.contiguous(), handle).wait()
        with Range("backward.redispatch"):
            travelling = dispatcher.start_redispatch(dy_TD.contiguous(), handle)
            w_up, w_down, b_up, b_down, w_gate = cast_to(x_RD.dtype, *saved[:5])
            dout_RD = travelling.wait()
        # Every rank sends both gradients home, whoever needs them: their number of exchanges must agree.
        needs = (True, True, *needs_with_gate(ctx.needs_input_grad)[2:])
        home: list[Combined] = []

        def send(dx_RD: Tensor, dweight_RK: Tensor) -> None:
            with Range("backward.combine"):
                home.append(dispatcher.start_combine(dx_RD.contiguous(), handle, dweight_RK))

        with Range("backward.experts"):
            dx_RD, dweight_RK, *dparameters = gate_last(
                experts_backward(
                    dout_RD, x_RD, kept_h, weight_RK, join(w_gate, w_up), w_down, b_up, b_down,
                    ExpertOrder(*saved[5:]), ctx.activation, ctx.products, needs, consume_h=not graph_is_kept(),
                    send_input_grads=send if ctx.overlap.input_grad else None,
                )
            )  # fmt: skip
        if not home:
            send(dx_RD, dweight_RK)
        ((rows, weights),) = home
        with Range("backward.combine.wait_weights"):
            dweight_TK = weights.wait()
        if ctx.late is None or not ctx.needs_input_grad[0]:
            with Range("backward.combine.wait_rows"):
                dx_TD = rows.wait()
        else:
            ctx.late.arriving = rows
            # For its shape alone, which is dX's; `_Late` has dX itself.
            dx_TD = dy_TD
        return dx_TD, dweight_TK, *dparameters, *(None,) * 8


def start_dispatch(dispatcher: Dispatcher, rows_TD: Tensor, routing: Routing) -> Pending[Dispatched]:
    """Starts to send the rows, outside autograd."""
    with Range("dispatch"):
        return dispatcher.start_dispatch(rows_TD.detach().contiguous(), routing.idx_TK, routing.weight_TK.detach())


def parallel_experts(
    rows_TD: Tensor,
    routing: Routing,
    experts: GroupedExperts,
    dispatcher: Dispatcher,
    travelling: Pending[Dispatched],
    overlap: OverlapConfig,
    late: LateGradient | None = None,
) -> Tensor:
    """[T, D] -> [T, D], differentiable in the rows, the routing's weights and the experts' parameters.

    Args:
        travelling: what `start_dispatch` returned for these rows and this routing.
        late: whose `mark` the rows have passed; None to wait for their gradient in the experts' node.
    """
    (w_up, w_down, b_up, b_down), products = experts.operands(rows_TD)
    w_gate, w_up = w_up if isinstance(w_up, tuple) else (None, w_up)
    return _ParallelExperts.apply(
        rows_TD, routing.weight_TK, w_up, w_down, b_up, b_down, w_gate, travelling, dispatcher, experts.activation,
        products, experts.recompute_activations, experts.recompute_dispatch, overlap, late,
    )  # fmt: skip


def through_experts(
    rows_TD: Tensor,
    routing: Routing,
    experts: nn.Module,
    dispatcher: Dispatcher,
    overlap: OverlapConfig | None = None,
    *,
    beside: Callable[[], Pending[Tensor]] | None = None,
    late: LateGradient | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Dispatch, experts, combine: [T, D] -> [T, D], each row the weighted sum of its experts' outputs.

    Args:
        experts: a GroupedExperts, or a module that takes a Dispatched.
        beside: launched while the rows travel, waited for at the end.
        late: see `parallel_experts`.

    Returns:
        The sums, and what `beside` gave.
    """
    if dispatcher.ep_size == 1 or not isinstance(experts, GroupedExperts):
        sent = dispatch(dispatcher, rows_TD, routing)
        y_TD = combine(dispatcher, experts(sent), sent.handle)
        return y_TD, None if beside is None else beside().wait()
    travelling = start_dispatch(dispatcher, rows_TD, routing)
    side = None if beside is None else beside()
    y_TD = parallel_experts(rows_TD, routing, experts, dispatcher, travelling, overlap or OverlapConfig(), late)
    return y_TD, None if side is None else side.wait()
