# SPDX-License-Identifier: GPL-3.0-or-later
"""Trainer and Accelerate over DeepSpeed on two ranks: the scripts of docs/transformers.md, and equal losses."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tests.distributed import run_ranks
from tests.test_docs import ROOT, blocks

transformers = pytest.importorskip("transformers", minversion="5.7")
pytest.importorskip("accelerate")

PAGE = ROOT / "docs" / "transformers.md"
ZERO2, AUTOEP = (str(ROOT / "ds_configs" / f"trainer_zero2{end}.json") for end in ("", "_autoep"))
TRAINING = ["--max_steps", "20", "--logging_steps", "1", "--report_to", "none", "--save_strategy", "no"]
# eps: see tests/ds/tiny.py. The default rate is for pretrained models.
OPTIMIZER = ["--learning_rate", "1e-2", "--adam_epsilon", "1e-3", "--per_device_train_batch_size", "2"]

pytestmark = pytest.mark.slow


def page(part: str) -> str:
    """The page's block that has this in it."""
    (code,) = (code for code in blocks(PAGE, "py") if part in code)
    return code


def losses(trainer: Any) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def run_script(code: str, folder: str, ds_config: str) -> Any:
    """train.py with these arguments; its trainer."""
    sys.argv = ["train.py", "--output_dir", folder, "--deepspeed", ds_config, "--use_cpu", *TRAINING, *OPTIMIZER]
    script = ModuleType("__main__")
    exec(compile(code, "train.py", "exec"), vars(script))
    return script.trainer


def run_stage3(folder: str, implementation: str, checkpointing: bool) -> list[float]:
    """Four steps of GPT-OSS, whose parameters lie transposed and have biases, partitioned by ZeRO-3."""
    from tests.hf.models import build, rows

    model = build("gpt_oss", implementation)
    ds_config = {
        "train_micro_batch_size_per_gpu": 2,
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    arguments = transformers.TrainingArguments(
        folder,
        deepspeed=ds_config,
        use_cpu=True,
        max_steps=4,
        logging_steps=1,
        report_to="none",
        save_strategy="no",
        learning_rate=1e-2,
        adam_epsilon=1e-3,
        per_device_train_batch_size=2,
        gradient_checkpointing=checkpointing,
    )
    trainer = transformers.Trainer(model, arguments, train_dataset=rows())
    trainer.train()
    assert trainer.model_wrapped.zero_optimization_stage() == 3
    return losses(trainer)


def run_accelerate(implementation: str) -> list[float]:
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import DeepSpeedPlugin

    from tests.hf.models import build, rows

    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(hf_ds_config=ZERO2))
    model = build("qwen3_moe", implementation)
    model, optimizer, loader = accelerator.prepare(
        model, torch.optim.AdamW(model.parameters(), lr=1e-2, eps=1e-3), torch.utils.data.DataLoader(rows(), 2)
    )
    result = []
    for inputs in loader:
        loss = model(**inputs).loss
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        result.append(loss.item())
    return result


def _runs(rank: int, world_size: int, folder: str) -> dict[str, Any]:
    import flashfusemoe_ds as ffmoe

    ffmoe.register_experts_implementation()
    script, attach = page("trainer.train()"), page("TrainerCallback")
    result: dict[str, Any] = {}

    trainer = run_script(script, folder, ZERO2)
    trainer.save_model(f"{folder}/saved")
    result["ours"] = losses(trainer)
    result["stage"] = trainer.model_wrapped.zero_optimization_stage()
    inputs = {"input_ids": torch.arange(24).view(2, 12)}
    with torch.no_grad():
        result["logits"] = trainer.model.eval()(**inputs).logits.numpy()

    result["eager"] = losses(run_script(script.replace('="flashfusemoe"', '="eager"'), folder, ZERO2))

    trainer = run_script(script.replace("trainer.train()", f"{attach}\ntrainer.train()"), folder, AUTOEP)
    result["autoep"] = losses(trainer)
    result["layers"] = [type(layer.mlp).__name__ for layer in trainer.model.model.layers]

    for implementation in ("eager", "flashfusemoe"):
        result[f"accelerate {implementation}"] = run_accelerate(implementation)
        result[f"stage 3 {implementation}"] = run_stage3(folder, implementation, implementation == "flashfusemoe")
    return result


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("trainer")


@pytest.fixture(scope="module")
def runs(folder: Path) -> dict[str, Any]:
    results = run_ranks(2, _runs, str(folder))
    return results[0]


def assert_equal(actual: list[float], expected: list[float]) -> None:
    assert expected[-1] < expected[0] - 0.5, "nothing was learned, so that equal losses would say little"
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)


def test_twenty_steps_equal_eager(runs: dict[str, Any]) -> None:
    assert len(runs["ours"]) == 20 and runs["stage"] == 2
    assert_equal(runs["ours"], runs["eager"])


def test_experts_over_two_ranks(runs: dict[str, Any]) -> None:
    assert set(runs["layers"]) == {"FusedAutoEPMoELayer"}
    assert_equal(runs["autoep"], runs["eager"])


def test_accelerate_and_stage_3_equal_eager(runs: dict[str, Any]) -> None:
    for way in ("accelerate", "stage 3"):
        assert_equal(runs[f"{way} flashfusemoe"], runs[f"{way} eager"])


def test_what_was_saved_is_plain(runs: dict[str, Any], folder: Path) -> None:
    plain = transformers.AutoModelForCausalLM.from_pretrained(folder / "saved", experts_implementation="eager")
    with torch.no_grad():
        logits = plain.eval()(input_ids=torch.arange(24).view(2, 12)).logits
    torch.testing.assert_close(logits, torch.from_numpy(runs["logits"]), rtol=1e-5, atol=1e-5)


def test_the_command_of_the_page(tmp_path: Path) -> None:
    on_gpus, on_cpus = (line for line in "".join(blocks(PAGE, "bash")).splitlines() if line.startswith("deepspeed"))
    assert on_cpus == f"{on_gpus} --use_cpu"
    (tmp_path / "train.py").write_text(page("trainer.train()"))
    (tmp_path / "ds_configs").symlink_to(ROOT / "ds_configs")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    launch = [sys.executable, "-m", "deepspeed.launcher.runner", "--master_port", port, *on_cpus.split()[1:]]
    python_path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    run = subprocess.run(
        launch, cwd=tmp_path, env={**os.environ, "DS_ACCELERATOR": "cpu", "PYTHONPATH": python_path}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, timeout=240,
    )  # fmt: skip
    assert run.returncode == 0, run.stdout
    state = json.loads((tmp_path / "out" / "checkpoint-20" / "trainer_state.json").read_text())
    assert state["global_step"] == 20
    # 20 steps of 8 rows on each of two ranks are all 320 rows; half of them, if both ranks read the same ones.
    assert state["train_batch_size"] == 8 and state["epoch"] == 1
