# SPDX-License-Identifier: GPL-3.0-or-later
"""Who runs the transports' all-to-all: torch.distributed, unless deepspeed.comm would do more than pass it on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from deepspeed.comm import comm as deepspeed_comm
from deepspeed.comm.torch import TorchBackend

from flashfusemoe_ds.ds.collectives import Collectives


class OtherBackend(TorchBackend):
    pass


@pytest.mark.parametrize(
    ("logged", "backend", "device", "expected"),
    [
        (False, TorchBackend, "cpu", "torch"),
        (True, TorchBackend, "cpu", "deepspeed"),
        (False, OtherBackend, "cpu", "deepspeed"),
        (False, TorchBackend, "meta", "deepspeed"),
    ],
)
def test_who_runs_it(
    monkeypatch: pytest.MonkeyPatch, logged: bool, backend: type[TorchBackend], device: str, expected: str
) -> None:
    seen: list[tuple[Any, ...]] = []

    def noted(name: str) -> Any:
        return lambda output, tensor, **options: seen.append((name, output, tensor, options)) or "work"

    monkeypatch.setattr(deepspeed_comm.comms_logger, "enabled", logged)
    monkeypatch.setattr(deepspeed_comm, "cdb", backend.__new__(backend))
    monkeypatch.setattr(deepspeed_comm, "all_to_all_single", noted("deepspeed"))
    monkeypatch.setattr(torch.distributed, "all_to_all_single", noted("torch"))
    output, tensor = torch.empty(2, device=device), torch.empty(2, device=device)
    options = {"output_split_sizes": [1, 1], "input_split_sizes": [2, 0], "group": None, "async_op": True}
    assert Collectives.all_to_all_single(output, tensor, **options) == "work"
    assert len(seen) == 1 and seen[0][0] == expected
    assert seen[0][1] is output and seen[0][2] is tensor and seen[0][3] == options
