# SPDX-License-Identifier: GPL-3.0-or-later
"""MoE layers under an mpu with tensor parallelism, where the ranks of a group hold the same tokens.

    x [T, D], alike on every rank ─ gate ─ routing of all T tokens, alike
      └ own      each rank keeps its T / size tokens and their routes
          └ dispatch ─ experts ─ combine
      └ whole    the other ranks' outputs come in: [T, D], alike on every rank

So a token is sent and computed once, not once per rank. DeepSpeed does the same with slots of its capacity buffers
(deepspeed/moe/mappings.py, drop_tokens and gather_tokens); with tokens no capacity must be divisible by anything.
All ranks compute the same loss, which counts once: the backward of `own` gathers, that of `whole` cuts, neither adds.

Experts that are tensor-parallel themselves add up over the group inside their forward, so its ranks must compute the
same rows: `on_all_tokens` makes them whole again between dispatch and experts.

The mpu of DeepSpeed's Ulysses calls its sequence-parallel group its model-parallel one too. Those ranks hold different
tokens: to the layer that is data parallelism, and nothing of this applies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed
from deepspeed import comm as dist
from deepspeed.utils import groups
from deepspeed.utils.bwc import (
    bwc_pipeline_parallel_world_size,
    bwc_tensor_model_parallel_group,
    bwc_tensor_model_parallel_world_size,
)
from torch import Tensor
from torch.autograd.function import once_differentiable

from flashfusemoe_ds.types import Dispatched, Routing

# What ranks that compute the same may differ by, of the largest value: rounding in 16 bits, but no other token.
ALIKE = 1e-2
# Columns of a tensor that are compared between ranks.
SAMPLE = 32


def ranks_per_stage(mpu: Any) -> int:
    """Ranks that share a pipeline stage."""
    return dist.get_world_size() // bwc_pipeline_parallel_world_size(mpu)


def tensor_parallel_size(mpu: Any) -> int:
    """Ranks that hold the same tokens, according to a DeepSpeed mpu (or None)."""
    # DeepSpeed's own mark of the Ulysses mpu, in deepspeed.utils.groups.
    if mpu is None or hasattr(mpu, "initialize_sequence_parallel"):
        return 1
    return bwc_tensor_model_parallel_world_size(mpu)


@dataclass(frozen=True)
class ReplicatedTokens:
    """A tensor-parallel group whose ranks call a layer with the same tokens.

    Attributes:
        group: the mpu's tensor-parallel group.
        size, rank: its number of ranks, and this rank's place in it.
        split: whether the ranks divide the tokens among themselves.
        experts_on_all: whether every rank's experts compute the rows of all ranks of the group.
    """

    group: torch.distributed.ProcessGroup
    size: int
    rank: int
    split: bool
    experts_on_all: bool

    def own(self, x_TX: Tensor) -> Tensor:
        """This rank's share of rows that all ranks have, [T, *] -> [T / size, *]; its gradient is for all rows."""
        return _Own.apply(x_TX, self, self.shares(x_TX.shape[0])) if self.split else x_TX

    def own_routing(self, routing: Routing) -> Routing:
        """The routing of this rank's share of the tokens; the counts stay those of all."""
        if not self.split:
            return routing
        idx_TK = self.cut(routing.idx_TK, self.shares(routing.idx_TK.shape[0]))
        return replace(routing, idx_TK=idx_TK, weight_TK=self.own(routing.weight_TK))

    def whole(self, y_TX: Tensor, num_tokens: int) -> Tensor:
        """The inverse of `own`, [T / size, *] -> [T, *]."""
        return _Whole.apply(y_TX, self, self.shares(num_tokens)) if self.split else y_TX

    def on_all_tokens(self, experts: Callable[[Dispatched], Tensor], sent: Dispatched, check: bool) -> Tensor:
        """The experts' sums for the rows this rank received, computed together with those that the others did.

        The ranks' rows are put one after another, so they lie alike on every rank whatever order a transport delivers
        in: an expert's own sum over the group adds rows by their place.

        Args:
            check: whether to compare the experts' outputs between ranks, see `check_outputs`.
        """
        if not self.split:
            y_RD = experts(sent)
            if check:
                check_outputs(self, y_RD)
            return y_RD
        sizes = torch.tensor([[sent.x_RD.shape[0], sent.num_routes]], device=sent.x_RD.device)
        rows, routes = zip(*self.gather(sizes, (1,) * self.size).tolist(), strict=True)
        everything = Dispatched(
            x_RD=_Whole.apply(sent.x_RD, self, rows),
            idx_RK=self.gather(sent.idx_RK, rows),
            weight_RK=_Whole.apply(sent.weight_RK, self, rows),
            num_routes=sum(routes),
            handle=None,
        )
        y_GD = experts(everything)
        if check:
            check_outputs(self, y_GD)
        return _Own.apply(y_GD, self, rows)

    def shares(self, num_tokens: int) -> tuple[int, ...]:
        """Tokens per rank; the first ranks take one more where it does not come out even."""
        each, more = divmod(num_tokens, self.size)
        return tuple(each + (rank < more) for rank in range(self.size))

    def cut(self, x: Tensor, rows: tuple[int, ...]) -> Tensor:
        """This rank's rows[rank] of sum(rows) rows."""
        return x.narrow(0, sum(rows[: self.rank]), rows[self.rank])

    def gather(self, x: Tensor, rows: tuple[int, ...]) -> Tensor:
        """All ranks' rows in rank order; rank r has rows[r] of them."""
        most = max(rows)
        if most == 0:
            return x
        padded = x if len(x) == most else torch.cat([x, x.new_zeros(most - len(x), *x.shape[1:])])
        out = x.new_empty(self.size * most, *x.shape[1:])
        dist.all_gather_into_tensor(out, padded.contiguous(), group=self.group)
        if min(rows) == most:
            return out
        return torch.cat([part[:n] for part, n in zip(out.chunk(self.size), rows, strict=True)])


class _Own(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, tokens, rows):
        ctx.tokens, ctx.rows = tokens, rows
        return tokens.cut(x, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, dx):
        return ctx.tokens.gather(dx, ctx.rows), None, None


class _Whole(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, tokens, rows):
        ctx.tokens, ctx.rows = tokens, rows
        return tokens.gather(x, rows)

    @staticmethod
    @once_differentiable
    def backward(ctx, dx):
        return ctx.tokens.cut(dx, ctx.rows), None, None


def replicated_tokens(mpu: Any, group_name: str, expert_tensor_parallel: bool) -> ReplicatedTokens | None:
    """How a layer shares its tokens within the mpu's tensor-parallel group; None without one.

    Asked of the process groups rather than of the layer's setting: DeepSpeed creates groups once per ep_size, for all
    layers of it.

    Args:
        group_name: the layer's, in deepspeed.utils.groups, which must exist.
        expert_tensor_parallel: the layer's enable_expert_tensor_parallelism.

    Raises:
        ValueError: the groups were created for another layout than this layer's.
    """
    size, ranks = tensor_parallel_size(mpu), ranks_per_stage(mpu)
    expert_ranks = groups._get_expert_parallel_world_size(group_name) * groups._get_expert_data_parallel_world_size(
        group_name
    )
    # Over how many ranks experts are spread, or the gradients of their copies added: with the tensor-parallel ones, or
    # only among the ranks of one place in their tensor-parallel groups.
    apart = expert_ranks * size == ranks
    if not apart and expert_ranks != ranks:
        raise ValueError(
            f"the process groups {group_name} cover {expert_ranks} of {ranks} ranks, but the mpu's tensor-parallel "
            f"size is {size}: an earlier engine of this process created them under another mpu"
        )
    if size == 1:
        return None
    if expert_tensor_parallel and not apart:
        raise ValueError(
            f"enable_expert_tensor_parallelism is True, but the process groups {group_name} were created by a layer "
            "where it is False; give all layers of one ep_size the same value"
        )
    group = bwc_tensor_model_parallel_group(mpu)
    split = not (apart and groups._get_expert_parallel_world_size(group_name) == 1)
    return ReplicatedTokens(group, size, dist.get_rank(group=group), split, apart)


@torch.no_grad()
def check_tokens(tokens: ReplicatedTokens, x_TD: Tensor, routing: Routing) -> None:
    """ValueError, on every rank of the group, unless all have the same tokens and route them alike."""
    lengths = tokens.gather(torch.tensor([x_TD.shape[0]], device=x_TD.device), (1,) * tokens.size).tolist()
    advice = (
        f"the mpu's tensor-parallel size is {tokens.size}: MoE expects the same tokens on all ranks of such a group"
    )
    if len(set(lengths)) > 1:
        raise ValueError(f"{advice}, but they have {', '.join(map(str, lengths))}")
    samples = _samples(tokens, x_TD)
    if not _alike(samples):
        raise ValueError(f"{advice}, but they have different ones")
    idx = tokens.gather(routing.idx_TK.contiguous(), (len(x_TD),) * tokens.size).chunk(tokens.size)
    # Where the tokens differ by rounding, a near tie may be decided either way.
    if all(torch.equal(samples[0], s) for s in samples) and not all(torch.equal(idx[0], i) for i in idx):
        raise ValueError(
            f"the mpu's tensor-parallel size is {tokens.size}, and the ranks of such a group route the same tokens to "
            "different experts: they must draw the same random numbers (use_rts, noisy_gate_policy, "
            "top2_2nd_expert_sampling) and have the same gate. Seed torch alike on them"
        )


@torch.no_grad()
def check_outputs(tokens: ReplicatedTokens, y_RD: Tensor) -> None:
    """ValueError, on every rank of the group, unless the experts' outputs for all tokens agree."""
    if not _alike(_samples(tokens, y_RD)):
        raise ValueError(
            f"the mpu's tensor-parallel size is {tokens.size}, and the experts' outputs differ between the ranks of "
            "such a group. Under enable_expert_tensor_parallelism an expert whose weights are split must add up its "
            "ranks' outputs itself (and the gradients of its input); one that is not split needs the same weights on "
            "all of them"
        )


def _samples(tokens: ReplicatedTokens, x_TD: Tensor) -> tuple[Tensor, ...]:
    return tokens.gather(x_TD[:, :SAMPLE].float().contiguous(), (len(x_TD),) * tokens.size).chunk(tokens.size)


def _alike(samples: tuple[Tensor, ...]) -> bool:
    """NaN counts as alike: what made it is not to be found here."""
    first = samples[0]
    return not any(bool(((first - other).abs() > ALIKE * first.abs().max()).any()) for other in samples if len(first))
