# SPDX-License-Identifier: GPL-3.0-or-later
"""README and docs/ say what is there: links resolve, snippets run, configs validate, generated pages are current."""

from __future__ import annotations

import json
import re
import runpy
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from flashfusemoe_ds.config import FlashFuseMoEConfig
from tests.distributed import run_ranks

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
PAGES = [ROOT / "README.md", *DOCS]
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def blocks(page: Path, language: str) -> list[str]:
    return [code for kind, code in _BLOCK.findall(page.read_text()) if kind == language]


def anchors(page: Path) -> set[str]:
    """GitHub's anchors of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", _BLOCK.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_config_reference_is_current() -> None:
    script = runpy.run_path(str(ROOT / "docs" / "generate_config.py"))
    assert (ROOT / "docs" / "config.md").read_text() == script["render"](), "run: python docs/generate_config.py"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_relative_links_resolve(page: Path) -> None:
    for link in _LINK.findall(_BLOCK.sub("", page.read_text())):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link}: no such file"
        assert target.is_relative_to(ROOT), f"{link}: outside the repository"
        assert not anchor or anchor in anchors(target), f"{link}: no such heading"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_snippets_compile_and_configs_validate(page: Path) -> None:
    for code in blocks(page, "python"):
        compile(code, page.name, "exec")
    for text in blocks(page, "json"):
        FlashFuseMoEConfig.from_ds_config(json.loads(text))


def _run_snippets(rank: int, world_size: int) -> int:
    snippets = [(page.name, code) for page in DOCS for code in blocks(page, "python")]
    for name, code in snippets:
        exec(compile(code, name, "exec"), {"__name__": "__main__"})
    return len(snippets)


@pytest.mark.slow
def test_snippets_of_docs_run() -> None:
    (count,) = run_ranks(1, _run_snippets)
    assert count >= 8


def test_getting_started_has_two_commands() -> None:
    started = (ROOT / "README.md").read_text().split("## Getting started")[1].split("\n## ")[0]
    commands = [line for kind, code in _BLOCK.findall(started) for line in code.splitlines() if line.strip()]
    assert commands == ["make train", "make test"]
    targets = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{command.split()[1]}:", targets, re.MULTILINE) for command in commands)


def test_the_picture_is_valid_and_names_existing_files() -> None:
    root = ElementTree.parse(ROOT / "docs" / "images" / "dataflow.svg").getroot()
    texts = [element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}text")]
    files = {word.strip(",()") for text in texts for word in text.split() if word.endswith(".py")}
    assert len(files) > 8
    for file in files:
        assert (ROOT / "flashfusemoe_ds" / file).is_file(), file
