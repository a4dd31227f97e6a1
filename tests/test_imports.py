# SPDX-License-Identifier: GPL-3.0-or-later
"""The direction of imports, read off the syntax trees: L0 <- L1 <- L2 <- L3 <- {ds, hf} <- report."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "flashfusemoe_ds"
LEVELS = {
    "config": 0,
    "types": 0,
    "kernels": 1,
    "dispatch": 2,
    "nn": 3,
    "planning": 3,
    "ds": 4,
    "hf": 4,
    "plan_config": 4,
    "plan_trace": 4,
    "report": 5,
    "convert_checkpoint": 5,
    "plot_load": 5,
    "plan_model": 5,
    "plan_numbers": 6,
    "plan_text": 7,
    "plan": 8,
    "__init__": 9,
}
# Third parties that may appear only in some places.
ONLY_IN = {
    "triton": ("kernels/", "dispatch/symm_mem.py"),
    "deep_ep": ("dispatch/deep_ep.py",),
    "transformers": ("hf/", "ds/autoep.py"),
    "deepspeed": ("ds/",),
}


def imports(path: Path) -> Iterator[str]:
    """Dotted names of every import in a file, wherever it stands."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide the direction"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def violations(root: Path) -> list[str]:
    found = []
    for path in sorted(root.rglob("*.py")):
        place = path.relative_to(root).as_posix()
        mine = place.split("/")[0].removesuffix(".py")
        for name in imports(path):
            top, *rest = name.split(".")
            if top == "flashfusemoe_ds" and rest:
                theirs = rest[0] if rest[0] in LEVELS else "__init__"
                if theirs != mine and LEVELS[theirs] >= LEVELS[mine]:
                    found.append(f"{place} imports {name}: L{LEVELS[theirs]} from L{LEVELS[mine]}")
            elif top in ONLY_IN and not place.startswith(ONLY_IN[top]):
                found.append(f"{place} imports {top}, which belongs in {' and '.join(ONLY_IN[top])}")
    return found


def test_imports_go_one_way() -> None:
    assert violations(PACKAGE) == []


@pytest.mark.parametrize(
    ("place", "line", "complaint"),
    [
        ("kernels/x.py", "from flashfusemoe_ds.nn.router import route", "L3 from L1"),
        ("nn/x.py", "import deepspeed", "belongs in ds/"),
        ("ds/x.py", "from flashfusemoe_ds.hf.convert import y", "L4 from L4"),
        ("dispatch/nccl.py", "def f():\n    import triton.language", "belongs in kernels/"),
    ],
)
def test_the_contract_notices(tmp_path: Path, place: str, line: str, complaint: str) -> None:
    (tmp_path / place).parent.mkdir()
    (tmp_path / place).write_text(line)
    assert any(complaint in v for v in violations(tmp_path))


def test_importing_the_package_imports_neither_torch_nor_deepspeed() -> None:
    code = "import sys, flashfusemoe_ds; print([m for m in ('torch', 'deepspeed', 'triton') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=PACKAGE.parent, check=True)
    assert run.stdout.strip() == "[]"
