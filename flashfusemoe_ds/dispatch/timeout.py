# SPDX-License-Identifier: GPL-3.0-or-later
"""How long a process group waits for its ranks, which torch is told in public and keeps in private."""

from __future__ import annotations

import torch
import torch.distributed


def group_timeout_s(group: torch.distributed.ProcessGroup, device: torch.device) -> float | None:
    """Seconds of the group's timeout, that of its backend for this kind of device; None where torch does not say."""
    try:
        return group._get_backend(device).options._timeout.total_seconds()
    except (AttributeError, RuntimeError):
        return None
