# SPDX-License-Identifier: GPL-3.0-or-later
"""The command `python -m flashfusemoe_ds.plan`: what it reads, prints, advises and refuses."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from flashfusemoe_ds import MoELayer, plan, plan_numbers
from flashfusemoe_ds.dispatch.symm_mem import MAX_RANKS
from flashfusemoe_ds.plan_text import GIB
from tests.hf import models

ROOT = Path(__file__).parent.parent
MIB = 2**20
ADAM = {"type": "AdamW", "params": {"torch_adam": True}}


def write(tmp_path: Path, **config: Any) -> Path:
    path = tmp_path / "ds.json"
    path.write_text(json.dumps({"optimizer": ADAM, "train_micro_batch_size_per_gpu": 2, **config}))
    return path


def command(tmp_path: Path, *words: str, **config: Any) -> list[dict[str, Any]]:
    args = plan.parse_args(["--config", str(write(tmp_path, **config)), "--json", *words])
    return json.loads(plan.run(args))


def build_stock() -> tuple[nn.Module, dict[str, Tensor]]:
    """A factory for --model: stock DeepSpeed layers."""
    from deepspeed.moe.layer import MoE

    from tests.ds import tiny

    return tiny.TinyModel(MoE, ep_size=1), {"x": torch.empty(48, tiny.D_IN), "target": torch.empty(48, tiny.D_OUT)}


def build_moe_layer() -> tuple[nn.Module, Tensor]:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = MoELayer(d_model=16, ffn_dim=32, num_experts=4, top_k=2, num_shared_experts=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x)[0]

    return Model(), torch.empty(2, 10, 16)


def test_factories(tmp_path: Path) -> None:
    from tests.ds import tiny

    plans = command(tmp_path, "--model", "tests.test_plan_command:build_stock", "--gpus", "4")
    assert [p["ep_size"] for p in plans] == [1, 2, 4]
    whole = sum(p.numel() for p in tiny.TinyModel(tiny.StockMoE, 1).parameters())
    assert {p["parameters"] for p in plans} == {whole}
    # Each expert-parallel rank holds its share, in float32.
    experts = plans[0]["expert_parameters"] * 4
    held = [p["memory"]["parameters"] for p in plans]
    assert [held[0] - size for size in held] == [0, experts // 2, experts * 3 // 4]
    assert all(p["memory"]["dense_kept"] > 0 and p["peak"] > p["memory"]["gradients"] for p in plans)

    (own,) = command(tmp_path, "--model", "tests.test_plan_command:build_moe_layer", "--gpus", "4")
    assert own["rows"] == 20 and own["wire"]["exchange"] == 0
    assert own["parameters"] == sum(p.numel() for p in build_moe_layer()[0].parameters())


def test_checkpoints_backends_and_skew(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    models.config("qwen3_moe").save_pretrained(tmp_path / "qwen3")
    words = ["--model", str(tmp_path / "qwen3"), "--gpus", "4", "--sequence_length", "32"]
    plans = command(tmp_path, *words, "--ep_size", "1", "2", "--backend", "nccl", "deep_ep", "--skew", "1", "2",
                    zero_optimization={"stage": 2}, gradient_accumulation_steps=3)  # fmt: skip
    assert [(p["ep_size"], p["ep_backend"], p["skew"]) for p in plans] == [
        (1, "none", 1), (2, "nccl", 1), (2, "nccl", 2), (2, "deep_ep", 1), (2, "deep_ep", 2)
    ]  # fmt: skip
    balanced, skewed = plans[1], plans[2]
    assert skewed["routes"] == 2 * balanced["routes"] and skewed["peak"] > balanced["peak"]
    checkpointed = command(tmp_path, *words, "--ep_size", "2", "--gradient_checkpointing",
                           zero_optimization={"stage": 2}, gradient_accumulation_steps=3)[0]  # fmt: skip
    assert checkpointed["memory"]["moe_kept"] < balanced["memory"]["moe_kept"]
    assert checkpointed["wire"]["exchange"] > 1.4 * balanced["wire"]["exchange"]


def test_wire_and_fixed_costs(tmp_path: Path) -> None:
    """Of two layers and three micro batches of 64 tokens."""
    words = ["--shape", "64,32,16,8,2", "--layers", "2", "--gpus", "2", "--ep_size", "1", "2"]
    alone, plain = command(tmp_path, *words, gradient_accumulation_steps=3)
    assert alone["wire"]["exchange_ms"] == alone["wire"]["exchange_fixed_ms"] == 0
    rows = 51  # of 64: 22 of 28 pairs of experts have one of a rank's four
    assert plain["wire"]["exchange"] == 3 * 2 * rows * (4 * 32 * 4 + 16 + 8)
    nccl = plan_numbers.EXCHANGE_COSTS["nccl"]
    assert plain["wire"]["exchange_ms"] == pytest.approx(plain["wire"]["exchange"] / nccl.gbps / 1e6)
    assert plain["wire"]["exchange_fixed_ms"] == pytest.approx(3 * 2 * sum(nccl.fixed_us) / 1e3)
    given = command(tmp_path, *words, "--exchange_gbps", "2", "--exchange_us", "1", "20", "300", "4000",
                    gradient_accumulation_steps=3)[1]  # fmt: skip
    assert given["wire"]["exchange_ms"] == pytest.approx(plain["wire"]["exchange"] / 2e6)
    assert given["wire"]["exchange_fixed_ms"] == pytest.approx(3 * 2 * 4.321)


def test_costs_of_other_settings_are_not_passed_off(tmp_path: Path) -> None:
    words = ["--shape", "64,32,16,8,2", "--gpus", "2", "--ep_size", "2", "--backend", "symm_mem"]
    few = {"flashfusemoe": {"symm_mem": {"num_sms": 24}}}
    costs = ["--exchange_gbps", "192", "--exchange_us", "180", "0", "128", "1"]
    (note,) = command(tmp_path, *words, **few)[0]["notes"]
    assert "symm_mem.num_sms is 24, and its exchange was measured with 64" in note
    assert command(tmp_path, *words, *costs, **few)[0]["notes"] == command(tmp_path, *words)[0]["notes"] == []


def test_text_says_what_does_not_fit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = write(tmp_path, bf16={"enabled": True}, zero_optimization={"stage": 1})
    words = ["--config", str(config), "--shape", "4096,2048,768,64,8", "--layers", "4", "--gpus", "8"]
    assert plan.main([*words, "--ep_size", "1", "8", "--memory", "6"]) == 0
    text = capsys.readouterr().out
    wire, fixed = (
        float(next(line for line in text.splitlines() if line.strip().startswith(label)).split()[-1])
        for label in ("dispatch and combine: wire", "with fixed costs (host and launches)")
    )
    assert fixed == pytest.approx(wire + 4 * sum(plan_numbers.EXCHANGE_COSTS["nccl"].fixed_us) / 1e3, abs=0.011)
    peak = next(line for line in text.splitlines() if line.strip().startswith("peak  "))
    one, eight = map(float, peak.split()[1:])
    assert one > 6 > eight
    assert f"ep_size 1, none, skew 1: {one:.1f} GiB do not fit in 6" in text and "fits: ep_size" in text
    assert plan.main([*words, "--memory", "0.1"]) == 0
    assert "no ep_size fits" in capsys.readouterr().out


SHAPE = ("--shape", "64,32,16,8,2", "--gpus", "4")


def advice(tmp_path: Path, *words: str) -> str:
    """The text's last line."""
    return plan.run(plan.parse_args(["--config", str(write(tmp_path)), *SHAPE, *words])).splitlines()[-1]


def test_advice_is_for_the_transport_that_does_not_fit(tmp_path: Path) -> None:
    both = ("--backend", "nccl", "symm_mem")
    nccl, symm_mem = (p["peak"] / GIB for p in command(tmp_path, *SHAPE, "--ep_size", "2", *both))
    assert nccl < symm_mem
    between = ("--memory", str((nccl + symm_mem) / 2))
    alone = command(tmp_path, *SHAPE, "--ep_size", "1")[0]["peak"] / GIB
    assert alone < symm_mem
    said = advice(tmp_path, "--ep_size", "2", *both, *between)
    assert "with symm_mem, at skew 1, fits: ep_size 1" in said
    # ep_size 1 has no transport: the first that was asked for, or one that does not fit either.
    little = ("--memory", str(min(alone, nccl) / 2))
    assert "with symm_mem, at skew 1, no ep_size fits" in advice(
        tmp_path, "--ep_size", "1", "--backend", "symm_mem", *little
    )
    plans = ("--ep_size", "1", "2", "--backend", "symm_mem", "nccl", "--skew", "1.5")
    assert "with symm_mem, at skew 1.5" in advice(tmp_path, *plans, *little)


def test_advice_says_which_ep_sizes_a_transport_refuses(tmp_path: Path) -> None:
    words = ("--shape", "64,32,16,128,2", "--gpus", "128", "--ep_size", "2", "--backend", "symm_mem")
    path = write(tmp_path)
    text = plan.run(plan.parse_args(["--config", str(path), *words, "--memory", "0.001"]))
    assert "no ep_size fits; refused: ep_size " in text
    assert f"128: ep_backend symm_mem: ep_size is {2 * MAX_RANKS}; at most {MAX_RANKS} GPUs" in text


FACTORY = "tests.test_plan_command:build_moe_layer"
OFFLOAD = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
FEW = {"flashfusemoe": {"symm_mem": {"max_tokens_per_rank": 32}}}


@pytest.mark.parametrize(
    ("words", "config", "said"),
    [
        (("--shape", "64,32,16", "--gpus", "4"), {}, "--shape is '64,32,16'; it must be five numbers"),
        (
            (*SHAPE, "--ep_size", "3"),
            {},
            "ep_size is 3; it must divide the 4 GPUs and every layer's experts. Valid: 1",
        ),
        ((*SHAPE, "--skew", "0.5"), {}, "--skew is 0.5"),
        ((*SHAPE, "--exchange_us", "1", "2", "3", "-4"), {}, "--exchange_us is 1.0 2.0 3.0 -4.0; all must be 0 or"),
        ((*SHAPE, "--layers", "0"), {}, "--layers is 0; it must be positive"),
        ((*SHAPE, "--tokens", "8"), {}, "--shape has its own T"),
        (SHAPE, {"optimizer": None}, '"optimizer"; name it: --optimizer'),
        (SHAPE, {"optimizer": {"type": "Lamb"}}, "the optimizer is 'Lamb'; plans know adam, adamw"),
        (
            SHAPE,
            {"gradient_accumulation_steps": "auto"},
            "gradient_accumulation_steps is 'auto'; a plan needs a whole number, at least 1",
        ),
        (SHAPE, {"gradient_accumulation_steps": float("inf")}, "gradient_accumulation_steps is inf; a plan needs"),
        (SHAPE, {"tensor_parallel": {"autotp_size": "auto"}}, "tensor_parallel.autotp_size is 'auto'; a plan needs"),
        (SHAPE, {"expert_parallel": {"enabled": "false"}}, "expert_parallel.enabled is 'false'; a plan needs true or"),
        (
            SHAPE,
            {"optimizer": {"type": "AdamW", "params": [1e-3]}},
            "optimizer.params is [0.001]; it must be a JSON object",
        ),
        (SHAPE, {"train_micro_batch_size_per_gpu": 0}, "train_micro_batch_size_per_gpu is 0; a plan needs"),
        (SHAPE, {"zero_optimization": {"stage": float("nan")}}, "zero_optimization.stage is nan; a plan needs"),
        (SHAPE, {"zero_optimization": {"reduce_bucket_size": 0.5}}, "reduce_bucket_size is 0.5; a plan needs"),
        (SHAPE, {"zero_optimization": {"stage": 4}}, "zero_optimization.stage is 4; valid: 0, 1, 2, 3"),
        (SHAPE, OFFLOAD, "zero_optimization.offload_optimizer: no formula"),
        (SHAPE, {"flashfusemoe": {"ep_backend": "nvlink"}}, 'flashfusemoe.ep_backend is "nvlink"'),
        ((*SHAPE, "--backend", "symm_mem"), FEW, "symm_mem.max_tokens_per_rank is 32, and there are 64 tokens"),
        (("--model", "nowhere", "--gpus", "4"), {}, "such a file, or package.module:factory"),
        (("--model", "tests.test_plan_command:absent", "--gpus", "4"), {}, "has no function 'absent'"),
        (("--model", FACTORY, "--gpus", "4", "--ep_size", "2"), {}, "MoELayers, which an engine does not"),
    ],
)
def test_mistakes_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], config: dict[str, Any], said: str
) -> None:
    path = write(tmp_path, **config)
    assert plan.main(["--config", str(path), *words]) == 1
    assert said in capsys.readouterr().err


def test_the_documented_command_runs(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "planning.md").read_text()
    (line,) = re.findall(r"^python -m flashfusemoe_ds.plan (.*?)\n```", text, re.MULTILINE | re.DOTALL)
    write(tmp_path)
    models.config("qwen3_moe").save_pretrained(tmp_path / "qwen3")
    words = [sys.executable, "-m", "flashfusemoe_ds.plan", *line.replace("\\\n", " ").split()]
    done = subprocess.run(words, capture_output=True, text=True, check=True, timeout=120, cwd=tmp_path,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    assert "kept by MoE layers" in done.stdout and done.stdout.count("ep_size 8") == 2
