# SPDX-License-Identifier: GPL-3.0-or-later
"""The random draws of DeepSpeed's gating; tests/ds/test_stock_parity.py compares the gating itself with stock."""

from __future__ import annotations

import torch

from flashfusemoe_ds.nn.deepspeed_gating import capacity, gumbel_noise, jitter


def test_draws_are_those_of_torch_distributions() -> None:
    shape = (257, 129)
    like = torch.ones(shape)
    torch.manual_seed(0)
    uniform = torch.distributions.Uniform(torch.tensor(1.0 - 1e-2), torch.tensor(1.0 + 1e-2)).rsample(shape)
    gumbel = torch.distributions.Gumbel(torch.tensor(0.0), torch.tensor(1.0)).rsample(shape)
    after = torch.get_rng_state()
    torch.manual_seed(0)
    assert torch.equal(jitter(like), uniform)
    assert torch.equal(gumbel_noise(like), gumbel)
    assert torch.equal(torch.get_rng_state(), after)


def test_draws_follow_the_shape_and_not_the_memory() -> None:
    like = torch.ones(7, 5)
    torch.manual_seed(0)
    expected = jitter(like)
    torch.manual_seed(0)
    assert torch.equal(jitter(torch.ones(5, 7).t()), expected)


def test_capacity_multiplies_in_float32_as_deepspeed_does() -> None:
    # 1.1 * 10 is 11.000000238 in float32 and 11.000000000000002 in float64; 3.3 * 10 is 33 in float32 and less below.
    for factor in (0.1, 0.7, 1.1, 1.25, 3.3, 1 / 3):
        for tokens in range(1, 200):
            exact = torch.ceil((tokens / 8) * torch.tensor(factor)).to(torch.int64)
            assert capacity(tokens, 8, factor, 2) == max(int(exact), 2)
