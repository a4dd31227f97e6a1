# SPDX-License-Identifier: GPL-3.0-or-later
"""What `launch` tells apart, and the way below Triton's `compiled[grid]`: with a compiled kernel that notes how it is
launched."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from triton import knobs
from triton.backends.nvidia import driver as nvidia

from flashfusemoe_ds.kernels import launch as module
from flashfusemoe_ds.kernels.launch import Bound, Descriptor, _below, _Known, launch

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


def known(compiled: Compiled, args: tuple[Any, ...] = ()) -> _Known:
    return _Known(compiled, ("constexpr",), _below(compiled, list(args)))


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
    assert _below(Compiled(scratch=16), []) is None


def test_descriptors_are_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[tuple[Any, ...]] = []

    def make(arg: Descriptor, block: dict[str, Any]) -> list[Any]:
        made.append((arg.base.data_ptr(), arg.shape, tuple(block["block_size"])))
        return [made[-1], *arg.shape, *arg.strides]

    monkeypatch.setattr(nvidia, "make_tensordesc_arg", make, raising=False)
    compiled = Compiled(BLOCKS)
    a, b, c = torch.empty(8, 64), torch.empty(16, 64), torch.empty(8, 64)

    def of(tensor: torch.Tensor) -> Descriptor:
        return Descriptor(tensor, (64, 64))

    kernel = known(compiled, (of(a), 7, of(b)))
    for first, second in ((a, b), (a, b), (b, b), (a[:4], b), (c, b)):
        kernel.fire((1,), [of(first), 7, of(second)], 0)
    first_call, again, other, smaller, elsewhere = (call[13:] for call in compiled.direct)
    map_a, map_b = (a.data_ptr(), (8, 64), (64, 64)), (b.data_ptr(), (16, 64), (128, 64))
    assert first_call == again == (map_a, 8, 64, 64, 1, 7, map_b, 16, 64, 64, 1, "constexpr")
    # The other place's block, although a descriptor of the same tensor is known; another shape at the same address.
    map_b_first, map_smaller = (b.data_ptr(), (16, 64), (64, 64)), (a.data_ptr(), (4, 64), (64, 64))
    assert other == (map_b_first, 16, 64, 64, 1, 7, map_b, 16, 64, 64, 1, "constexpr")
    assert smaller == (map_smaller, 4, 64, 64, 1, 7, map_b, 16, 64, 64, 1, "constexpr")
    map_c = c.data_ptr(), (8, 64), (64, 64)
    assert elsewhere == (map_c, 8, 64, 64, 1, 7, map_b, 16, 64, 64, 1, "constexpr")
    assert sorted(made) == sorted([map_a, map_b, map_b_first, map_smaller, map_c])

    monkeypatch.setattr(module, "MOST_DESCRIPTORS", 5)
    kernel.fire((1,), [of(a[:2]), 7, of(b)], 0)
    assert len(kernel.below.made) == 1  # the others are forgotten


def test_tritons_own_knobs_say_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "knobs", knobs)
    assert not module._is_hooked()


def test_descriptor_says_what_triton_says() -> None:
    w = torch.empty(3, 4, 8)
    for block, base in (((1, 4, 8), w), ((4, 8), w.view(12, 8)), ((4, 8), w[0])):
        ours = Descriptor(w if block[0] == 1 else base.view_as(base), block)
        assert (ours.shape, ours.strides, ours.padding) == (tuple(base.shape), base.stride(), "zero")
        theirs = ours.checked()
        assert (theirs.shape, theirs.strides, theirs.padding) == ([*ours.shape], [*ours.strides], ours.padding)
    rows = Descriptor(w, (4, 8))  # of a matrix: the experts' rows one after another
    assert (rows.shape, rows.strides) == ((12, 8), (8, 1))
    # The stride of a dimension of length 1 means nothing, and may be one that TMA refuses.
    odd = torch.empty(16).as_strided((1, 2, 8), (3, 8, 1))
    assert Descriptor(odd, (1, 2, 8)).strides == (16, 8, 1)


# ---- what is told apart

KERNEL = SimpleNamespace(arg_names=["x_ptr", "y_ptr", "desc", "n", "m", "scale", "A", "B"])
X, OPTIONS = torch.empty(64), {"A": 4, "B": 8, "num_warps": 4}
BASE = (X, X, Descriptor(torch.empty(64, 64), (32, 64)), 32, 7, 1.5)


def changed(**places: Any) -> tuple[Any, ...]:
    return tuple(places.get(name, a) for name, a in zip(KERNEL.arg_names, BASE, strict=False))


class Compilations(list):
    """Notes the way through Triton, where each call gets a kernel of its own."""

    def through_triton(self, bound: Bound, grid: Any, device: Any, args: tuple[Any, ...]) -> Compiled:
        self.append(Compiled([None]))
        return self[-1]


@pytest.fixture
def compilations(monkeypatch: pytest.MonkeyPatch) -> Compilations:
    compiled = Compilations()
    monkeypatch.setattr(Bound, "_through_triton", lambda *args: compiled.through_triton(*args))
    monkeypatch.setattr(module, "_TRITON_3_6", False)
    return compiled


ALIKE = {
    "another tensor": changed(x_ptr=torch.empty(3, 5)),
    "a parameter": changed(x_ptr=torch.nn.Parameter(torch.empty(64))),
    "another multiple of 16": changed(n=-48),
    "the least of 32 bits": changed(n=-(2**31)),
    "another odd number": changed(m=2**31 - 1),
    "another factor": changed(scale=0.0),
    "another base": changed(desc=Descriptor(torch.empty(8, 64), (32, 64))),
}
APART = {
    "dtype": changed(x_ptr=X.int()),
    "dtype of the second": changed(y_ptr=X.half()),
    "None": changed(y_ptr=None),
    "no multiple of 16": changed(n=33),
    "1": changed(m=1),
    "64 bits": changed(n=2**31),
    "odd in 64 bits": changed(m=-(2**31) - 1),
    "a float": changed(m=7.0),
    "None for a float": changed(scale=None),
    "block": changed(desc=Descriptor(torch.empty(64, 64), (64, 64))),
    "dtype of a descriptor": changed(desc=Descriptor(torch.empty(64, 64).half(), (32, 64))),
}


def test_one_kernel_for_what_triton_compiles_once(compilations: Compilations) -> None:
    bound = Bound(KERNEL, **OPTIONS)
    launch(bound, (2,), *BASE)
    for name, args in ALIKE.items():
        launch(bound, (2,), *args)
        assert len(compilations) == 1, name
        (grid, *values), expected = compilations[0].through[-1], [*args, 4, 8]
        assert grid == (2, 1, 1) and values[2] is args[2] and values[3:] == expected[3:]
        assert values[:2] == [t.data_ptr() for t in args[:2]]


def test_another_kernel_for_what_triton_compiles_anew(compilations: Compilations) -> None:
    bound = Bound(KERNEL, **OPTIONS)
    for count, args in enumerate((BASE, *APART.values()), start=1):
        launch(bound, (2,), *args)
        assert len(compilations) == count, list(APART)[count - 2]
    for compiled, args in zip(list(compilations), (BASE, *APART.values()), strict=True):
        launch(bound, (2,), *args)
        assert len(compilations) == count and len(compiled.through) == 1


def test_constexprs_tell_kernels_apart(compilations: Compilations) -> None:
    other = SimpleNamespace(arg_names=KERNEL.arg_names)
    kinds = [
        (KERNEL, OPTIONS), (other, OPTIONS), (KERNEL, {**OPTIONS, "A": 5}), (KERNEL, {**OPTIONS, "num_warps": 8}),
        (KERNEL, {**OPTIONS, "num_stages": 2}), (KERNEL, {"B": 4, "A": 8, "num_warps": 4}),
    ]  # fmt: skip
    for count, (kernel, options) in enumerate(kinds, start=1):
        launch(kernel, (2,), *BASE, **options)
        assert len(compilations) == count
    for compiled, (kernel, options) in zip(list(compilations), kinds, strict=True):
        launch(kernel, (2,), *BASE, **options)
        assert len(compilations) == count
        assert compiled.through[0][-2:] == (options["A"], options["B"])  # in the order of the signature


def test_unaligned_pointers_always_go_through_triton(compilations: Compilations) -> None:
    bound, unaligned = Bound(KERNEL, **OPTIONS), changed(y_ptr=X[1:])
    for count, args in enumerate((BASE, unaligned, unaligned), start=1):
        launch(bound, (2,), *args)
        assert len(compilations) == count
    launch(bound, (2,), *BASE)  # the unaligned ones left nothing behind
    assert len(compilations) == 3 and len(compilations[0].through) == 1


def test_no_program_no_launch(compilations: Compilations) -> None:
    launch(Bound(KERNEL, **OPTIONS), (2, 0), *BASE)
    assert compilations == []


class OnSecond(torch.Tensor):
    """As if on the second GPU."""

    def get_device(self) -> int:
        return 1


def test_another_device_goes_through_triton(compilations: Compilations, monkeypatch: pytest.MonkeyPatch) -> None:
    current = [1]
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[0])
    bound = Bound(KERNEL, **OPTIONS)
    there, here = changed(x_ptr=torch.empty(64).as_subclass(OnSecond)), BASE
    launch(bound, (2,), *there)
    launch(bound, (2,), *there)
    assert len(compilations) == 1 and len(compilations[0].through) == 1
    launch(bound, (2,), *here)  # compiled for another device
    assert len(compilations) == 2
    current[0] = 0
    launch(bound, (2,), *there)
    assert len(compilations) == 3 and len(compilations[0].through) == 1
