# SPDX-License-Identifier: GPL-3.0-or-later
"""Kernel launches that skip most of Triton's Python.

`kernel[grid](...)` binds arguments, looks at each for what it may specialise on, builds a key and compares the
kernel's globals before it launches: 35 to 90 us for these kernels, 13 of which make a layer's step, which on small
layers is more than the GPU needs. `launch` builds a smaller key and calls the compiled kernel itself: some 10 us.

The memo holds compiled kernels, as Triton's own does, and TMA descriptors, which say no more than an address, a shape
and a block. It never decides what is computed.
"""

from __future__ import annotations

import contextlib
import inspect
from dataclasses import dataclass
from typing import Any

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
        block_shape: of the block that one copy moves.
        layout: of that block in shared memory, for a Gluon kernel; None for a Triton kernel.
    """

    base: Tensor
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    block_shape: tuple[int, ...]
    layout: Any = None
    padding: str = "zero"

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

    def __init__(self, compiled: CompiledKernel) -> None:
        launcher = compiled.run
        self.launch = launcher.launch
        self.fixed = compiled.function, launcher.launch_cooperative_grid, launcher.launch_pdl, None, None
        self.fixed += compiled.packed_metadata, None, None, None
        self.get_stream = driver.active.get_current_stream
        # Kernels that take descriptors are launched by a function around the launcher, which makes them.
        around = inspect.getclosurevars(self.launch).nonlocals if inspect.isfunction(self.launch) else {}
        self.blocks: list[Any] = []
        if None not in (around.get("tensordesc_meta") or [None]):
            self.launch, self.blocks = around["launcher"], around["tensordesc_meta"]
        self.made: dict[tuple[Any, ...], list[Any]] = {}

    def __call__(self, grid: tuple[int, int, int], device: int, args: list[Any], constexprs: tuple[Any, ...]) -> None:
        if self.blocks:
            args = self._with_descriptors(args)
        self.launch(*grid, self.get_stream(device), *self.fixed, *args, *constexprs)

    def _with_descriptors(self, args: list[Any]) -> list[Any]:
        out: list[Any] = []
        index = 0
        for a in args:
            if type(a) is not Descriptor:
                out.append(a)
                continue
            key = index, a.base.data_ptr(), a.shape, a.strides, a.padding
            made = self.made.get(key)
            if made is None:
                from triton.backends.nvidia.driver import make_tensordesc_arg

                if len(self.made) >= MOST_DESCRIPTORS:
                    self.made.clear()
                made = self.made[key] = make_tensordesc_arg(a, self.blocks[index])
            out += made
            index += 1
        return out


@dataclass(slots=True)
class _Known:
    kernel: Any  # kept, since the memo's key has its id
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
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))


def _below(compiled: CompiledKernel) -> _Below | None:
    """None for other versions, which have other launchers, and for kernels with scratch memory."""
    if not _TRITON_3_6 or compiled.run.global_scratch_size or compiled.run.profile_scratch_size:
        return None
    return _Below(compiled)


class _Launch:
    def __init__(self) -> None:
        self._known: dict[tuple[Any, ...], _Known] = {}

    def __call__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        *args: Any,
        num_warps: int,
        num_stages: int = 3,
        **constexprs: Any,
    ) -> None:
        """Launches on the device of the first tensor, whichever is current; nothing where the grid is empty.

        Args:
            kernel: @triton.jit or @gluon.jit.
            grid: one to three dimensions.
            args: the kernel's run-time arguments, in order: tensors, Descriptors, numbers, None.
            constexprs: its constexpr arguments, which come last in its signature.
        """
        if 0 in grid:
            return
        # What Triton specialises on: a tensor's dtype and alignment, whether an int is 1 or a multiple of 16, and
        # whether it needs 64 bits.
        key: list[Any] = [id(kernel), num_warps, num_stages, *constexprs, *constexprs.values()]
        values: list[Any] = []  # pointers as numbers, which a launcher need not ask the tensors for
        pointers, device = 0, None
        for a in args:
            if isinstance(a, Tensor):
                if device is None:
                    device = a.device
                key.append(a.dtype)
                a = a.data_ptr()
                pointers |= a
            elif type(a) is int:
                key.append(1 if a == 1 else (a & 15 == 0, -(2**31) <= a < 2**31))
            elif type(a) is Descriptor:
                key.append(a.block_shape)
                key.append(a.base.dtype)
            else:
                key.append(type(a))
            values.append(a)
        index = device.index
        key.append(index)
        key = tuple(key)

        known = self._known.get(key)
        current = torch.cuda.current_device() if device.type == "cuda" else index
        if known is None or pointers & 15 or index != current:
            compiled = self._through_triton(kernel, grid, device, args, num_warps, num_stages, constexprs)
            if compiled is not None and not pointers & 15:
                ordered = tuple(constexprs[name] for name in kernel.arg_names[len(args) :])
                self._known[key] = _Known(kernel, compiled, ordered, _below(compiled))
            return
        known.fire(grid, values, index)

    @staticmethod
    def _through_triton(kernel, grid, device, args, num_warps, num_stages, constexprs) -> CompiledKernel | None:
        """The long way: the first time, for a pointer that is not aligned (and then it matters which), and on another
        device than the current one. None from the interpreter."""
        args = [a.checked() if isinstance(a, Descriptor) else a for a in args]
        with torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext():
            compiled = kernel[grid](*args, **constexprs, num_warps=num_warps, num_stages=num_stages)
        return compiled if isinstance(compiled, CompiledKernel) else None


launch = _Launch()
