# SPDX-License-Identifier: GPL-3.0-or-later
"""Where two checkpoints' contents differ."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor


def differences(a: Any, b: Any, skip: tuple[str, ...], where: str = "") -> Iterator[str]:
    """Compares dicts, sequences, objects and tensors to the bit, types and all; keys in `skip` are left out."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.dtype != b.dtype or not torch.equal(a, b):
            yield f"{where}: tensors"
    elif type(a) is not type(b):
        yield f"{where}: {type(a)} and {type(b)}"
    elif isinstance(a, dict):
        if set(a) != set(b):
            yield f"{where}: {sorted(map(str, set(a) ^ set(b)))}"
        for key in (a.keys() & b.keys()) - set(skip):
            yield from differences(a[key], b[key], skip, f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        if len(a) != len(b):
            yield f"{where}: lengths {len(a)} and {len(b)}"
        for i, pair in enumerate(zip(a, b, strict=False)):
            yield from differences(*pair, skip, f"{where}/{i}")
    elif hasattr(a, "__dict__") and not isinstance(a, int):
        yield from differences(vars(a), vars(b), skip, where)
    elif a != b:
        yield f"{where}: {a!r} and {b!r}"
