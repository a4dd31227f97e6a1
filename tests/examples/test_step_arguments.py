# SPDX-License-Identifier: GPL-3.0-or-later
"""What the benchmarks of whole training steps all refuse on the command line. Each one's own is in its own tests."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

SCRIPTS = ("step", "autoep_step", "seed_lm")
MISTAKES = [
    (["--batch", "0"], "--batch 0: must be positive"),
    (["--rounds", "-1"], "--rounds -1: must be positive"),
    (["--steps", "0"], "--steps 0: must be positive"),
    (["--warmup", "1"], "--warmup 1: must be at least 2"),
    (["--profile_steps", "-1"], "--profile_steps and --gradient_clipping must not be negative"),
    (["--gradient_clipping", "-0.5"], "--profile_steps and --gradient_clipping must not be negative"),
    (["--ep_backend", "post"], 'ep_backend is "post"'),
]


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_mistakes_are_said(refusal: Callable[..., str], script: str, arguments: list[str], message: str) -> None:
    _needed_by(script)
    assert message in refusal(script, "--size", "toy", *arguments)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("script", ("step", "autoep_step"))
def test_a_trace_needs_a_gpu(refusal: Callable[..., str], script: str) -> None:
    _needed_by(script)
    assert "--trace: needs a GPU" in refusal(script, "--size", "toy", "--trace")


@pytest.mark.parametrize("script", ("step", "seed_lm"))
@pytest.mark.parametrize(
    ("ep_size", "message"),
    [
        ("3", "ep_size=3: must divide num_experts=4, so be one of [1, 2, 4]"),
        ("2", "--ep_size 2: must divide the 1 processes"),
    ],
)
def test_ep_size(refusal: Callable[..., str], script: str, ep_size: str, message: str) -> None:
    assert message in refusal(script, "--size", "toy", "--ep_size", ep_size)


def _needed_by(script: str) -> None:
    if script == "autoep_step":
        pytest.importorskip("transformers", reason="needs transformers: pip install flashfusemoe_ds[hf]")
