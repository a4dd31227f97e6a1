# SPDX-License-Identifier: GPL-3.0-or-later
"""The MoE layers of a checkpoint: one expert's own tensors, and how they are stacked where they are.

Which tensors an expert has, its file says. How they are stacked cannot be seen from them: an expert is recognised by
running it. So it comes from the layout file that this package writes, or from the model itself.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from deepspeed.moe.layer import MoE as StockMoE
from torch import Tensor, nn

from flashfusemoe_ds.ds.checkpoint import stacking_from_json
from flashfusemoe_ds.ds.convert.files import read
from flashfusemoe_ds.ds.expert_layout import ExpertLayout
from flashfusemoe_ds.ds.fused_experts import STOCK_PREFIX
from flashfusemoe_ds.ds.replace import replace_moe

EXPERTS = ".deepspeed_moe.experts."
_PER_EXPERT = re.compile(rf"(.*){re.escape(EXPERTS + STOCK_PREFIX)}(\d+)\.(.+)")
_STACKED = re.compile(rf"(.*){re.escape(EXPERTS)}(\w+)")


@dataclass(frozen=True)
class MoELayerExperts:
    """One MoE layer.

    Attributes:
        name: the layer's path in the model.
        shapes: one expert's own tensors, buffers too, in its own order.
        dtype: of its weights.
        stacking: how they are stacked in this package's layout; None if the experts run one by one, or if unknown.
    """

    name: str
    num_experts: int
    shapes: dict[str, torch.Size]
    dtype: torch.dtype
    stacking: ExpertLayout | None

    def stacked_shapes(self) -> dict[str, torch.Size]:
        """Of one expert's rows of the stacked parameters, in the order in which the layer registers these."""
        assert self.stacking is not None
        rows = self.stacking.stack({leaf: torch.empty(shape, device="meta") for leaf, shape in self.shapes.items()})
        up = self.stacking.up_name
        return {name: rows[name].shape for name in (up, f"{up}_bias", "down_proj", "down_proj_bias") if name in rows}


def read_layers(expert_files: list[list[Path]], safe_globals: Sequence[Any]) -> list[MoELayerExperts]:
    """Every MoE layer's name, shapes and dtype, from its experts' files; `stacking` is None.

    Raises:
        ValueError: experts of a layer differ, or a file holds something else.
    """
    layers = []
    for i, files in enumerate(expert_files):
        found = [_own_tensors(path, gid, safe_globals) for gid, path in enumerate(files)]
        for path, other in zip(files, found, strict=True):
            if other != found[0]:
                raise ValueError(f"{path} holds other tensors than expert 0 of MoE layer {i}: {other}, {found[0]}")
        name, shapes, dtype = found[0]
        layers.append(MoELayerExperts(name, len(files), dict(shapes), dtype, None))
    return layers


def _own_tensors(
    path: Path, gid: int, safe_globals: Sequence[Any]
) -> tuple[str, tuple[tuple[str, torch.Size], ...], torch.dtype]:
    """The layer's name, the shapes of this expert's tensors, and the dtype of the first."""
    tensors = read(path, safe_globals)
    parsed = {key: per_expert_name(key) for key in tensors} if isinstance(tensors, dict) else {}
    owners = {(p[0], p[1]) if p else None for p in parsed.values()}
    if len(owners) != 1 or None in owners or next(iter(owners))[1] != gid:
        raise ValueError(f"{path} does not hold the tensors of expert {gid} of one deepspeed MoE layer")
    shapes = tuple((parsed[key][2], tensor.shape) for key, tensor in tensors.items())
    return next(iter(owners))[0], shapes, next(iter(tensors.values())).dtype


def per_expert_name(name: str) -> tuple[str, int, str] | None:
    """(layer, expert, the expert's own name) of a name in the stock layout."""
    match = _PER_EXPERT.fullmatch(name)
    return (match[1], int(match[2]), match[3]) if match else None


def stacked_name(name: str) -> tuple[str, str] | None:
    """(layer, stacked parameter) of a name in the stacked layout."""
    match = _STACKED.fullmatch(name)
    return (match[1], match[2]) if match else None


def stackings_of_model(factory: str) -> dict[str, ExpertLayout | None]:
    """How `initialize` stacks the experts of every MoE layer, by name, of the model that `module:function` returns."""
    module, _, function = factory.partition(":")
    try:
        make = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"--model {factory}: {error}; valid: MODULE:FUNCTION, a function without arguments") from None
    model = make()
    if not isinstance(model, nn.Module):
        raise ValueError(f"--model {factory} returned a {type(model).__name__}; it must return the model")
    replace_moe(model)
    return {name: getattr(m.deepspeed_moe.experts, "layout", None) for name, m in _moe_layers(model)}


def _moe_layers(model: nn.Module) -> Iterator[tuple[str, StockMoE]]:
    return ((name, m) for name, m in model.named_modules() if isinstance(m, StockMoE))


def stackings_of_file(layout: Mapping[str, Any]) -> dict[str, ExpertLayout | None]:
    """The same, as this package's layout file has it; empty if an older version wrote it."""
    return {m["name"]: stacking_from_json(m["stacking"]) for m in layout["moe_layers"] if "stacking" in m}


def check_stackings(layers: Sequence[MoELayerExperts], stackings: Mapping[str, ExpertLayout | None]) -> None:
    """ValueError unless these are the checkpoint's layers and their experts have the checkpoint's tensors."""
    if list(stackings) != [layer.name for layer in layers]:
        raise ValueError(
            f"the model's MoE layers are {', '.join(stackings) or 'none'}; the checkpoint's are "
            f"{', '.join(layer.name for layer in layers)}"
        )
    for layer in layers:
        stacking = stackings[layer.name]
        if stacking is not None and set(stacking.leaves) != set(layer.shapes):
            raise ValueError(
                f"an expert of {layer.name} has the tensors {', '.join(stacking.leaves)} in the model; in the "
                f"checkpoint {', '.join(layer.shapes)}"
            )


# Stands for the parts of the other stacked parameters, which a result does not depend on. Any length that splits into
# gate and up, interleaved or not, will do.
_FILLER = torch.empty(4)


def stack_one(stacking: ExpertLayout, name: str, own: Mapping[str, Tensor]) -> Tensor:
    """One expert's row of one stacked parameter, from those of its own tensors that it is made of."""
    return stacking.stack({leaf: own.get(leaf, _FILLER) for leaf in stacking.leaves})[name]


def unstack_one(stacking: ExpertLayout, name: str, row: Tensor) -> dict[str, Tensor]:
    """The inverse of `stack_one`."""
    sources = stacking.sources()
    own = stacking.unstack({n: row if n == name else _FILLER for n in sources})
    return {leaf: own[leaf] for leaf in sources[name]}
