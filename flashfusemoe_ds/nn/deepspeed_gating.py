# SPDX-License-Identifier: GPL-3.0-or-later
"""DeepSpeed 0.19.8's top-1, top-2 and top-k gating, in the compact [T, K] form and without its collectives.

Source of the semantics: deepspeed/moe/sharded_moe.py, functions top1gating, top2gating and topkgating, reached through
TopKGate. Everything is float32. Where a choice depends on torch.topk's order among equals or on random draws, the same
call on the same values is made, so both decide alike from the same generator state.

Not reproduced, because dispatch here has no capacity buffers: the MAX all-reduce of the capacity when nothing is
dropped, the assertion T >= min_capacity of top-1, and its TypeError at drop_tokens=False with a floating-point mask
of used tokens.

`deepspeed_gating` says it all in PyTorch operators, which autograd differentiates. `gate_and_route` takes the kernels
of kernels/deepspeed_routing.py instead, if asked to. What is random, and what torch.topk decides over the tokens of an
expert, is one function for both.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from flashfusemoe_ds.kernels.precision import without_autocast
from flashfusemoe_ds.nn.router import router_logits, runs_fused
from flashfusemoe_ds.types import Routing

NOISE_POLICIES = (None, "None", "Jitter", "RSample")


@dataclass(frozen=True)
class DeepSpeedGating:
    """The options of TopKGate, under its names; `capacity_factor` is the one in force (training or evaluation)."""

    k: int
    capacity_factor: float
    min_capacity: int
    drop_tokens: bool
    use_rts: bool
    top2_2nd_expert_sampling: bool
    rsample: bool

    def limit(self, num_tokens: int, num_experts: int) -> int:
        """Routes that an expert takes where tokens are dropped."""
        return capacity(num_tokens, num_experts, self.capacity_factor * self.k, self.min_capacity)


def _float32(value: float) -> float:
    """The nearest float32. In Python arithmetic, which torch.compile can evaluate: a tensor's value would be data."""
    mantissa, exponent = math.frexp(value)
    return math.ldexp(round(math.ldexp(mantissa, 24)), exponent - 24)


def _uniform(shape: Sequence[int], device: torch.device, low: float, high: float) -> Tensor:
    """The draws of torch.distributions.Uniform, bit for bit, without its constants' copies to the GPU."""
    # By shape: rand_like draws in the order of memory, which differs for a transposed tensor.
    draws = torch.rand(shape, dtype=torch.float32, device=device)
    if (low, high) == (0.0, 1.0):
        return draws
    low32, high32 = _float32(low), _float32(high)
    return draws.mul_(_float32(high32 - low32)).add_(low32)


def jitter(x_TD: Tensor, epsilon: float = 1e-2) -> Tensor:
    """Multiplies float32 x by uniform noise in [1 - epsilon, 1 + epsilon]."""
    return x_TD * _uniform(x_TD.shape, x_TD.device, 1.0 - epsilon, 1.0 + epsilon)


def gumbel_noise(shape: Sequence[int], device: torch.device) -> Tensor:
    """The draws of torch.distributions.Gumbel(0, 1), bit for bit; their uniform never is 0 or 1."""
    finfo = torch.finfo(torch.float32)
    return _uniform(shape, device, finfo.tiny, 1 - finfo.eps).log_().neg_().log_().neg_()


def capacity(num_tokens: int, num_experts: int, capacity_factor: float, min_capacity: int) -> int:
    """ceil(T / E * factor), the product in float32 as DeepSpeed has it, at least min_capacity."""
    wanted = math.ceil(_float32(_float32(num_tokens / num_experts) * _float32(capacity_factor)))
    return max(wanted, min_capacity)


def deepspeed_gating(
    logits_TE: Tensor, gating: DeepSpeedGating, used_token_T: Tensor | None = None
) -> tuple[Routing, Tensor]:
    """Routes tokens as DeepSpeed does.

    Args:
        logits_TE: float32 [T, E].
        gating: the options in force.
        used_token_T: [T], 0 for tokens that must not be routed; only top-1 looks at it, as in DeepSpeed.

    Returns:
        The routing, and l_aux: DeepSpeed's load-balancing loss, scalar float32 (0 for a rank without tokens).
    """
    if gating.k == 1:
        routing, l_aux = _top1(logits_TE, gating, used_token_T)
    elif gating.k == 2:
        routing, l_aux = _top2(logits_TE, gating)
    else:
        routing, l_aux = _topk(logits_TE, gating)
    # The mean over no tokens is NaN; a rank without tokens contributes no loss, but stays in the graph.
    return routing, l_aux if logits_TE.shape[0] else logits_TE.sum()


def gate_and_route(
    x_TD: Tensor,
    weight_ED: Tensor,
    gating: DeepSpeedGating,
    used_token_T: Tensor | None = None,
    fused: bool = False,
) -> tuple[Routing, Tensor]:
    """Gate product and `deepspeed_gating` in one: by PyTorch operators, or, if `fused`, by kernels on CUDA and outside
    of torch.compile's graphs.

    Args:
        x_TD: the gate's input, jittered if it is to be.
        weight_ED: the gate's weight, any floating-point dtype; logits are float32.
    """
    with without_autocast(x_TD.device.type):
        if fused and not torch.compiler.is_compiling() and runs_fused(x_TD, weight_ED, gating.k):
            return route_fused(x_TD, weight_ED, gating, used_token_T)
        return deepspeed_gating(router_logits(x_TD, weight_ED, torch.float32), gating, used_token_T)


def route_fused(
    x_TD: Tensor, weight_ED: Tensor, gating: DeepSpeedGating, used_token_T: Tensor | None = None
) -> tuple[Routing, Tensor]:
    """`gate_and_route` by the fused kernels: random draws and drops by value here, all else there."""
    from flashfusemoe_ds.kernels import deepspeed_routing  # not at the top: machines without CUDA may lack triton

    (num_tokens, _), num_experts = x_TD.shape, weight_ED.shape[0]
    noise_TE = used_T = limit = keep = None
    if (gating.k == 1 and gating.rsample) or (gating.k == 2 and gating.top2_2nd_expert_sampling):
        noise_TE = gumbel_noise((num_tokens, num_experts), x_TD.device)
    if gating.k == 1 and used_token_T is not None:
        used_T = used_token_T.reshape(-1) != 0
    if gating.drop_tokens and gating.k == 2:
        limit = gating.limit(num_tokens, num_experts)
    elif gating.drop_tokens:
        keep = functools.partial(_keep_topk if gating.k > 2 else _keep_top1, gating, used_T)
    elif gating.k == 1 and gating.use_rts:
        _priorities((num_tokens, num_experts), x_TD.device)  # DeepSpeed draws them though nothing can be dropped
    idx_TK, weight_TK, counts_E, l_aux = deepspeed_routing.route(
        x_TD, weight_ED, gating.k, noise_TE, used_T, limit, keep
    )
    return Routing(idx_TK, weight_TK, counts_E), l_aux


def _keep_top1(gating: DeepSpeedGating, used_T: Tensor | None, logits_TE: Tensor, choice_TK: Tensor) -> Tensor:
    """Which of the chosen routes stay, bool [T, 1]."""
    mask_TE = _chosen(choice_TK.squeeze(1), logits_TE.shape[1], used_T)
    priorities_TE = _priorities(mask_TE.shape, mask_TE.device) if gating.use_rts else None
    return _random_tokens(mask_TE, priorities_TE, gating).gather(1, choice_TK) != 0


def _keep_topk(gating: DeepSpeedGating, used_T: None, logits_TE: Tensor, choice_TK: Tensor) -> Tensor:
    """Which of the chosen routes stay, bool [T, K]. By torch's softmax: tokens must rank as they do in DeepSpeed."""
    gate_TK = F.softmax(logits_TE, dim=1).gather(1, choice_TK)
    return _most_probable_tokens(gate_TK, choice_TK, logits_TE.shape[1], gating).gather(1, choice_TK)


def _top1(logits_TE: Tensor, gating: DeepSpeedGating, used_token_T: Tensor | None) -> tuple[Routing, Tensor]:
    num_experts = logits_TE.shape[1]
    noisy_TE = logits_TE + gumbel_noise(logits_TE.shape, logits_TE.device) if gating.rsample else None
    gates_TE = F.softmax(logits_TE, dim=1)
    choice_T = torch.argmax(gates_TE if noisy_TE is None else noisy_TE, dim=1)
    mask_TE = _chosen(choice_T, num_experts, None if used_token_T is None else used_token_T.reshape(-1) != 0)
    counts_E = mask_TE.sum(0)
    l_aux = (gates_TE.mean(0) * mask_TE.float().mean(0)).sum() * num_experts

    # Random token selection draws T * E numbers whether or not anything can be dropped.
    priorities_TE = _priorities(mask_TE.shape, mask_TE.device) if gating.use_rts else None
    if gating.drop_tokens:
        mask_TE = _random_tokens(mask_TE, priorities_TE, gating)
    weight_TK = (gates_TE * mask_TE).sum(1, keepdim=True)
    kept_TK = mask_TE.any(1, keepdim=True)
    return Routing(_drop(choice_T.unsqueeze(1), kept_TK, weight_TK), weight_TK, counts_E), l_aux


def _chosen(choice_T: Tensor, num_experts: int, used_T: Tensor | None) -> Tensor:
    """int64 [T, E], 1 at the expert of each used token."""
    mask_TE = F.one_hot(choice_T, num_experts)
    return mask_TE if used_T is None else mask_TE * used_T.unsqueeze(1)


def _priorities(shape: Sequence[int], device: torch.device) -> Tensor:
    return _uniform(shape, device, 0.0, 1.0)


def _random_tokens(mask_TE: Tensor, priorities_TE: Tensor | None, gating: DeepSpeedGating) -> Tensor:
    """What is left of the mask when each expert keeps the tokens of highest priority; without priorities, those that
    torch.topk finds first."""
    limit = min(gating.limit(*mask_TE.shape), mask_TE.shape[0])
    ranked_TE = mask_TE if priorities_TE is None else mask_TE * priorities_TE
    selected_CE = torch.topk(ranked_TE, k=limit, dim=0)[1]
    return mask_TE * torch.zeros_like(mask_TE).scatter_(0, selected_CE, 1)


def _top2(logits_TE: Tensor, gating: DeepSpeedGating) -> tuple[Routing, Tensor]:
    num_tokens, num_experts = logits_TE.shape
    gates_TE = F.softmax(logits_TE, dim=1)
    first_T = torch.argmax(gates_TE, dim=1)
    first_TE = F.one_hot(first_T, num_experts)
    with torch.no_grad():
        noisy_TE = logits_TE
        if gating.top2_2nd_expert_sampling:
            noisy_TE = logits_TE + gumbel_noise(logits_TE.shape, logits_TE.device)
        second_T = torch.argmax(noisy_TE.masked_fill(first_TE.bool(), float("-inf")), dim=1)
    second_TE = F.one_hot(second_T, num_experts)
    counts_E = (first_TE + second_TE).sum(0)
    l_aux = (gates_TE.mean(0) * first_TE.float().mean(0)).mean() * num_experts * num_experts

    if gating.drop_tokens:
        # First come, first served, and every first choice before every second one.
        limit = gating.limit(num_tokens, num_experts)
        first_place_TE = torch.cumsum(first_TE, dim=0) - 1
        second_place_TE = torch.cumsum(second_TE, dim=0) - 1 + first_TE.sum(0, keepdim=True)
        first_TE = first_TE * (first_place_TE < limit)
        second_TE = second_TE * (second_place_TE < limit)
    weight_TK = torch.stack([(gates_TE * first_TE).sum(1), (gates_TE * second_TE).sum(1)], dim=1)
    kept_TK = torch.stack([first_TE.any(1), second_TE.any(1)], dim=1)
    idx_TK = _drop(torch.stack([first_T, second_T], dim=1), kept_TK, weight_TK)
    return Routing(idx_TK, _over_survivors(weight_TK), counts_E), l_aux


def _topk(logits_TE: Tensor, gating: DeepSpeedGating) -> tuple[Routing, Tensor]:
    num_experts = logits_TE.shape[1]
    gates_TE = F.softmax(logits_TE, dim=1)
    gate_TK, choice_TK = torch.topk(gates_TE, k=gating.k, dim=1)
    mask_TE = torch.zeros_like(gates_TE, dtype=torch.bool).scatter_(1, choice_TK, True)
    counts_E = mask_TE.sum(0)
    l_aux = (gates_TE.mean(0) * mask_TE.float().mean(0)).mean() * num_experts * num_experts / gating.k

    if gating.drop_tokens:
        mask_TE = mask_TE & _most_probable_tokens(gate_TK, choice_TK, num_experts, gating)
    kept_TK = mask_TE.gather(1, choice_TK)
    weight_TK = gate_TK * kept_TK
    return Routing(_drop(choice_TK, kept_TK, weight_TK), _over_survivors(weight_TK), counts_E), l_aux


def _most_probable_tokens(gate_TK: Tensor, choice_TK: Tensor, num_experts: int, gating: DeepSpeedGating) -> Tensor:
    """bool [T, E], True where an expert takes a token: those of its tokens to which it is most probable. Where it has
    fewer, tokens that did not choose it too."""
    num_tokens = gate_TK.shape[0]
    limit = min(gating.limit(num_tokens, num_experts), num_tokens)
    chosen_TE = gate_TK.new_zeros(num_tokens, num_experts).scatter(1, choice_TK, gate_TK)
    selected_CE = torch.topk(chosen_TE, k=limit, dim=0, sorted=False)[1]
    return torch.zeros_like(chosen_TE, dtype=torch.bool).scatter_(0, selected_CE, True)


def _drop(idx_TK: Tensor, kept_TK: Tensor, weight_TK: Tensor) -> Tensor:
    """Ids, -1 where not kept. A NaN weight keeps its route: in DeepSpeed too it reaches the output."""
    return torch.where(kept_TK | torch.isnan(weight_TK), idx_TK, -1)


def _over_survivors(weight_TK: Tensor) -> Tensor:
    """Renormalises over the routes that survived; a token that lost every route keeps weight 0."""
    return weight_TK / weight_TK.sum(1, keepdim=True).clamp(min=torch.finfo(weight_TK.dtype).eps)
