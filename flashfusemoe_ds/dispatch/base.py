# SPDX-License-Identifier: GPL-3.0-or-later
"""What a transport is, and the two autograd Functions around it, written once for all of them.

A transport moves one row per (token, destination rank), never one per route: a token whose k experts live on one rank
crosses the wire once. The receiving rank sums its own experts' outputs before sending a row back, so combine is a
plain sum over ranks. Hence the gradients: backward of dispatch is combine, backward of combine is a replayed dispatch.

Every operation is started, and waited for where its result is needed; what is launched between runs beside it.

Every rank of the group calls every method the same number of times in the same order; token counts may differ and may
be zero. Autograd keeps that order in the backward because a rank without rows still returns connected tensors.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flashfusemoe_ds.types import Dispatched, Routing

T = TypeVar("T")


@dataclass(frozen=True)
class Geometry:
    """What a transport must know before the first exchange, the same on every rank.

    Attributes:
        num_experts: E, over all ranks; rank p owns experts [p * e, (p + 1) * e).
        hidden_size: width of the rows.
        top_k: K, routes per token.
        dtype: of the rows; one of fewer bytes may be sent too.
    """

    num_experts: int
    hidden_size: int
    top_k: int
    dtype: torch.dtype


class Pending(Generic[T]):
    """A result on its way."""

    def __init__(self, finish: Callable[[], T]) -> None:
        self._finish: Callable[[], T] | None = finish

    def wait(self) -> T:
        """The result, once. On CUDA the current stream waits for it, and the host only if the transport must size
        buffers by counts from other ranks."""
        assert self._finish is not None, "waited twice"
        finish, self._finish = self._finish, None
        return finish()


class Combined(NamedTuple):
    """What comes home: rows [T, D], and, if they were sent, weights [T, K]. Each is waited for by itself."""

    rows: Pending[Tensor]
    weights: Pending[Tensor] | None


class Dispatcher(Protocol):
    """A transport for one expert-parallel group. It knows nothing of autograd, experts' weights or DeepSpeed.

    Tensors passed to a `start_` method are read until its result was waited for; do not write to them before.
    """

    name: str
    ep_size: int

    def start_dispatch(self, x_TD: Tensor, idx_TK: Tensor, weight_TK: Tensor) -> Pending[Dispatched]:
        """Sends each token to every rank that owns one of its experts.

        Args:
            x_TD: [T, D] contiguous rows, any dtype the transport carries.
            idx_TK: int64 [T, K], global expert ids or -1.
            weight_TK: float32 (or float64) [T, K].
        """
        ...

    def start_redispatch(self, x_TD: Tensor, handle: Any) -> Pending[Tensor]:
        """Sends other rows along the same routes: [T, D] -> [R, D]. No count exchange, no host synchronisation."""
        ...

    def start_combine(self, y_RD: Tensor, handle: Any, weight_RK: Tensor | None = None) -> Combined:
        """Sends rows home and adds them up over ranks: [R, D] -> [T, D]; likewise the optional [R, K] -> [T, K].

        Args:
            y_RD: contiguous.
            weight_RK: 0 at every route that this rank does not compute.
        """
        ...


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_TD, weight_TK, idx_TK, dispatcher):
        sent = dispatcher.start_dispatch(x_TD.contiguous(), idx_TK, weight_TK).wait()
        ctx.dispatcher, ctx.handle = dispatcher, sent.handle
        ctx.save_for_backward(sent.idx_RK)
        ctx.mark_non_differentiable(sent.idx_RK)
        return sent.x_RD, sent.weight_RK, sent.idx_RK, sent.num_routes, sent.handle

    @staticmethod
    @once_differentiable
    def backward(ctx, dx_RD, dweight_RK, *_):
        (idx_RK,) = ctx.saved_tensors
        # A route that another rank computes has no gradient here; its own rank sends it.
        dweight_RK = torch.where(idx_RK >= 0, dweight_RK, 0)
        home = ctx.dispatcher.start_combine(dx_RD.contiguous(), ctx.handle, dweight_RK)
        return home.rows.wait(), home.weights.wait(), None, None


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y_RD, dispatcher, handle):
        ctx.dispatcher, ctx.handle = dispatcher, handle
        return dispatcher.start_combine(y_RD.contiguous(), handle).rows.wait()

    @staticmethod
    @once_differentiable
    def backward(ctx, dy_TD):
        return ctx.dispatcher.start_redispatch(dy_TD.contiguous(), ctx.handle).wait(), None, None


def dispatch(dispatcher: Dispatcher, x_TD: Tensor, routing: Routing) -> Dispatched:
    """Tokens to their experts' ranks, differentiable in x and in the weights."""
    if dispatcher.ep_size == 1:
        return dispatcher.start_dispatch(x_TD, routing.idx_TK, routing.weight_TK).wait()
    x_RD, weight_RK, idx_RK, num_routes, handle = _Dispatch.apply(x_TD, routing.weight_TK, routing.idx_TK, dispatcher)
    return Dispatched(x_RD, idx_RK, weight_RK, num_routes, handle)


def combine(dispatcher: Dispatcher, y_RD: Tensor, handle: Any) -> Tensor:
    """Experts' sums back to their tokens, differentiable in y."""
    if dispatcher.ep_size == 1:
        return dispatcher.start_combine(y_RD, handle).rows.wait()
    return _Combine.apply(y_RD, dispatcher, handle)
