# SPDX-License-Identifier: GPL-3.0-or-later
"""Which transport a layer gets: the names of `ep_backend`, whether each runs here, and why not."""

from __future__ import annotations

from importlib.util import find_spec
from types import ModuleType

import torch
import torch.distributed

from flashfusemoe_ds.config import FlashFuseMoEConfig
from flashfusemoe_ds.dispatch.base import Dispatcher, Geometry
from flashfusemoe_ds.dispatch.local import LocalDispatcher
from flashfusemoe_ds.dispatch.nccl import NcclDispatcher

EP_BACKENDS = ("nccl", "deep_ep", "symm_mem", "hybrid")


def why_not(ep_backend: str) -> str | None:
    """None if this transport can be used on this machine, else the reason, in words."""
    if ep_backend in ("nccl", "hybrid"):
        return None if torch.distributed.is_available() else "this torch was built without torch.distributed"
    if ep_backend == "deep_ep":
        if find_spec("deep_ep") is None:
            return "package deep_ep is not installed (see github.com/deepseek-ai/DeepEP)"
        return "this version of flashfusemoe_ds has no deep_ep transport yet"
    if ep_backend == "symm_mem":
        if not torch.cuda.is_available():
            return "it needs CUDA GPUs, and torch sees none"
        return "this version of flashfusemoe_ds has no symm_mem transport yet"
    return f"unknown; valid: {', '.join(EP_BACKENDS)}"


def check_ep_backend(ep_backend: str) -> None:
    """Raises before any collective: ImportError for a missing package, ValueError otherwise."""
    reason = why_not(ep_backend)
    if reason is None:
        return
    usable = ", ".join(name for name in EP_BACKENDS if why_not(name) is None)
    error = ImportError if ep_backend == "deep_ep" and find_spec("deep_ep") is None else ValueError
    raise error(f"ep_backend {ep_backend!r} cannot be used: {reason}. Usable here: {usable}")


def resolve_hybrid() -> tuple[str, str]:
    """What `hybrid` means here, and why: deep_ep where usable, else symm_mem, else nccl."""
    for name in ("deep_ep", "symm_mem"):
        if why_not(name) is None:
            return name, f"{name} is usable"
    return "nccl", "; ".join(f"{name}: {why_not(name)}" for name in ("deep_ep", "symm_mem"))


def make_dispatcher(
    config: FlashFuseMoEConfig,
    group: torch.distributed.ProcessGroup | None,
    geometry: Geometry,
    comm: ModuleType = torch.distributed,
) -> Dispatcher:
    """The transport for a group; without one, or with a group of one rank, the identity.

    Args:
        config: names the transport and has its settings.
        comm: torch.distributed, or deepspeed.comm, whose communication logger then sees the traffic.
    """
    check_ep_backend(config.ep_backend)
    if group is None or comm.get_world_size(group=group) == 1:
        return LocalDispatcher()
    return NcclDispatcher(group, geometry.num_experts, comm)
