# SPDX-License-Identifier: GPL-3.0-or-later
"""The router of MoELayer: scores, top-k, weights, losses. Float32 throughout, whatever the model's dtype.

One `Gating` describes every published variant the package knows:

    Mixtral          softmax over the chosen k logits      Gating(score="softmax", order="after_topk")
    OLMoE            softmax over all, weights as they are Gating(score="softmax")
    Qwen3-MoE        the same, renormalised over the k     Gating(score="softmax", renormalize=True)
    DeepSeek-V3      sigmoid, bias, groups, renormalised   Gating(score="sigmoid", renormalize=True, expert_bias=True,
                     and scaled                                   scaling_factor=2.5, num_groups=8, top_groups=4)
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from flashfusemoe_ds.kernels.precision import without_autocast
from flashfusemoe_ds.kernels.routing_rule import Rule
from flashfusemoe_ds.nn.losses import balanced_bias, load_balancing_loss, router_z_loss
from flashfusemoe_ds.types import Routing

SCORES = ("softmax", "sigmoid")
ORDERS = ("before_topk", "after_topk")
GROUP_SCORES = ("top2_sum", "max")


@dataclass(frozen=True)
class Gating:
    """How logits become experts and weights.

    Attributes:
        score: "softmax" or "sigmoid".
        order: score all E logits "before_topk", or only the chosen ones "after_topk".
        renormalize: divide the k weights by their sum.
        scaling_factor: multiplies the weights last.
        num_groups: experts form this many equal groups, of which `top_groups` may be chosen from (0: no groups).
        top_groups: groups open to each token.
        group_score: rank groups by the sum of their two best scores ("top2_sum", DeepSeek-V3) or by their best
            ("max", DeepSeek-V2).
        expert_bias: add a bias to the scores for choosing only, moved by `MoELayer.update_expert_bias`.
        bias_update_rate: step of that bias.
    """

    score: str = "softmax"
    order: str = "before_topk"
    renormalize: bool = False
    scaling_factor: float = 1.0
    num_groups: int = 0
    top_groups: int = 0
    group_score: str = "top2_sum"
    expert_bias: bool = False
    bias_update_rate: float = 1e-3

    def check(self, num_experts: int, top_k: int) -> None:
        """Raises ValueError naming the field, its value and the valid ones."""
        for name, valid in (("score", SCORES), ("order", ORDERS), ("group_score", GROUP_SCORES)):
            if getattr(self, name) not in valid:
                raise ValueError(f"gating.{name} is {getattr(self, name)!r}; valid: {', '.join(valid)}")
        if not math.isfinite(self.scaling_factor) or self.scaling_factor <= 0:
            raise ValueError(f"gating.scaling_factor is {self.scaling_factor}; it must be positive")
        if self.num_groups < 0 or (self.num_groups and num_experts % self.num_groups):
            raise ValueError(f"gating.num_groups is {self.num_groups}; it must divide num_experts ({num_experts})")
        if self.num_groups and not 0 < self.top_groups <= self.num_groups:
            raise ValueError(f"gating.top_groups is {self.top_groups}; valid: 1 to num_groups ({self.num_groups})")
        per_group = num_experts // self.num_groups if self.num_groups else num_experts
        if self.num_groups and top_k > self.top_groups * per_group:
            raise ValueError(
                f"top_k is {top_k}, but gating.top_groups={self.top_groups} groups of {per_group} hold fewer"
            )


GATINGS: dict[str, Gating] = {
    "softmax": Gating(),
    "softmax_renorm": Gating(renormalize=True),
    "softmax_topk": Gating(order="after_topk"),
    "sigmoid": Gating(score="sigmoid"),
    "sigmoid_renorm": Gating(score="sigmoid", renormalize=True),
}


def get_gating(gating: str | Gating) -> Gating:
    """A Gating, or one of the named ones; ValueError lists the names."""
    if isinstance(gating, Gating):
        return gating
    if gating not in GATINGS:
        raise ValueError(f"gating {gating!r} is unknown; valid: {', '.join(GATINGS)}, or a Gating(...)")
    return GATINGS[gating]


def _within_top_groups(choice_TE: Tensor, gating: Gating) -> Tensor:
    """Sets to -inf the experts outside each token's best groups."""
    num_tokens, num_experts = choice_TE.shape
    grouped = choice_TE.view(num_tokens, gating.num_groups, num_experts // gating.num_groups)
    best = min(2 if gating.group_score == "top2_sum" else 1, grouped.shape[2])
    group_score = grouped.topk(best, dim=2)[0].sum(2)
    top = group_score.topk(gating.top_groups, dim=1)[1]
    open_groups = torch.zeros_like(group_score, dtype=torch.bool).scatter_(1, top, True)
    return grouped.masked_fill(~open_groups.unsqueeze(2), float("-inf")).view(num_tokens, num_experts)


def route(
    logits_TE: Tensor, gating: Gating, top_k: int, bias_E: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Chooses experts and weighs them.

    Args:
        logits_TE: float32 (or float64) [T, E].
        bias_E: added to the scores for choosing, never for weighing; with order "after_topk" to the logits.

    Returns:
        idx_TK int64, weight_TK in the logits' dtype, and probs_TE: the scores as probabilities (rows sum to 1) for the
        balancing loss.
    """
    if gating.score == "softmax":
        scores_TE = F.softmax(logits_TE, dim=1)
        probs_TE = scores_TE
    else:
        scores_TE = torch.sigmoid(logits_TE)
        # An all-zero row (every logit far below 0) has no distribution; the floor keeps it from dividing by 0.
        probs_TE = scores_TE / scores_TE.sum(1, keepdim=True).clamp(min=torch.finfo(scores_TE.dtype).tiny)
    with torch.no_grad():
        choice_TE = logits_TE if gating.order == "after_topk" else scores_TE
        if bias_E is not None:
            choice_TE = choice_TE + bias_E
        if gating.num_groups:
            choice_TE = _within_top_groups(choice_TE, gating)
        idx_TK = choice_TE.topk(top_k, dim=1)[1]
    if gating.order == "after_topk":
        chosen_TK = logits_TE.gather(1, idx_TK)
        weight_TK = F.softmax(chosen_TK, dim=1) if gating.score == "softmax" else torch.sigmoid(chosen_TK)
    else:
        weight_TK = scores_TE.gather(1, idx_TK)
    if gating.renormalize:
        weight_TK = weight_TK / weight_TK.sum(1, keepdim=True).clamp(min=torch.finfo(weight_TK.dtype).tiny)
    return idx_TK, weight_TK * gating.scaling_factor, probs_TE


class _RouterLogits(torch.autograd.Function):
    """x @ w.T in wider precision, keeping x itself: autograd would keep a float32 copy, twice the size of a bf16 x."""

    @staticmethod
    def forward(ctx, x_TD, weight_ED, dtype):
        ctx.save_for_backward(x_TD, weight_ED)
        return x_TD.to(dtype) @ weight_ED.to(dtype).T

    @staticmethod
    @once_differentiable
    def backward(ctx, dlogits_TE):
        x_TD, weight_ED = ctx.saved_tensors
        dtype = dlogits_TE.dtype
        dx = dweight = None
        with without_autocast(x_TD.device.type):  # a backward may be called inside it
            if ctx.needs_input_grad[0]:
                dx = (dlogits_TE @ weight_ED.to(dtype)).to(x_TD.dtype)
            if ctx.needs_input_grad[1]:
                dweight = (dlogits_TE.T @ x_TD.to(dtype)).to(weight_ED.dtype)
        return dx, dweight, None


def router_logits(x_TD: Tensor, weight_ED: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """[T, E] in float32, under autocast too. Left open, the dtype is float64 for float64 input."""
    if dtype is None:
        dtype = torch.float64 if x_TD.dtype is torch.float64 else torch.float32
    with without_autocast(x_TD.device.type):
        return _RouterLogits.apply(x_TD, weight_ED, dtype)


def count_routes(idx_TK: Tensor, num_experts: int) -> Tensor:
    """int64 [E]: how often each expert was chosen. Takes no -1."""
    counts_E = torch.zeros(num_experts, dtype=torch.int64, device=idx_TK.device)
    return counts_E.scatter_add_(0, idx_TK.reshape(-1), torch.ones_like(idx_TK).reshape(-1))


def route_with_losses(
    logits_TE: Tensor,
    gating: Gating,
    top_k: int,
    aux_loss_coeff: float,
    z_loss_coeff: float,
    bias_E: Tensor | None = None,
) -> Routing:
    """Logits -> Routing, with each loss whose coefficient is positive."""
    idx_TK, weight_TK, probs_TE = route(logits_TE, gating, top_k, bias_E)
    counts_E = count_routes(idx_TK, logits_TE.shape[1])
    losses: dict[str, Tensor] = {}
    if aux_loss_coeff > 0:
        losses["aux_loss"] = aux_loss_coeff * load_balancing_loss(probs_TE, counts_E, top_k)
    if z_loss_coeff > 0:
        losses["z_loss"] = z_loss_coeff * router_z_loss(logits_TE)
    return Routing(idx_TK, weight_TK, counts_E, losses)


def runs_fused(x_TD: Tensor, weight_ED: Tensor, top_k: int) -> bool:
    """Whether the fused kernels take these operands."""
    if not x_TD.is_cuda:
        return False
    from flashfusemoe_ds.kernels import routing  # not at the top: machines without CUDA may lack triton

    return routing.covers(x_TD, weight_ED, top_k)


def gate_and_route(
    x_TD: Tensor,
    weight_ED: Tensor,
    gating: Gating,
    top_k: int,
    aux_loss_coeff: float,
    z_loss_coeff: float,
    bias_E: Tensor | None = None,
    count: bool = False,
) -> Routing:
    """`router_logits` and `route_with_losses` in one: by fused kernels on CUDA, by these two elsewhere.

    Args:
        count: the counts will be read, so let them come with the losses and not from launches of their own.
    """
    if runs_fused(x_TD, weight_ED, top_k):
        return route_fused(x_TD, weight_ED, gating, top_k, aux_loss_coeff, z_loss_coeff, bias_E, count)
    logits_TE = router_logits(x_TD, weight_ED)
    return route_with_losses(logits_TE, gating, top_k, aux_loss_coeff, z_loss_coeff, bias_E)


def route_fused(
    x_TD: Tensor,
    weight_ED: Tensor,
    gating: Gating,
    top_k: int,
    aux_loss_coeff: float,
    z_loss_coeff: float,
    bias_E: Tensor | None = None,
    count: bool = False,
) -> Routing:
    """`gate_and_route` by the fused kernels."""
    from flashfusemoe_ds.kernels import routing

    rule = fused_rule(gating, top_k)
    idx_TK, weight_TK, counts_E, aux_loss, z_loss = routing.route(
        x_TD, weight_ED, rule, aux_loss_coeff, z_loss_coeff, bias_E, count
    )
    return Routing(
        idx_TK,
        weight_TK,
        functools.partial(count_routes, idx_TK, weight_ED.shape[0]) if counts_E is None else counts_E,
        named_losses(aux_loss, z_loss),
    )


def named_losses(aux_loss: Tensor | None, z_loss: Tensor | None) -> dict[str, Tensor]:
    """Those of the two that there are, as `Routing.losses` has them."""
    return {name: loss for name, loss in (("aux_loss", aux_loss), ("z_loss", z_loss)) if loss is not None}


@functools.lru_cache(maxsize=256)
def fused_rule(gating: Gating, top_k: int) -> Rule:
    """The gating as the kernels take it."""
    return Rule(
        top_k=top_k,
        softmax=gating.score == "softmax",
        after_topk=gating.order == "after_topk",
        renormalize=gating.renormalize,
        scaling_factor=float(gating.scaling_factor),
        num_groups=gating.num_groups,
        top_groups=gating.top_groups,
        top2_sum=gating.group_score == "top2_sum",
    )


class Router(nn.Module):
    """Linear gate followed by `route`, with the losses whose coefficient is positive.

    Attributes:
        weight: [E, D], initialised kaiming_uniform times 0.01, so that routing starts nearly balanced.
        expert_bias: float32 buffer [E], present if gating.expert_bias.
        routed_counts: int64 buffer [E], routes since the last bias update; not saved.
    """

    def __init__(
        self,
        d_model: int,
        num_experts: int,
        top_k: int,
        gating: str | Gating = "softmax_topk",
        aux_loss_coeff: float = 0.0,
        z_loss_coeff: float = 0.0,
    ) -> None:
        super().__init__()
        self.top_k, self.num_experts = top_k, num_experts
        self.gating = get_gating(gating)
        if not 1 <= top_k <= num_experts:
            raise ValueError(f"top_k is {top_k}; valid: 1 to num_experts ({num_experts})")
        self.gating.check(num_experts, top_k)
        self.aux_loss_coeff, self.z_loss_coeff = aux_loss_coeff, z_loss_coeff
        self.weight = nn.Parameter(torch.empty(num_experts, d_model))
        if self.gating.expert_bias:
            self.register_buffer("expert_bias", torch.zeros(num_experts, dtype=torch.float32))
            self.register_buffer("routed_counts", torch.zeros(num_experts, dtype=torch.int64), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        with torch.no_grad():
            self.weight.mul_(0.01)

    def forward(self, x_TD: Tensor) -> Routing:
        routing = gate_and_route(
            x_TD, self.weight, self.gating, self.top_k, self.aux_loss_coeff, self.z_loss_coeff, self.bias_E,
            self.counts,
        )  # fmt: skip
        if self.counts:
            self.tally(routing.counts_E)
        return routing

    @property
    def bias_E(self) -> Tensor | None:
        """The bias on the scores for choosing, if the gating has one."""
        return self.expert_bias if self.gating.expert_bias else None

    @property
    def counts(self) -> bool:
        """Whether this forward's routes count for the next bias update."""
        return self.gating.expert_bias and self.training

    def tally(self, counts_E: Tensor) -> None:
        """Adds to `routed_counts`. A recomputed forward counts twice; the sign in the update rule does not see it."""
        self.routed_counts += counts_E

    def _apply(self, fn, recurse: bool = True) -> Router:
        """Moves the module, but leaves the bias in float32: steps of 1e-3 would vanish in bf16's eight bits."""
        exact = self.expert_bias if self.gating.expert_bias else None
        super()._apply(fn, recurse)
        if exact is not None:
            # Coming from the meta device there is no value to keep.
            self.expert_bias = (self.expert_bias if exact.is_meta else exact).to(
                self.expert_bias.device, torch.float32
            )
        return self

    @torch.no_grad()
    def update_expert_bias(self) -> None:
        """Moves the bias one step from `routed_counts` (sum them over ranks first) and resets the counts."""
        if not self.gating.expert_bias:
            raise ValueError("gating.expert_bias is False; there is no bias to update")
        self.expert_bias.copy_(balanced_bias(self.expert_bias, self.routed_counts, self.gating.bias_update_rate))
        self.routed_counts.zero_()
