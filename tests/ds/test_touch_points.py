# SPDX-License-Identifier: GPL-3.0-or-later
"""The installed DeepSpeed still has what this package replaces or relies on: docs/zero_and_checkpoints.md lists it."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import deepspeed
import pytest

ROOT = Path(__file__).parent.parent.parent
PAGE = ROOT / "docs" / "zero_and_checkpoints.md"
PACKAGE = ROOT / "flashfusemoe_ds"
_ROW = re.compile(r"^\| `((?:deepspeed|torch)[\w.]*)` \| (.+?) \| (.+?) \|$", re.MULTILINE)
# Files whose every attribute of an engine or of a DeepSpeed optimizer must be in the table.
GLUE = (
    "engine",
    "engine_overlap",
    "stage0_overlap",
    "zero_overlap",
    "grad_norm",
    "overflow_check",
    "unfused_step",
    "expert_load",
)
_ENGINE = "deepspeed.runtime.engine.DeepSpeedEngine"


def rows() -> list[tuple[str, str, str]]:
    """(touch point, what it must be, what we do with it)"""
    return [(name, expected.strip("`"), use) for name, expected, use in _ROW.findall(PAGE.read_text())]


def describe(name: str) -> str:
    """What a dotted name is now: the parameters of a function, the value of a constant, or its kind."""
    parts = name.split(".")
    for depth in range(len(parts), 0, -1):
        try:
            owner: Any = importlib.import_module(".".join(parts[:depth]))
        except ImportError:
            continue
        for i, part in enumerate(parts[depth:], depth):
            if not hasattr(owner, part):
                last = i == len(parts) - 1
                return "instance attribute" if last and _is_set_on_self(owner, part) else "missing"
            owner = inspect.getattr_static(owner, part) if inspect.isclass(owner) else getattr(owner, part)
        return _kind(owner)
    return "missing"


def _kind(value: Any) -> str:
    if isinstance(value, staticmethod | classmethod):
        value = value.__func__
    if isinstance(value, property):
        return "property"
    if inspect.isclass(value):
        return "class"
    if inspect.ismodule(value):
        return "module"
    if callable(value):
        try:
            return f"({', '.join(inspect.signature(value).parameters)})"
        except ValueError:
            return "builtin"
    return repr(value) if isinstance(value, str | int | float | type(None)) else type(value).__name__


def _is_set_on_self(owner: Any, attribute: str) -> bool:
    if not inspect.isclass(owner):
        return False
    for cls in owner.__mro__:
        if cls.__module__.startswith("deepspeed"):
            for node in ast.walk(ast.parse(inspect.getsource(inspect.getmodule(cls)))):
                if isinstance(node, ast.ClassDef) and node.name == cls.__name__ and _sets(node, attribute):
                    return True
    return False


def _sets(cls: ast.ClassDef, attribute: str) -> bool:
    """Whether a class assigns self.attribute, or self.__dict__["attribute"], which skips torch's __setattr__."""
    stores = [n for n in ast.walk(cls) if isinstance(getattr(n, "ctx", None), ast.Store)]
    return any(ast.unparse(n) in (f"self.{attribute}", f"self.__dict__['{attribute}']") for n in stores)


@pytest.mark.parametrize(("name", "expected", "use"), rows(), ids=[name for name, _, _ in rows()])
def test_the_installed_version_still_has_it(name: str, expected: str, use: str) -> None:
    now = describe(name)
    assert now == expected, (
        f"DeepSpeed {deepspeed.__version__}: {name} was {expected}, now it is {now}. What for: {use}. Read the new "
        f"source, mend our side, then the row in {PAGE.name}"
    )


def imported_from_deepspeed(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "deepspeed":
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def test_every_import_from_deepspeed_is_listed() -> None:
    listed = {name for name, _, _ in rows()}
    found = {name for path in PACKAGE.rglob("*.py") for name in imported_from_deepspeed(path)}
    assert len(found) > 20
    # A module counts as listed when names in it are.
    unlisted = {n for n in found if n not in listed and not any(other.startswith(f"{n}.") for other in listed)}
    assert unlisted == set(), "add rows to the table"


def attributes_of(path: Path, owners: set[str]) -> Iterator[str]:
    """Attributes taken of variables, or of attributes, with these names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Attribute):
            owner = node.value
            if (isinstance(owner, ast.Name) and owner.id in owners) or (
                isinstance(owner, ast.Attribute) and owner.attr in owners
            ):
                yield node.attr


@pytest.mark.parametrize("file", GLUE)
def test_every_attribute_of_the_engine_and_its_optimizer_is_listed(file: str) -> None:
    listed = {name.rpartition(".")[2] for name, _, _ in rows()}
    used = set(attributes_of(PACKAGE / "ds" / f"{file}.py", {"engine", "optimizer"}))
    ours = {name for name in used if name.startswith("_flashfusemoe")}
    assert used - listed - ours == set(), "add rows to the table"


@pytest.mark.parametrize(
    ("name", "description"),
    [
        (f"{_ENGINE}.no_sync", "(self)"),
        (f"{_ENGINE}.no_such_method", "missing"),
        (f"{_ENGINE}.inside_no_sync_ctxt", "instance attribute"),
        (f"{_ENGINE}.communication_data_type", "property"),
        ("deepspeed.no_such_module.f", "missing"),
        ("deepspeed.moe.layer.MoE", "class"),
    ],
)
def test_what_a_name_is_now(name: str, description: str) -> None:
    assert describe(name) == description
