# SPDX-License-Identifier: GPL-3.0-or-later
"""What a conversion is made of: flat buffers, groups of experts, files read without running them, stacking."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from torch import nn

from flashfusemoe_ds.ds.convert import files
from flashfusemoe_ds.ds.convert.flat import FlatLayout, aligned_gaps, round_robin, undo_round_robin
from flashfusemoe_ds.ds.convert.groups import Arrangement, ExpertParam, cut, join
from flashfusemoe_ds.ds.convert.layers import MoELayerExperts, stack_one, unstack_one
from flashfusemoe_ds.ds.expert_layout import ACTIVATIONS, PACKINGS, ExpertLayout, recognise
from flashfusemoe_ds.ds.fused_experts import FusedExperts
from tests.ds import experts_zoo
from tests.ds.differences import differences


@pytest.mark.parametrize("num_partitions", [1, 2, 3, 4])
@pytest.mark.parametrize("multiple", [1, 8])
def test_flat_layout(num_partitions: int, multiple: int) -> None:
    numels = (5, 8, 1, 30, 2)
    layout = FlatLayout(numels, aligned_gaps(numels, multiple), num_partitions, 2 * num_partitions)
    tensors = [torch.rand(n) + 1 for n in numels]
    buffer = layout.flatten(tensors)
    assert buffer.numel() == layout.total and layout.total % (2 * num_partitions) == 0
    assert all(offset % multiple == 0 for offset in layout.offsets)
    partitions = [layout.partition(buffer, i) for i in range(num_partitions)]
    assert torch.equal(torch.cat(partitions), buffer)
    cut_off = [p[: p.numel() - layout.padding(i)] for i, p in enumerate(partitions)]
    assert sum(p.numel() for p in cut_off) == layout.used
    for offset, tensor in zip(layout.offsets, tensors, strict=True):
        assert torch.equal(layout.read(cut_off, offset, tensor.numel()), tensor)
    found = torch.cat([partitions[i][s : s + n] for i in range(num_partitions) for _, s, n in layout.fragments(i)])
    assert torch.equal(found, torch.cat(tensors))


def test_loss_scalers_are_read(tmp_path: Path) -> None:
    scalers = [LossScaler(128.0), DynamicLossScaler(2.0**16, 1000, 1, 2, False)]
    torch.save(scalers, tmp_path / "scalers.pt")
    torch.save(scalers, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    for name in ("scalers.pt", "old.pt"):
        assert list(differences(files.read(tmp_path / name), scalers, ())) == []


class Harmful:
    def __reduce__(self) -> Any:
        return os.system, ("exit 1",)


@pytest.mark.parametrize("new_format", [True, False])
def test_nothing_in_a_file_is_run(tmp_path: Path, new_format: bool) -> None:
    torch.save({"module": Harmful()}, tmp_path / "file.pt", _use_new_zipfile_serialization=new_format)
    with mock.patch("os.system") as system, pytest.raises(ValueError, match="system"):
        files.read(tmp_path / "file.pt")
    assert not system.called


@pytest.mark.parametrize("length", [0, 1, 4, 7, 9])
def test_round_robin(length: int) -> None:
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

    items = list(range(length))
    for ranks in (1, 2, 4):
        ordered = round_robin(items, ranks)
        assert ordered == DeepSpeedZeroOptimizer._round_robin_reorder(None, items, ranks)[0]
        assert undo_round_robin(ordered, ranks) == items


@pytest.mark.parametrize("limit", [1, 64, 130, 200, 385, 10_000])
def test_groups_are_cut_as_deepspeed_cuts_them(limit: int) -> None:
    shapes = {"a": torch.Size((8, 8)), "b": torch.Size((8,)), "c": torch.Size((8, 16))}
    layer = MoELayerExperts("moe", 6, shapes, torch.float32, None)
    arrangement = Arrangement((layer,), (False,), 2)
    params = arrangement.expand([(0, tuple(shapes))])
    stock = []
    for param in params:
        stock.append(nn.Parameter(torch.empty(arrangement.shape(param))))
        stock[-1].allreduce, stock[-1].group_name = False, "ep_size_2"
    made = split_params_into_different_moe_groups_for_optimizer({"params": stock, "name": "x"}, max_group_size=limit)
    expected = [len(group["params"]) for group in made if group["params"]]
    groups_cut = cut(params, arrangement, limit)
    assert [len(group) for group in groups_cut] == expected
    options = [{"moe": True, "lr": 1}] * len(groups_cut)
    sizes = [[arrangement.shape(p).numel() for p in group] for group in groups_cut]
    assert join(options, sizes, limit) == [list(range(len(groups_cut)))]
    assert arrangement.condense([p for group in groups_cut for p in group]) == [(0, tuple(shapes))]
    assert arrangement.condense(params[::-1]) is None


def test_groups_of_other_options_are_not_joined() -> None:
    options = [{}, {"moe": True, "lr": 1}, {"moe": True, "lr": 2}, {"moe": True, "lr": 2}, {"moe": True, "lr": 2}]
    assert join(options, [[5], [9], [9, 2], [2, 9], [8]], 10) == [[1], [2, 3, 4]]
    assert join(options, [[5], [9], [9], [1], [8]], 10) == [[1], [2], [3], [4]]


@pytest.mark.parametrize("bias", [(False, False), (True, True), (True, False)])
@pytest.mark.parametrize("packing", PACKINGS)
def test_one_stacked_parameter_at_a_time(packing: str, bias: tuple[bool, bool]) -> None:
    leaves = ("up.weight", *["up.bias"] * bias[0], "down.weight", *["down.bias"] * bias[1])
    layout = ExpertLayout("swiglu", ("up",), "down", packing, bias, leaves)
    shapes = {"up.weight": (12, 4), "up.bias": (12,), "down.weight": (4, 6), "down.bias": (4,)}
    own = {leaf: torch.rand(shapes[leaf]) for leaf in leaves}
    stacked = layout.stack(own)
    for name, parts in layout.sources().items():
        row = stack_one(layout, name, {part: own[part] for part in parts})
        assert torch.equal(row, stacked[name])
        back = unstack_one(layout, name, row)
        assert set(back) == set(parts) and all(torch.equal(back[part], own[part]) for part in parts)


@pytest.mark.parametrize("expert", ["relu_bias", "swiglu", "swiglu_packed", "interleaved"])
def test_stacked_parameters_are_in_the_modules_order(expert: str) -> None:
    make = experts_zoo.EXPERTS.get(expert, experts_zoo.InterleavedMLP)
    modules = [make(8, 12) for _ in range(2)]
    layout, reason = recognise(modules, 8)
    assert layout is not None, reason
    shapes = {name: p.shape for name, p in modules[0].named_parameters()}
    layer = MoELayerExperts("moe", 2, shapes, torch.float32, layout)
    fused = FusedExperts(modules, layout)
    assert layer.stacked_shapes() == {name: p.shape[1:] for name, p in fused.named_parameters()}
    assert list(layer.stacked_shapes()) == [name for name, _ in fused.named_parameters()]
    arrangement = Arrangement((layer,), (True,), 1)
    for name, p in fused.named_parameters():
        param = arrangement.param(f"moe.deepspeed_moe.experts.{name}")
        assert param == ExpertParam(0, None, name) and arrangement.shape(param) == p.shape
    assert arrangement.param("moe.deepspeed_moe.gate.wg.weight") is None
    assert layout.activation in ACTIVATIONS
