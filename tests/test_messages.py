# SPDX-License-Identifier: GPL-3.0-or-later
"""docs/troubleshooting.md has every message of the package, word for word, and none that the package has not."""

from __future__ import annotations

import ast
import functools
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "troubleshooting.md"
SOURCES = sorted((ROOT / "flashfusemoe_ds").rglob("*.py"))
# A plan's errors are about the command line that was just typed, and name the option and what it takes.
OF_A_PLAN = (
    "plan.py", "plan_config.py", "plan_numbers.py", "plan_text.py", "plan_model.py", "plan_trace.py", "planning.py",
    "meta_model.py",
)  # fmt: skip
# What stands for the parts of a message that are known only when it is raised.
HOLE = "\0"
# Raised at a programmer, who reads the traceback: a name that a module does not have, and Python's own protocol.
NOT_FOR_USERS = {"AttributeError", "AssertionError", "NotImplementedError", "StopIteration"}
# Not ours; the page says so.
OF_DEEPSPEED = ("Native DeepSpeed MoE is not supported with ZeRO Stage 3 ...",)


def parts(text: str) -> list[str]:
    """A documented message without its <placeholders> and the dots at its end."""
    return [part for part in re.split(r"<[^<>]*>|\.\.\.$", text) if part.strip()]


def says(template: str, message: list[str]) -> bool:
    """Whether the parts of a documented message stand in a message of the source, in this order."""
    at = 0
    for part in message:
        found = template.find(part.strip(), at)
        if found < 0:
            return False
        at = found + len(part.strip())
    return True


def documented() -> list[str]:
    """The code spans in the first column of the page's tables, as far as they are more than a name."""
    cells = [line.split(" | ")[0] for line in PAGE.read_text().splitlines() if line.startswith("| ")]
    return [span for cell in cells for span in re.findall(r"`([^`]+)`", cell) if " " in span]


@functools.cache
def constants() -> dict[tuple[str, str], str]:
    """Module-level names of strings, as (file or "", name)."""
    found = {}
    for path in SOURCES:
        for node in ast.parse(path.read_text()).body:
            match node:
                case ast.Assign(targets=[ast.Name(id=name)], value=ast.Constant(value=str(text))):
                    found[path.name, name] = found["", name] = text
    return found


def template(node: ast.AST, file: str) -> str:
    """A string expression with a HOLE for everything that only a run can tell."""
    if isinstance(node, ast.Constant):
        return node.value if isinstance(node.value, str) else HOLE
    if isinstance(node, ast.JoinedStr):
        return "".join(template(value, file) for value in node.values)
    if isinstance(node, ast.FormattedValue):
        return template(node.value, file)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return template(node.left, file) + template(node.right, file)
    if isinstance(node, ast.Name):
        known = constants()
        return known.get((file, node.id), known.get(("", node.id), HOLE))
    return HOLE


@functools.cache
def strings() -> tuple[str, ...]:
    """Every string expression of the package: what a message, or a reason within one, may be made of."""
    kinds = (ast.Constant, ast.JoinedStr, ast.BinOp)
    found = {
        template(node, path.name)
        for path in SOURCES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, kinds)
    }
    return tuple(text for text in found if text.strip(HOLE + " "))


def raised() -> Iterator[tuple[str, str]]:
    """Where, and with which words, the package raises or warns."""
    for path in SOURCES:
        if path.name in OF_A_PLAN:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                call = node.exc
                if ast.unparse(call.func) in NOT_FOR_USERS:
                    continue
            elif isinstance(node, ast.Call) and re.search(r"\.warn(ing)?(_once)?$", ast.unparse(node.func)):
                call = node
            else:
                continue
            words = template(call.args[0], path.name) if call.args else ""
            if len(words.replace(HOLE, "").strip()) > 3:  # else it is put together elsewhere: see `strings`
                yield f"{path.relative_to(ROOT)}:{node.lineno}", words


def test_documented_messages_are_in_the_source() -> None:
    unknown = [m for m in documented() if m not in OF_DEEPSPEED and not any(says(s, parts(m)) for s in strings())]
    assert not unknown, "not in the source; has the wording changed?\n" + "\n".join(unknown)


def test_every_message_is_documented() -> None:
    known = [parts(message) for message in documented()]
    missing = [
        f"{where}: {words.replace(HOLE, '<...>')}"
        for where, words in raised()
        # A short message, such as "<key> is <value>; valid: <values>", is part of many longer ones.
        if not any(says(words, m) and sum(map(len, m)) > 0.5 * len(words.replace(HOLE, "")) for m in known)
    ]
    assert not missing, "not in docs/troubleshooting.md:\n" + "\n".join(missing)
