# SPDX-License-Identifier: GPL-3.0-or-later
"""Kernel launches that skip most of Triton's Python.

`kernel[grid](...)` binds arguments, looks at each for what it may specialise on, builds a key and compares the
kernel's globals before it launches: 35 to 90 us for these kernels, 13 of which make a layer's step, which on small
layers is more than the GPU needs. `launch` builds a smaller key and calls the compiled kernel itself: some 10 us. What
every step launches is `Bound` to its constexprs once, so that they are not named, and looked up, each time.

The memo holds compiled kernels, as Triton's own does, and TMA descriptors, which say no more than an address, a shape
and a block. It never decides what is computed.
"""

from __future__ import annotations

import contextlib
import inspect
import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver

_TRITON_3_6 = triton.__version__.startswith("3.6.")
MOST_DESCRIPTORS = 256  # kept per kernel; a training step's addresses come back


@dataclass(slots=True)
class Descriptor:
    """A TMA descriptor to be: what the launch reads of Triton's, without the checks that every construction repeats.

    Attributes:
        base: contiguous, 16-byte aligned, rows of a multiple of 16 bytes.
        block_shape: of the block that one copy moves. Where it has fewer dimensions than base, base's first ones are
            addressed as one.
        layout: of that block in shared memory, for a Gluon kernel; None for a Triton kernel.
    """

    base: Tensor
    block_shape: tuple[int, ...]
    layout: Any = None
    padding: ClassVar[str] = "zero"

    @property
    def shape(self) -> tuple[int, ...]:
        shape = self.base.shape
        joined = len(shape) - len(self.block_shape) + 1
        return math.prod(shape[:joined]), *shape[joined:]

    @property
    def strides(self) -> tuple[int, ...]:
        shape = self.shape
        return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))

    def checked(self) -> Any:
        """Triton's own descriptor of the same."""
        shape, strides, block = list(self.shape), list(self.strides), list(self.block_shape)
        if self.layout is None:
            from triton.tools.tensor_descriptor import TensorDescriptor

            return TensorDescriptor(self.base, shape, strides, block)
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor as GluonDescriptor

        return GluonDescriptor(self.base, shape, strides, block, self.layout)


class _Below:
    """What lies below a compiled kernel's `[grid]` in Triton 3.6. A launch takes 8 us there, 4 of them above this, and
    3 more for every TMA descriptor, made anew each time; here it is looked up by what it is made from."""

    def __init__(self, compiled: CompiledKernel, args: list[Any]) -> None:
        launcher = compiled.run
        self.launch = launcher.launch
        self.fixed = compiled.function, launcher.launch_cooperative_grid, launcher.launch_pdl, None, None
        self.fixed += compiled.packed_metadata, None, None, None
        self.get_stream = driver.active.get_current_stream
        # Kernels that take descriptors are launched by a function around the launcher, which makes them.
        around = inspect.getclosurevars(self.launch).nonlocals if inspect.isfunction(self.launch) else {}
        self.blocks: list[tuple[int, Any]] = []  # where descriptors stand, from the last, and what Triton says of each
        if None not in (around.get("tensordesc_meta") or [None]):
            places = [i for i, a in enumerate(args) if type(a) is Descriptor]
            self.launch = around["launcher"]
            self.blocks = [*zip(places, around["tensordesc_meta"], strict=True)][::-1]
        self.made: dict[tuple[Any, ...], list[Any]] = {}

    def __call__(self, grid: tuple[int, int, int], device: int, args: list[Any], constexprs: tuple[Any, ...]) -> None:
        """Launches. Descriptors are replaced in `args`."""
        for place, block in self.blocks:
            descriptor = args[place]
            base = descriptor.base
            key = place, base.data_ptr(), base.shape
            args[place : place + 1] = self.made.get(key) or self._make(key, descriptor, block)
        self.launch(*grid, self.get_stream(device), *self.fixed, *args, *constexprs)

    def _make(self, key: tuple[Any, ...], descriptor: Descriptor, block: Any) -> list[Any]:
        from triton.backends.nvidia.driver import make_tensordesc_arg

        if len(self.made) >= MOST_DESCRIPTORS:
            self.made.clear()
        made = self.made[key] = make_tensordesc_arg(descriptor, block)
        return made


@dataclass(slots=True)
class _Known:
    compiled: CompiledKernel
    constexprs: tuple[Any, ...]  # in the order of the signature
    below: _Below | None

    def fire(self, grid: tuple[int, ...], args: list[Any], device: int) -> None:
        grid = (*grid, 1, 1)[:3]
        if self.below is None or _is_hooked():
            self.compiled[grid](*args, *self.constexprs)
        else:
            self.below(grid, device, args, self.constexprs)


def _is_hooked() -> bool:
    """Whether somebody, a profiler, wants to be called at launches. Triton 3.6 has empty chains where nobody does."""
    runtime = knobs.runtime
    enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def _below(compiled: CompiledKernel, args: list[Any]) -> _Below | None:
    """None for other versions, which have other launchers, and for kernels with scratch memory."""
    if not _TRITON_3_6 or compiled.run.global_scratch_size or compiled.run.profile_scratch_size:
        return None
    return _Below(compiled, args)


class Bound:
    """A kernel with its constexprs. `launch` takes one in the place of a kernel.

    Args:
        kernel: @triton.jit or @gluon.jit.
        constexprs: its constexpr arguments, which come last in its signature.
    """

    def __init__(self, kernel: Any, *, num_warps: int, num_stages: int = 3, **constexprs: Any) -> None:
        self.kernel, self.constexprs = kernel, constexprs
        self.options = {**constexprs, "num_warps": num_warps, "num_stages": num_stages}
        self._known: dict[tuple[Any, ...], _Known] = {}

    def launch(self, grid: tuple[int, ...], args: tuple[Any, ...]) -> None:
        """See `launch`."""
        if 0 in grid:
            return
        # What Triton specialises on: a tensor's dtype and alignment, whether an int is 1 or a multiple of 16, and
        # whether it needs 64 bits.
        key: list[Any] = []
        values: list[Any] = []  # pointers as numbers, which a launcher need not ask the tensors for
        pointers, first = 0, None
        for a in args:
            kind = type(a)
            if kind is int:
                key.append(1 if a == 1 else (a & 15 == 0, -(2**31) <= a < 2**31))
            elif kind is Descriptor:
                key.append(a.block_shape)
                key.append(a.base.dtype)
            elif kind is Tensor or isinstance(a, Tensor):
                if first is None:
                    first = a
                key.append(a.dtype)
                a = a.data_ptr()
                pointers |= a
            else:
                key.append(kind)
            values.append(a)
        index = first.get_device()
        key.append(index)
        key = tuple(key)

        known = self._known.get(key)
        if known is None or pointers & 15 or (index >= 0 and index != torch.cuda.current_device()):
            compiled = self._through_triton(grid, first.device, args)
            if compiled is not None and not pointers & 15:
                ordered = tuple(self.constexprs[name] for name in self.kernel.arg_names[len(args) :])
                self._known[key] = _Known(compiled, ordered, _below(compiled, values))
            return
        known.fire(grid, values, index)

    def _through_triton(
        self, grid: tuple[int, ...], device: torch.device, args: tuple[Any, ...]
    ) -> CompiledKernel | None:
        """The long way: the first time, for a pointer that is not aligned (and then it matters which), and on another
        device than the current one. None from the interpreter."""
        args = [a.checked() if isinstance(a, Descriptor) else a for a in args]
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            compiled = self.kernel[grid](*args, **self.options)
        return compiled if isinstance(compiled, CompiledKernel) else None


class _Kernels:
    def __init__(self) -> None:
        self._bound: dict[tuple[Any, ...], Bound] = {}

    def launch(self, kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        """Launches on the device of the first tensor, whichever is current; nothing where the grid is empty.

        Args:
            kernel: @triton.jit or @gluon.jit, or one that is `Bound`.
            grid: one to three dimensions.
            args: the kernel's run-time arguments, in order: tensors, Descriptors, numbers, None.
            options: what `Bound` takes, num_warps and the constexprs; nothing for a kernel that is bound.
        """
        if type(kernel) is not Bound:
            key = id(kernel), *options, *options.values()
            bound = self._bound.get(key)
            if bound is None:
                bound = self._bound[key] = Bound(kernel, **options)
            kernel = bound
        kernel.launch(grid, args)


launch = _Kernels().launch
