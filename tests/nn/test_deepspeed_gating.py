# SPDX-License-Identifier: GPL-3.0-or-later
"""The random draws of DeepSpeed's gating; tests/ds/test_stock_parity.py compares the gating itself with stock."""

from __future__ import annotations

import math

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
    # 50 * 1.1 is 55 in float32 and a little more in float64, where the ceiling would be 56.
    assert capacity(400, 8, 1.1, 2) == 55 and math.ceil(50 * 1.1) == 56
    assert capacity(720, 8, 1.1, 2) == 99 and math.ceil(90 * 1.1) == 100
    assert capacity(3, 8, 1.0, 4) == 4
