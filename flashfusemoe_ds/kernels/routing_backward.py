# SPDX-License-Identifier: GPL-3.0-or-later
"""The gradients of a router: dlogits, and beside them the operands of the two products | dx | dgate | its parts added.

Scores are recomputed from the logits. Serves `routing` and `deepspeed_routing`, whose module docstrings have the rest.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from flashfusemoe_ds.kernels.launch import Bound, launch
from flashfusemoe_ds.kernels.precision import mm32, without_autocast
from flashfusemoe_ds.kernels.routing_rule import Rule, aux_factor_of, z_factor_of
from flashfusemoe_ds.kernels.sizes import cdiv
from flashfusemoe_ds.kernels.triton_logits import (
    COPY_BLOCK,
    NUM_WARPS,
    TINY,
    at_least,
    at_least_tiny,
    softmax_within,
    split,
    tile_of,
)


@triton.jit
def _stack_weight(weight_ptr, stacked_ptr, program, numel, WEIGHT_FP32: tl.constexpr, BLOCK: tl.constexpr):
    """The right-hand side of dx: [w; w] for a bf16 weight, [hi; hi; mid] for a float32 one."""
    at = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(weight_ptr + at, mask=at < numel, other=0.0)
    if WEIGHT_FP32:
        value, mid, _ = split(value)
        tl.store(stacked_ptr + numel * 2 + at, mid, mask=at < numel)
    tl.store(stacked_ptr + at, value, mask=at < numel)
    tl.store(stacked_ptr + numel + at, value, mask=at < numel)


@triton.jit
def _sum_partials(ds_ptr, pos_ptr, routes, is_token, num_routes, TOKENS: tl.constexpr, PARTIALS: tl.constexpr):
    """dweight of some routes, from the experts' partial sums [PARTIALS, N] at the routes' places in their order."""
    at = ds_ptr + tl.load(pos_ptr + routes, mask=is_token, other=0)
    total = tl.zeros([TOKENS], dtype=tl.float32)
    for _ in range(PARTIALS):
        total += tl.load(at, mask=is_token, other=0.0)
        at += num_routes
    return total


@triton.jit(do_not_specialize=["num_tokens", "num_routes", "copy_programs"])
def _dlogits_kernel(
    logits_ptr,
    idx_ptr,
    dweight_ptr,
    pos_ptr,
    counts_ptr,
    daux_ptr,
    dz_ptr,
    dlogits_ptr,
    gate_ptr,
    stacked_ptr,
    num_tokens,
    num_routes,
    scaling_factor,
    aux_factor,
    z_factor,
    gate_numel,
    copy_programs,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    SOFTMAX: tl.constexpr,
    AFTER_TOPK: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    HAS_DWEIGHT: tl.constexpr,
    PARTIALS: tl.constexpr,
    HAS_AUX: tl.constexpr,
    HAS_Z: tl.constexpr,
    PARTS: tl.constexpr,
    FLOOR: tl.constexpr,
    COPY_BLOCK: tl.constexpr,
    TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    program = tl.program_id(0)
    if program < copy_programs:
        _stack_weight(gate_ptr, stacked_ptr, program, gate_numel, PARTS == 4, COPY_BLOCK)
    else:
        rows = (program - copy_programs).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
        is_token = rows < num_tokens
        columns = tl.arange(0, EXPERTS)[None, :]
        exists = columns < NUM_EXPERTS
        inside = is_token[:, None] & exists
        logits = tl.load(logits_ptr + rows[:, None] * NUM_EXPERTS + columns, mask=inside, other=0.0)
        if HAS_Z or (SOFTMAX and (HAS_AUX or not AFTER_TOPK)):
            softmax, log_partition = softmax_within(logits, exists)
        if not SOFTMAX:
            sigmoid = tl.where(exists, tl.sigmoid(logits), 0.0)

        # Everything below lives in [tokens, experts]: `grad` holds the gradient of each chosen weight at its expert.
        dlogits = tl.zeros([TOKENS, EXPERTS], dtype=tl.float32)
        grad = tl.zeros([TOKENS, EXPERTS], dtype=tl.float32)
        if HAS_DWEIGHT:
            chosen = tl.zeros([TOKENS, EXPERTS], dtype=tl.int1)
            for k in range(TOP_K):
                expert = tl.load(idx_ptr + rows * TOP_K + k, mask=is_token, other=-1).to(tl.int32)
                if PARTIALS > 0:
                    dweight = _sum_partials(
                        dweight_ptr, pos_ptr, rows * TOP_K + k, is_token, num_routes, TOKENS, PARTIALS
                    )
                else:
                    dweight = tl.load(dweight_ptr + rows * TOP_K + k, mask=is_token, other=0.0)
                hit = columns == expert[:, None]
                grad = tl.where(hit, dweight[:, None], grad)
                chosen = chosen | hit
            grad *= scaling_factor
            if SOFTMAX and AFTER_TOPK:
                # A row past the last token has chosen nothing: let it divide by 1.
                scores, _ = softmax_within(logits, chosen | ~is_token[:, None])
            elif SOFTMAX:
                scores = tl.where(chosen, softmax, 0.0)
            else:
                scores = tl.where(chosen, sigmoid, 0.0)
            if RENORMALIZE:
                total = tl.sum(scores, axis=1)
                divisor = at_least(total, FLOOR)
                mean = tl.where(total < FLOOR, 0.0, tl.sum(grad * scores, axis=1) / divisor)
                grad = tl.where(chosen, (grad - mean[:, None]) / divisor[:, None], 0.0)
            if AFTER_TOPK:
                if SOFTMAX:
                    dlogits = scores * (grad - tl.sum(grad * scores, axis=1)[:, None])
                else:
                    dlogits = grad * scores * (1.0 - scores)
                grad = tl.zeros([TOKENS, EXPERTS], dtype=tl.float32)
        # From here on `grad` is that of all scores.
        if HAS_AUX:
            count = tl.load(counts_ptr + columns, mask=exists, other=0).to(tl.float32)
            dprobs = count * (tl.load(daux_ptr) * aux_factor)
            if SOFTMAX:
                grad += dprobs
            else:
                total = tl.sum(sigmoid, axis=1)
                divisor = at_least_tiny(total)
                mean = tl.where(total < TINY, 0.0, tl.sum(dprobs * sigmoid, axis=1) / divisor)
                grad += (dprobs - mean[:, None]) / divisor[:, None]
        if HAS_AUX or (HAS_DWEIGHT and not AFTER_TOPK):
            if SOFTMAX:
                dlogits += softmax * (grad - tl.sum(grad * softmax, axis=1)[:, None])
            else:
                dlogits += grad * sigmoid * (1.0 - sigmoid)
        if HAS_Z:
            dlogits += softmax * (log_partition * (2.0 * z_factor * tl.load(dz_ptr)))[:, None]

        out = dlogits_ptr + rows[:, None] * (PARTS * NUM_EXPERTS) + columns
        if PARTS == 1:
            tl.store(out, dlogits, mask=inside)
        else:
            hi, mid, lo = split(dlogits)
            tl.store(out, lo, mask=inside)
            tl.store(out + NUM_EXPERTS, hi, mask=inside)
            tl.store(out + 2 * NUM_EXPERTS, mid, mask=inside)
            if PARTS == 4:
                tl.store(out + 3 * NUM_EXPERTS, hi, mask=inside)


@triton.jit
def _add_parts_kernel(parts_ptr, out_ptr, numel, BLOCK: tl.constexpr):
    """[3 * numel] float32 -> [numel]: (first + third) + second, small ones first."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    lo = tl.load(parts_ptr + at, mask=at < numel, other=0.0)
    hi = tl.load(parts_ptr + numel + at, mask=at < numel, other=0.0)
    mid = tl.load(parts_ptr + numel * 2 + at, mask=at < numel, other=0.0)
    tl.store(out_ptr + at, ((lo + mid) + hi).to(out_ptr.dtype.element_ty), mask=at < numel)


@functools.cache
def _dlogits_bound(
    rule: Rule,
    num_experts: int,
    has_dweight: bool,
    partials: int,
    has_aux: bool,
    has_z: bool,
    parts: int,
    floor: float,
) -> Bound:
    return Bound(
        _dlogits_kernel,
        NUM_EXPERTS=num_experts,
        TOP_K=rule.top_k,
        SOFTMAX=rule.softmax,
        AFTER_TOPK=rule.after_topk,
        RENORMALIZE=rule.renormalize,
        HAS_DWEIGHT=has_dweight,
        PARTIALS=partials,
        HAS_AUX=has_aux,
        HAS_Z=has_z,
        PARTS=parts,
        FLOOR=floor,
        COPY_BLOCK=COPY_BLOCK,
        **tile_of(num_experts),
        num_warps=NUM_WARPS,
    )


_ADD_PARTS = Bound(_add_parts_kernel, BLOCK=COPY_BLOCK, num_warps=NUM_WARPS)


def gate_gradients(
    x_TD: Tensor,
    gate_ED: Tensor,
    logits_TE: Tensor,
    idx_TK: Tensor,
    counts_E: Tensor | None,
    dweight_TK: Tensor | None,
    daux: Tensor | None,
    dz: Tensor | None,
    rule: Rule,
    aux_loss_coeff: float,
    z_loss_coeff: float,
    need_x: bool,
    need_gate: bool,
    pos_TK: Tensor | None = None,
    floor: float = TINY.value,
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of x [T, D] and of the gate's weight [E, D], each in its tensor's dtype, None where not needed.

    Args:
        idx_TK: int64 [T, K], -1 for a dropped route, which weighs 0 and has no share in a renormalisation.
        dweight_TK: float32 [T, K]; None if nobody used the weights.
        pos_TK: if given, every route has a place [0, N) in the experts' order, and in the place of dweight_TK stand
            the experts' partial sums dS [P, N].
        floor: what a sum of scores was raised to before renormalised weights were divided by it.
    """
    num_tokens, num_experts = logits_TE.shape
    if not num_tokens:
        return (torch.zeros_like(x_TD) if need_x else None), (torch.zeros_like(gate_ED) if need_gate else None)
    gate_ED = gate_ED.contiguous()
    # Columns of dlogits: lo | hi | mid, and for a float32 gate hi once more. The gate's gradient takes the first
    # three. x's, which is rounded to bf16 in the end, takes all but lo: [hi | mid] [w; w], or [hi | mid | hi]
    # [hi; hi; mid]. What that leaves out is 2^-16 of a term, where rounding the sum costs 2^-9.
    parts = 1
    if x_TD.dtype is torch.bfloat16 and gate_ED.dtype in (torch.bfloat16, torch.float32):
        parts = 3 if gate_ED.dtype is torch.bfloat16 else 4
    dtype = torch.float32 if parts == 1 else torch.bfloat16
    dlogits = torch.empty(num_tokens, parts * num_experts, dtype=dtype, device=x_TD.device)
    stacked, copy_programs = gate_ED, 0
    if need_x and parts > 1:
        stacked = torch.empty((parts - 1) * num_experts, gate_ED.shape[1], dtype=dtype, device=x_TD.device)
        copy_programs = cdiv(gate_ED.numel(), COPY_BLOCK)
    tile, partials = tile_of(num_experts), 0 if pos_TK is None else dweight_TK.shape[0]
    launch(
        _dlogits_bound(
            rule, num_experts, dweight_TK is not None, partials, daux is not None, dz is not None, parts, floor
        ),
        (copy_programs + cdiv(num_tokens, tile["TOKENS"]),),
        logits_TE,
        idx_TK,
        logits_TE if dweight_TK is None else dweight_TK.contiguous(),
        idx_TK if pos_TK is None else pos_TK,
        idx_TK if counts_E is None else counts_E,
        logits_TE if daux is None else daux,
        logits_TE if dz is None else dz,
        dlogits,
        gate_ED,
        stacked,
        num_tokens,
        0 if pos_TK is None else dweight_TK.shape[1],
        rule.scaling_factor,
        aux_factor_of(num_tokens, num_experts, rule, aux_loss_coeff),
        z_factor_of(num_tokens, z_loss_coeff),
        gate_ED.numel(),
        copy_programs,
    )
    dx = dgate = None
    # A backward may be called inside autocast, which would cast the products.
    with without_autocast(x_TD.device.type):
        if parts == 1:
            if need_x:
                dx = (dlogits @ gate_ED.float()).to(x_TD.dtype)
            if need_gate:
                dgate = (dlogits.T @ x_TD.float()).to(gate_ED.dtype)
            return dx, dgate
        if need_x:
            dx = _mm16(dlogits[:, num_experts:], stacked)
        if need_gate:
            dgate_parts = mm32(dlogits[:, : 3 * num_experts].T, x_TD)
    if need_gate:
        dgate = torch.empty_like(gate_ED)
        launch(
            _ADD_PARTS,
            (cdiv(dgate.numel(), COPY_BLOCK),),
            dgate_parts,
            dgate,
            dgate.numel(),
        )
    return dx, dgate


def _mm16(a: Tensor, b: Tensor) -> Tensor:
    return a @ b if a.is_cuda else (a.float() @ b.float()).to(a.dtype)
