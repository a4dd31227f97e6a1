# SPDX-License-Identifier: GPL-3.0-or-later
"""Hooks of the documentation site (mkdocs.yml): what links to files of the repository on GitHub does so on the site.

Pages link to each other, to sources and to tests by relative paths. The site's home is the repository's README.md, and
a file outside docs/ that a page links to becomes a page under repository/: Markdown as it is, sources highlighted. So
the site needs no address of a repository, and a strict build checks every link.
"""

from __future__ import annotations

import os
import re
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
HOME = "README.md"
ELSEWHERE = "repository/"
PICTURES = (".png", ".svg")
LANGUAGES = {".py": "python", ".json": "json", ".sh": "bash", ".yml": "yaml", ".toml": "toml"}

# A fenced block, in which nothing is a link, or the target of a link.
_FENCE_OR_LINK = re.compile(
    r"(?P<fence>^(?P<ticks>```+).*?^(?P=ticks)$)|(?<=\]\()(?P<target>[^)\s]+)(?=\))", re.M | re.S
)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds the home page and every file outside docs/ that can be reached by links."""
    waiting = [HOME, *(repository_path(file.src_uri) for file in files.documentation_pages())]
    seen = set(waiting)
    files.append(File.generated(config, site_uri(HOME), content=(ROOT / HOME).read_text()))
    while waiting:
        path = waiting.pop()
        for target in _targets(path):
            if target in seen or not (ROOT / target).is_file():
                continue  # mkdocs reports what does not exist
            seen.add(target)
            if files.get_file_from_path(site_uri(target)) is None:
                files.append(_generated(target, config))
            waiting.append(target)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turns links between files of the repository into links between pages of the site."""
    here = repository_path(page.file.src_uri)
    if not here.endswith(".md"):
        return markdown  # a source: its text is no Markdown

    def to_page(match: re.Match[str]) -> str:
        target = match["target"]
        if target is None or re.match(r"[a-z]+:|#", target):
            return match[0]
        path, hash_, anchor = target.partition("#")
        base = PurePosixPath(page.file.src_uri).parent
        return os.path.relpath(site_uri(resolve(here, path)), base) + hash_ + anchor

    return _FENCE_OR_LINK.sub(to_page, markdown)


def site_uri(path: str) -> str:
    """Where the site's source of a file lies, relative to docs/; the inverse of `repository_path`."""
    if path == HOME:
        return "index.md"
    if path.startswith("docs/") and path.endswith((".md", *PICTURES)):
        return path.removeprefix("docs/")
    return ELSEWHERE + (path if path.endswith((".md", *PICTURES)) else path + ".md")


def repository_path(uri: str) -> str:
    """The file of the repository that a source of the site is made from."""
    if uri == "index.md":
        return HOME
    if not uri.startswith(ELSEWHERE):
        return "docs/" + uri
    path = uri.removeprefix(ELSEWHERE)
    return path if (ROOT / path).exists() else path.removesuffix(".md")


def resolve(page: str, link: str) -> str:
    """A link of a page, as a path from the repository's root; a folder stands for its README.md."""
    path = os.path.normpath(os.path.join(os.path.dirname(page), link))
    return f"{path}/README.md" if (ROOT / path).is_dir() else path


def _targets(path: str) -> list[str]:
    if not path.endswith(".md"):
        return []
    targets = [match["target"] for match in _FENCE_OR_LINK.finditer((ROOT / path).read_text())]
    relative = [target.partition("#")[0] for target in targets if target and not re.match(r"[a-z]+:|#", target)]
    return [resolve(path, target) for target in relative]


def _generated(path: str, config: MkDocsConfig) -> File:
    uri, file = site_uri(path), ROOT / path
    if path.endswith(PICTURES):
        return File.generated(config, uri, content=file.read_bytes())
    if path.endswith(".md"):
        return File.generated(config, uri, content=file.read_text())
    language = LANGUAGES.get(file.suffix, "text")
    source = f"``````{language}\n{file.read_text()}\n``````\n"
    return File.generated(config, uri, content=f"---\nsearch:\n  exclude: true\n---\n\n# {path}\n\n{source}")
