# SPDX-License-Identifier: GPL-3.0-or-later
"""Writes docs/config.md from flashfusemoe_ds.config.FlashFuseMoEConfig: `python docs/generate_config.py`."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, MultipleOf
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from flashfusemoe_ds.config import SECTION, FlashFuseMoEConfig

PAGE = Path(__file__).parent / "config.md"

HEADER = f"""\
# The `{SECTION}` section

<!-- Generated from flashfusemoe_ds/config.py by docs/generate_config.py. Edit the class, then run the script. -->

The section stands at the top level of the DeepSpeed config, beside `zero_optimization`. Every key may be left out; so
may the section. An unknown key, a wrong value or a section name close to this one raises a `ValueError` that names the
key, its value and the valid ones. A backend whose package is missing raises an `ImportError`. Both come before the
first collective.

```json
{{
  "train_micro_batch_size_per_gpu": 8,
  "zero_optimization": {{"stage": 1}},
  "{SECTION}": {{"ep_backend": "nccl", "replace_moe": true, "recompute_activations": false}}
}}
```
"""

FOOTER = """\
## What takes effect where

- `flashfusemoe_ds.initialize` puts every key into effect. `attach(engine)` cannot change what the engine was built
  with: at ZeRO stages 1 and 2 `overlap_dense_grads` needs `overlap_comm` in the config there, and `replace_moe` is
  only checked for deepspeed.moe layers (see [quickstart.md](quickstart.md#attach)).
- `overlap_dense_grads` also sets `zero_optimization.overlap_comm` and `reduce_bucket_size` at ZeRO stages 1 and 2,
  where the config does not say otherwise. The configurations it leaves to DeepSpeed, and `exact_grad_norm`, are in
  [zero_and_checkpoints.md](zero_and_checkpoints.md).
- `gemm_backend`, `recompute_activations` and `recompute_dispatch` concern fused experts. Experts that run one by one
  (see [migrating_from_deepspeed_moe.md](migrating_from_deepspeed_moe.md#which-experts-are-fused)) ignore them.
- `ep_backend` "deep_ep" needs the package of that name, "symm_mem" GPUs of one host, "hybrid" takes what is there; see
  [expert_parallelism.md](expert_parallelism.md). `gemm_backend` "triton" needs a CUDA GPU of compute capability 8.0 or
  more. `python -m flashfusemoe_ds.report` prints what runs on a machine, and why the rest does not.
- `MoELayer` and `fused_moe` read no config: `gemm_backend` and `recompute_activations`, and `MoELayer`'s
  `recompute_dispatch`, are arguments there, and `shard_experts` takes the `ep_backend` and, as dicts, the sections
  `deep_ep`, `symm_mem` and `overlap`.
- `overlap.shared_experts` concerns `MoELayer`, whose shared experts are its own.
"""


def render() -> str:
    """The whole page."""
    return "\n".join([HEADER, *_tables(FlashFuseMoEConfig, SECTION), FOOTER])


def _tables(model: type[BaseModel], name: str) -> Iterator[str]:
    rows = ["| key | type or values | default | meaning |", "|---|---|---|---|"]
    sections = {}
    for key, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            sections[key] = field.annotation
            rows.append(f"| `{key}` | section | see [below](#{name}{key}) | {field.description} |")
        else:
            rows.append(f"| `{key}` | {_values(field)} | {_shown(field.default)} | {field.description} |")
    yield f"## {name}\n\n" + "\n".join(rows) + "\n"
    for key, section in sections.items():
        yield from _tables(section, f"{name}.{key}")


def _values(field: FieldInfo) -> str:
    kind, optional = field.annotation, ""
    if get_origin(kind) in (Union, UnionType):
        (kind,) = (part for part in get_args(kind) if part is not type(None))
        optional = ", or left out"
    if get_origin(kind) is Literal:
        return ", ".join(_shown(value) for value in get_args(kind)) + optional
    if kind is bool:
        return "true, false" + optional
    limits = [f"at least {m.ge}" for m in field.metadata if isinstance(m, Ge)]
    limits += [f"a multiple of {m.multiple_of}" for m in field.metadata if isinstance(m, MultipleOf)]
    return ", ".join(["integer" if kind is int else kind.__name__, *limits]) + optional


def _shown(value: Any) -> str:
    return "left out" if value is None else f"`{json.dumps(value)}`"


if __name__ == "__main__":
    PAGE.write_text(render())
