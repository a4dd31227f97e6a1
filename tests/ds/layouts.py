# SPDX-License-Identifier: GPL-3.0-or-later
"""Parallel layouts for tests: mpus as users write them, experts split over ranks, and DeepSpeed's groups anew."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from deepspeed import comm as dist
from deepspeed.utils import groups
from torch import Tensor, nn
from torch.nn import functional as F


class TensorParallelMpu:
    """Consecutive ranks are tensor-parallel, the others data-parallel: what deepspeed.initialize(mpu=) wants."""

    def __init__(self, tp_size: int) -> None:
        self.tp_size, self.rank, self.world = tp_size, dist.get_rank(), dist.get_world_size()
        self.tp_group = own_group([range(i, i + tp_size) for i in range(0, self.world, tp_size)])
        self.dp_group = own_group([range(i, self.world, tp_size) for i in range(tp_size)])

    def get_model_parallel_rank(self) -> int:
        return self.rank % self.tp_size

    def get_model_parallel_world_size(self) -> int:
        return self.tp_size

    def get_model_parallel_group(self) -> Any:
        return self.tp_group

    def get_data_parallel_rank(self) -> int:
        return self.rank // self.tp_size

    def get_data_parallel_world_size(self) -> int:
        return self.world // self.tp_size

    def get_data_parallel_group(self) -> Any:
        return self.dp_group


def own_group(all_ranks: list[range]) -> Any:
    """Creates every group, as every rank must, and returns the one this rank belongs to."""
    created = [(ranks, dist.new_group(list(ranks))) for ranks in all_ranks]
    return next(group for ranks, group in created if dist.get_rank() in ranks)


@contextlib.contextmanager
def fresh_groups(mpu: Any = None) -> Iterator[None]:
    """DeepSpeed's expert groups forgotten before and after, and this mpu in force between."""
    _forget(mpu)
    try:
        yield
    finally:
        _forget(None)


@contextlib.contextmanager
def stock_gathers_on_gloo() -> Iterator[None]:
    """Lets DeepSpeed's gather_tokens run between CPUs: gloo refuses a flat output for an input with dimensions."""
    original = dist.all_gather_into_tensor

    def flat(out: Tensor, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        return original(out, x.flatten() if out.dim() == 1 else x, *args, **kwargs)

    dist.all_gather_into_tensor = flat
    try:
        yield
    finally:
        dist.all_gather_into_tensor = original


def _forget(mpu: Any) -> None:
    for known in (
        groups._EXPERT_PARALLEL_GROUP,
        groups._EXPERT_PARALLEL_GROUP_RANKS,
        groups._EXPERT_DATA_PARALLEL_GROUP,
        groups._EXPERT_DATA_PARALLEL_GROUP_RANKS,
    ):
        known.clear()
    groups.expert_tensor_parallel_world_size, groups.mesh_device, groups.mpu = 1, None, mpu


class SplitMLP(nn.Module):
    """relu(x W1^T + b1) W2^T + b2, its hidden units split over a group: Megatron's column- and row-parallel Linears.

    With `group` None the ranks' outputs are not added up: what a user who forgot it has.
    """

    def __init__(self, d_model: int, ffn_dim: int, tp_size: int, group: Any) -> None:
        super().__init__()
        # In a tuple: copy.deepcopy, which makes DeepSpeed's experts, cannot copy a process group.
        self.group = Group(group)
        self.fc1 = nn.Linear(d_model, ffn_dim // tp_size)
        self.fc2 = nn.Linear(ffn_dim // tp_size, d_model, bias=False)
        self.bias = nn.Parameter(torch.zeros(d_model))

    def forward(self, x: Tensor) -> Tensor:
        x = _AddGradients.apply(x, self.group)
        y = self.fc2(F.relu(self.fc1(x)))
        return _AddOutputs.apply(y, self.group) + self.bias


class WholeMLP(SplitMLP):
    """The same on one rank."""

    def __init__(self, d_model: int, ffn_dim: int) -> None:
        super().__init__(d_model, ffn_dim, 1, None)


class Group:
    """A process group that copies of a module share."""

    def __init__(self, group: Any) -> None:
        self.group = group

    def __deepcopy__(self, memo: dict[int, Any]) -> Group:
        return self

    def add_up(self, x: Tensor) -> Tensor:
        if self.group is not None:
            x = x.clone()
            dist.all_reduce(x, group=self.group)
        return x


class _AddGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, group):
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx, dx):
        return ctx.group.add_up(dx), None


class _AddOutputs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, y, group):
        return group.add_up(y)

    @staticmethod
    def backward(ctx, dy):
        return dy, None


def split(name: str, whole: Tensor, tp_size: int, tp_rank: int) -> Tensor:
    """The part of a WholeMLP's tensor that belongs to this rank's SplitMLP."""
    if name.endswith(("fc1.weight", "fc1.bias")):
        return whole.chunk(tp_size)[tp_rank]
    if name.endswith("fc2.weight"):
        return whole.chunk(tp_size, dim=1)[tp_rank]
    return whole


class SequenceMpu:
    """Consecutive ranks hold parts of one sequence: DeepSpeed's parallel_state_sp, but with no model parallelism.

    parallel_state_sp names its sequence-parallel group as the model-parallel one too, which stock's MoE takes for
    tensor parallelism.
    """

    def __init__(self, sp_size: int) -> None:
        self.sp_size, self.rank, self.world = sp_size, dist.get_rank(), dist.get_world_size()
        self.sp_group = own_group([range(i, i + sp_size) for i in range(0, self.world, sp_size)])
        self.all_group = own_group([range(self.world)])

    def initialize_sequence_parallel(self) -> None:
        """DeepSpeed looks whether it exists."""

    def get_model_parallel_rank(self) -> int:
        return 0

    def get_model_parallel_world_size(self) -> int:
        return 1

    def get_sequence_parallel_rank(self) -> int:
        return self.rank % self.sp_size

    def get_sequence_parallel_world_size(self) -> int:
        return self.sp_size

    def get_sequence_parallel_group(self) -> Any:
        return self.sp_group

    def get_sequence_data_parallel_rank(self) -> int:
        return self.rank

    def get_sequence_data_parallel_world_size(self) -> int:
        return self.world

    def get_sequence_data_parallel_group(self) -> Any:
        return self.all_group
