# SPDX-License-Identifier: GPL-3.0-or-later
"""The benchmarks' modules, which are scripts of one folder and import each other by their plain names."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest

from tests.examples.scripts import BENCHMARKS


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


@pytest.fixture
def refusal(
    load: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    """What a script, as the only process, says to arguments that it refuses."""

    def said(script: str, *arguments: str) -> str:
        monkeypatch.setenv("WORLD_SIZE", "1")
        with pytest.raises(SystemExit) as stopped:
            load(script).parse_args(list(arguments))
        assert stopped.value.code == 2
        return capsys.readouterr().err

    return said
