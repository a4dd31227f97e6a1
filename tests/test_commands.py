# SPDX-License-Identifier: GPL-3.0-or-later
"""Every command of the documentation is run: by a test, by CI, or by whoever measured with it on GPUs.

Commands are the lines of fenced blocks in sh or bash, and code spans that begin with a program. Four kinds:

- RUN says which test or CI step runs a command, and a piece of text by which to find it there.
- A block whose first line begins with "# on GPUs" holds commands with which something was measured, or is to be. A
  test names each script in it, to run it at toy size, and the script takes the options that the page gives it.
- Pages of examples: EXAMPLES_TEST runs their commands, and names every script that they start.
- `pip install "flashfusemoe_ds[extra]"` names an extra of setup.py.
"""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.test_docs import EVERY_PAGE, ROOT

_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```", re.MULTILINE | re.DOTALL)
_PROGRAM = re.compile(r"(make|pip) .+|(python|torchrun|deepspeed|accelerate) .*(\.py|-m ).*")
ON_GPUS = "# on GPUs"
CI = ".ci/run"
CONVERT = ("tests/ds/test_convert.py", r"^python -m flashfusemoe_ds.convert_checkpoint")
EXAMPLES_TEST = "tests/examples/test_examples.py"
LAUNCHED = ("tests/examples/test_train_lm.py", "deepspeed.launcher.runner")
TRAINER = "deepspeed --num_gpus 2 train.py --deepspeed ds_configs/trainer_zero2.json --output_dir out --max_steps 20"

RUN = {
    "make setup": ("Makefile", "test: lint"),
    "make train": (CI, "make train"),
    "make test": (CI, "test </dev/null"),
    "make docs": (CI, "make docs"),
    'pip install -e ".[dev]"': ("setup_env.sh", '-e ".[dev]"'),
    "python -m flashfusemoe_ds.plan --config ds.json --model qwen3/config.json --gpus 8 --ep_size 1 8 "
    "--sequence_length 4096 --skew 1 1.5 --memory 140": ("tests/test_plan_command.py", '"-m", "flashfusemoe_ds.plan"'),
    "python -m flashfusemoe_ds.report": ("tests/test_report.py", '"-m", "flashfusemoe_ds.report"'),
    "python -m flashfusemoe_ds.plot_load runs/a --out load.png": ("tests/test_plot_load.py", '"--out"'),
    "python -m flashfusemoe_ds.convert_checkpoint": CONVERT,
    "python -m flashfusemoe_ds.convert_checkpoint runs/stock runs/fused --to stacked --ep-size 2 "
    "--model train:build_model": CONVERT,
    "python -m flashfusemoe_ds.convert_checkpoint runs/fused runs/stock_again --to per_expert --ep-size 4": CONVERT,
    "deepspeed --num_gpus 2 script.py": LAUNCHED,
    "deepspeed examples/train_lm.py --deepspeed_config ds_configs/<file>": LAUNCHED,
    "deepspeed --num_gpus 2 examples/train_lm.py --deepspeed_config ds_configs/cpu_zero1.json": LAUNCHED,
    "deepspeed --num_gpus 2 examples/train_lm.py --deepspeed_config ds_configs/cpu_zero1.json --resume": LAUNCHED,
    TRAINER: ("tests/hf/test_trainer.py", 'f"{on_gpus} --use_cpu"'),
    f"{TRAINER} --use_cpu": ("tests/hf/test_trainer.py", "*on_cpus.split()[1:]"),
    "torchrun --nproc_per_node 2 examples/benchmarks/seed_lm.py --size toy --batch 2 --compile_backend aot_eager": (
        "tests/examples/test_seed_lm.py",
        'torchrun("seed_lm.py", *TOY',
    ),
    "torchrun --nproc_per_node 2 examples/benchmarks/backend_curves.py --curves nccl ep1 --steps 20 --batch 2 "
    "--context 32": ("tests/examples/test_seed_lm.py", '"backend_curves"'),
    "python examples/benchmarks/layer.py --merge runs/a/layer.json runs/b/layer.json --out runs/both": (
        "tests/examples/test_layer_benchmark.py",
        '"--merge"',
    ),
}

# Needs CUDA from its first line on: its options are all that a CPU can check.
NOT_ON_CPUS = ("examples/benchmarks/transport.py",)


class Command(NamedTuple):
    page: str
    line: str
    on_gpus: bool


def commands() -> Iterator[Command]:
    for page in EVERY_PAGE:
        text, name = page.read_text(), str(page.relative_to(ROOT))
        for language, code in _FENCE.findall(text):
            if language not in ("sh", "bash"):
                continue
            for line in code.replace("\\\n", " ").splitlines():
                line = " ".join(re.sub(r"(^|\s)#.*", "", line).split())
                if line:
                    yield Command(name, line, code.startswith(ON_GPUS))
        for span in re.findall(r"`([^`\n]+)`", _FENCE.sub("", text)):
            if _PROGRAM.fullmatch(span):
                yield Command(name, span, on_gpus=False)


@functools.cache
def texts_of_tests() -> tuple[str, ...]:
    """The text of every test file that may run an example or a benchmark."""
    return tuple(path.read_text() for path in (ROOT / "tests").rglob("test_*.py") if path != Path(__file__))


def complaint(command: Command) -> str | None:
    """Why the command is not known to run; None if it is."""
    extras = re.fullmatch(r'pip install "flashfusemoe_ds\[(\w+)\]"', command.line)
    if extras:
        return None if f'"{extras[1]}":' in (ROOT / "setup.py").read_text() else "no such extra in setup.py"
    words = shlex.split(command.line)
    scripts = [word for word in words if word.endswith(".py")]
    if command.line in RUN:
        return None
    if command.page.startswith("examples/") and not command.page.startswith("examples/benchmarks/"):
        name = Path(scripts[0] if scripts else command.page)
        key = name.stem if name.parent.name == "examples" else name.parent.name
        return None if key in (ROOT / EXAMPLES_TEST).read_text() else f"{EXAMPLES_TEST} does not know {key}"
    if not command.on_gpus:
        return "no test is known to run it: add one, and name it in RUN"
    if not scripts:
        return None if words[:2] == ["pip", "install"] else "no script of the repository in it"
    name = re.compile(rf"\b{Path(scripts[0]).stem}\b")
    if scripts[0] not in NOT_ON_CPUS and not any(name.search(test) for test in texts_of_tests()):
        return "no test runs its script at toy size"
    after = words[words.index(scripts[0]) :]
    sources = "".join(path.read_text() for path in (ROOT / scripts[0]).parent.glob("*.py"))
    unknown = [word for word in after if word.startswith("--") and f'"{word}"' not in sources]
    return f"no such options: {' '.join(unknown)}" if unknown else None


def test_every_command_is_run() -> None:
    found = list(commands())
    assert len(found) > 40
    wrong = {f"{command.page}: {command.line}": why for command in found if (why := complaint(command))}
    assert not wrong, "\n".join(f"{command}\n    {why}" for command, why in wrong.items())


def test_what_runs_them_is_there() -> None:
    for what, (file, text) in RUN.items():
        assert text in (ROOT / file).read_text(), f"{file} no longer runs `{what}`"


def test_nothing_is_listed_that_no_page_shows() -> None:
    shown = {command.line for command in commands()}
    assert set(RUN) <= shown, set(RUN) - shown
