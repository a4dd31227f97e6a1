# SPDX-License-Identifier: GPL-3.0-or-later
"""The router as one autograd node: gate product, scores, top-k, weights and losses, in few launches.

    forward   gate product [T, D] x [D, E] | scores, top-k, weights, partial sums of the losses
              | one program that finishes the sums, where a loss or the counts are asked for
    backward  dlogits, and beside them the operands of the two products | dx | dweight | its parts added up
            (routing_backward.py)

The router is float32 throughout, at the speed of 16-bit tensor cores. A product of two bf16 numbers is exact in
float32, so a bf16 gate only needs a float32 accumulator. Where one operand is float32 (a float32 gate, or dlogits), it
is cut into three bf16 numbers that add up to its 24 bits, and the product runs over all three. Everything else
(float32 x, mixed dtypes, the gradients of float16) takes a float32 product.

The twin of all this is `nn.router`: `router_logits` and `route_with_losses`, which autograd differentiates. Kept for
the backward: x, the gate, the logits [T, E] and the indices; scores are recomputed. No floating-point atomics.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from flashfusemoe_ds.kernels.launch import Bound, launch
from flashfusemoe_ds.kernels.precision import mm32, without_autocast
from flashfusemoe_ds.kernels.routing_backward import gate_gradients
from flashfusemoe_ds.kernels.routing_rule import Rule, aux_factor_of, z_factor_of
from flashfusemoe_ds.kernels.sizes import cdiv, next_power_of_2
from flashfusemoe_ds.kernels.triton_logits import (
    CLOSED,
    COPY_BLOCK,
    NEVER,
    NUM_WARPS,
    TILE,
    at_least_tiny,
    best_column,
    load_logits,
    max_programs,
    ordered,
    softmax_within,
    split,
    tile_of,
    unordered,
)

MAX_EXPERTS, MAX_TOP_K = 1024, 32


@triton.jit
def _close_groups(
    key, columns, NUM_EXPERTS: tl.constexpr, NUM_GROUPS: tl.constexpr, TOP_GROUPS: tl.constexpr, TOP2: tl.constexpr,
    GROUPS: tl.constexpr,
):  # fmt: skip
    """Puts the experts outside each row's best groups behind all others."""
    size: tl.constexpr = NUM_EXPERTS // NUM_GROUPS
    group = columns // size
    groups = tl.arange(0, GROUPS)[None, :]
    group_key = tl.full([key.shape[0], GROUPS], NEVER, tl.int32)
    for g in range(NUM_GROUPS):
        members = tl.where(group == g, key, NEVER)
        top, first = best_column(members, columns)
        score = unordered(top)
        if TOP2 and size > 1:
            score += unordered(tl.max(tl.where(columns == first[:, None], NEVER, members), axis=1))
        group_key = tl.where(groups == g, ordered(score)[:, None], group_key)
    is_open = tl.zeros(key.shape, dtype=tl.int1)
    for _ in range(TOP_GROUPS):
        _, first = best_column(group_key, groups)
        group_key = tl.where(groups == first[:, None], NEVER, group_key)
        is_open = is_open | (group == first[:, None])
    return tl.where(is_open, key, tl.minimum(key, CLOSED))


@triton.jit(do_not_specialize=["num_tokens"])
def _choose_kernel(
    parts_ptr,
    logits_ptr,
    bias_ptr,
    idx_ptr,
    weight_ptr,
    probs_ptr,
    z_ptr,
    counts_ptr,
    num_tokens,
    scaling_factor,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    SOFTMAX: tl.constexpr,
    AFTER_TOPK: tl.constexpr,
    RENORMALIZE: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    TOP_GROUPS: tl.constexpr,
    TOP2: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SPLIT: tl.constexpr,
    SUM_PROBS: tl.constexpr,
    SUM_Z: tl.constexpr,
    COUNT: tl.constexpr,
    TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,
    CHOICES: tl.constexpr,
    GROUPS: tl.constexpr,
):
    program = tl.program_id(0)
    columns = tl.arange(0, EXPERTS)[None, :]
    choices = tl.arange(0, CHOICES)[None, :]
    exists = columns < NUM_EXPERTS
    probs_sum = tl.zeros([TOKENS, EXPERTS], dtype=tl.float32)
    z_sum = tl.zeros([TOKENS], dtype=tl.float32)
    count = tl.zeros([TOKENS, EXPERTS], dtype=tl.int32)
    for tile in range(program, tl.cdiv(num_tokens, TOKENS), tl.num_programs(0)):
        rows = tile * TOKENS + tl.arange(0, TOKENS).to(tl.int64)
        is_token = rows < num_tokens
        inside = is_token[:, None] & exists
        logits = load_logits(parts_ptr, logits_ptr, rows, columns, inside, NUM_EXPERTS, SPLIT)

        if SUM_Z or (SOFTMAX and (SUM_PROBS or not AFTER_TOPK)):
            probs, log_partition = softmax_within(logits, exists)
        if SUM_Z:
            z_sum += tl.where(is_token, log_partition * log_partition, 0.0)
        scores = logits
        if SOFTMAX and not AFTER_TOPK:
            scores = probs
        if not SOFTMAX and (SUM_PROBS or not AFTER_TOPK):
            sigmoid = tl.where(exists, tl.sigmoid(logits), 0.0)
            if SUM_PROBS:
                probs = sigmoid / at_least_tiny(tl.sum(sigmoid, axis=1))[:, None]
            if not AFTER_TOPK:
                scores = sigmoid
        if SUM_PROBS:
            probs_sum += tl.where(is_token[:, None], probs, 0.0)

        choice = scores
        if HAS_BIAS:
            choice += tl.load(bias_ptr + columns, mask=exists, other=0.0)
        key = tl.where(exists, ordered(choice), NEVER)
        if NUM_GROUPS > 0:
            key = _close_groups(key, columns, NUM_EXPERTS, NUM_GROUPS, TOP_GROUPS, TOP2, GROUPS)
        chosen = tl.zeros([TOKENS, CHOICES], dtype=tl.float32)
        for k in range(TOP_K):
            top, expert = best_column(key, columns)
            is_chosen = columns == expert[:, None]
            if HAS_BIAS:
                score = tl.sum(tl.where(is_chosen, scores, 0.0), axis=1)
            else:
                score = unordered(top)
            chosen = tl.where(choices == k, score[:, None], chosen)
            key = tl.where(is_chosen, NEVER, key)
            tl.store(idx_ptr + rows * TOP_K + k, expert.to(tl.int64), mask=is_token)
            if COUNT:
                count += (is_chosen & is_token[:, None]).to(tl.int32)

        weight = chosen
        is_choice = choices < TOP_K
        if AFTER_TOPK:
            if SOFTMAX:
                weight, _ = softmax_within(chosen, is_choice)
            else:
                weight = tl.sigmoid(chosen)
        if RENORMALIZE:
            weight = weight / at_least_tiny(tl.sum(tl.where(is_choice, weight, 0.0), axis=1))[:, None]
        tl.store(
            weight_ptr + rows[:, None] * TOP_K + choices, weight * scaling_factor, mask=is_token[:, None] & is_choice
        )
    partial = program * NUM_EXPERTS + tl.arange(0, EXPERTS)
    if SUM_PROBS:
        tl.store(probs_ptr + partial, tl.sum(probs_sum, axis=0), mask=tl.arange(0, EXPERTS) < NUM_EXPERTS)
    if COUNT:
        tl.store(counts_ptr + partial, tl.sum(count, axis=0), mask=tl.arange(0, EXPERTS) < NUM_EXPERTS)
    if SUM_Z:
        tl.store(z_ptr + program, tl.sum(z_sum, axis=0))


@triton.jit(do_not_specialize=["num_partials"])
def _finish_kernel(
    probs_ptr,
    z_ptr,
    counts_ptr,
    total_counts_ptr,
    aux_loss_ptr,
    z_loss_ptr,
    num_partials,
    aux_factor,
    z_factor,
    NUM_EXPERTS: tl.constexpr,
    COUNT: tl.constexpr,
    SUM_PROBS: tl.constexpr,
    SUM_Z: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program, so that the sums have one order."""
    columns = tl.arange(0, EXPERTS)
    count = tl.zeros([ROWS, EXPERTS], dtype=tl.int32)
    probs = tl.zeros([ROWS, EXPERTS], dtype=tl.float32)
    z = tl.zeros([ROWS], dtype=tl.float32)
    for first in range(0, num_partials, ROWS):
        rows = first + tl.arange(0, ROWS)
        at = rows[:, None] * NUM_EXPERTS + columns[None, :]
        inside = (rows < num_partials)[:, None] & (columns < NUM_EXPERTS)[None, :]
        if COUNT:
            count += tl.load(counts_ptr + at, mask=inside, other=0)
        if SUM_PROBS:
            probs += tl.load(probs_ptr + at, mask=inside, other=0.0)
        if SUM_Z:
            z += tl.load(z_ptr + rows, mask=rows < num_partials, other=0.0)
    if COUNT:
        total = tl.sum(count, axis=0)
        tl.store(total_counts_ptr + columns, total.to(tl.int64), mask=columns < NUM_EXPERTS)
    if SUM_PROBS:
        tl.store(aux_loss_ptr, tl.sum(total.to(tl.float32) * tl.sum(probs, axis=0), axis=0) * aux_factor)
    if SUM_Z:
        tl.store(z_loss_ptr, tl.sum(z, axis=0) * z_factor)


@triton.jit
def _split_weight_kernel(weight_ptr, out_ptr, numel, BLOCK: tl.constexpr):
    """[E, D] float32 -> [3E, D] bf16: hi, mid, lo."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    hi, mid, lo = split(tl.load(weight_ptr + at, mask=at < numel, other=0.0))
    tl.store(out_ptr + at, hi, mask=at < numel)
    tl.store(out_ptr + numel + at, mid, mask=at < numel)
    tl.store(out_ptr + numel * 2 + at, lo, mask=at < numel)


def gate_product(x_TD: Tensor, weight_ED: Tensor) -> tuple[Tensor, bool]:
    """x weight' in float32: [T, E], or, True in the second place, [T, 3E] whose three parts are still to be added."""
    if x_TD.dtype is weight_ED.dtype and x_TD.dtype in (torch.bfloat16, torch.float16):
        return mm32(x_TD, weight_ED.T), False
    if x_TD.dtype is torch.bfloat16 and weight_ED.dtype is torch.float32:
        weight_ED = weight_ED.contiguous()
        parts = torch.empty(3 * weight_ED.shape[0], weight_ED.shape[1], dtype=torch.bfloat16, device=weight_ED.device)
        numel = weight_ED.numel()
        launch(
            _split_weight_kernel,
            (cdiv(numel, COPY_BLOCK),),
            weight_ED,
            parts,
            numel,
            BLOCK=COPY_BLOCK,
            num_warps=NUM_WARPS,
        )
        return mm32(x_TD, parts.T), True
    return x_TD.float() @ weight_ED.float().T, False


@functools.cache
def _choose_bound(
    rule: Rule, num_experts: int, has_bias: bool, is_split: bool, sum_probs: bool, sum_z: bool, count: bool
) -> Bound:
    return Bound(
        _choose_kernel,
        NUM_EXPERTS=num_experts,
        TOP_K=rule.top_k,
        SOFTMAX=rule.softmax,
        AFTER_TOPK=rule.after_topk,
        RENORMALIZE=rule.renormalize,
        NUM_GROUPS=rule.num_groups,
        TOP_GROUPS=rule.top_groups,
        TOP2=rule.top2_sum,
        HAS_BIAS=has_bias,
        SPLIT=is_split,
        SUM_PROBS=sum_probs,
        SUM_Z=sum_z,
        COUNT=count,
        CHOICES=next_power_of_2(rule.top_k),
        GROUPS=next_power_of_2(max(rule.num_groups, 1)),
        **tile_of(num_experts),
        num_warps=NUM_WARPS,
    )


def choose(
    product: Tensor,
    is_split: bool,
    bias_E: Tensor | None,
    rule: Rule,
    aux_loss_coeff: float,
    z_loss_coeff: float,
    count: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """What `gate_product` returned -> logits, choice, weights and sums.

    Returns:
        logits_TE float32; idx_TK int64; weight_TK float32; counts_E int64 if asked for or if there is an auxiliary
        loss, and the two scalar losses where their coefficients are positive, else None.
    """
    num_tokens, num_experts = product.shape[0], product.shape[1] // (3 if is_split else 1)
    tile = tile_of(num_experts)
    sum_probs, sum_z = aux_loss_coeff > 0, z_loss_coeff > 0
    count = count or sum_probs

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(*shape, dtype=dtype, device=product.device)  # a tuple of sizes takes longer to parse

    programs = cdiv(num_tokens, tile["TOKENS"])
    if count or sum_z:
        # Without tokens too: the one program writes zeros.
        programs = max(1, min(programs, max_programs(tile)))
    logits_TE = empty(num_tokens, num_experts) if is_split else product
    idx_TK = empty(num_tokens, rule.top_k, dtype=torch.int64)
    weight_TK = empty(num_tokens, rule.top_k)
    probs_BE = empty(programs, num_experts) if sum_probs else logits_TE
    z_B = empty(programs) if sum_z else logits_TE
    counts_BE = empty(programs, num_experts, dtype=torch.int32) if count else idx_TK
    if programs:
        launch(
            _choose_bound(rule, num_experts, bias_E is not None, is_split, sum_probs, sum_z, count),
            (programs,),
            product,
            logits_TE,
            product if bias_E is None else bias_E,
            idx_TK,
            weight_TK,
            probs_BE,
            z_B,
            counts_BE,
            num_tokens,
            rule.scaling_factor,
        )
    if not (count or sum_z):
        return logits_TE, idx_TK, weight_TK, None, None, None
    counts_E = empty(num_experts, dtype=torch.int64) if count else None
    aux_loss = product.new_empty(()) if sum_probs else None
    z_loss = product.new_empty(()) if sum_z else None
    launch(
        _finish_kernel,
        (1,),
        probs_BE,
        z_B,
        counts_BE,
        logits_TE if counts_E is None else counts_E,
        logits_TE if aux_loss is None else aux_loss,
        logits_TE if z_loss is None else z_loss,
        programs,
        aux_factor_of(num_tokens, num_experts, rule, aux_loss_coeff),
        z_factor_of(num_tokens, z_loss_coeff),
        NUM_EXPERTS=num_experts,
        COUNT=count,
        SUM_PROBS=sum_probs,
        SUM_Z=sum_z,
        EXPERTS=tile["EXPERTS"],
        ROWS=8 * TILE // tile["EXPERTS"],
        num_warps=8,
    )
    return logits_TE, idx_TK, weight_TK, counts_E, aux_loss, z_loss


def route_forward(
    x_TD: Tensor,
    gate_ED: Tensor,
    bias_E: Tensor | None,
    rule: Rule,
    aux_loss_coeff: float,
    z_loss_coeff: float,
    count: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """`route` without autograd. Returns what `choose` does."""
    with without_autocast(x_TD.device.type):
        product, is_split = gate_product(x_TD, gate_ED)
        return choose(product, is_split, bias_E, rule, aux_loss_coeff, z_loss_coeff, count)


class _Route(torch.autograd.Function):
    """The router as one node, so that what it keeps is chosen here: x, the gate, the logits, the indices."""

    @staticmethod
    def forward(ctx, x_TD, gate_ED, bias_E, rule, aux_loss_coeff, z_loss_coeff, count):
        logits_TE, idx_TK, weight_TK, counts_E, aux_loss, z_loss = route_forward(
            x_TD, gate_ED, bias_E, rule, aux_loss_coeff, z_loss_coeff, count
        )
        ctx.save_for_backward(x_TD, gate_ED, logits_TE, idx_TK, counts_E if aux_loss is not None else None)
        ctx.rule, ctx.coeffs = rule, (aux_loss_coeff, z_loss_coeff)
        ctx.mark_non_differentiable(*(t for t in (idx_TK, counts_E) if t is not None))
        ctx.set_materialize_grads(False)
        return idx_TK, weight_TK, counts_E, aux_loss, z_loss

    @staticmethod
    @once_differentiable
    def backward(ctx, _didx, dweight_TK, _dcounts, daux, dz):
        x_TD, gate_ED, logits_TE, idx_TK, counts_E = ctx.saved_tensors
        if dweight_TK is None and daux is None and dz is None:
            return (None,) * 7
        dx, dgate = gate_gradients(
            x_TD, gate_ED, logits_TE, idx_TK, counts_E, dweight_TK, daux, dz, ctx.rule, *ctx.coeffs,
            need_x=ctx.needs_input_grad[0], need_gate=ctx.needs_input_grad[1],
        )  # fmt: skip
        return dx, dgate, None, None, None, None, None


def covers(x_TD: Tensor, gate_ED: Tensor, top_k: int) -> bool:
    """Whether `route` takes these operands; what it does not is left to the twin."""
    floats = (torch.bfloat16, torch.float16, torch.float32)
    return (
        x_TD.dtype in floats
        and gate_ED.dtype in floats
        and gate_ED.shape[0] <= MAX_EXPERTS
        and top_k <= MAX_TOP_K
        and gate_ED.numel() > 0
    )


def route(
    x_TD: Tensor,
    gate_ED: Tensor,
    rule: Rule,
    aux_loss_coeff: float = 0.0,
    z_loss_coeff: float = 0.0,
    bias_E: Tensor | None = None,
    count: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Tokens to experts, differentiable in x and the gate.

    Args:
        x_TD, gate_ED: operands that `covers` accepts, on one device.
        aux_loss_coeff, z_loss_coeff: multiply the losses of `nn.losses`; 0 for none.
        bias_E: float32 [E], added to the scores for choosing, never for weighing.
        count: return counts_E even without an auxiliary loss.

    Returns:
        idx_TK int64; weight_TK float32; counts_E int64 [E], routes per expert, or None; the auxiliary and the z-loss,
        float32 scalars, or None. Of equal scores the lower expert wins; a NaN counts as the largest.
    """
    if torch.compiler.is_compiling():
        from flashfusemoe_ds.kernels import operators  # not at the top: it imports this module

        return operators.route_by_rule(x_TD, gate_ED, bias_E, rule, aux_loss_coeff, z_loss_coeff, count)
    return _Route.apply(x_TD, gate_ED, bias_E, rule, aux_loss_coeff, z_loss_coeff, count)
