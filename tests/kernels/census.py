# SPDX-License-Identifier: GPL-3.0-or-later
"""What kernels compile to for Hopper, without a GPU: registers, spills, shared memory, instructions.

`python -m tests.kernels.census` prints one JSON line per kernel in CASES; test_census.py reads them. Run it with
TRITON_INTERPRET unset, or there is nothing to compile. To add a kernel, Triton or Gluon, add a function to SOURCES
that returns its launches: for most, `record` around the call that launches it, on tensors of device "meta".
"""

from __future__ import annotations

import collections
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource

from flashfusemoe_ds.kernels.activation import get_activation
from flashfusemoe_ds.kernels.order import ExpertOrder, max_tiles

TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int32: "i32",
    torch.int64: "i64",
}
# HGMMA: wgmma. LDGSTS: cp.async. UTMALDG, UTMASTG: TMA. LDL, STL: local memory, which is where spills go.
INSTRUCTIONS = (
    "HGMMA",
    "HMMA",
    "FFMA",
    "LDGSTS",
    "UTMALDG",
    "UTMASTG",
    "LDL",
    "STL",
    "LDSM",
    "STSM",
    "LDS",
    "STS",
    "BAR",
)


@dataclass(frozen=True)
class Launch:
    """One kernel with everything that decides its code.

    Attributes:
        signature: type of every parameter: "*bf16", "i32", "tensordesc<bf16[1, 128, 64]>", or "constexpr".
        constexprs: values of the latter.
        options: num_warps, num_stages and what else the compiler takes.
        expects: instructions that must occur.
        capability: what to compile for; 90 stands for 9.0a, as Triton has it.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    options: dict[str, Any]
    expects: tuple[str, ...] = ("HGMMA",)
    capability: int = 90


@dataclass(frozen=True)
class Census:
    """registers and spill bytes are per thread (spilled: stack and local memory), shared memory in bytes."""

    name: str
    capability: int
    options: dict[str, Any]
    registers: int
    spilled: int
    shared: int
    expects: tuple[str, ...]
    instructions: dict[str, int] = field(default_factory=dict)


def type_of(value: Any) -> str:
    """A runtime argument's type, as the compiler spells it."""
    if value is None:
        return "constexpr"
    if isinstance(value, Tensor):
        return f"*{TYPES[value.dtype]}"
    if isinstance(value, int):
        return "i32"
    layout = getattr(value, "layout", None)  # of a Gluon descriptor
    block = ", ".join(map(str, value.block_shape))
    return f"tensordesc<{TYPES[value.base.dtype]}[{block}]{'' if layout is None else f',{layout!r}'}>"


def describe(
    name: str,
    kernel: Any,
    args: tuple[Any, ...],
    options: dict[str, Any],
    expects: tuple[str, ...] = ("HGMMA",),
    capability: int = 90,
) -> Launch:
    """The Launch of kernel[grid](*args, **options)."""
    names = kernel.arg_names
    signature = {n: type_of(a) for n, a in zip(names, args, strict=False)}
    constexprs = {n: None for n, kind in signature.items() if kind == "constexpr"}
    constexprs |= {n: v for n, v in options.items() if n in names}
    signature |= {n: "constexpr" for n in names if n not in signature}
    options = {n: v for n, v in options.items() if n not in names}
    return Launch(name, kernel, signature, constexprs, options, expects, capability)


def compile_launch(launch: Launch) -> Census:
    """Compiles with pointers that 16 divides, as torch allocates them."""
    kernel = launch.kernel
    names = kernel.arg_names
    source = GluonASTSource if kernel.is_gluon() else ASTSource
    attrs = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if launch.signature[n].startswith("*")}
    constexprs = {(names.index(n),): value for n, value in launch.constexprs.items()}
    ordered = {n: launch.signature[n] for n in names}
    compiled = triton.compile(
        source(kernel, ordered, constexprs, attrs),
        target=GPUTarget("cuda", launch.capability, 32),
        options=launch.options,
    )
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.asm["cubin"])
        usage = _cuobjdump("-res-usage", file.name)
        sass = _cuobjdump("-sass", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    assert found, usage
    registers, stack, local = map(int, found.groups())
    counts = collections.Counter(re.findall(rf"\b({'|'.join(INSTRUCTIONS)})\b", sass))
    shared = compiled.metadata.shared
    return Census(
        launch.name, launch.capability, launch.options, registers, stack + local, shared, launch.expects, dict(counts)
    )


def _cuobjdump(*arguments: str) -> str:
    binary = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    return subprocess.run((str(binary), *arguments), capture_output=True, text=True, check=True).stdout


@contextmanager
def record(
    module: ModuleType, name: str, expects: tuple[str, ...] = ("HGMMA",), capability: int = 90
) -> Iterator[list[Launch]]:
    """Collects what goes through module.launch(kernel, grid, *args, **options) instead of launching it."""
    launches: list[Launch] = []

    def note(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        label = f"{name} {kernel.__name__} #{len(launches)}"
        launches.append(describe(label, kernel, args, options, expects, capability))

    original, module.launch = module.launch, note
    try:
        yield launches
    finally:
        module.launch = original


def meta_order(num_rows: int, top_k: int, num_experts: int) -> ExpertOrder:
    """The shapes of an order, without data."""
    n = num_rows * top_k

    def ints(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int32, device="meta")

    tiles = max_tiles(n, num_experts)
    return ExpertOrder(
        ints(n), ints(n), ints(num_rows, top_k), ints(num_experts), ints(num_experts + 1), ints(tiles),
        ints(num_experts),
    )  # fmt: skip


def portable_launches() -> list[Launch]:
    """TritonProducts as it runs on an H200, where a shape changes its code, and once on an A100."""
    from flashfusemoe_ds.kernels import triton_products

    def run(
        name: str,
        shape: tuple[int, int, int, int, int],
        activation: str = "swiglu",
        *,
        bias: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        only: tuple[str, ...] = (),
        capability: int = 90,
        expects: tuple[str, ...] = ("HGMMA",),
    ) -> list[Launch]:
        products = triton_products.TritonProducts(divmod(capability, 10), 132)
        act, (rows, d, f, experts, top_k) = get_activation(activation), shape
        h, n = act.up_width(f), rows * top_k

        def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        order = meta_order(rows, top_k, experts)
        x, up, down = empty(rows, d), empty(experts, h, d), empty(experts, d, f)
        b_up, b_down = (empty(experts, h), empty(experts, d)) if bias else (None, None)
        weight = empty(rows, top_k, dtype=torch.float32)
        with record(triton_products, name, expects, capability) as launches:
            products.up(x, order, up, b_up, weight, act)
            products.down(empty(n, f), order, down, b_down, weight)
            products.dgated(x, order, down, None, empty(n, h), weight, act, overwrite_h=not bias)
            products.dx(empty(n, h), order, up)
            products.dw_down(x, order, empty(n, f))
            products.dw_up(empty(n, h), order, x)
        return [launch for launch in launches if not only or launch.kernel.__name__ in only]

    qwen3, mixtral, seed = (16384, 2048, 768, 128, 8), (8192, 4096, 14336, 8, 2), (8192, 1024, 2048, 8, 2)
    ragged = (4096, 1416, 2824, 32, 4)  # no tile divides these widths: masks everywhere
    activate = ("up_kernel", "dgated_kernel")
    return [
        *run("qwen3", qwen3),
        *run("mixtral", mixtral, only=("dgated_kernel",)),
        *run("gelu_tanh with biases", seed, "gelu_tanh", bias=True, only=activate),
        *run("ragged geglu with biases", ragged, "geglu", bias=True, only=(*activate, "weight_grad_kernel")),
        *run("seed on sm_80", seed, capability=80, expects=("HMMA", "LDGSTS")),
        *run("seed in float32", seed, dtype=torch.float32, expects=("FFMA",)),
    ]


SOURCES: tuple[Callable[[], list[Launch]], ...] = (portable_launches,)


def main() -> None:
    wanted = sys.argv[1:]
    for source in SOURCES:
        for launch in source():
            if not wanted or any(word in launch.name for word in wanted):
                print(json.dumps(asdict(compile_launch(launch))), flush=True)


if __name__ == "__main__":
    main()
