# SPDX-License-Identifier: GPL-3.0-or-later
"""The benchmarks' modules, which are scripts of one folder and import each other by their plain names."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

BENCHMARKS = Path(__file__).parents[2] / "examples" / "benchmarks"


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Imports a module of the benchmarks by its plain name, as when it runs as a script; forgets it afterwards."""
    own = {path.stem for path in BENCHMARKS.glob("*.py")}
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = {name: sys.modules.pop(name) for name in own & sys.modules.keys()}
    yield importlib.import_module
    for name in own & sys.modules.keys():
        del sys.modules[name]
    sys.modules.update(before)
