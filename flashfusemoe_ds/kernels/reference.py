# SPDX-License-Identifier: GPL-3.0-or-later
"""The truth: every stage as short, differentiable PyTorch, in any dtype up to float64, on any device.

Nothing here is fast and nothing here is shared with the fast paths: autograd derives every gradient, every expert sees
every token, and the routing is read off one-hot matrices. Tests compare the fast paths with this file,
and the recognition of users' experts compares those with its activations.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

CURVES: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": F.silu,
    "geglu": F.gelu,
    "geglu_tanh": lambda g: F.gelu(g, approximate="tanh"),
    "reglu": F.relu,
    "relu_squared": lambda g: F.relu(g).square(),
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda g: F.gelu(g, approximate="tanh"),
    "relu": F.relu,
}
PLAIN = ("silu", "gelu", "gelu_tanh", "relu")


def activate(h: Tensor, activation: str) -> Tensor:
    """[..., H] -> [..., F]."""
    curve = CURVES[activation]
    if activation in PLAIN:
        return curve(h)
    gate, up = h.chunk(2, dim=-1)
    return curve(gate) * up


def dense_weights(idx_TK: Tensor, weight_TK: Tensor, num_experts: int) -> Tensor:
    """[T, K] routes -> [T, E] combine weights, 0 where an expert does not see a token."""
    one_hot = F.one_hot(idx_TK.clamp(min=0), num_experts) * (idx_TK >= 0).unsqueeze(-1)
    return (weight_TK.unsqueeze(-1) * one_hot).sum(1)


def experts(
    x_TD: Tensor,
    idx_TK: Tensor,
    weight_TK: Tensor,
    w_up_EHD: Tensor,
    w_down_EDF: Tensor,
    activation: str,
    b_up_EH: Tensor | None = None,
    b_down_ED: Tensor | None = None,
) -> Tensor:
    """Twin of kernels.experts.experts: every expert on every token, weighted, summed. [T, D] -> [T, D]."""
    h = torch.einsum("td,ehd->teh", x_TD, w_up_EHD)
    if b_up_EH is not None:
        h = h + b_up_EH
    y = torch.einsum("tef,edf->ted", activate(h, activation), w_down_EDF)
    if b_down_ED is not None:
        y = y + b_down_ED
    return torch.einsum("te,ted->td", dense_weights(idx_TK, weight_TK, w_up_EHD.shape[0]).to(y.dtype), y)


def switch_aux_loss(probs_TE: Tensor, idx_TK: Tensor) -> Tensor:
    """E * sum_e f_e P_e (Fedus et al. 2021, eq. 4-6): f_e the share of routes, P_e the mean probability."""
    num_experts = probs_TE.shape[1]
    share = F.one_hot(idx_TK.reshape(-1), num_experts).to(probs_TE.dtype).mean(0)
    return num_experts * (share * probs_TE.mean(0)).sum()


def z_loss(logits_TE: Tensor) -> Tensor:
    """Mean squared log-partition (Zoph et al. 2022, eq. 5)."""
    return torch.logsumexp(logits_TE, dim=1).square().mean()
