# SPDX-License-Identifier: GPL-3.0-or-later
"""The "flashfusemoe" section: defaults, values, and a sentence for every mistake."""

from __future__ import annotations

import pytest

from flashfusemoe_ds import FlashFuseMoEConfig


def test_defaults() -> None:
    config = FlashFuseMoEConfig.from_ds_config({"train_batch_size": 8})
    assert (config.ep_backend, config.replace_moe, config.gemm_backend) == ("nccl", True, None)
    assert (config.overlap_dense_grads, config.recompute_activations) == (True, False)
    assert (config.deep_ep.num_sms, config.deep_ep.max_tokens_per_rank) == (24, 8192)


def test_values_arrive() -> None:
    section = {"ep_backend": "hybrid", "replace_moe": False, "gemm_backend": "reference",
               "deep_ep": {"num_sms": 12}}  # fmt: skip
    config = FlashFuseMoEConfig.from_ds_config({"flashfusemoe": section})
    assert (config.ep_backend, config.replace_moe, config.gemm_backend) == ("hybrid", False, "reference")
    assert (config.deep_ep.num_sms, config.deep_ep.max_tokens_per_rank) == (12, 8192)


# ruff: noqa: E501
MISTAKES: list[tuple[object, str]] = [
    ({"ep_backnd": "nccl"}, r'flashfusemoe\.ep_backnd: unknown key; did you mean "ep_backend"\? Valid keys: ep_backend, '),
    ({"xyz": 1}, r"flashfusemoe\.xyz: unknown key; Valid keys: ep_backend, replace_moe, gemm_backend, "),
    ({"ep_backend": "nvshmem"}, r"flashfusemoe\.ep_backend is \"nvshmem\"; valid: 'nccl', 'deep_ep', 'symm_mem' or 'hybrid'"),
    ({"ep_backend": "auto"}, r"flashfusemoe\.ep_backend is \"auto\"; valid: 'nccl'"),
    ({"ep_backend": 3}, r"flashfusemoe\.ep_backend is 3; valid: 'nccl'"),
    ({"gemm_backend": "cublas"}, r"flashfusemoe\.gemm_backend is \"cublas\"; valid: 'triton', 'grouped_mm' or 'reference'"),
    ({"replace_moe": "true"}, r"flashfusemoe\.replace_moe is \"true\"; input should be a valid boolean"),
    ({"replace_moe": 1}, r"flashfusemoe\.replace_moe is 1; input should be a valid boolean"),
    ({"recompute_activations": None}, r"flashfusemoe\.recompute_activations is null; input should be a valid boolean"),
    ({"overlap_dense_grads": [True]}, r"flashfusemoe\.overlap_dense_grads is \[true\]; input should be a valid boolean"),
    ({"deep_ep": 5}, r"flashfusemoe\.deep_ep is 5; "),
    ({"deep_ep": {"num_sm": 5}}, r'flashfusemoe\.deep_ep\.num_sm: unknown key; did you mean "num_sms"\? Valid keys: num_sms, max_'),
    ({"deep_ep": {"num_sms": 23}}, r"flashfusemoe\.deep_ep\.num_sms is 23; input should be a multiple of 2"),
    ({"deep_ep": {"num_sms": "24"}}, r'flashfusemoe\.deep_ep\.num_sms is "24"; input should be a valid integer'),
    ({"deep_ep": {"max_tokens_per_rank": 0}}, r"flashfusemoe\.deep_ep\.max_tokens_per_rank is 0; input should be greater"),
    ([1], r'"flashfusemoe" is \[1\]; it must be a JSON object'),
    ("nccl", r'"flashfusemoe" is .nccl.; it must be a JSON object'),
]  # fmt: skip


@pytest.mark.parametrize(("section", "message"), MISTAKES)
def test_mistakes_name_the_setting_its_value_and_the_valid_ones(section: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FlashFuseMoEConfig.from_ds_config({"flashfusemoe": section})


def test_every_mistake_is_reported_at_once() -> None:
    with pytest.raises(ValueError) as raised:
        FlashFuseMoEConfig.from_section({"ep_backnd": "nccl", "replace_moe": 1})
    assert "ep_backnd" in str(raised.value) and "replace_moe" in str(raised.value)


@pytest.mark.parametrize("name", ["flashfuse_moe", "flashfusedmoe", "FlashFuseMoE", "flashfusemoe_ds"])
def test_a_misspelt_section_is_not_ignored(name: str) -> None:
    with pytest.raises(ValueError, match=f'"{name}" is not a section of the config; did you mean "flashfusemoe"'):
        FlashFuseMoEConfig.from_ds_config({name: {"ep_backend": "nccl"}})


def test_other_sections_are_left_alone() -> None:
    FlashFuseMoEConfig.from_ds_config({"zero_optimization": {"stage": 1}, "flops_profiler": {}, "moe": 1})
