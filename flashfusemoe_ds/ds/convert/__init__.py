# SPDX-License-Identifier: GPL-3.0-or-later
"""Takes a checkpoint, optimizer state included, to the other layout of experts, another ep_size, or both.

Stock DeepSpeed keeps a parameter for every tensor of every local expert; this package stacks those of all local
experts. Optimizer state is saved in the order of parameters and knows no names, so that neither layout's loads as the
other's, nor at another ep_size. Weights do: each expert has a file of its own.

    files               which files there are; reading them safely, writing a new folder whole or not at all
    layers              the MoE layers: one expert's tensors, and how they are stacked
    groups              which of them each parameter group holds, in which order, before and after
    flat                how DeepSpeed lays a group out flat and cuts it into partitions
    optimizer_files     one rank's file, group by group
    states              the state of every expert's tensor, read from one layout and built in the other
    model_file          what of the model's own file depends on the layout
    source              all that, read and checked
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from flashfusemoe_ds.ds.checkpoint import LAYOUT_FILE, layout_record
from flashfusemoe_ds.ds.convert import files as disk
from flashfusemoe_ds.ds.convert.files import CheckpointFiles, check_target, find_files, new_folder, read
from flashfusemoe_ds.ds.convert.groups import Arrangement, ExpertParam, cut, translate
from flashfusemoe_ds.ds.convert.model_file import check_model_state, convert_model_state, regroup_scheduler
from flashfusemoe_ds.ds.convert.optimizer_files import put_together
from flashfusemoe_ds.ds.convert.source import Source, read_source
from flashfusemoe_ds.ds.convert.states import ExpertStates, Partitioning, TargetGroup

LAYOUTS = ("stacked", "per_expert")
# deepspeed.moe.utils.split_params_into_different_moe_groups_for_optimizer's default.
MAX_GROUP_SIZE = 178956971


def convert_checkpoint(
    source_dir: str | os.PathLike[str],
    target_dir: str | os.PathLike[str],
    *,
    to: str,
    ep_size: int,
    tag: str | None = None,
    model: str | None = None,
    max_group_size: int = MAX_GROUP_SIZE,
    safe_globals: Sequence[str] = (),
) -> Path:
    """Writes a checkpoint that `load_checkpoint` resumes from, weights and optimizer state, in the other layout.

    Args:
        source_dir: what was given to save_checkpoint. Of DeepSpeed's MoE or of this package's, ZeRO stage 0, 1 or 2.
        target_dir: a folder that does not exist yet, or is empty.
        to: "stacked" for this package, "per_expert" for stock DeepSpeed. Experts that this package does not fuse stay
            as they are.
        ep_size: of the target, for all its MoE layers.
        tag: which checkpoint; None for the one that `latest` names.
        model: "module:function" that returns the model as it is trained, stock or fused. Needed where experts are
            stacked and the source is stock DeepSpeed's, whose files do not tell gate from up projections.
        max_group_size: elements beyond which groups of experts' parameters are cut: the value given to
            split_params_into_different_moe_groups_for_optimizer, if not DeepSpeed's own.
        safe_globals: full names of further classes that the files hold, in client_state for example, and that are safe
            to make.

    Returns:
        The new checkpoint's folder, of the same tag.

    Raises:
        ValueError: something does not fit, or is not converted; nothing is written then.
    """
    target_path = check_target(target_dir)
    found = find_files(source_dir, tag)
    classes = disk.named_classes(safe_globals)
    model_state = read(found.model, classes)
    check_model_state(model_state, found.model)
    payloads = [read(path, classes) for path in found.optimizer]
    source = read_source(found, model_state, payloads, classes, model, max_group_size)
    target = _plan_target(source, to, ep_size, max_group_size)

    def name_latest(folder: Path) -> None:
        disk.write_text(found.tag, folder / "latest")

    with new_folder(target_path, name_latest) as folder:
        out = folder / found.tag
        out.mkdir(parents=True)
        first_payload = _write_optimizer(out, found, payloads, source, target)
        groups = [g if isinstance(g, int) else g.params for g in target.groups]
        state = convert_model_state(
            model_state, source.arrangement, target.arrangement, groups, first_payload.get("optimizer")
        )
        origins = [g if isinstance(g, int) else g.origin for g in target.groups]
        state["lr_scheduler"] = regroup_scheduler(state.get("lr_scheduler"), origins, len(source.files[0]))
        disk.save(state, out / found.model.name)
        for path in (path for layer in found.experts for path in layer):
            disk.copy(path, out / path.name)
        disk.write_text(json.dumps(_layout_file(target), indent=1), out / LAYOUT_FILE)
    return target_path / found.tag


@dataclass(frozen=True)
class _ExpertGroup:
    origin: int  # the source's group whose options it has
    params: list[ExpertParam]  # in flat order


@dataclass(frozen=True)
class _Target:
    arrangement: Arrangement
    partitioning: Partitioning
    groups: list[int | _ExpertGroup]  # in order; an int is the source's dense group of that index


def _plan_target(source: Source, to: str, ep_size: int, max_group_size: int) -> _Target:
    if to not in LAYOUTS:
        raise ValueError(f"the layout is {to!r}; valid: {', '.join(LAYOUTS)}")
    layers, ranks = source.arrangement.layers, source.partitioning
    counts = [layer.num_experts for layer in layers] + ([ranks.num_files] if ranks.nesting.zero else [])
    if ep_size < 1 or any(count % ep_size for count in counts):
        valid = [n for n in range(1, min(counts) + 1) if not any(count % n for count in counts)]
        raise ValueError(
            f"ep_size is {ep_size}; it must divide the experts of every MoE layer"
            + (f" and the {ranks.num_files} data-parallel ranks, whose number stays" if ranks.nesting.zero else "")
            + f". Valid: {', '.join(map(str, valid))}"
        )
    if to == "stacked" and not any(source.arrangement.stacked) and all(layer.stacking is None for layer in layers):
        raise ValueError(
            f"how the experts would be stacked is not known: the source has no {LAYOUT_FILE} that says it. Name the "
            "model, --model MODULE:FUNCTION; if its experts are not fused, use the layout per_expert"
        )
    stacked = tuple(to == "stacked" and layer.stacking is not None for layer in layers)
    arrangement = Arrangement(layers, stacked, ep_size)
    partitioning = replace(ranks, ep_size=ep_size, num_files=ranks.num_files if ranks.nesting.zero else ep_size)
    contents = {run[0]: content for run, content in source.runs}
    groups: list[int | _ExpertGroup] = []
    for i in range(len(source.files[0])):
        if i in contents:
            params = arrangement.expand(translate(contents[i], source.arrangement, arrangement))
            pieces = cut(params, arrangement, max_group_size)
            groups += [_ExpertGroup(i, partitioning.flat_order(piece)) for piece in pieces]
        elif i not in source.groups:
            groups.append(i)
    return _Target(arrangement, partitioning, groups)


def _write_optimizer(
    out: Path, found: CheckpointFiles, payloads: list[Any], source: Source, target: _Target
) -> dict[str, Any]:
    """Writes every rank's optimizer file, and returns that of rank 0."""
    states = ExpertStates(source.arrangement, source.partitioning, source.files, source.groups)
    parts = target.partitioning
    any_group = next(iter(source.groups))
    first: dict[str, Any] = {}
    for ep_rank in range(parts.ep_size):
        built = [
            g
            if isinstance(g, int)
            else TargetGroup(states, target.arrangement, parts, source.files[0][g.origin].options, g.params, ep_rank)
            for g in target.groups
        ]
        for i in range(parts.num_partitions):
            rank = parts.file(ep_rank, i)
            # Dense parameters lie as they did: in the same rank's partition, or on every rank alike.
            like = rank if parts.nesting.zero else 0
            groups = [
                source.files[like][g] if isinstance(g, int) else g.partition(i, source.files[like][any_group])
                for g in built
            ]
            payload = put_together(payloads[like], parts.nesting, groups)
            name = found.optimizer[like].name
            disk.save(
                payload, out / (name if parts.nesting.zero else name.replace("expp_rank_0", f"expp_rank_{rank}"))
            )
            first = payload if rank == 0 else first
    return first


def _layout_file(target: _Target) -> dict[str, Any]:
    arrangement = target.arrangement
    entries = [
        (layer.name, stacked, layer.stacking)
        for layer, stacked in zip(arrangement.layers, arrangement.stacked, strict=True)
    ]
    groups = [[arrangement.name(p) for p in g.params] for g in target.groups if not isinstance(g, int)]
    return layout_record(entries, arrangement.ep_size, groups)
