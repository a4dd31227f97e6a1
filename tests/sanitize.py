# SPDX-License-Identifier: GPL-3.0-or-later
"""Every kernel once, on a case small enough for compute-sanitizer. Fails if a result is wrong.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 python -m tests.sanitize
    compute-sanitizer --tool racecheck --error-exitcode 1 python -m tests.sanitize

memcheck finds accesses out of bounds only where every tensor is an allocation of its own, hence no caching. Words
after the command choose groups: routing, portable, hopper. Run it once without a tool first: that compiles the
kernels, which the tools would slow down as well.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from flashfusemoe_ds.kernels import reference
from flashfusemoe_ds.kernels.activation import ACTIVATIONS
from flashfusemoe_ds.kernels.experts import experts
from flashfusemoe_ds.kernels.products import ExpertProducts
from flashfusemoe_ds.kernels.select import why_not_hopper, why_not_triton
from flashfusemoe_ds.nn.router import Gating, route_fused, route_with_losses, router_logits
from tests.close import rms_error, value_and_grads

DEVICE = torch.device("cuda")
# One expert of two row tiles, one of a single short one, one without rows.
ROWS, TOP_K, EXPERTS = 150, 2, 3
# (D, F): widths that 64 does not divide, and some that it does, but not every tile: they take other paths.
RAGGED, WHOLE = (72, 136), (320, 288)


def experts_case(activation: str, d: int, f: int) -> tuple[list[Tensor], Tensor]:
    """x, weight, w_up, w_down, b_up, b_down in float64, rounded to bf16, and the experts' ids; some routes dropped."""
    g = torch.Generator().manual_seed(0)
    h = ACTIVATIONS[activation].up_width(f)
    shapes = [(ROWS, d), (ROWS, TOP_K), (EXPERTS, h, d), (EXPERTS, d, f), (EXPERTS, h), (EXPERTS, d)]
    inputs = [torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes]
    inputs[2] *= d**-0.5
    inputs[3] *= f**-0.5
    idx = torch.zeros(ROWS, TOP_K, dtype=torch.int64)
    idx[:, 1] = -1
    idx[::7, 1] = 2
    return [t.bfloat16().double().to(DEVICE) for t in inputs], idx.to(DEVICE)


def errors_of_experts(
    products: ExpertProducts, activation: str, widths: tuple[int, int], *, bias: bool, recompute: bool
) -> dict[str, float]:
    inputs, idx = experts_case(activation, *widths)
    inputs = inputs if bias else inputs[:4]

    def fast(x: Tensor, weight: Tensor, w_up: Tensor, w_down: Tensor, *biases: Tensor) -> Tensor:
        b_up, b_down = biases or (None, None)
        return experts(
            x, idx, weight.float(), w_up, w_down, ACTIVATIONS[activation], products,
            b_up_eH=b_up, b_down_eD=b_down, recompute=recompute,
        )  # fmt: skip

    def truth(x: Tensor, weight: Tensor, w_up: Tensor, w_down: Tensor, *biases: Tensor) -> Tensor:
        return reference.experts(x, idx, weight, w_up, w_down, activation, *biases)

    actual = value_and_grads(fast, inputs, torch.bfloat16)
    expected = value_and_grads(truth, inputs, torch.float64)
    names = ("y", "dx", "dweight", "dw_up", "dw_down", "db_up", "db_down")
    errors = {name: rms_error(a, e) for name, a, e in zip(names, actual, expected, strict=False)}
    empty = [grad[1] for grad in actual[3:]]
    errors["the expert without rows"] = max(float(grad.abs().max()) for grad in empty)
    return errors


def errors_of_routing(gating: Gating, gate_dtype: torch.dtype) -> dict[str, float]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(ROWS, 72, generator=g).to(DEVICE, torch.bfloat16)
    gate = torch.randn(8, 72, generator=g).mul(72**-0.5).to(DEVICE, gate_dtype)
    direction = torch.randn(ROWS, TOP_K, generator=g).to(DEVICE)
    bias = torch.linspace(-0.1, 0.1, 8, device=DEVICE) if gating.expert_bias else None
    results = []
    for fused in (True, False):
        leaves = [x.clone().requires_grad_(), gate.clone().requires_grad_()]
        if fused:
            routing = route_fused(*leaves, gating, TOP_K, 0.5, 0.25, bias, True)
        else:
            doubles = [leaf.double() for leaf in leaves]
            routing = route_with_losses(router_logits(*doubles), gating, TOP_K, 0.5, 0.25, bias)
        outputs = [routing.weight_TK, routing.losses["aux_loss"], routing.losses["z_loss"]]
        one = torch.ones((), device=DEVICE)
        douts = [v.to(out.dtype) for v, out in zip((direction, one, one), outputs, strict=True)]
        grads = torch.autograd.grad(outputs, leaves, douts)
        results.append([*outputs, *grads, routing.idx_TK.double(), routing.counts_E.double()])
    names = ("weight", "aux_loss", "z_loss", "dx", "dgate", "idx", "counts")
    return {name: rms_error(a, e) for name, a, e in zip(names, *results, strict=True)}


def cases() -> dict[str, Callable[[], dict[str, float]]]:
    """By "group what": a function that returns errors by name of the result."""
    from flashfusemoe_ds.kernels.hopper_products import HopperProducts
    from flashfusemoe_ds.kernels.triton_products import TritonProducts

    plain = Gating(order="after_topk")
    grouped = Gating(score="sigmoid", renormalize=True, num_groups=4, top_groups=2, expert_bias=True)
    found: dict[str, Callable[[], dict[str, float]]] = {
        "routing, bf16 gate": lambda: errors_of_routing(plain, torch.bfloat16),
        "routing, float32 gate, groups": lambda: errors_of_routing(grouped, torch.float32),
    }
    backends: dict[str, type[TritonProducts]] = {"portable": TritonProducts}
    if why_not_hopper(DEVICE) is None:
        backends["hopper"] = HopperProducts
    for name, backend in backends.items():
        run = partial(errors_of_experts, backend.on(torch.empty(0, device=DEVICE).device))
        found[f"{name}, swiglu"] = partial(run, "swiglu", RAGGED, bias=False, recompute=False)
        found[f"{name}, whole tiles"] = partial(run, "swiglu", WHOLE, bias=False, recompute=False)
        found[f"{name}, gelu with biases, recomputed"] = partial(run, "gelu", RAGGED, bias=True, recompute=True)
        found[f"{name}, whole tiles, gelu"] = partial(run, "gelu", WHOLE, bias=False, recompute=False)
    return found


def main() -> None:
    reason = why_not_triton(torch.bfloat16, DEVICE) if torch.cuda.is_available() else "torch sees no CUDA GPU"
    if reason is not None:
        sys.exit(f"nothing to run: {reason}")
    groups, wrong = sys.argv[1:], []
    chosen = {name: run for name, run in cases().items() if not groups or name.split(",")[0] in groups}
    if not chosen:
        sys.exit(f"nothing to run of {', '.join(groups)}; there are: {', '.join(cases())}")
    for name, run in chosen.items():
        errors = run()
        torch.cuda.synchronize()
        # bf16 keeps 8 bits, and three products follow each other: some 5e-3 of a result, and 1 if anything is wrong.
        bad = {what: error for what, error in errors.items() if not error <= 0.02}
        wrong += [f"{name}: {what} is off by {error:.2g}" for what, error in bad.items()]
        print(f"{name}: {', '.join(f'{what} {error:.1e}' for what, error in errors.items())}", flush=True)
    if wrong:
        sys.exit("\n".join(wrong))


if __name__ == "__main__":
    main()
