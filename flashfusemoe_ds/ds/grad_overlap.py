# SPDX-License-Identifier: GPL-3.0-or-later
"""OverlappedGradSync: averages gradients during backward in a plain PyTorch loop, without DeepSpeed's engine."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

from flashfusemoe_ds.ds.grad_buckets import GradReducer, Reduction

_AVERAGED_AT = "_flashfusemoe_averaged_at_version"


class OverlappedGradSync:
    """Averages the gradients of `params` over `group`, in buckets, while the backward is still running.

        sync = OverlappedGradSync(get_dense_params(model), group)
        for batch in batches:
            model(batch).backward()
            sync.finish()
            optimizer.step()
            optimizer.zero_grad()

    Every rank makes one with equally shaped parameters in the same order, and calls `finish` equally often. A
    parameter without a gradient counts as one with a gradient of zero, and has one afterwards. Gradient accumulation:
    run all backwards of a step but the last under `no_sync`.

    Experts that `MoELayer.shard_experts` spread over ep_size of the group's W ranks take one more of these: over the
    W / ep_size ranks that hold the same experts, with `divisor=W`.

    Args:
        params: trainable parameters in the order in which a backward finishes them, as `get_dense_params` lists them.
        group: the ranks to average over; None is the default group.
        num_buckets: at most so many collectives for each dtype. The first bucket is small.
        divisor: what the sum over the group is divided by; None is the group's size.

    Raises:
        ValueError: no parameter, one that is listed twice or not trainable, or num_buckets or divisor not positive.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        group: dist.ProcessGroup | None = None,
        num_buckets: int = 4,
        divisor: float | None = None,
    ) -> None:
        params = list(params)
        if not params:
            raise ValueError("params is empty; OverlappedGradSync needs at least one parameter")
        if len(set(params)) < len(params):
            raise ValueError("params lists a parameter twice")
        for i, param in enumerate(params):
            if not (param.is_leaf and param.requires_grad):
                raise ValueError(f"params[{i}], of shape {tuple(param.shape)}, is not a trainable leaf")
        if num_buckets < 1:
            raise ValueError(f"num_buckets is {num_buckets}; it must be at least 1")
        num_ranks = dist.get_world_size(group)
        if divisor is not None and not 0 < divisor < math.inf:
            raise ValueError(f"divisor is {divisor}; it must be positive, or None for the group's size ({num_ranks})")

        divisor = num_ranks if divisor is None else divisor
        # Averaging what is averaged already changes nothing; a sum over some ranks that is divided by more does.
        self._once_only = divisor != num_ranks
        first, rest = _bucket_numels(sum(p.numel() for p in params), num_buckets)
        reduction = Reduction(group, after=1.0 / divisor)
        self._reducer = GradReducer(
            ((p, reduction) for p in params), first_numel=first, bucket_numel=rest, everyone=group
        )
        self._accumulated = False  # a gradient came since the last finish
        self._paused = False
        self._callback_task: int | None = None
        self._hooks = [p.register_post_accumulate_grad_hook(self._on_grad) for p in params]

    @property
    def num_buckets(self) -> int:
        """Collectives in a step."""
        return len(self._reducer.buckets)

    def finish(self) -> None:
        """Makes every gradient the average; call it after a step's last backward, on every rank.

        A second call changes nothing. On a GPU the host does not wait: work issued afterwards on the current stream
        sees the averages. When all parameters got gradients, the end of the backward has done this already.

        A rank on which none of the parameters got a gradient takes part all the same, provided that the gradients
        were cleared with `zero_grad(set_to_none=True)`, PyTorch's default: cleared to zeros, such a step would look
        like a finished one.

        Raises:
            RuntimeError: called under `no_sync`.
        """
        if self._paused:
            raise RuntimeError("finish() was called under no_sync(); call it after the last backward, outside")
        if self._accumulated or any(p.grad is None for p in self._reducer.params if p.requires_grad):
            self._finish()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backwards in here only accumulate; the next one outside reduces the sum."""
        paused, self._paused = self._paused, True
        try:
            yield
        finally:
            self._paused = paused

    def remove_hooks(self) -> None:
        """Lets go of the parameters; gradients are no longer averaged."""
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()

    def _on_grad(self, param: nn.Parameter) -> None:
        if self._once_only:
            _refuse_averaged(param)
        self._accumulated = True
        if self._paused:
            return
        task = torch._C._current_graph_task_id()
        if task != self._callback_task:
            # One for each graph task: with reentrant checkpointing a backward is several, one inside the other.
            self._callback_task = task
            torch.autograd.Variable._execution_engine.queue_callback(self._end_of_backward)
        self._reducer.ready(param)

    def _end_of_backward(self) -> None:
        self._callback_task = None
        # Otherwise gradients are missing: the end of an inner backward, or unused parameters, which finish() knows.
        if self._reducer.started and self._reducer.all_launched:
            self._finish()

    def _finish(self) -> None:
        self._reducer.finish()
        self._accumulated = False
        if self._once_only:
            for param in self._reducer.params:
                if param.grad is not None:
                    setattr(param.grad, _AVERAGED_AT, param.grad._version)


def _bucket_numels(total: int, num_buckets: int) -> tuple[int, int]:
    """The first bucket an eighth of an even share, the others alike."""
    first = max(1, total // (8 * num_buckets))
    return (total, total) if num_buckets == 1 else (first, max(1, -(-(total - first) // (num_buckets - 1))))


def _refuse_averaged(param: nn.Parameter) -> None:
    """Adding to a gradient that is averaged already would scale a part of it twice."""
    version = getattr(param.grad, _AVERAGED_AT, None)
    # Accumulating in place is one version; clearing in between would have been another.
    if version is not None and param.grad._version <= version + 1:
        raise RuntimeError(
            f"a backward added to the gradient of a parameter of shape {tuple(param.shape)} that is averaged already; "
            "clear the gradients after each step, and run all backwards of a step but the last under no_sync()"
        )
