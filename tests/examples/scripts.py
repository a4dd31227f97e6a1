# SPDX-License-Identifier: GPL-3.0-or-later
"""The benchmarks' scripts: where they are, what a rank runs of them, and what a table of theirs says."""

from __future__ import annotations

import contextlib
import importlib
import io
import sys
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).parents[2]
BENCHMARKS = ROOT / "examples" / "benchmarks"


def run_main(rank: int, world_size: int, script: str, *arguments: str | Path) -> tuple[int, str]:
    """A script's main() on a rank of run_ranks: what it returns and prints."""
    sys.path.insert(0, str(BENCHMARKS))
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        code = importlib.import_module(script).main(list(map(str, arguments)))
    return code, printed.getvalue()


def cells(lines: Iterable[str]) -> list[list[str]]:
    """Of the lines of a Markdown table."""
    return [[cell.strip(" *") for cell in line.split("|")[1:-1]] for line in lines]
