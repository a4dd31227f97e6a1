# SPDX-License-Identifier: GPL-3.0-or-later
"""What a model's forward and backward allocate, counted on the meta device: no weights, no arithmetic, no GPU.

The model's own code runs, so that whatever it keeps is in the count: norms, attention, the loss, checkpointing. Three
things stand in for what a GPU does otherwise than the meta device would:

    the experts   `PlannedExperts` allocates what planning.py says of the fused stage and its exchange
    attention     `_FlashAttention` allocates what a fused attention kernel does, not the [S, S] scores
    gradients     hooks drop at each parameter what ZeRO and its buckets would not keep

What only kernels know of (cuBLAS's workspace, the CUDA context, NCCL's buffers) and what the allocator wastes are not
counted.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from flashfusemoe_ds.config import FlashFuseMoEConfig
from flashfusemoe_ds.planning import DEFAULTS, Load, MoEShape, Phase, backward_phases, forward_bytes, kept_bytes

BLOCK_BYTES = 512  # of which PyTorch's CUDA allocator gives out multiples


class Traced(NamedTuple):
    """Bytes above parameters and optimizer.

    Attributes:
        kept: after the forward, for the backward.
        peak: the most at any moment, gradients included.
    """

    kept: int
    peak: int


# --- counting ----------------------------------------------------------------------------------------------------


class Ledger(TorchDispatchMode):
    """Counts the storages that operators make while it is on, until they are freed.

    Args:
        known: tensors that exist already.
        block: bytes of which an allocation is a multiple.
    """

    def __init__(self, known: Sequence[Tensor], block: int = BLOCK_BYTES) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._block = block
        self._known = WeakIdKeyDictionary()
        for tensor in known:
            self._known[tensor.untyped_storage()] = True

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._note(leaf.untyped_storage())
        return result

    def _note(self, storage: torch.UntypedStorage) -> None:
        if storage in self._known:
            return
        self._known[storage] = True
        size = -(-storage.nbytes() // self._block) * self._block
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.live -= size


def _bytes(like: Tensor, size: int) -> Tensor:
    return like.new_empty(max(size, 0), dtype=torch.uint8)


# --- stand-ins ---------------------------------------------------------------------------------------------------


class PlannedExperts(nn.Module):
    """Experts of one rank that compute nothing and allocate what the fused ones would.

    Args:
        shape: of the whole layer.
        params: the experts' parameters, name -> shape of all experts, the first dimension being them.
        extra_kept: bytes that the layer keeps beside the experts, of so many tokens.
    """

    def __init__(
        self, shape: MoEShape, params: dict[str, tuple[int, ...]], *, extra_kept: Callable[[int], int] | None = None
    ) -> None:
        super().__init__()
        self.shape, self.shapes, self.extra_kept = shape, params, extra_kept
        self.itemsize, self.load, self.section = 0, None, DEFAULTS

    def configure(self, load: Load, dtype: torch.dtype, section: FlashFuseMoEConfig) -> None:
        """Takes what is planned, and this rank's share of the parameters."""
        self.load, self.itemsize, self.section = load, dtype.itemsize, section
        for name, (_, *sizes) in self.shapes.items():
            weight = torch.empty(load.local_experts, *sizes, dtype=dtype, device="meta")
            self.register_parameter(name, nn.Parameter(weight))

    def prepare(self, x_TD: Tensor) -> Tensor:
        """The rows to dispatch, as they are: layers ask their experts for them."""
        return x_TD

    def forward(self, x: Any, *routing: Any) -> Tensor:
        """x, then ids and weights [T, K]; or a Dispatched."""
        weight = routing[-1] if routing else x.weight_RK
        x = x if isinstance(x, Tensor) else x.x_RD
        return _Experts.apply(x, weight, self, *self.parameters())

    def kept(self) -> dict[str, int]:
        """Bytes kept from the forward to the backward, by name, with `extra_kept` as "router"; after `configure`."""
        assert self.load is not None
        kept = kept_bytes(self.shape, self.load, self.itemsize, self.section)
        return kept if self.extra_kept is None else {**kept, "router": self.extra_kept(self.load.tokens)}

    def phases(self) -> list[Phase]:
        """The backward's moments and their bytes beyond what is kept; after `configure`."""
        assert self.load is not None
        return backward_phases(self.shape, self.load, self.itemsize, self.section)

    def forward_bytes(self) -> int:
        """The most that the forward has allocated beside what is kept; after `configure`."""
        assert self.load is not None
        return forward_bytes(self.shape, self.load, self.itemsize, self.section)


class _Experts(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, experts, *params):
        kept = experts.kept()
        # Where X is the layer's input, others may keep it too.
        alias = experts.load.ep_size == 1 or experts.section.recompute_dispatch
        held = _bytes(x, sum(kept.values()) - (kept["X"] if alias else 0))
        _bytes(x, experts.forward_bytes())  # and freed
        ctx.save_for_backward(held, x if alias else None, *params)
        ctx.experts, ctx.like = experts, weight
        return torch.empty_like(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        _, _, *params = ctx.saved_tensors
        for phase in ctx.experts.phases():
            _bytes(dout, phase.bytes)
        return torch.empty_like(dout), torch.empty_like(ctx.like), None, *(torch.empty_like(p) for p in params)


class _FlashAttention(torch.autograd.Function):
    """[B, heads, S, C] tensors; keeps its operands, the result and one float32 per row. Its backward adds up dq in
    float32, and, where heads share keys, makes dk and dv for every head first."""

    @staticmethod
    def forward(ctx, q, k, v):
        batch, heads, length, _ = q.shape
        out = q.new_empty(batch, length, heads, v.shape[-1]).transpose(1, 2)
        log_sums = q.new_empty(batch, heads, length, dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, log_sums)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        q, k, v, *_ = ctx.saved_tensors
        temporary = q.numel() * 4 + q.shape[0] * q.shape[1] * q.shape[2] * 4
        if k.shape[1] != q.shape[1]:
            temporary += q.shape[1] * (k.numel() + v.numel()) // k.shape[1] * q.element_size()
        grads = tuple(torch.empty_like(t) for t in (q, k, v))
        _bytes(q, temporary)
        return grads


def _attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """In the place of scaled_dot_product_attention."""
    return _FlashAttention.apply(query, key, value)


class _Answers(TorchFunctionMode):
    """What the meta device cannot say because it has no values."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.__bool__ and args[0].is_meta:
            return True  # Transformers asks whether each text of a batch is one sequence
        if func is torch.bincount and args[0].is_meta:
            # Its length would depend on values; whoever counts routes says how many experts there are.
            return args[0].new_empty(kwargs.get("minlength", 1))
        return func(*args, **kwargs)


# --- gradients ---------------------------------------------------------------------------------------------------


@dataclass
class GradientRule:
    """What becomes of gradients as a backward makes them.

    Attributes:
        stage: of ZeRO.
        ranks: that share a parameter.
        owned: whether a rank keeps a parameter's gradient at stage 2. At stage 3 it keeps its share of each.
        bucket_numel: elements that are packed and reduced together; 0 where each is reduced as it lies.
        staging: bytes that DeepSpeed's ZeRO 1 and 2 allocate at the first gradient of a backward.
    """

    stage: int
    ranks: Callable[[nn.Parameter], int]
    owned: Callable[[nn.Parameter], bool]
    bucket_numel: int
    staging: int

    def __post_init__(self) -> None:
        self._pending: dict[int, int] = {}
        self._shares: dict[nn.Parameter, Tensor] = {}
        self._staging: Tensor | None = None

    def ready(self, param: nn.Parameter) -> None:
        """A hook: `param.grad` was just accumulated."""
        if self._staging is None and self.staging:
            self._staging = _bytes(param, self.staging)
        ranks = self.ranks(param)
        if ranks > 1:
            pending = self._pending.get(ranks, 0) + param.numel()
            if pending >= self.bucket_numel:
                _bytes(param, pending * param.element_size())
                pending = 0
            self._pending[ranks] = pending
        if self.stage == 2 and not self.owned(param):
            param.grad = None
        if self.stage == 3 and ranks > 1:
            share = -(-param.numel() // ranks) * param.element_size()
            if param not in self._shares:
                self._shares[param] = _bytes(param, share)
            param.grad = None

    def end(self) -> None:
        """The backward is through."""
        self._pending.clear()
        self._staging = None


def trace(
    model: nn.Module, loss: Callable[[], Tensor], rule: GradientRule, *, accumulate: bool, inputs: Sequence[Tensor]
) -> Traced:
    """Runs a forward and a backward of a model on the meta device.

    Args:
        loss: runs the model on one micro batch and returns a scalar.
        accumulate: whether gradients of earlier micro batches are there: a second forward and backward is counted.
        inputs: tensors that exist before the forward.
    """
    params = [p for p in model.parameters() if p.requires_grad]
    hooks = [p.register_post_accumulate_grad_hook(rule.ready) for p in params]
    known = [*model.parameters(), *model.buffers(), *inputs]
    try:
        with ExitStack() as stack:
            ledger = stack.enter_context(Ledger(known))
            stack.enter_context(_Answers())
            # Replaced, because a function mode is off in a backward, where checkpointing runs the forward again.
            stack.enter_context(mock.patch.object(nn.functional, "scaled_dot_product_attention", _attention))
            kept = 0
            for _ in range(2 if accumulate else 1):
                before = ledger.live
                value = loss()
                kept = ledger.live - before
                value.backward()
                del value
                rule.end()
            return Traced(kept, ledger.peak)
    finally:
        for hook in hooks:
            hook.remove()
        for param in params:
            param.grad = None
