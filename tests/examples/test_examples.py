# SPDX-License-Identifier: GPL-3.0-or-later
"""The examples, by the commands of their pages: they run on CPUs, and print what the pages say that they print.

A script runs in forked processes, with the environment and the arguments that its launcher would give it: that saves
each of them seconds of imports. torchrun itself runs here once, the deepspeed launcher in test_train_lm.py.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import runpy
import shlex
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from tests import test_docs
from tests.distributed import run_ranks

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
PAGES = [EXAMPLES / "README.md", *sorted(EXAMPLES.glob("*/README.md")), ROOT / "ds_configs" / "README.md"]
# Rounding differs between machines and grows from step to step; a change of model, data or training is far larger.
TOLERANCE = 0.02
_NUMBER = re.compile(r"\d+\.\d+(?:e[+-]?\d+)?")


# --- commands and outputs of a page --------------------------------------------------------------------------------


def commands(page: str, folder: Path) -> list[list[str]]:
    """The page's commands, word by word, with `folder` in place of runs/."""
    text = "".join(test_docs.blocks(EXAMPLES / page, "sh")).replace("\\\n", " ")
    return [shlex.split(line.replace("runs/", f"{folder}/")) for line in text.splitlines()]


def shown(page: str) -> list[str]:
    """The lines that the page says are printed, those left out aside."""
    return [line for block in test_docs.blocks(EXAMPLES / page, "") for line in block.splitlines() if line != "..."]


def assert_prints(output: str, lines: Sequence[str]) -> None:
    """Each of these lines is there, in this order, numbers with a decimal point to TOLERANCE."""
    assert lines
    printed: Iterator[str] = iter(output.splitlines())
    for line in lines:
        assert any(_same(line, candidate) for candidate in printed), f"missing, or not in this place: {line}\n{output}"


def _same(line: str, candidate: str) -> bool:
    if _NUMBER.sub("#", line).split() != _NUMBER.sub("#", candidate).split():
        return False
    pairs = zip(_NUMBER.findall(line), _NUMBER.findall(candidate), strict=True)
    return all(abs(float(a) - float(b)) <= TOLERANCE for a, b in pairs)


def losses(output: str) -> list[float]:
    return [float(loss) for loss in re.findall(r"\bloss\W+(\d+\.\d+)", output)]


# --- running them --------------------------------------------------------------------------------------------------


def launch(*commands: Sequence[str]) -> str:
    """What rank 0 prints when these commands run one after another, in forked processes."""
    worlds, scripts = zip(*map(_without_launcher, commands), strict=True)
    assert len(set(worlds)) == 1
    return run_ranks(worlds[0] or 1, _script, scripts, [_free_port() for _ in scripts], worlds[0] == 0, init=False)[0]


def _without_launcher(command: Sequence[str]) -> tuple[int, list[str]]:
    """The number of processes, 0 for a script without a launcher; and the script with its arguments."""
    if command[0] == "python":
        return 0, list(command[1:])
    if command[0] == "torchrun":
        return int(command[1].removeprefix("--nproc_per_node=")), list(command[2:])
    assert command[:2] == ["deepspeed", "--num_gpus"], command
    script, *arguments = command[3:]
    return int(command[2]), [script, "--local_rank=LOCAL_RANK", *arguments]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _script(rank: int, world_size: int, scripts: Sequence[list[str]], ports: list[int], alone: bool) -> str:
    from deepspeed.utils import logger

    os.chdir(ROOT)
    if alone:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "LOCAL_WORLD_SIZE"):
            del os.environ[name]
    output = io.StringIO()
    for handler in logger.handlers:
        handler.setLevel(logging.NOTSET)
        handler.setStream(output)
    for arguments, port in zip(scripts, ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        sys.argv = [argument.replace("LOCAL_RANK", str(rank)) for argument in arguments]
        sys.path.insert(0, str((ROOT / sys.argv[0]).parent))
        with contextlib.redirect_stdout(output):
            runpy.run_path(sys.argv[0], run_name="__main__")
    return output.getvalue()


def torchrun(command: Sequence[str]) -> str:
    """What the command prints, with torchrun itself."""
    python_path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", *command[1:]],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": python_path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    return done.stdout


# --- the pages -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.parent.name)
def test_pages(page: Path) -> None:
    test_docs.test_relative_links_resolve(page)
    test_docs.test_snippets_compile_and_configs_validate(page)
    if page.parent.parent == EXAMPLES and page.parent.name != "benchmarks":
        code = "".join(
            re.sub(r"\s+", "", path.read_text()) for path in [*page.parent.glob("*.py"), *EXAMPLES.glob("*.py")]
        )
        for block in test_docs.blocks(page, "py"):
            for line in block.splitlines():
                assert re.sub(r"\s+", "", line).rstrip(",") in code, f"{line}: not in the code"


def test_every_example_is_in_the_index() -> None:
    index = (EXAMPLES / "README.md").read_text()
    for page in EXAMPLES.glob("*/README.md"):
        assert f"({page.parent.name}/README.md)" in index
        folder = page.parent
        if (folder / "train.py").exists():
            command = commands(f"{folder.name}/README.md", Path("runs"))[0]
            assert folder.name == "resume_other_ep_size" or f"`{' '.join(command)}`" in index


# --- the examples --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_swap_layer(tmp_path: Path) -> None:
    (command,) = commands("swap_layer/README.md", tmp_path)
    output = launch(command)
    assert_prints(output, shown("swap_layer/README.md"))
    rows = [[float(loss) for loss in line.split()[1:]] for line in output.splitlines() if re.match(r" *\d+ ", line)]
    assert len(rows) == 20
    for stock, imported, replaced in rows:
        assert abs(imported - stock) < 2e-4 and abs(replaced - stock) < 2e-4


@pytest.mark.slow
def test_custom_expert(tmp_path: Path) -> None:
    (command,) = commands("custom_expert/README.md", tmp_path)
    output = launch(command)
    warnings = [line for line in shown("custom_expert/README.md") if line.startswith("experts of class")]
    assert_prints(output, [line for line in shown("custom_expert/README.md") if line not in warnings])
    assert len(warnings) == 2 and all(output.count(warning) == 1 for warning in warnings)
    (_, packed), (_, clamped), (_, normed) = re.findall(r"loss ([\d.]+) at step 1, ([\d.]+) at", output)
    assert abs(float(clamped) - float(packed)) < 2e-4 and float(normed) < 4.5


@pytest.mark.slow
def test_resume_other_ep_size(tmp_path: Path) -> None:
    train, *rest, weights_only = commands("resume_other_ep_size/README.md", tmp_path)
    output = launch(train)
    from flashfusemoe_ds.convert_checkpoint import main

    for convert, resume in zip(rest[::2], rest[1::2], strict=True):
        assert convert[:3] == ["python", "-m", "flashfusemoe_ds.convert_checkpoint"]
        assert main(convert[3:]) == 0
        output += launch(resume)
    assert_prints(output, shown("resume_other_ep_size/README.md"))
    whole, ep4, ep1 = (dict(re.findall(rf"ep_size {n} +step +(\d+) +loss ([\d.]+)", output)) for n in (2, 4, 1))
    assert len(whole) == 20 and set(ep4) == set(ep1) == {str(step) for step in range(11, 21)}
    for step in ep4:
        for resumed in (ep4, ep1):
            assert abs(float(resumed[step]) - float(whole[step])) < 2e-4

    afresh = losses(launch(weights_only))
    assert abs(afresh[0] - float(whole["11"])) < 2e-4, "the weights are those of the checkpoint"
    assert afresh[-1] < afresh[0] - 0.3 and abs(afresh[-1] - float(whole["20"])) > 2e-4


@pytest.mark.slow
def test_finetune_qwen3_moe(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", minversion="5.7")
    pytest.importorskip("accelerate")
    tiny, real, autoep = commands("finetune_qwen3_moe/README.md", tmp_path)
    folder = tmp_path / "saved"
    output = launch([*tiny, "--output_dir", str(folder), "--disable_tqdm", "true"])
    assert_prints(output, shown("finetune_qwen3_moe/README.md"))
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    assert type(model).__name__ == "Qwen3MoeForCausalLM"

    # What was just saved stands for real weights; it needs a tokenizer.
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = {character: i for i, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    own = {"models/Qwen3-30B-A3B": str(folder), "my_texts": str(ROOT / "LICENSE")}
    toy = ["--disable_tqdm", "true", "--output_dir", str(tmp_path / "again")]
    output = launch(
        [*(own.get(word, word) for word in real), *toy, "--max_steps", "10", "--learning_rate", "3e-3"],
        [*autoep, *toy, "--max_steps", "10"],
    )
    for first, last in (losses(output)[:2], losses(output)[2:]):
        assert last < first - 0.3


@pytest.mark.slow
def test_full_integration(tmp_path: Path) -> None:
    alone, compiled, spread, replicated, engine = commands("README.md", tmp_path)
    assert_prints(torchrun(spread), shown("README.md"))

    toy = ["--steps", "5", "--log_every", "1"]
    one = losses(launch([*alone, *toy], [*compiled, *toy, "--compile_backend", "aot_eager"]))
    two = losses(launch([*replicated, *toy], [*spread, *toy]))
    at_2 = losses(launch([*engine, *toy]))
    engine[engine.index("--ep_size") + 1] = "1"
    at_1 = losses(launch([*engine, *toy]))
    for first, second in ((one[:5], one[5:]), (two[:5], two[5:]), (at_1, at_2)):
        assert len(first) == 5 and first[-1] < first[0] - 0.5
        assert second == pytest.approx(first, abs=2e-4)


@pytest.mark.slow
def test_muon_and_adamw(tmp_path: Path) -> None:
    (command,) = commands("muon_and_adamw/README.md", tmp_path)
    assert_prints(launch(command), shown("muon_and_adamw/README.md"))
