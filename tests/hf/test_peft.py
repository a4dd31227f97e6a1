# SPDX-License-Identifier: GPL-3.0-or-later
"""LoRA on packed experts through PEFT's `target_parameters`: trains and merges as over Transformers' eager code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", minversion="5.7")
peft = pytest.importorskip("peft")

import flashfusemoe_ds as ffmoe  # noqa: E402
from tests.hf.models import batch, build  # noqa: E402
from tests.test_docs import ROOT, blocks  # noqa: E402


def with_lora(name: str, implementation: str) -> torch.nn.Module:
    lora = peft.LoraConfig(
        r=4,
        lora_alpha=8,
        target_modules=["q_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        init_lora_weights=False,  # else B is zero, and A gets no gradient
    )
    model = build(name, implementation)
    torch.manual_seed(1)
    return peft.get_peft_model(model, lora)


def train(model: torch.nn.Module) -> list[float]:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    losses = []
    for _ in range(4):
        loss = model(**batch()).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def logits(model: torch.nn.Module) -> Tensor:
    with torch.no_grad():
        return model(**batch(seed=1)).logits


@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_lora_trains_and_merges(name: str, tmp_path: Path) -> None:
    ffmoe.register_experts_implementation()
    eager, ours = with_lora(name, "eager"), with_lora(name, "flashfusemoe")
    before = {path: p.detach().clone() for path, p in ours.named_parameters()}
    expected = train(eager)
    assert expected[-1] < expected[0] - 0.1
    torch.testing.assert_close(train(ours), expected, rtol=1e-5, atol=1e-5)

    adapted = logits(ours)
    torch.testing.assert_close(adapted, logits(eager), rtol=1e-5, atol=1e-5)
    for path, param in ours.named_parameters():
        assert torch.equal(param, before[path]) == ("lora_" not in path), path
    assert sum("experts" in path and "lora_" in path for path in before) == 2 * 2 * 2

    merged = ours.merge_and_unload()
    torch.testing.assert_close(logits(merged), adapted, rtol=1e-5, atol=1e-5)
    merged.save_pretrained(tmp_path)
    plain = type(merged).from_pretrained(tmp_path, experts_implementation="eager")
    torch.testing.assert_close(logits(plain), adapted, rtol=1e-5, atol=1e-5)


def test_the_page_runs() -> None:
    (code,) = (code for code in blocks(ROOT / "docs" / "transformers.md", "py") if "LoraConfig" in code)
    names: dict[str, object] = {}
    exec(compile(code, "transformers.md", "exec"), names)
    assert not any("lora" in path for path, _ in names["model"].named_parameters())
