# SPDX-License-Identifier: GPL-3.0-or-later
"""Copies of counts to the host, with a stream and events that only note what is asked of them."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

from flashfusemoe_ds.dispatch import host_copy
from flashfusemoe_ds.dispatch.host_copy import HostCopies, HostCopy


def test_memory_serves_again_once_it_was_read(monkeypatch: pytest.MonkeyPatch) -> None:
    log: list[str] = []

    def made(counts: torch.Tensor) -> HostCopy:
        log.append("made")
        return HostCopy(torch.empty_like(counts), SimpleNamespace(record=lambda stream: log.append("recorded")))

    monkeypatch.setattr(host_copy, "_like", made)
    copies = HostCopies(contextlib.nullcontext())
    waited = SimpleNamespace(wait=lambda: log.append("waited"))
    first = copies.start(torch.tensor([[1, 2]]), after=waited)
    second = copies.start(torch.tensor([[3, 4]]))
    assert log == ["made", "waited", "recorded", "made", "recorded"]
    assert copies.read(first) == [[1, 2]]
    third = copies.start(torch.tensor([[5, 6]]))
    assert log[5:] == ["recorded"] and third.values is first.values
    assert copies.read(second) == [[3, 4]] and copies.read(third) == [[5, 6]]


def test_memory_made_in_an_evaluation_serves_training(monkeypatch: pytest.MonkeyPatch) -> None:
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **options: empty(*size, **options))
    monkeypatch.setattr(torch.cuda, "Event", lambda: SimpleNamespace(record=lambda stream: None))
    copies = HostCopies(contextlib.nullcontext())
    for mode in (True, False, True):
        with torch.inference_mode(mode):
            assert copies.read(copies.start(torch.tensor([1, 2]))) == [1, 2]
