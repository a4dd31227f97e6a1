# SPDX-License-Identifier: GPL-3.0-or-later
"""Kernel launches that skip most of Triton's Python.

`kernel[grid](...)` binds arguments, looks at each for what it may specialise on, builds a key and compares the
kernel's globals before it launches: 35 to 90 us for these kernels, 13 of which make a layer's step, which on small
layers is more than the GPU needs. `launch` builds a smaller key and calls the compiled kernel itself: some 10 us.

The memo holds compiled kernels alone, as Triton's own does; it never decides what is computed.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver

_TRITON_3_6 = triton.__version__.startswith("3.6.")


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


@dataclass(slots=True)
class _Known:
    kernel: Any  # kept, since the memo's key has its id
    compiled: CompiledKernel
    constexprs: tuple[Any, ...]  # in the order of the signature
    direct: Callable[..., None] | None

    def fire(self, grid: tuple[int, ...], args: list[Any], device: int) -> None:
        x, y, z = (*grid, 1, 1)[:3]
        runtime = knobs.runtime
        if self.direct is None or runtime.launch_enter_hook is not None or runtime.launch_exit_hook is not None:
            self.compiled[(x, y, z)](*args, *self.constexprs)
            return
        compiled, launcher = self.compiled, self.compiled.run
        self.direct(
            x, y, z, driver.active.get_current_stream(device), compiled.function, launcher.launch_cooperative_grid,
            launcher.launch_pdl, None, None, compiled.packed_metadata, None, None, None, *args, *self.constexprs,
        )  # fmt: skip


def _direct(compiled: CompiledKernel) -> Callable[..., None] | None:
    """What lies below the compiled kernel's `[grid]` in Triton 3.6, for kernels without scratch memory: of its 8 us a
    launch, 4 are spent above this. None for other versions, which have other launchers."""
    launcher = compiled.run
    if not _TRITON_3_6 or launcher.global_scratch_size or launcher.profile_scratch_size:
        return None
    return launcher.launch


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
                self._known[key] = _Known(kernel, compiled, ordered, _direct(compiled))
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
