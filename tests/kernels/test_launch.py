# SPDX-License-Identifier: GPL-3.0-or-later
"""The way below Triton's `compiled[grid]`, with a compiled kernel that notes how it is launched."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from triton import knobs
from triton.backends.nvidia import driver as nvidia

from flashfusemoe_ds.kernels import launch as module
from flashfusemoe_ds.kernels.launch import Descriptor, _below, _Known

BLOCKS = [{"block_size": [64, 64]}, {"block_size": [128, 64]}]


class Compiled:
    """What Triton 3.6 makes of a kernel, as far as a launch asks it."""

    function, packed_metadata = "function", "metadata"

    def __init__(self, blocks: list[Any] | None = None, scratch: int = 0) -> None:
        self.direct: list[tuple[Any, ...]] = []
        self.through: list[tuple[Any, ...]] = []
        tensordesc_meta, launcher = blocks, lambda *args: self.direct.append(args)

        def inner(*args: Any) -> None:  # as Triton wraps the launcher of a kernel with descriptors
            assert tensordesc_meta
            launcher("made by Triton", *args)

        self.run = SimpleNamespace(
            launch=inner if blocks else self.direct_launch, global_scratch_size=scratch, profile_scratch_size=0,
            launch_cooperative_grid=False, launch_pdl=False,
        )  # fmt: skip

    def direct_launch(self, *args: Any) -> None:
        self.direct.append(args)

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        return lambda *args: self.through.append((grid, *args))


@pytest.fixture(autouse=True)
def triton_3_6(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TRITON_3_6", True)
    monkeypatch.setattr(module, "driver", SimpleNamespace(active=SimpleNamespace(get_current_stream=lambda d: 70 + d)))
    empty = SimpleNamespace(calls=[])  # Triton 3.6's hooks, when nobody has one
    monkeypatch.setattr(module, "knobs", SimpleNamespace(runtime=SimpleNamespace(launch_enter_hook=empty,
                                                                                 launch_exit_hook=empty)))  # fmt: skip


def known(compiled: Compiled) -> _Known:
    return _Known(None, compiled, ("constexpr",), _below(compiled))


def test_goes_below_where_nobody_listens() -> None:
    compiled = Compiled()
    known(compiled).fire((5,), [1, 2], 3)
    fixed = ("function", False, False, None, None, "metadata", None, None, None)
    assert compiled.direct == [(5, 1, 1, 73, *fixed, 1, 2, "constexpr")] and compiled.through == []


@pytest.mark.parametrize("hook", ["launch_enter_hook", "launch_exit_hook"])
@pytest.mark.parametrize("listener", [SimpleNamespace(calls=[print]), print], ids=["chain", "function"])
def test_hooks_are_called_by_triton(hook: str, listener: Any) -> None:
    compiled = Compiled()
    setattr(module.knobs.runtime, hook, listener)
    known(compiled).fire((5, 6), [1], 0)
    assert compiled.direct == [] and compiled.through == [((5, 6, 1), 1, "constexpr")]


def test_scratch_memory_is_tritons_affair() -> None:
    assert _below(Compiled(scratch=16)) is None


def test_descriptors_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[Any, ...]] = []

    def make(arg: Descriptor, block: dict[str, Any]) -> list[Any]:
        made.append((arg.base.data_ptr(), arg.shape, tuple(block["block_size"])))
        return [f"map {len(made)}", *arg.shape, *arg.strides]

    monkeypatch.setattr(nvidia, "make_tensordesc_arg", make, raising=False)
    compiled = Compiled(BLOCKS)
    kernel = known(compiled)
    a, b = torch.empty(8, 64), torch.empty(16, 64)

    def of(tensor: torch.Tensor) -> Descriptor:
        return Descriptor(tensor, tuple(tensor.shape), tensor.stride(), (64, 64))

    for first, second in ((a, b), (a, b), (b, b), (a[:4], b)):
        kernel.fire((1,), [of(first), 7, of(second)], 0)
    first_call, again, other, smaller = (call[13:] for call in compiled.direct)
    assert first_call == again == ("map 1", 8, 64, 64, 1, 7, "map 2", 16, 64, 64, 1, "constexpr")
    assert other[0] == "map 3" and smaller[:3] == ("map 4", 4, 64)  # another address; another shape there
    assert made[0] == (a.data_ptr(), (8, 64), (64, 64)) and made[1] == (b.data_ptr(), (16, 64), (128, 64))

    monkeypatch.setattr(module, "MOST_DESCRIPTORS", 4)
    kernel.fire((1,), [of(a[:2]), 7, of(b)], 0)
    assert len(kernel.below.made) == 2  # forgotten, and made again


def test_tritons_own_knobs_say_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "knobs", knobs)
    assert not module._is_hooked()
