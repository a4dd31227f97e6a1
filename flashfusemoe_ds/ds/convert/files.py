# SPDX-License-Identifier: GPL-3.0-or-later
"""The files of a DeepSpeed MoE checkpoint: finding them, reading them without running what they contain, and writing
a new folder that is either whole or not there."""

from __future__ import annotations

import importlib
import os
import pickle
import re
import secrets
import shutil
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

MODEL_FILE = "mp_rank_00_model_states.pt"
# All that DeepSpeed 0.19.8 puts into these files beyond tensors and plain Python values.
DEEPSPEED_CLASSES = (LossScaler, DynamicLossScaler, fragment_address, ZeroStageEnum)

_EXPERT_FILE = re.compile(r"layer_(\d+)_expert_(\d+)_mp_rank_00_model_states\.pt")
_OPTIMIZER_FILE = re.compile(r"(expp_rank|zero_pp_rank|bf16_zero_pp_rank)_(\d+)_mp_rank_00_optim_states\.pt")
# Files of checkpoints that are made in another way, and what they are.
_FOREIGN = (
    (re.compile(r".*_mp_rank_(?!00)\d+_.*|mp_rank_(?!00_model)\d+_.*"), "tensor parallelism"),
    (re.compile(r".*zero_pp_rank_\d+_mp_rank_\d+_model_states\.pt"), "ZeRO stage 3"),
    (re.compile(r"expert_\d+_mp_rank_\d+_model_states\.pt"), "a DeepSpeed that numbered no MoE layers"),
    (re.compile(r"layer_\d+-model.*"), "pipeline parallelism"),
    (re.compile(r"offloaded_tensors"), "optimizer state offloaded to NVMe"),
    (re.compile(r"zero"), "a universal checkpoint"),
)


@dataclass(frozen=True)
class CheckpointFiles:
    """One tag of a checkpoint.

    Attributes:
        folder: the tag's own folder.
        experts: [MoE layer][global expert id] -> its weights.
        optimizer: the optimizer's files by rank: data-parallel ranks under ZeRO, else expert-parallel ranks.
        zero: whether they are ZeRO's.
    """

    folder: Path
    tag: str
    model: Path
    experts: list[list[Path]]
    optimizer: list[Path]
    zero: bool


def find_files(source_dir: str | os.PathLike[str], tag: str | None) -> CheckpointFiles:
    """The files of this tag, or of the one that `latest` names.

    Raises:
        ValueError: nothing is there, a file is missing, or it is a kind of checkpoint that is not converted.
    """
    source = Path(source_dir)
    if tag is None:
        latest = source / "latest"
        if not latest.is_file():
            raise ValueError(f"{source} has no file 'latest'; name the checkpoint by its tag (--tag)")
        tag = latest.read_text().strip()
    folder = source / tag
    if not folder.is_dir():
        tags = sorted(p.name for p in source.iterdir() if p.is_dir()) if source.is_dir() else []
        raise ValueError(f"{source} has no checkpoint with the tag {tag!r}; valid: {', '.join(tags) or 'none'}")
    names = sorted(os.listdir(folder))
    for name in names:
        for pattern, what in _FOREIGN:
            if pattern.fullmatch(name):
                raise ValueError(f"{folder} was saved with {what} ({name}); such checkpoints are not converted")
    if MODEL_FILE not in names:
        raise ValueError(f"{folder} has no {MODEL_FILE}: it is no whole DeepSpeed checkpoint")
    experts = _by_number(folder, {tuple(map(int, m.groups())): m[0] for m in map(_EXPERT_FILE.fullmatch, names) if m})
    if not experts:
        raise ValueError(
            f"{folder} has no experts' files (layer_0_expert_0_...): the model has no deepspeed MoE layer"
        )
    states = {(m[1], int(m[2])): m[0] for m in map(_OPTIMIZER_FILE.fullmatch, names) if m}
    kinds = sorted({kind for kind, _ in states})
    if len(kinds) != 1:
        found = f"files of {', '.join(kinds)}" if kinds else "no optimizer's files"
        raise ValueError(
            f"{folder} has {found}; one kind is converted. Weights need no conversion: they load at any ep_size with "
            "load_optimizer_states=False"
        )
    (optimizer,) = _by_number(folder, {(0, rank): name for (_, rank), name in states.items()})
    return CheckpointFiles(folder, tag, folder / MODEL_FILE, experts, optimizer, kinds[0] != "expp_rank")


def _by_number(folder: Path, found: dict[tuple[int, int], str]) -> list[list[Path]]:
    """{(i, j): name} -> [i][j]; ValueError where a number is left out."""
    rows: list[list[Path]] = []
    for i, j in sorted(found):
        if i == len(rows):
            rows.append([])
        if i != len(rows) - 1 or j != len(rows[i]):
            raise ValueError(f"{folder}: a file before {found[i, j]} is missing; it is no whole checkpoint")
        rows[i].append(folder / found[i, j])
    return rows


def named_classes(names: Sequence[str]) -> list[Any]:
    """Classes or functions by full name, for `read`. ValueError if there is no such thing."""
    found = []
    for name in names:
        module, _, attribute = name.rpartition(".")
        try:
            found.append(getattr(importlib.import_module(module), attribute))
        except (ImportError, AttributeError, ValueError) as error:
            raise ValueError(f"--safe-globals {name}: {error}") from None
    return found


def read(path: Path, safe_globals: Sequence[Any] = ()) -> Any:
    """Reads a file with weights_only: of its classes, only DeepSpeed's own and `safe_globals` are made. Tensors stay
    on disk until they are used, where the file's format allows.

    Raises:
        ValueError: it holds other classes, or cannot be read.
    """
    with torch.serialization.safe_globals([*DEEPSPEED_CLASSES, *safe_globals]):
        try:
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except pickle.UnpicklingError as error:
            if not zipfile.is_zipfile(path):
                raise ValueError(f"{path} cannot be read without running code that it holds: {error}") from error
            unsafe = torch.serialization.get_unsafe_globals_in_checkpoint(path)
            raise ValueError(
                f"{path} holds {', '.join(unsafe) or 'objects'} beside tensors and plain values, and reading that "
                "runs code. If you trust the file, name them: --safe-globals " + " ".join(unsafe)
            ) from error
        except (RuntimeError, OSError, EOFError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from error


def save(payload: Any, path: Path) -> None:
    """torch.save, onto the disk."""
    with open(path, "wb") as file:
        torch.save(payload, file)
        _sync(file)


def copy(source: Path, path: Path) -> None:
    with open(source, "rb") as old, open(path, "wb") as new:
        shutil.copyfileobj(old, new, 1 << 24)
        _sync(new)


def write_text(text: str, path: Path) -> None:
    with open(path, "w") as file:
        file.write(text)
        _sync(file)


def _sync(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def check_target(target_dir: str | os.PathLike[str]) -> Path:
    """ValueError unless the folder is not there or empty, and its parent is there."""
    target = Path(target_dir).absolute()
    if not target.parent.is_dir():
        raise ValueError(f"the folder of {target} does not exist; create {target.parent} first")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} exists and is not empty; name a new folder")
    return target


@contextmanager
def new_folder(target: Path, finish: Callable[[Path], None]) -> Iterator[Path]:
    """A folder beside the target to write into. It takes the target's name only when all is written and on the disk.

    Args:
        finish: writes what makes the folder look whole; called last, when everything else is on the disk.
    """
    partial = target.parent / f".{target.name}.partial-{secrets.token_hex(4)}"
    partial.mkdir()
    try:
        yield partial
        for folder, _, _ in os.walk(partial, topdown=False):
            _sync_folder(Path(folder))
        finish(partial)
        _sync_folder(partial)
        os.rename(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _sync_folder(target.parent)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
