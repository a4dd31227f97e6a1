# SPDX-License-Identifier: GPL-3.0-or-later
"""Router losses and the aux-loss-free balancing rule. All are over this rank's tokens and differentiable."""

from __future__ import annotations

import torch
from torch import Tensor


def load_balancing_loss(probs_TE: Tensor, counts_E: Tensor, top_k: int) -> Tensor:
    """Switch auxiliary loss, E * sum_e f_e P_e; 1 when balanced, 0 for a rank without tokens.

    f_e is the share of routes that chose expert e, before any were dropped; P_e its mean router probability
    (Fedus et al. 2021, arXiv:2101.03961, eq. 4-6, with routes in place of tokens so that it holds for any top-k).

    Args:
        probs_TE: float32 [T, E], each row summing to 1; the loss's gradient flows through it.
        counts_E: int64 [E], routes per expert.
        top_k: routes per token.
    """
    num_tokens, num_experts = probs_TE.shape
    share_E = counts_E.to(probs_TE.dtype) / max(num_tokens * top_k, 1)
    return num_experts * (share_E * probs_TE.sum(0)).sum() / max(num_tokens, 1)


def router_z_loss(logits_TE: Tensor) -> Tensor:
    """Mean over tokens of logsumexp(logits)^2 (Zoph et al. 2022, arXiv:2202.08906, eq. 5); 0 without tokens."""
    return torch.logsumexp(logits_TE, dim=1).square().sum() / max(logits_TE.shape[0], 1)


@torch.no_grad()
def balanced_bias(bias_E: Tensor, counts_E: Tensor, rate: float) -> Tensor:
    """The next expert bias of aux-loss-free balancing (Wang et al. 2024, arXiv:2408.15664, algorithm 1).

    An expert below the mean load gains `rate`, one above loses it.
    """
    load_E = counts_E.to(torch.float32)
    return bias_E + rate * torch.sign(load_E.mean() - load_E)
