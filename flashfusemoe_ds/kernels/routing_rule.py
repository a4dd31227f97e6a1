# SPDX-License-Identifier: GPL-3.0-or-later
"""What the fused router is told of a gating, in plain numbers, and how it scales its losses. Takes no triton."""

from __future__ import annotations

from typing import NamedTuple


class Rule(NamedTuple):
    """How logits become experts and weights: `nn.router.Gating` as plain numbers, in the order the kernels take them.

    Attributes:
        top_k: experts per token, at most `routing.MAX_TOP_K`.
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


def aux_factor_of(num_tokens: int, num_experts: int, rule: Rule, coeff: float) -> float:
    """What the sum over experts of (routes of e) * (e's probability summed over tokens) is multiplied by."""
    return coeff * num_experts / max(num_tokens, 1) / max(num_tokens * rule.top_k, 1)


def z_factor_of(num_tokens: int, coeff: float) -> float:
    """What the sum over tokens of the squared log-partition is multiplied by."""
    return coeff / max(num_tokens, 1)
