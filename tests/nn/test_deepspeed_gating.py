# SPDX-License-Identifier: GPL-3.0-or-later
"""The random draws of DeepSpeed's gating; tests/ds/test_stock_parity.py compares the gating itself with stock."""

from __future__ import annotations

import math

import pytest
import torch

from flashfusemoe_ds.nn.deepspeed_gating import DeepSpeedGating, capacity, deepspeed_gating, gumbel_noise, jitter


def test_draws_are_those_of_torch_distributions() -> None:
    shape = (257, 129)
    like = torch.ones(shape)
    torch.manual_seed(0)
    uniform = torch.distributions.Uniform(torch.tensor(1.0 - 1e-2), torch.tensor(1.0 + 1e-2)).rsample(shape)
    gumbel = torch.distributions.Gumbel(torch.tensor(0.0), torch.tensor(1.0)).rsample(shape)
    after = torch.get_rng_state()
    torch.manual_seed(0)
    assert torch.equal(jitter(like), uniform)
    assert torch.equal(gumbel_noise(shape, like.device), gumbel)
    assert torch.equal(torch.get_rng_state(), after)


def test_draws_follow_the_shape_and_not_the_memory() -> None:
    like = torch.ones(7, 5)
    torch.manual_seed(0)
    expected = jitter(like)
    torch.manual_seed(0)
    assert torch.equal(jitter(torch.ones(5, 7).t()), expected)


def test_capacity_multiplies_in_float32_as_deepspeed_does() -> None:
    # 50 * 1.1 is 55 in float32 and a little more in float64, where the ceiling would be 56.
    assert capacity(400, 8, 1.1, 2) == 55 and math.ceil(50 * 1.1) == 56
    assert capacity(720, 8, 1.1, 2) == 99 and math.ceil(90 * 1.1) == 100
    assert capacity(3, 8, 1.0, 4) == 4


@pytest.mark.parametrize("drop_tokens", [True, False])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_l_aux_and_weights_have_their_gradients(k: int, drop_tokens: bool) -> None:
    """Against finite differences in float64, with drops."""
    gating = DeepSpeedGating(k, 0.5, 1, drop_tokens, use_rts=False, top2_2nd_expert_sampling=False, rsample=False)
    logits = torch.randn(20, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
    routing, l_aux = deepspeed_gating(logits, gating)
    assert (routing.idx_TK < 0).any() == drop_tokens
    assert torch.autograd.gradcheck(lambda x: deepspeed_gating(x, gating)[1], (logits,), rtol=1e-6, atol=1e-8)
    assert torch.autograd.gradcheck(
        lambda x: deepspeed_gating(x, gating)[0].weight_TK, (logits,), rtol=1e-6, atol=1e-8
    )
    assert torch.autograd.grad(l_aux, logits)[0].abs().max() > 1e-4
