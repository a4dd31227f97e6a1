# SPDX-License-Identifier: GPL-3.0-or-later
"""GradReducer: sums of gradients over ranks, bucket by bucket, while the backward that makes them is still running.

Every parameter has a `Reduction`: over which ranks, scaled how. Parameters that share one fill buckets in the order in
which a backward finishes them, the first bucket small so that communication starts early. The caller reports each
accumulated gradient (`ready`). A bucket whose gradients are all there is launched:

    side stream   wait for the gradients' streams | pack | scale | all-reduce, asynchronous | scale | unpack
    finish()      launches what is left, with zeros for gradients that never came, then waits for all of it

Two side streams take turns, so that one bucket is packed while the one before it travels. Without streams (CPU) the
same steps run, except that the wait for the collective and the unpacking happen in `finish`.

Buckets are launched in one fixed order, the same on every rank whatever order gradients arrive in: a bucket that is
ready early waits for those before it. A rank on which a parameter got no gradient launches that bucket and the later
ones in `finish`; no rank skips a collective. So that parameters which nobody uses hold up no others, the ranks compare
notes after the first round: whatever lacked a gradient on any of them moves to the end of the order.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True)
class Reduction:
    """gradient = after * sum over the group's ranks of (before * gradient).

    Args:
        group: the ranks; None is the default group.
        before, after: factors around the sum, applied in the dtype on the wire.
        dtype: on the wire; None is the gradient's own.
    """

    group: Any
    before: float = 1.0
    after: float = 1.0
    dtype: torch.dtype | None = None


class _Bucket:
    """Parameters reduced by one collective, and where they stand in this backward."""

    def __init__(self, params: list[nn.Parameter], reduction: Reduction, num_ranks: int) -> None:
        self.params, self.reduction = params, reduction
        self.device = params[0].device
        self.dtype = reduction.dtype or params[0].dtype
        self.numels = [p.numel() for p in params]
        # Nothing travels and nothing is cast: the gradients are scaled where they lie.
        self.in_place = num_ranks == 1 and self.dtype == params[0].dtype
        self.expected = dict.fromkeys(params, 1)
        self.producers: set[Any] = set()  # streams on which its gradients were made
        self.reset()

    def reset(self) -> None:
        self.arrivals = dict.fromkeys(self.params, 0)
        self.waiting_for = len(self.params)
        self.launched = False
        self.producers.clear()
        self.grads: list[Tensor | None] = []
        self.flat: Tensor | None = None
        self.work: Any = None

    def arrived(self, param: nn.Parameter) -> None:
        self.arrivals[param] += 1
        if self.arrivals[param] == self.expected[param]:
            self.waiting_for -= 1

    def views(self) -> list[Tensor]:
        assert self.flat is not None
        parts = self.flat.split(self.numels)
        return [part.view(p.shape) for part, p in zip(parts, self.params, strict=True)]


class _HostOrder:
    """No streams: what is issued has happened. Collectives still run asynchronously, until they are waited for."""

    eager_completion = False

    def mark_ready(self, bucket: _Bucket) -> None:
        pass

    def side(self, bucket: _Bucket) -> contextlib.AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def issued(self) -> None:
        pass

    def release(self, grad: Tensor) -> None:
        pass

    def join(self) -> None:
        pass


class _CudaOrder:
    """Two side streams, ordered with the streams that make and use the gradients by events alone: the host never waits
    and no stream waits for more than it needs."""

    # Waiting for a collective makes the side stream wait, not the host, so all of a bucket is issued at its launch.
    eager_completion = True

    def __init__(self, device: torch.device) -> None:
        self.device = device
        # Ahead of the backward's kernels: packing is short, and a collective waits for it.
        self.streams = [torch.cuda.Stream(device, priority=-1) for _ in range(2)]
        self.done = [torch.cuda.Event() for _ in self.streams]
        self.used: set[int] = set()
        self.turn = 0
        self.producers: set[torch.cuda.Stream] = set()

    def mark_ready(self, bucket: _Bucket) -> None:
        """The gradient was made on the stream that is current here, in the autograd thread's hook."""
        # No event here, of which a step would record one for every parameter: `side` records one for a whole bucket.
        bucket.producers.add(torch.cuda.current_stream(self.device))

    def side(self, bucket: _Bucket) -> contextlib.AbstractContextManager[Any]:
        self.turn = (self.turn + 1) % len(self.streams)
        self.used.add(self.turn)
        stream = self.streams[self.turn]
        for producer in bucket.producers:
            stream.wait_stream(producer)
        self.producers |= bucket.producers
        return torch.cuda.stream(stream)

    def issued(self) -> None:
        self.done[self.turn].record(self.streams[self.turn])

    def release(self, grad: Tensor) -> None:
        """The caller drops the gradient now, while the side stream still reads it."""
        grad.record_stream(self.streams[self.turn])

    def join(self) -> None:
        """Whoever uses the gradients next, or reuses their memory, does so after the side streams."""
        for stream in {*self.producers, torch.cuda.current_stream(self.device)}:
            for turn in self.used:
                stream.wait_event(self.done[turn])
        self.producers.clear()
        self.used.clear()


class GradReducer:
    """Reduces the gradients of a fixed list of parameters, in place.

    Args:
        params: trainable, in backward order (last used first), each with its reduction. Empty ones are left alone.
        first_numel, bucket_numel: a bucket is closed once it holds at least so many elements: the first of each
            reduction and dtype, and the others.
        comm: torch.distributed, or a module with its all_reduce and get_world_size.
        keep: the parameters whose gradients this rank needs; the others' `grad` becomes None once it is packed.
        everyone: the group of all ranks whose reducers have the same buckets; None is the default group.
        learn: nothing is launched in the first round before `finish`. It shows how often a gradient is accumulated
            in one round (tied weights under reentrant activation checkpointing: more than once), and the
            communicators are set up outside the backward.
    """

    def __init__(
        self,
        params: Iterable[tuple[nn.Parameter, Reduction]],
        *,
        first_numel: int,
        bucket_numel: int,
        comm: Any = dist,
        everyone: Any = None,
        keep: Callable[[nn.Parameter], bool] | None = None,
        learn: bool = True,
    ) -> None:
        self._comm, self._everyone, self._keep = comm, everyone, keep
        self._sizes = first_numel, bucket_numel
        self._reductions = {p: reduction for p, reduction in params if p.numel()}
        self._use_buckets(self._fill(self._reductions))
        self._orders: dict[torch.device, Any] = {}
        for bucket in self.buckets:
            if bucket.device not in self._orders:
                cuda = bucket.device.type == "cuda"
                self._orders[bucket.device] = _CudaOrder(bucket.device) if cuda else _HostOrder()
        self._learning, self._first_round = learn, True
        self._next = 0
        self.started = False  # whether a gradient arrived since the last round ended

    @property
    def params(self) -> list[nn.Parameter]:
        return list(self._reductions)

    @property
    def all_launched(self) -> bool:
        return self._next == len(self.buckets)

    def ready(self, param: nn.Parameter) -> None:
        """Call it where `param.grad` was just accumulated: in a post-accumulate hook, on the hook's stream.

        Raises:
            RuntimeError: the gradient was accumulated again after its bucket was launched.
        """
        bucket = self._bucket_of[param]
        if bucket.launched:
            raise RuntimeError(
                f"the gradient of a parameter of shape {tuple(param.shape)} was accumulated again after it was given "
                "to the reduction: a second backward without finish(), or a parameter that several checkpointed "
                "regions share; accumulate under no_sync(), checkpoint with use_reentrant=False, or set "
                "overlap_dense_grads to false"
            )
        self.started = True
        self._orders[bucket.device].mark_ready(bucket)
        bucket.arrived(param)
        if not self._learning:
            while not self.all_launched and self.buckets[self._next].waiting_for <= 0:
                self._launch_next()

    @torch.no_grad()
    def finish(self) -> None:
        """Ends the round: every parameter's gradient is reduced for what is issued after this call on this stream."""
        self._reduce_rest()
        if self._first_round:
            self._order_by_use()
        for bucket in self.buckets:
            for param, count in bucket.arrivals.items():
                bucket.expected[param] = max(bucket.expected[param], count)
            bucket.reset()
        self._learning = self._first_round = self.started = False
        self._next = 0

    @torch.no_grad()
    def finish_only(self) -> None:
        """`finish` of a reducer that is used once."""
        self._reduce_rest()

    def _reduce_rest(self) -> None:
        while not self.all_launched:
            # Gradients accumulated before this round, or written by hand, were made on the stream of the caller.
            bucket = self.buckets[self._next]
            for param in bucket.params:
                if param.grad is None and param.requires_grad and self._keeps(param):
                    param.grad = torch.zeros_like(param)
            self._orders[bucket.device].mark_ready(bucket)
            self._launch_next()
        for bucket in self.buckets:
            if not self._orders[bucket.device].eager_completion:
                self._complete(bucket)
        for order in self._orders.values():
            order.join()

    def _order_by_use(self) -> None:
        """Moves what some rank did not use to the end. Waits for the other ranks, once in the reducer's life."""
        arrivals = {p: bucket.arrivals[p] for bucket in self.buckets for p in bucket.params}
        missing = torch.tensor([arrivals[p] == 0 for p in self._reductions], dtype=torch.int32)
        missing = missing.to(self.buckets[0].device) if self.buckets else missing
        self._comm.all_reduce(missing, group=self._everyone)
        unused = {p for p, count in zip(self._reductions, missing.tolist(), strict=True) if count}
        if unused:
            used = [p for p in self._reductions if p not in unused]
            self._use_buckets(self._fill(used) + self._fill([p for p in self._reductions if p in unused]))
            for bucket in self.buckets:
                bucket.arrivals = {p: arrivals[p] for p in bucket.params}

    def _fill(self, params: Iterable[nn.Parameter]) -> list[_Bucket]:
        return _fill_buckets(((p, self._reductions[p]) for p in params), *self._sizes, self._comm)

    def _use_buckets(self, buckets: list[_Bucket]) -> None:
        self.buckets = buckets
        self._bucket_of = {p: bucket for bucket in buckets for p in bucket.params}

    def _keeps(self, param: nn.Parameter) -> bool:
        return self._keep is None or self._keep(param)

    @torch.no_grad()
    def _launch_next(self) -> None:
        bucket = self.buckets[self._next]
        self._next += 1
        bucket.launched = True
        order = self._orders[bucket.device]
        bucket.grads = [_dense(p) for p in bucket.params]
        with order.side(bucket):
            if not bucket.in_place:
                self._pack(bucket, order)
            if order.eager_completion:
                self._complete(bucket)
            order.issued()

    def _pack(self, bucket: _Bucket, order: Any) -> None:
        """Copies the gradients into one tensor and starts its sum."""
        bucket.flat = torch.empty(sum(bucket.numels), dtype=bucket.dtype, device=bucket.device)
        present = [(view, grad) for view, grad in zip(bucket.views(), bucket.grads, strict=True) if grad is not None]
        if len(present) < len(bucket.params):
            bucket.flat.zero_()
        if present:
            torch._foreach_copy_(*(list(side) for side in zip(*present, strict=True)))
        for i, param in enumerate(bucket.params):
            grad = bucket.grads[i]
            if grad is not None and not self._keeps(param):
                order.release(grad)
                param.grad = bucket.grads[i] = None
        _scale([bucket.flat], bucket.reduction.before)
        bucket.work = self._comm.all_reduce(bucket.flat, group=bucket.reduction.group, async_op=True)

    def _complete(self, bucket: _Bucket) -> None:
        """Waits for the sum and writes it back; or, where no other rank takes part, scales the gradients."""
        kept = [i for i, grad in enumerate(bucket.grads) if grad is not None]
        grads = [bucket.grads[i] for i in kept]
        if bucket.in_place:
            _scale(grads, bucket.reduction.before * bucket.reduction.after)
            return
        if bucket.work is not None:
            bucket.work.wait()
        _scale([bucket.flat], bucket.reduction.after)
        if grads:
            views = bucket.views()
            torch._foreach_copy_(grads, [views[i] for i in kept])
        # The memory goes back to the side stream's pool, whose next user comes after this copy.
        bucket.flat = bucket.work = None


def _fill_buckets(
    params: Iterable[tuple[nn.Parameter, Reduction]], first_numel: int, bucket_numel: int, comm: Any
) -> list[_Bucket]:
    """Buckets in the order in which a backward completes them."""
    open_lanes: dict[Any, tuple[int, list[nn.Parameter]]] = {}
    opened: set[Any] = set()
    closed: list[tuple[int, Any, list[nn.Parameter]]] = []
    for position, (param, reduction) in enumerate(params):
        lane = (reduction, param.dtype, param.device)
        _, members = open_lanes.get(lane, (0, []))
        members.append(param)
        open_lanes[lane] = (position, members)
        if sum(p.numel() for p in members) >= (bucket_numel if lane in opened else first_numel):
            closed.append((position, lane, members))
            opened.add(lane)
            del open_lanes[lane]
    closed += [(position, lane, members) for lane, (position, members) in open_lanes.items()]
    closed.sort(key=lambda item: item[0])
    return [_Bucket(members, lane[0], comm.get_world_size(lane[0].group)) for _, lane, members in closed]


def _dense(param: nn.Parameter) -> Tensor | None:
    """The gradient; a sparse one is replaced by its dense form, which every rank's bucket has room for."""
    if not param.requires_grad:
        return None  # frozen since the buckets were filled: its place stays, with zeros
    if param.grad is not None and param.grad.is_sparse:
        param.grad = param.grad.to_dense()
    return param.grad


def _scale(tensors: Sequence[Tensor], factor: float) -> None:
    if factor != 1.0 and tensors:
        torch._foreach_mul_(tensors, factor)
