# SPDX-License-Identifier: GPL-3.0-or-later
"""DeepSpeed's gate as one autograd node: gate product, choice, drops, weights and l_aux, in few launches.

    forward   gate product | softmax, choice, counts and partial sums | one program that finishes the sums
              | drops, where there is a capacity
    backward  that of routing.py, which has the gate product too: routing_backward.py

The twin is `nn.deepspeed_gating`, which says what DeepSpeed does. What is random is drawn there, by the same calls for
both, and comes in as tensors. Softmax is computed here, so that a probability may differ from torch's in its last bit;
of equal ones the lower expert wins, as torch.argmax has it, and torch.topk on CUDA for the set of experts.

There are three ways to lose a route:

    by mask       the token is not used: known when its expert is chosen
    by position   first come, first served, every first choice before every second one. `_choose_kernel` counts each
                  program's stretch of tokens, `_finish_kernel` adds up what stands before it, and
                  `_drop_late_kernel` ranks the tokens of each stretch
    by value      torch.topk over the tokens of each expert, PyTorch's, between two kernels: a callable brings it in

Kept for the backward: x, the gate, the logits [T, E], the indices and counts. No floating-point atomics.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

from flashfusemoe_ds.kernels.launch import launch
from flashfusemoe_ds.kernels.precision import without_autocast
from flashfusemoe_ds.kernels.routing import gate_product
from flashfusemoe_ds.kernels.routing_backward import gate_gradients
from flashfusemoe_ds.kernels.routing_rule import Rule, aux_factor_of
from flashfusemoe_ds.kernels.sizes import cdiv, next_power_of_2
from flashfusemoe_ds.kernels.triton_logits import (
    NEVER,
    NUM_WARPS,
    TILE,
    at_least,
    best_column,
    load_logits,
    max_programs,
    ordered,
    softmax_within,
    tile_of,
    unordered,
)

# What DeepSpeed raises the sum of a token's probabilities to before it divides by it.
EPS = tl.constexpr(torch.finfo(torch.float32).eps)
MINUS_INFINITY = tl.constexpr(-0x7F800001)  # `ordered` of it
KEEP_TILE = 512  # routes in a program of the drops by value

Keep = Callable[[Tensor, Tensor], Tensor]


@triton.jit(do_not_specialize=["num_tokens", "per_program"])
def _choose_kernel(
    parts_ptr,
    logits_ptr,
    noise_ptr,
    used_ptr,
    idx_ptr,
    weight_ptr,
    probs_ptr,
    counts_ptr,
    num_tokens,
    per_program,
    NUM_EXPERTS: tl.constexpr,
    TOP_K: tl.constexpr,
    HAS_NOISE: tl.constexpr,
    HAS_USED: tl.constexpr,
    SPLIT: tl.constexpr,
    FINAL: tl.constexpr,
    TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,
    CHOICES: tl.constexpr,
):
    """One stretch of tokens. FINAL: nothing else is dropped, so that ids and weights are the last word; otherwise they
    are all chosen experts and their probabilities."""
    program = tl.program_id(0)
    columns = tl.arange(0, EXPERTS)[None, :]
    choices = tl.arange(0, CHOICES)[None, :]
    exists = columns < NUM_EXPERTS
    probs_sum = tl.zeros([TOKENS, EXPERTS], dtype=tl.float32)
    count = tl.zeros([TOKENS, EXPERTS], dtype=tl.int32)
    second_count = tl.zeros([TOKENS, EXPERTS], dtype=tl.int32)
    for offset in range(0, per_program, TOKENS):
        rows = program.to(tl.int64) * per_program + offset + tl.arange(0, TOKENS)
        is_token = rows < num_tokens
        inside = is_token[:, None] & exists
        logits = load_logits(parts_ptr, logits_ptr, rows, columns, inside, NUM_EXPERTS, SPLIT)
        probs, _ = softmax_within(logits, exists)
        probs_sum += tl.where(is_token[:, None], probs, 0.0)
        counts = is_token
        if HAS_USED:
            is_used = tl.load(used_ptr + rows, mask=is_token, other=0) != 0
            counts = is_token & is_used

        noisy = logits
        if HAS_NOISE:
            noisy += tl.load(noise_ptr + rows[:, None] * NUM_EXPERTS + columns, mask=inside, other=0.0)
        key = ordered(probs)
        if TOP_K == 1 and HAS_NOISE:
            key = ordered(noisy)
        key = tl.where(exists, key, NEVER)
        weight = tl.zeros([TOKENS, CHOICES], dtype=tl.float32)
        for k in range(TOP_K):
            top, expert = best_column(key, columns)
            is_chosen = columns == expert[:, None]
            if TOP_K > 2:
                prob = unordered(top)
            else:
                prob = tl.sum(tl.where(is_chosen, probs, 0.0), axis=1)
            counted = (is_chosen & counts[:, None]).to(tl.int32)
            if TOP_K == 2:
                # The second choice looks at logits, and at those of the first as -inf, not as absent.
                key = tl.where(exists, tl.where(is_chosen, MINUS_INFINITY, ordered(noisy)), NEVER)
                count += tl.where(k == 0, counted, 0)
                second_count += tl.where(k == 0, 0, counted)
            else:
                key = tl.where(is_chosen, NEVER, key)
                count += counted
            if HAS_USED and FINAL:
                # A NaN keeps its route, so that it shows in the output, as it does in DeepSpeed's.
                prob = prob * is_used.to(tl.float32)
                expert = tl.where(is_used | (prob != prob), expert, -1)
            weight = tl.where(choices == k, prob[:, None], weight)
            tl.store(idx_ptr + rows * TOP_K + k, expert.to(tl.int64), mask=is_token)
        if FINAL and TOP_K > 1:
            weight = weight / at_least(tl.sum(weight, axis=1), EPS)[:, None]
        tl.store(weight_ptr + rows[:, None] * TOP_K + choices, weight, mask=is_token[:, None] & (choices < TOP_K))

    column = tl.arange(0, EXPERTS)
    is_expert = column < NUM_EXPERTS
    tl.store(probs_ptr + program * NUM_EXPERTS + column, tl.sum(probs_sum, axis=0), mask=is_expert)
    if TOP_K == 2:
        counts_ptr += program * (2 * NUM_EXPERTS)
        tl.store(counts_ptr + NUM_EXPERTS + column, tl.sum(second_count, axis=0), mask=is_expert)
    else:
        counts_ptr += program * NUM_EXPERTS
    tl.store(counts_ptr + column, tl.sum(count, axis=0), mask=is_expert)


@triton.jit(do_not_specialize=["num_programs"])
def _finish_kernel(
    probs_ptr,
    counts_ptr,
    before_ptr,
    total_ptr,
    first_total_ptr,
    l_aux_ptr,
    num_programs,
    aux_factor,
    NUM_EXPERTS: tl.constexpr,
    TWO: tl.constexpr,
    BY_POSITION: tl.constexpr,
    EXPERTS: tl.constexpr,
    ROWS: tl.constexpr,
):
    """One program, so that the sums have one order. TWO: first and second choices are counted apart.
    BY_POSITION: before [B, 2E] is the number of routes in the stretches before each, by rank of choice."""
    columns = tl.arange(0, EXPERTS)
    is_expert = columns < NUM_EXPERTS
    width: tl.constexpr = 2 * NUM_EXPERTS if TWO else NUM_EXPERTS
    probs = tl.zeros([EXPERTS], dtype=tl.float32)
    first = tl.zeros([EXPERTS], dtype=tl.int32)
    second = tl.zeros([EXPERTS], dtype=tl.int32)
    for start in range(0, num_programs, ROWS):
        rows = start + tl.arange(0, ROWS)
        inside = (rows < num_programs)[:, None] & is_expert[None, :]
        at = rows[:, None] * NUM_EXPERTS + columns[None, :]
        probs += tl.sum(tl.load(probs_ptr + at, mask=inside, other=0.0), axis=0)
        at = rows[:, None] * width + columns[None, :]
        count = tl.load(counts_ptr + at, mask=inside, other=0)
        if BY_POSITION:
            tl.store(before_ptr + at, first[None, :] + tl.cumsum(count, axis=0) - count, mask=inside)
        first += tl.sum(count, axis=0)
        if TWO:
            count = tl.load(counts_ptr + at + NUM_EXPERTS, mask=inside, other=0)
            if BY_POSITION:
                later = second[None, :] + tl.cumsum(count, axis=0) - count
                tl.store(before_ptr + at + NUM_EXPERTS, later, mask=inside)
            second += tl.sum(count, axis=0)
    tl.store(total_ptr + columns, (first + second).to(tl.int64), mask=is_expert)
    if TWO:
        tl.store(first_total_ptr + columns, first.to(tl.int64), mask=is_expert)
    tl.store(l_aux_ptr, tl.sum(first.to(tl.float32) * probs, axis=0) * aux_factor)


@triton.jit
def _places(hit, next_place):
    """Each row's place among the routes of its expert, and where the next tile of rows goes on."""
    rank = tl.cumsum(hit.to(tl.int32), axis=0) - 1
    place = tl.sum(tl.where(hit, next_place[None, :] + rank, 0), axis=1)
    return place, next_place + tl.sum(hit.to(tl.int32), axis=0)


@triton.jit
def _store_routes(idx_ptr, weight_ptr, at, inside, expert, prob, is_kept, RENORMALIZE: tl.constexpr):
    """Ids and weights of [tokens, choices] over the routes that are kept."""
    prob = prob * is_kept.to(tl.float32)
    expert = tl.where(is_kept | (prob != prob), expert, -1)  # a NaN keeps its route
    if RENORMALIZE:
        prob = prob / at_least(tl.sum(prob, axis=1), EPS)[:, None]
    tl.store(idx_ptr + at, expert, mask=inside)
    tl.store(weight_ptr + at, prob, mask=inside)


@triton.jit(do_not_specialize=["num_tokens", "per_program", "limit"])
def _drop_late_kernel(
    choice_ptr,
    prob_ptr,
    before_ptr,
    first_total_ptr,
    idx_ptr,
    weight_ptr,
    num_tokens,
    per_program,
    limit,
    NUM_EXPERTS: tl.constexpr,
    TOKENS: tl.constexpr,
    EXPERTS: tl.constexpr,
):
    """Two choices a token; each expert keeps the `limit` routes that come first. The stretches of `_choose_kernel`."""
    program = tl.program_id(0)
    column = tl.arange(0, EXPERTS)
    columns = column[None, :]
    is_expert = column < NUM_EXPERTS
    ranks = tl.arange(0, 2)[None, :]
    before_ptr += program * (2 * NUM_EXPERTS)
    next_first = tl.load(before_ptr + column, mask=is_expert, other=0)
    next_second = tl.load(before_ptr + NUM_EXPERTS + column, mask=is_expert, other=0)
    next_second += tl.load(first_total_ptr + column, mask=is_expert, other=0).to(tl.int32)
    for offset in range(0, per_program, TOKENS):
        rows = program.to(tl.int64) * per_program + offset + tl.arange(0, TOKENS)
        is_token = rows < num_tokens
        first = tl.load(choice_ptr + rows * 2, mask=is_token, other=-1).to(tl.int32)
        second = tl.load(choice_ptr + rows * 2 + 1, mask=is_token, other=-1).to(tl.int32)
        first_place, next_first = _places(columns == first[:, None], next_first)
        second_place, next_second = _places(columns == second[:, None], next_second)
        is_kept = tl.where(ranks == 0, first_place[:, None], second_place[:, None]) < limit
        expert = tl.where(ranks == 0, first[:, None], second[:, None]).to(tl.int64)
        at = rows[:, None] * 2 + ranks
        inside = is_token[:, None] & (ranks < 2)
        prob = tl.load(prob_ptr + at, mask=inside, other=0.0)
        _store_routes(idx_ptr, weight_ptr, at, inside, expert, prob, is_kept, True)


@triton.jit(do_not_specialize=["num_tokens"])
def _drop_unkept_kernel(
    choice_ptr,
    prob_ptr,
    kept_ptr,
    idx_ptr,
    weight_ptr,
    num_tokens,
    TOP_K: tl.constexpr,
    TOKENS: tl.constexpr,
    CHOICES: tl.constexpr,
):
    rows = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    choices = tl.arange(0, CHOICES)[None, :]
    inside = (rows < num_tokens)[:, None] & (choices < TOP_K)
    at = rows[:, None] * TOP_K + choices
    expert = tl.load(choice_ptr + at, mask=inside, other=-1)
    prob = tl.load(prob_ptr + at, mask=inside, other=0.0)
    is_kept = tl.load(kept_ptr + at, mask=inside, other=0) != 0
    _store_routes(idx_ptr, weight_ptr, at, inside, expert, prob, is_kept, TOP_K > 1)


def _coefficient(top_k: int) -> float:
    """What turns `routing`'s auxiliary loss, of counts over T * K routes, into l_aux: at K = 2 DeepSpeed counts the
    first choices alone, and divides them by T."""
    return 2.0 if top_k == 2 else 1.0


def _rule(top_k: int) -> Rule:
    """DeepSpeed's weights in the terms of `routing`: softmax over all, renormalised over what is left of K >= 2."""
    return Rule(top_k, True, False, top_k > 1, 1.0, 0, 0, False)


def choose(
    product: Tensor,
    is_split: bool,
    top_k: int,
    noise_TE: Tensor | None,
    used_T: Tensor | None,
    limit: int | None,
    keep: Keep | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """What `routing.gate_product` returned -> logits, routes and sums; the other arguments as in `route`.

    Returns:
        logits_TE float32; idx_TK int64; weight_TK float32; counts_E int64 of all choices; those of the choices that
        l_aux counts, which may be the same tensor; l_aux.
    """
    num_tokens, num_experts = product.shape[0], product.shape[1] // (3 if is_split else 1)
    by_position, two = limit is not None, top_k == 2
    tile = tile_of(num_experts)
    choices = next_power_of_2(top_k)

    def empty(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=product.device)

    # Stretches of whole tiles, so that what stands before a stretch is a sum over programs. Without tokens too: the
    # one program writes zeros.
    tiles = max(1, cdiv(num_tokens, tile["TOKENS"]))
    per_program = cdiv(tiles, min(tiles, max_programs(tile))) * tile["TOKENS"]
    programs = max(1, cdiv(num_tokens, per_program))
    logits_TE = empty(num_tokens, num_experts) if is_split else product
    choice_TK, prob_TK = empty(num_tokens, top_k, dtype=torch.int64), empty(num_tokens, top_k)
    probs_BE = empty(programs, num_experts)
    counts_B = empty(programs, (2 if two else 1) * num_experts, dtype=torch.int32)
    launch(
        _choose_kernel,
        (programs,),
        product,
        logits_TE,
        logits_TE if noise_TE is None else noise_TE,
        choice_TK if used_T is None else used_T,
        choice_TK,
        prob_TK,
        probs_BE,
        counts_B,
        num_tokens,
        per_program,
        NUM_EXPERTS=num_experts,
        TOP_K=top_k,
        HAS_NOISE=noise_TE is not None,
        HAS_USED=used_T is not None,
        SPLIT=is_split,
        FINAL=limit is None and keep is None,
        CHOICES=choices,
        **tile,
        num_warps=NUM_WARPS,
    )
    counts_E = empty(num_experts, dtype=torch.int64)
    first_E = empty(num_experts, dtype=torch.int64) if two else counts_E
    before_B = torch.empty_like(counts_B) if by_position else counts_B
    l_aux = empty()
    launch(
        _finish_kernel,
        (1,),
        probs_BE,
        counts_B,
        before_B,
        counts_E,
        first_E,
        l_aux,
        programs,
        aux_factor_of(num_tokens, num_experts, _rule(top_k), _coefficient(top_k)),
        NUM_EXPERTS=num_experts,
        TWO=two,
        BY_POSITION=by_position,
        EXPERTS=tile["EXPERTS"],
        ROWS=4 * TILE // tile["EXPERTS"],
        num_warps=8,
    )
    if limit is None and keep is None:
        return logits_TE, choice_TK, prob_TK, counts_E, first_E, l_aux
    idx_TK, weight_TK = torch.empty_like(choice_TK), torch.empty_like(prob_TK)
    if limit is not None:
        launch(
            _drop_late_kernel,
            (programs if num_tokens else 0,),
            choice_TK,
            prob_TK,
            before_B,
            first_E,
            idx_TK,
            weight_TK,
            num_tokens,
            per_program,
            limit,
            NUM_EXPERTS=num_experts,
            **tile,
            num_warps=NUM_WARPS,
        )
    else:
        kept_TK = keep(logits_TE, choice_TK).contiguous()
        tokens = max(1, KEEP_TILE // choices)
        launch(
            _drop_unkept_kernel,
            (cdiv(num_tokens, tokens),),
            choice_TK,
            prob_TK,
            kept_TK.view(torch.int8),
            idx_TK,
            weight_TK,
            num_tokens,
            TOP_K=top_k,
            TOKENS=tokens,
            CHOICES=choices,
            num_warps=NUM_WARPS,
        )
    return logits_TE, idx_TK, weight_TK, counts_E, first_E, l_aux


class _Gate(torch.autograd.Function):
    """The gate as one node, so that what it keeps is chosen here."""

    @staticmethod
    def forward(ctx, x_TD, gate_ED, noise_TE, used_T, top_k, limit, keep):
        with without_autocast(x_TD.device.type):
            product, is_split = gate_product(x_TD, gate_ED)
            logits_TE, idx_TK, weight_TK, counts_E, first_E, l_aux = choose(
                product, is_split, top_k, noise_TE, used_T, limit, keep
            )
        ctx.save_for_backward(x_TD, gate_ED, logits_TE, idx_TK, first_E)
        ctx.mark_non_differentiable(idx_TK, counts_E)
        ctx.set_materialize_grads(False)
        return idx_TK, weight_TK, counts_E, l_aux

    @staticmethod
    @once_differentiable
    def backward(ctx, _didx, dweight_TK, _dcounts, dl_aux):
        x_TD, gate_ED, logits_TE, idx_TK, first_E = ctx.saved_tensors
        if dweight_TK is None and dl_aux is None:
            return (None,) * 7
        top_k = idx_TK.shape[1]
        grads = gate_gradients(
            x_TD, gate_ED, logits_TE, idx_TK, first_E, dweight_TK, dl_aux, None, _rule(top_k), _coefficient(top_k),
            0.0, need_x=ctx.needs_input_grad[0], need_gate=ctx.needs_input_grad[1], floor=EPS.value,
        )  # fmt: skip
        return *grads, None, None, None, None, None


def route(
    x_TD: Tensor,
    gate_ED: Tensor,
    top_k: int,
    noise_TE: Tensor | None = None,
    used_T: Tensor | None = None,
    limit: int | None = None,
    keep: Keep | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tokens to experts as DeepSpeed has it, differentiable in x and the gate.

    Args:
        x_TD, gate_ED: operands that `routing.covers` accepts, on one device.
        top_k: K.
        noise_TE: float32, added to the logits for choosing: the expert at K = 1, the second one at K = 2. None beyond.
        used_T: bool, K = 1 alone: False for tokens that are not routed. `keep` must not keep them either.
        limit: K = 2 alone: routes that an expert takes, first come, first served.
        keep: (logits [T, E], chosen experts [T, K]) -> bool [T, K], the routes that stay. Called once, without
            autograd; at most one of `limit` and `keep`.

    Returns:
        idx_TK int64, -1 where dropped; weight_TK float32; counts_E int64 [E], routes before any were dropped, though
        without unused tokens; l_aux, a float32 scalar, 0 without tokens.
    """
    assert limit is None or (keep is None and top_k == 2)
    assert used_T is None or top_k == 1
    assert noise_TE is None or top_k <= 2
    used_T = None if used_T is None else used_T.contiguous().view(torch.int8)
    return _Gate.apply(x_TD, gate_ED, noise_TE, used_T, top_k, limit, keep)
