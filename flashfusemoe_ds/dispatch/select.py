# SPDX-License-Identifier: GPL-3.0-or-later
"""Which transport a layer gets: the names of `ep_backend`, whether each runs here, and why not.

What one rank cannot do, no rank does: where reasons may differ between ranks, they are exchanged before anything else,
and every rank raises the same error, or takes the same way out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from functools import cache
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any, NamedTuple, NoReturn
from weakref import WeakValueDictionary

import torch
import torch.distributed

from flashfusemoe_ds.config import FlashFuseMoEConfig
from flashfusemoe_ds.dispatch.agreement import Place, access_refusal, exchange, joint_reason, this_place
from flashfusemoe_ds.dispatch.base import Dispatcher, Geometry
from flashfusemoe_ds.dispatch.local import LocalDispatcher
from flashfusemoe_ds.dispatch.nccl import NcclDispatcher

EP_BACKENDS = ("nccl", "deep_ep", "symm_mem", "hybrid")
HYBRID_ORDER = ("deep_ep", "symm_mem")  # then nccl
# In the modules of these names.
_CLASSES = {"deep_ep": "DeepEPDispatcher", "symm_mem": "SymmMemDispatcher"}

Group = torch.distributed.ProcessGroup

# Transports with buffers, by all that must be equal for layers to share one: a buffer per layer would exhaust the
# GPU's memory and NCCL's windows. Weak: the layers hold their transport, this only finds it.
_shared: WeakValueDictionary[tuple[Any, ...], Dispatcher] = WeakValueDictionary()

logger = logging.getLogger(__name__)


def why_not(ep_backend: str) -> str | None:
    """None if this transport can be used by this process, else the reason, in words. No collective."""
    if ep_backend in ("nccl", "hybrid"):
        return None if torch.distributed.is_available() else "this torch was built without torch.distributed"
    if ep_backend in HYBRID_ORDER:
        package = _missing_package(ep_backend)
        return _module(ep_backend).machine_refusal() if package is None else package
    return f"unknown; valid: {', '.join(EP_BACKENDS)}"


def check_ep_backend(ep_backend: str, group: Group | None = None) -> None:
    """Refuses what this machine cannot do, or, with a group, what any of its ranks' machines cannot do.

    Args:
        group: its ranks exchange their reasons and raise alike; every one of them must call this.

    Raises:
        ImportError: the backend's package is missing.
        ValueError: any other reason.
    """
    mine = _vote(ep_backend, lambda: why_not(ep_backend))
    if group is not None and torch.distributed.get_world_size(group) > 1:
        votes = exchange(group, mine)
        reason = joint_reason(group, [vote.refusal for vote in votes])
        if reason is not None:
            _refuse(ep_backend, reason, votes)
    elif mine.refusal is not None:
        usable = [name for name in EP_BACKENDS if why_not(name) is None]
        _refuse(ep_backend, mine.refusal, [mine], usable)


def resolve_hybrid() -> tuple[str, str]:
    """What `hybrid` would take on this machine, and why: deep_ep where usable, else symm_mem, else nccl.

    A layer's own dispatcher may be another, for its geometry, its group or another rank's machine; its name says.
    """
    for name in HYBRID_ORDER:
        if why_not(name) is None:
            return name, f"{name} is usable"
    return "nccl", "; ".join(f"{name}: {why_not(name)}" for name in HYBRID_ORDER)


def make_dispatcher(
    config: FlashFuseMoEConfig,
    group: Group | None,
    geometry: Geometry,
    comm: Any = torch.distributed,
) -> Dispatcher:
    """The transport for a group; without one, or with a group of one rank, the identity.

    Collective for every backend but nccl: all ranks of the group make their layers' transports in the same order.
    Layers of one group, geometry and settings share one, which lives as long as any of them holds it.

    Args:
        config: names the transport and has its settings.
        comm: for nccl, see `NcclDispatcher`.

    Raises:
        ImportError: the backend's package is missing on a rank; on every rank, before data is exchanged.
        ValueError: a rank has another reason against it; likewise.
    """
    if group is None or comm.get_world_size(group=group) == 1:
        return LocalDispatcher()
    hybrid, refusals = config.ep_backend == "hybrid", {}
    for name, votes in _poll(config, group, geometry).items():
        reason = joint_reason(group, [vote.refusal for vote in votes])
        if reason is None:
            try:
                dispatcher = _find_or_make(name, config, group, geometry, votes)
            except ValueError as error:  # what only set-up can tell, and tells all ranks alike
                if not hybrid:
                    raise
                reason = str(error)
            else:
                if hybrid:
                    _say(name, geometry, refusals)
                return dispatcher
        if not hybrid:
            _refuse(name, reason, votes)
        refusals[name] = reason
    if hybrid:
        _say("nccl", geometry, refusals)
    return NcclDispatcher(group, geometry.num_experts, comm)


def close_dispatcher(dispatcher: Dispatcher) -> None:
    """Frees a transport's buffers, if it has any: collective, in the same order on every rank, once no layer uses it.
    Closing one that several layers share again does nothing."""
    for key in [key for key, shared in _shared.items() if shared is dispatcher]:
        del _shared[key]
    close = getattr(dispatcher, "close", None)
    if close is not None:
        close()


# --- how ranks agree ---------------------------------------------------------------------------------------------


class _Vote(NamedTuple):
    """What a rank says of one transport: why not, whether a package is missing, whether it has one to share."""

    refusal: str | None
    missing: bool
    has_it: bool = False


def _poll(config: FlashFuseMoEConfig, group: Group, geometry: Geometry) -> dict[str, list[_Vote]]:
    """Every rank's vote on each transport that the config allows before nccl. Two exchanges of a few words."""
    if config.ep_backend == "nccl":
        return {}
    candidates = HYBRID_ORDER if config.ep_backend == "hybrid" else (config.ep_backend,)
    places = exchange(group, this_place())
    mine = {
        name: _vote(
            name,
            lambda name=name: why_not(name) or _why_not_for(name, config, group, geometry, places),
            has_it=_key(name, config, group, geometry) in _shared,
        )
        for name in candidates
    }
    ballots = exchange(group, mine)
    return {name: [ballot[name] for ballot in ballots] for name in candidates}


def _vote(name: str, refusal: Callable[[], str | None], has_it: bool = False) -> _Vote:
    try:
        return _Vote(refusal(), _missing_package(name) is not None, has_it)
    except Exception as error:  # a broken installation may raise anything, and the other ranks wait for this vote
        return _Vote(f"the check failed ({type(error).__name__}: {error})", missing=False)


def _why_not_for(
    name: str, config: FlashFuseMoEConfig, group: Group, geometry: Geometry, places: list[Place]
) -> str | None:
    """What speaks against a usable transport between these ranks, for these rows."""
    hosts = len({place.host for place in places})
    if name == "symm_mem" and hosts > 1:
        return f"it works within one host, and the ranks are on {hosts}"
    return access_refusal(places, places[torch.distributed.get_rank(group)]) or _module(name).geometry_refusal(
        len(places), geometry, getattr(config, name)
    )


def _find_or_make(
    name: str, config: FlashFuseMoEConfig, group: Group, geometry: Geometry, votes: list[_Vote]
) -> Dispatcher:
    key = _key(name, config, group, geometry)
    # Garbage collection may have freed one rank's and not yet another's; then all make a new one.
    dispatcher = _shared.get(key) if all(vote.has_it for vote in votes) else None
    if dispatcher is None:
        make = getattr(_module(name), _CLASSES[name])
        dispatcher = _shared[key] = make(group, geometry, getattr(config, name))
    return dispatcher


def _key(name: str, config: FlashFuseMoEConfig, group: Group, geometry: Geometry) -> tuple[Any, ...]:
    return name, group, geometry, getattr(config, name)


def _refuse(ep_backend: str, reason: str, votes: list[_Vote], usable: Iterable[str] = ("nccl", "hybrid")) -> NoReturn:
    error = ImportError if any(vote.missing for vote in votes) else ValueError
    raise error(f"ep_backend {ep_backend!r} cannot be used: {reason}. Usable here: {', '.join(usable)}")


def _say(name: str, geometry: Geometry, refusals: dict[str, str]) -> None:
    if torch.distributed.get_rank() == 0:
        why = "; ".join(f"not {other}: {reason}" for other, reason in refusals.items()) or "it is usable"
        _info_once(f"ep_backend hybrid takes {name} for layers of {geometry} ({why})")


@cache
def _info_once(text: str) -> None:
    logger.info(text)


# --- the transports' modules -------------------------------------------------------------------------------------


def _missing_package(ep_backend: str) -> str | None:
    if ep_backend == "deep_ep" and find_spec("deep_ep") is None:
        return "package deep_ep is not installed (from github.com/deepseek-ai/DeepEP; PyPI's deep-ep is not it)"
    if ep_backend == "symm_mem" and find_spec("triton") is None:
        return "package triton is not installed"
    return None


def _module(name: str) -> ModuleType:
    """Imported when asked for: symm_mem imports triton."""
    return import_module(f"flashfusemoe_ds.dispatch.{name}")
