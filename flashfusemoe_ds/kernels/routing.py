# SPDX-License-Identifier: GPL-3.0-or-later
"""The router as one autograd node: gate product, scores, top-k, weights and losses, in few launches.

    forward   gate product [T, D] x [D, E] | scores, top-k, weights, partial sums of the losses
              | one program that finishes the sums, where a loss or the counts are asked for
    backward  dlogits, and beside them the operands of the two products | dx | dweight | its parts added up

The router is float32 throughout, at the speed of 16-bit tensor cores. A product of two bf16 numbers is exact in
float32, so a bf16 gate only needs a float32 accumulator. Where one operand is float32 (a float32 gate, or dlogits), it
is cut into three bf16 numbers that add up to its 24 bits, and the product runs over all three. Everything else
(float32 x, mixed dtypes, the gradients of float16) takes a float32 product.

The twin of all this is `nn.router`: `router_logits` and `route_with_losses`, which autograd differentiates. Kept for
the backward: x, the gate, the logits [T, E] and the indices; scores are recomputed. No floating-point atomics.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from flashfusemoe_ds.kernels.launch import launch
from flashfusemoe_ds.kernels.precision import without_autocast
from flashfusemoe_ds.kernels.sizes import cdiv, next_power_of_2

MAX_EXPERTS, MAX_TOP_K = 1024, 32
# Logits in a program's registers at a time. The kernels hold a handful of tensors of this size: at 1024 that is some
# 64 registers, at 2048 up to 212, and the backward spills.
TILE = 1024
MAX_TOKENS = 32  # per tile, so that few experts do not leave a handful of programs
NUM_WARPS = 4
# Partial sums [programs, E] are added up by one program in the end: fewer programs where there are many experts, but
# about one per multiprocessor.
MAX_PARTIALS, PARTIALS = 512, 65536
COPY_BLOCK = 2048
# torch's clamp of a sum of scores, router.py: the smallest normal float32.
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
# Below the key of every number, -inf (-0x7f800001) included: experts that do not exist or are taken, and above those
# experts of closed groups.
NEVER = tl.constexpr(-0x80000000)
CLOSED = tl.constexpr(-0x7FFFFFFF)


class Rule(NamedTuple):
    """How logits become experts and weights: `nn.router.Gating` as plain numbers, in the order the kernels take them.

    Attributes:
        top_k: experts per token, at most MAX_TOP_K.
        softmax: softmax scores, else sigmoid.
        after_topk: score the chosen logits alone.
        renormalize: divide the weights by their sum.
        scaling_factor: multiplies the weights last.
        num_groups, top_groups: equal groups of experts, and how many of them are open to a token; 0 for no groups.
        top2_sum: rank groups by the sum of their two best scores, else by their best.
    """

    top_k: int
    softmax: bool
    after_topk: bool
    renormalize: bool
    scaling_factor: float
    num_groups: int
    top_groups: int
    top2_sum: bool


# ---- pieces of both kernels, and of deepspeed_routing's


@triton.jit
def ordered(x):
    """Integers in the order of the floats, NaN above all, as torch.topk has it."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)  # -0 equals +0
    return tl.where(x == x, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits), 0x7FFFFFFF)


@triton.jit
def unordered(key):
    """The float of such an integer."""
    return tl.where(key < 0, key ^ 0x7FFFFFFF, key).to(tl.float32, bitcast=True)


@triton.jit
def best_column(key, columns):
    """Each row's largest key, and its first column."""
    top = tl.max(key, axis=1)
    return top, tl.min(tl.where(key == top[:, None], columns, 0x7FFFFFFF), axis=1)


@triton.jit
def softmax_within(logits, inside):
    """Softmax over the columns that are inside, 0 elsewhere, and the log-partition. A NaN makes its row NaN."""
    largest = tl.max(tl.where(inside, logits, float("-inf")), axis=1)
    exponential = tl.where(inside, tl.exp(logits - largest[:, None]), 0.0)
    total = tl.sum(exponential, axis=1)
    return exponential / total[:, None], largest + tl.log(total)


@triton.jit
def at_least(total, floor):
    """torch.clamp(min=floor): unlike a maximum, it keeps NaN."""
    return tl.where(total < floor, floor, total)


@triton.jit
def _at_least_tiny(total):
    return at_least(total, TINY)


@triton.jit
def _split(x):
    """x = hi + mid + lo in bf16, 8 bits of the mantissa each."""
    hi = x.to(tl.bfloat16)
    rest = x - hi.to(tl.float32)
    mid = rest.to(tl.bfloat16)
    return hi, mid, (rest - mid.to(tl.float32)).to(tl.bfloat16)


# ---- forward


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


@triton.jit
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
        at = rows[:, None] * NUM_EXPERTS + columns
        if SPLIT:
            # [T, 3E], the products with the three parts of the weight: the smallest are added first.
            part = parts_ptr + rows[:, None] * (3 * NUM_EXPERTS) + columns
            small = tl.load(part + 2 * NUM_EXPERTS, mask=inside, other=0.0)
            small += tl.load(part + NUM_EXPERTS, mask=inside, other=0.0)
            logits = small + tl.load(part, mask=inside, other=0.0)
            tl.store(logits_ptr + at, logits, mask=inside)
        else:
            logits = tl.load(logits_ptr + at, mask=inside, other=0.0)

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
                probs = sigmoid / _at_least_tiny(tl.sum(sigmoid, axis=1))[:, None]
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
            weight = weight / _at_least_tiny(tl.sum(tl.where(is_choice, weight, 0.0), axis=1))[:, None]
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


@triton.jit
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
    hi, mid, lo = _split(tl.load(weight_ptr + at, mask=at < numel, other=0.0))
    tl.store(out_ptr + at, hi, mask=at < numel)
    tl.store(out_ptr + numel + at, mid, mask=at < numel)
    tl.store(out_ptr + numel * 2 + at, lo, mask=at < numel)


def gate_product(x_TD: Tensor, weight_ED: Tensor) -> tuple[Tensor, bool]:
    """x weight' in float32: [T, E], or, True in the second place, [T, 3E] whose three parts are still to be added."""
    if x_TD.dtype is weight_ED.dtype and x_TD.dtype in (torch.bfloat16, torch.float16):
        return _mm32(x_TD, weight_ED.T), False
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
        return _mm32(x_TD, parts.T), True
    return x_TD.float() @ weight_ED.float().T, False


def _mm32(a: Tensor, b: Tensor) -> Tensor:
    """Product of 16-bit matrices accumulated and returned in float32."""
    if a.is_cuda and a.numel() and b.numel():
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def tile_of(num_experts: int) -> dict[str, int]:
    """The constexprs that say how much of the logits is in registers at a time."""
    experts = max(4, next_power_of_2(num_experts))
    return {"EXPERTS": experts, "TOKENS": max(1, min(MAX_TOKENS, TILE // experts))}


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
        return torch.empty(shape, dtype=dtype, device=product.device)

    programs = cdiv(num_tokens, tile["TOKENS"])
    if count or sum_z:
        # Without tokens too: the one program writes zeros.
        programs = max(1, min(programs, MAX_PARTIALS, max(128, PARTIALS // tile["EXPERTS"])))
    logits_TE = empty(num_tokens, num_experts) if is_split else product
    idx_TK = empty(num_tokens, rule.top_k, dtype=torch.int64)
    weight_TK = empty(num_tokens, rule.top_k)
    probs_BE = empty(programs, num_experts) if sum_probs else logits_TE
    z_B = empty(programs) if sum_z else logits_TE
    counts_BE = empty(programs, num_experts, dtype=torch.int32) if count else idx_TK
    if programs:
        launch(
            _choose_kernel,
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
            NUM_EXPERTS=num_experts,
            TOP_K=rule.top_k,
            SOFTMAX=rule.softmax,
            AFTER_TOPK=rule.after_topk,
            RENORMALIZE=rule.renormalize,
            NUM_GROUPS=rule.num_groups,
            TOP_GROUPS=rule.top_groups,
            TOP2=rule.top2_sum,
            HAS_BIAS=bias_E is not None,
            SPLIT=is_split,
            SUM_PROBS=sum_probs,
            SUM_Z=sum_z,
            COUNT=count,
            CHOICES=next_power_of_2(rule.top_k),
            GROUPS=next_power_of_2(max(rule.num_groups, 1)),
            **tile,
            num_warps=NUM_WARPS,
        )
    if not (count or sum_z):
        return logits_TE, idx_TK, weight_TK, None, None, None
    counts_E = empty(num_experts, dtype=torch.int64) if count else None
    aux_loss = empty() if sum_probs else None
    z_loss = empty() if sum_z else None
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
        _z_factor(num_tokens, z_loss_coeff),
        NUM_EXPERTS=num_experts,
        COUNT=count,
        SUM_PROBS=sum_probs,
        SUM_Z=sum_z,
        EXPERTS=tile["EXPERTS"],
        ROWS=8 * TILE // tile["EXPERTS"],
        num_warps=8,
    )
    return logits_TE, idx_TK, weight_TK, counts_E, aux_loss, z_loss


def aux_factor_of(num_tokens: int, num_experts: int, rule: Rule, coeff: float) -> float:
    """What the sum over experts of (routes of e) * (e's probability summed over tokens) is multiplied by."""
    return coeff * num_experts / max(num_tokens, 1) / max(num_tokens * rule.top_k, 1)


def _z_factor(num_tokens: int, coeff: float) -> float:
    return coeff / max(num_tokens, 1)


# ---- backward


@triton.jit
def _stack_weight(weight_ptr, stacked_ptr, program, numel, WEIGHT_FP32: tl.constexpr, BLOCK: tl.constexpr):
    """The right-hand side of dx: [w; w] for a bf16 weight, [hi; hi; mid] for a float32 one."""
    at = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(weight_ptr + at, mask=at < numel, other=0.0)
    if WEIGHT_FP32:
        value, mid, _ = _split(value)
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


@triton.jit
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
                divisor = _at_least_tiny(total)
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
            hi, mid, lo = _split(dlogits)
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
    tile = tile_of(num_experts)
    launch(
        _dlogits_kernel,
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
        _z_factor(num_tokens, z_loss_coeff),
        gate_ED.numel(),
        copy_programs,
        NUM_EXPERTS=num_experts,
        TOP_K=rule.top_k,
        SOFTMAX=rule.softmax,
        AFTER_TOPK=rule.after_topk,
        RENORMALIZE=rule.renormalize,
        HAS_DWEIGHT=dweight_TK is not None,
        PARTIALS=0 if pos_TK is None else dweight_TK.shape[0],
        HAS_AUX=daux is not None,
        HAS_Z=dz is not None,
        PARTS=parts,
        FLOOR=floor,
        COPY_BLOCK=COPY_BLOCK,
        **tile,
        num_warps=NUM_WARPS,
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
            dgate_parts = _mm32(dlogits[:, : 3 * num_experts].T, x_TD)
    if need_gate:
        dgate = torch.empty_like(gate_ED)
        launch(
            _add_parts_kernel,
            (cdiv(dgate.numel(), COPY_BLOCK),),
            dgate_parts,
            dgate,
            dgate.numel(),
            BLOCK=COPY_BLOCK,
            num_warps=NUM_WARPS,
        )
    return dx, dgate


def _mm16(a: Tensor, b: Tensor) -> Tensor:
    return a @ b if a.is_cuda else (a.float() @ b.float()).to(a.dtype)


# ---- autograd


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
