# SPDX-License-Identifier: GPL-3.0-or-later
"""What kernels compile to for Hopper, without a GPU: registers, spills, shared memory, instructions.

`python -m tests.kernels.census [WORD ...]` prints one JSON line per kernel that SOURCES list (and whose source or name
holds one of the words); test_census.py reads them. Run it with TRITON_INTERPRET unset, or there is nothing to compile.
To add a kernel, Triton or Gluon, add a function to SOURCES that returns its launches: for most, `record` around the
call that launches it, on tensors of device "meta".
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
from dataclasses import asdict, dataclass, field, replace
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
from flashfusemoe_ds.kernels.launch import Bound
from flashfusemoe_ds.kernels.order import ExpertOrder, max_tiles

TYPES = {
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float32: "fp32",
    torch.int8: "i8",
    torch.int32: "i32",
    torch.int64: "i64",
}
# HGMMA: wgmma. LDGSTS: cp.async. UTMALDG, UTMASTG: TMA. USETMAXREG: registers moved between the partitions of a
# warp-specialised kernel. LDL, STL: local memory, which is where spills go.
INSTRUCTIONS = (
    "HGMMA",
    "HMMA",
    "FFMA",
    "LDGSTS",
    "UTMALDG",
    "UTMASTG",
    "USETMAXREG",
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
        divisible: parameters of which the compiler knows that 16 divides them.
        options: num_warps, num_stages and what else the compiler takes.
        expects: instructions that must occur.
        capability: what to compile for; 90 stands for 9.0a, as Triton has it.
    """

    name: str
    kernel: Any
    signature: dict[str, str]
    constexprs: dict[str, Any]
    divisible: tuple[str, ...]
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
    if isinstance(value, Tensor):
        return f"*{TYPES[value.dtype]}"
    if isinstance(value, int):
        return "i32"
    if isinstance(value, float):
        return "fp32"
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
    """The Launch of kernel[grid](*args, **options), specialised as Triton does: an integer 1 is a constant, and of
    pointers (aligned, as torch allocates them) and other integers it knows whether 16 divides them."""
    names = kernel.arg_names
    fixed = {p.name for p in kernel.params if p.do_not_specialize}
    given = dict(zip(names, args, strict=False))
    integers = {n: a for n, a in given.items() if isinstance(a, int) and n not in fixed}
    constexprs = {n: a for n, a in given.items() if a is None or (n in integers and a == 1)}
    constexprs |= {n: v for n, v in options.items() if n in names}
    signature = {n: "constexpr" if n in constexprs or n not in given else type_of(given[n]) for n in names}
    divisible = tuple(n for n, kind in signature.items() if kind[0] == "*" or integers.get(n, 1) % 16 == 0)
    options = {n: v for n, v in options.items() if n not in names}
    return Launch(name, kernel, signature, constexprs, divisible, options, expects, capability)


def compile_launch(launch: Launch) -> Census:
    """Compiles, and reads registers and instructions off the result."""
    kernel = launch.kernel
    names = kernel.arg_names
    source = GluonASTSource if kernel.is_gluon() else ASTSource
    attrs = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(names) if n in launch.divisible}
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
    """Collects what goes through module.launch(kernel, grid, *args, **options) instead of launching it; the kernel may
    be `Bound` to its options."""
    launches: list[Launch] = []

    def note(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
        if isinstance(kernel, Bound):
            kernel, options = kernel.kernel, kernel.options
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
        ints(n), ints(n), ints(num_rows, top_k), ints(num_experts), ints(1), ints(tiles, 4), ints(num_experts, 3),
    )  # fmt: skip


# (rows, D, F, experts, top_k)
SEED, QWEN3, MIXTRAL = (8192, 1024, 2048, 8, 2), (16384, 2048, 768, 128, 8), (8192, 4096, 14336, 8, 2)
RAGGED = (4096, 1416, 2824, 32, 4)  # no tile divides these widths: masks everywhere


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
            products.dw_up(empty(n, h), order, x, up)
        return [launch for launch in launches if not only or launch.kernel.__name__ in only]

    activate = ("up_kernel", "dgated_kernel")
    return [
        *run("qwen3", QWEN3),
        *run("mixtral", MIXTRAL, only=("dgated_kernel",)),
        *run("gelu_tanh with biases", SEED, "gelu_tanh", bias=True, only=activate),
        *run("ragged geglu with biases", RAGGED, "geglu", bias=True, only=(*activate, "weight_grad_kernel")),
        *run("seed on sm_80", SEED, capability=80, expects=("HMMA", "LDGSTS")),
        *run("seed in float32", SEED, dtype=torch.float32, expects=("FFMA",)),
    ]


def hopper_launches() -> list[Launch]:
    """HopperProducts: every kernel at qwen3's shape, then what other shapes, dtypes and activations change of them.

    The kernels take the shape at run time; of it only what 16 divides, and what 64 divides, is compiled in.
    """
    from flashfusemoe_ds.kernels import hopper_products

    products = hopper_products.HopperProducts((9, 0), 132)
    tma, gather = ("HGMMA", "USETMAXREG", "UTMALDG"), ("HGMMA", "USETMAXREG", "UTMALDG", "LDGSTS")

    def run(
        name: str,
        shape: tuple[int, int, int, int, int],
        activation: str = "swiglu",
        *,
        bias: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        only: tuple[str, ...] = (),
    ) -> list[Launch]:
        act, (rows, d, f, experts, top_k) = get_activation(activation), shape
        h, n = act.up_width(f), rows * top_k

        def empty(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device="meta")

        order = meta_order(rows, top_k, experts)
        x, up, down = empty(rows, d), empty(experts, h, d), empty(experts, d, f)
        b_up, b_down = (empty(experts, h), empty(experts, d)) if bias else (None, None)
        weight = empty(rows, top_k, dtype=torch.float32)
        calls: dict[str, tuple[tuple[str, ...], Callable[[], Any]]] = {
            "up": (gather, lambda: products.up(x, order, up, b_up, weight, act)),
            "down": (tma, lambda: products.down(empty(n, f), order, down, b_down, weight)),
            "dgated": (
                gather,
                lambda: products.dgated(x, order, down, None, empty(n, h), weight, act, overwrite_h=True),
            ),
            "dx": (tma, lambda: products.dx(empty(n, h), order, up)),
            "dw_down": (gather, lambda: products.dw_down(x, order, empty(n, f))),
            "dw_up": (gather, lambda: products.dw_up(empty(n, h), order, x, up)),
        }
        launches: list[Launch] = []
        for product, (expects, call) in calls.items():
            if not only or product in only:
                with record(hopper_products, "", expects) as recorded:
                    call()
                (launch,) = recorded  # more, or none: a shape that these kernels do not take
                launches.append(replace(launch, name=f"hopper {name} {product}"))
        return launches

    launches = [
        *run("qwen3", QWEN3),
        *run("mixtral", MIXTRAL, only=("up",)),
        *run("fp16", QWEN3, dtype=torch.float16, only=("up",)),
        *run("ragged", RAGGED, only=("up", "down", "dw_up")),
        *run("biases", SEED, bias=True, only=("up", "down")),
        *run("geglu", SEED, "geglu", only=("up", "dgated")),
        *run("geglu_tanh", SEED, "geglu_tanh", only=("up", "dgated")),
        *run("relu_squared", SEED, "relu_squared", only=("up",)),
        *run("gelu", SEED, "gelu", only=("up",)),
        *run("gelu with biases", SEED, "gelu", bias=True, only=("up",)),
        *run("silu", SEED, "silu", only=("up",)),
    ]
    assert len({repr(replace(launch, name="")) for launch in launches}) == len(launches), "the same code twice"
    return launches


def exchange_launches() -> list[Launch]:
    """What the all-to-all transport launches; of a shape only K, P, e and D are compiled in."""
    from flashfusemoe_ds.kernels import triton_exchange

    def run(name: str, tokens: int, d: int, top_k: int, ranks: int, experts: int) -> list[Launch]:
        idx = torch.empty(tokens, top_k, dtype=torch.int64, device="meta")
        weight = torch.empty(tokens, top_k, device="meta")
        x = torch.empty(tokens, d, dtype=torch.bfloat16, device="meta")
        with record(triton_exchange, f"exchange {name}", ()) as launches:
            _, blocks = triton_exchange.count_rows(idx, experts // ranks, ranks)
            slot, words = triton_exchange.place_rows(idx, weight, experts // ranks, ranks, blocks)
            triton_exchange.spread_rows(x, slot, slot.numel())
            triton_exchange.take_apart(words, top_k, weight.dtype)
        return launches

    return [
        *run("qwen3 EP=8", 16384, 2048, 8, 8, 128),
        *run("dsv3 EP=64", 8192, 7168, 8, 64, 256),
        *run("widest", 4096, 1416, 32, 64, 1024),
    ]


def activation_launches() -> list[Launch]:
    """The shared experts' activation; of a shape only F is compiled in."""
    from flashfusemoe_ds.kernels import triton_activation

    def run(name: str, rows: int, f: int, activation: str, dtype: torch.dtype, capability: int = 90) -> list[Launch]:
        act = get_activation(activation)
        h = torch.empty(rows, act.up_width(f), dtype=dtype, device="meta")
        with record(triton_activation, f"shared {name}", (), capability) as launches:
            a = triton_activation.activate(h, act)
            triton_activation.activate_backward(h, a, act, overwrite_h=True)
        return launches

    return [
        *run("swiglu", 8192, 1536, "swiglu", torch.bfloat16),
        *run("swiglu on sm_80", 8192, 1536, "swiglu", torch.bfloat16, capability=80),
        *run("geglu in float32", 8192, 2048, "geglu", torch.float32),
        *run("gelu_tanh, ragged", 4096, 1418, "gelu_tanh", torch.float16),
    ]


SOURCES: tuple[Callable[[], list[Launch]], ...] = (
    portable_launches,
    hopper_launches,
    exchange_launches,
    activation_launches,
)


def main() -> None:
    wanted = sys.argv[1:]
    for source in SOURCES:
        for launch in source():
            if not wanted or any(word in f"{source.__name__} {launch.name}" for word in wanted):
                print(json.dumps(asdict(compile_launch(launch))), flush=True)


if __name__ == "__main__":
    main()
