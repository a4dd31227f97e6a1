# SPDX-License-Identifier: GPL-3.0-or-later
"""Text as bytes: a file, a folder or the Python standard library, split once, sampled in windows.

The data stays on the CPU as uint8. Which windows a rank sees at a step follows from (seed, step, rank) alone, so that
a resumed run reads what an uninterrupted one would have read.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

HELD_OUT = 0.05
# Some text that is always there and quickly read.
SMALL_TEXT = str(Path(__file__).resolve().parents[2] / "LICENSE")
# Tests, installed packages and caches are not part of the standard library's text.
STDLIB_SKIP = frozenset({"test", "tests", "idle_test", "idlelib", "site-packages", "dist-packages", "__pycache__"})


@dataclass(frozen=True)
class Corpus:
    name: str
    train: Tensor  # uint8 [bytes]
    held_out: Tensor  # uint8 [bytes], the last HELD_OUT of the text


def load_corpus(path: str | None, context: int) -> Corpus:
    """The text at `path` (a file, or all files below a folder), or the standard library's sources when None.

    Raises:
        ValueError: nothing readable at `path`, or too little text for windows of `context` bytes.
    """
    if path is None:
        root = Path(sysconfig.get_path("stdlib"))
        name = f"Python {sysconfig.get_python_version()} standard library"
        text = _read_files(root, [p for p in root.rglob("*.py") if not STDLIB_SKIP & set(p.relative_to(root).parts)])
    else:
        name = path
        text = _read_path(Path(path).expanduser())
    needed = int((context + 1) / HELD_OUT) + 1
    if len(text) < needed:
        raise ValueError(
            f"data={name!r}: {len(text):,} bytes of text; context={context} needs at least {needed:,}, since the last "
            f"{HELD_OUT:.0%} is held out and must hold one window: give more text or a shorter context"
        )
    split = len(text) - int(len(text) * HELD_OUT)
    return Corpus(name, text[:split], text[split:])


def train_batches(data: Tensor, context: int, batch: int, count: int, key: tuple[int, int, int]) -> Iterator[Tensor]:
    """`count` micro-batches of random windows, int64 [batch, context + 1]; `key` is (seed, step, rank)."""
    rng = np.random.default_rng(key)
    for _ in range(count):
        yield _windows(data, rng.integers(0, len(data) - context, size=batch), context)


def held_out_batches(data: Tensor, context: int, batch: int, count: int, rank: int, world: int) -> Iterator[Tensor]:
    """`count` micro-batches of this rank: evenly spaced windows, the same ones at every evaluation."""
    starts = np.linspace(0, len(data) - context - 1, count * batch * world, dtype=np.int64)[rank::world]
    for start in range(0, len(starts), batch):
        yield _windows(data, starts[start : start + batch], context)


def _windows(data: Tensor, starts: np.ndarray, context: int) -> Tensor:
    return torch.stack([data[s : s + context + 1] for s in starts.tolist()]).long()


def _read_path(path: Path) -> Tensor:
    if path.is_file():
        size = path.stat().st_size
        # Mapped, not read: a large corpus then costs its pages once per machine, not once per rank.
        if size == 0:
            raise ValueError(f"data={str(path)!r}: the file is empty; give one with text")
        return torch.from_file(str(path), shared=False, size=size, dtype=torch.uint8)
    if path.is_dir():
        return _read_files(path, [p for p in path.rglob("*") if not _hidden(p.relative_to(path))])
    raise ValueError(f"data={str(path)!r}: no such file or folder; give an existing one, or leave --data out")


def _hidden(path: Path) -> bool:
    return any(part.startswith(".") for part in path.parts)


def _read_files(root: Path, files: list[Path]) -> Tensor:
    """All files as one text, ordered by the hash of their names: repeatable, and the held-out end is a fair sample."""
    names = [p.relative_to(root).as_posix() for p in files if p.is_file()]
    if not names:
        raise ValueError(f"data={str(root)!r}: the folder holds no text; give a file, or a folder with files")
    names.sort(key=lambda name: hashlib.sha256(name.encode(errors="surrogateescape")).digest())
    return torch.frombuffer(bytearray(b"\n").join((root / name).read_bytes() for name in names), dtype=torch.uint8)
