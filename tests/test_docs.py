# SPDX-License-Identifier: GPL-3.0-or-later
"""README and docs/ say what is there: links resolve, snippets run, configs validate, generated pages are current."""

from __future__ import annotations

import hashlib
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
FOLDERS = sorted([*(ROOT / "examples").rglob("README.md"), *(ROOT / "ds_configs").glob("README.md")])
EVERY_PAGE = [*PAGES, *FOLDERS]
IMAGES = ROOT / "docs" / "images"
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")


def blocks(page: Path, language: str) -> list[str]:
    return [code for kind, code in _BLOCK.findall(page.read_text()) if kind == language]


def anchors(page: Path) -> set[str]:
    """GitHub's anchors of a page's headings; mkdocs.yml makes the same ones."""
    headings = re.findall(r"^#+ (.+)$", _BLOCK.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_config_reference_is_current() -> None:
    script = runpy.run_path(str(ROOT / "docs" / "generate_config.py"))
    assert (ROOT / "docs" / "config.md").read_text() == script["render"](), "run: python docs/generate_config.py"


@pytest.mark.parametrize("page", EVERY_PAGE, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_resolve(page: Path) -> None:
    for link in _LINK.findall(_BLOCK.sub("", page.read_text())):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{link}: no such file"
        assert target.is_relative_to(ROOT), f"{link}: outside the repository"
        # The site shows a folder by its README.md; without one, name a file.
        assert target.is_file() or (target / "README.md").is_file(), f"{link}: a folder without a page"
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
    root = ElementTree.parse(IMAGES / "dataflow.svg").getroot()
    texts = [element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}text")]
    files = {word.strip(",()") for text in texts for word in text.split() if word.endswith(".py")}
    assert len(files) > 8
    for file in files:
        assert (ROOT / "flashfusemoe_ds" / file).is_file(), file


def test_the_site_shows_every_page() -> None:
    listed = re.findall(r": (\w+\.md)$", (ROOT / "mkdocs.yml").read_text().split("\nnav:")[1], re.MULTILINE)
    assert sorted(listed) == sorted(["index.md", *(page.name for page in DOCS)])
    assert all(f"](docs/{page.name})" in (ROOT / "README.md").read_text() for page in DOCS)


def test_the_chart_shows_the_numbers_of_the_table() -> None:
    data = json.loads((IMAGES / "layer_times.json").read_text())
    table = (ROOT / "docs" / "kernels.md").read_text().split("### The layer")[1]
    for block in data["blocks"]:
        # Rows of a block follow the one that names the shape and its floor.
        start = re.search(rf"^\| {block['shape']}, floor {block['floor']:g}0* ms \|", table, re.MULTILINE)
        assert start, block
        rows = re.split(r"^\| \w+, floor ", table[start.end() :], flags=re.MULTILINE)[0]
        for name, ms in {"**ours**": block["ours"], **block["others"]}.items():
            assert re.search(rf" {re.escape(name)} \| [\d.]+ \| {ms:.3f} \|", rows), (block["shape"], name)
    assert all(command in table for command in data["commands"])
    digest = hashlib.sha256((IMAGES / "layer_times.json").read_bytes()).hexdigest()
    assert digest.encode() in (IMAGES / "layer_times.png").read_bytes(), "run: python docs/images/layer_times.py"


def matrix(page: Path) -> dict[str, list[str]]:
    """The rows of a page's tables with a column for each stack: what it is about -> the cells, ours first."""
    rows = [line.strip("| ").split(" | ") for line in page.read_text().splitlines() if line.startswith("| ")]
    return {row[0]: row[1:] for row in rows if len(row) == 12 and row[0] != ""}


def test_the_matrix_links_to_tests_and_the_short_form_agrees() -> None:
    whole, short = matrix(ROOT / "docs" / "features.md"), matrix(ROOT / "README.md")
    assert len(whole) > 40 and len(short) > 15
    for feature, (ours, *others) in whole.items():
        verdict, *tests = ours.split()
        assert verdict in ("yes", "part", "no") and set(others) <= {"yes", "part", "no", "?", "\N{EN DASH}"}, feature
        assert bool(tests) == (verdict != "no"), f"{feature}: a yes has a test, and a no has none"
        assert all(re.fullmatch(r"\[\d\]\(\.\./tests/(\w+/)*test_\w+\.py\)", test) for test in tests), feature
    for feature, cells in short.items():
        assert cells == [cell.replace("(../", "(") for cell in whole[feature]], feature
    assert {"yes", "part", "no"} <= {cells[0].split()[0] for cells in short.values()}
    assert f"and {len(whole) - len(short)} more rows" in (ROOT / "README.md").read_text()
