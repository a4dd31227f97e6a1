# SPDX-License-Identifier: GPL-3.0-or-later
"""The `"flashfusemoe"` section of a DeepSpeed JSON config. The reference in docs/ is generated from this class."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

SECTION = "flashfusemoe"


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class DeepEPConfig(_Section):
    """Settings of `ep_backend: "deep_ep"`."""

    num_sms: int = Field(24, ge=2, multiple_of=2, description="Streaming multiprocessors given to the exchange.")
    max_tokens_per_rank: int = Field(8192, ge=1, description="Most tokens one rank sends in one call (DeepEP 2.x).")


class SymmMemConfig(_Section):
    """Settings of `ep_backend: "symm_mem"`."""

    num_sms: int = Field(64, ge=1, description="Streaming multiprocessors given to the exchange.")
    max_tokens_per_rank: int = Field(
        8192, ge=1, description="Most tokens one rank sends in one call; buffers are sized for it. More raise."
    )
    capacity_factor: float | None = Field(
        None,
        gt=0,
        description="Routes that one rank has room for, as a multiple of max_tokens_per_rank * top_k; the host then "
        "never waits for the device, and more routes raise. Left out, the host reads their number in each dispatch.",
    )


class OverlapConfig(_Section):
    """What runs beside the exchange between expert-parallel ranks."""

    shared_experts: bool = Field(
        True, description="Shared experts run on a side stream, under dispatch and combine and their backward."
    )
    input_grad: bool = Field(True, description="The experts' input gradient travels while their dW is computed.")
    router_grad: bool = Field(
        True, description="The router's backward runs while the experts' input gradient travels; needs input_grad."
    )


class FlashFuseMoEConfig(_Section):
    """Everything the section can say. Unknown keys and wrong values raise ValueError before any collective."""

    ep_backend: Literal["nccl", "deep_ep", "symm_mem", "hybrid"] = Field(
        "nccl",
        description="Transport between expert-parallel ranks. nccl is deepspeed.comm's all-to-all (gloo on CPUs); "
        "hybrid takes deep_ep where usable, else symm_mem, else nccl, and logs which and why.",
    )
    replace_moe: bool = Field(
        True,
        description="Turn deepspeed.moe.layer.MoE modules of the model into fused ones, weights kept, and likewise "
        "the layers that DeepSpeed's AutoEP builds.",
    )
    gemm_backend: Literal["triton", "grouped_mm", "reference"] | None = Field(
        None, description="Backend of the experts' matrix products; omitted, the fastest that runs on the operands."
    )
    gating_backend: Literal["triton", "torch"] = Field(
        "triton",
        description="DeepSpeed's gating in `MoE` layers: fused kernels where they take the operands on CUDA, a tenth "
        "of the operators, or PyTorch operators everywhere.",
    )
    overlap_dense_grads: bool = Field(
        True,
        description="Reduce dense and expert gradients during backward, at ZeRO stages 0, 1 and 2. At 1 and 2 sets "
        "overlap_comm where the config leaves it out.",
    )
    exact_grad_norm: bool = Field(
        True,
        description="At ZeRO stage 0, clip by the norm of the whole model's gradient, the same at every ep_size. "
        "false: DeepSpeed's own norm, which for float32 averages the ranks' norms, each over its own experts.",
    )
    recompute_activations: bool = Field(
        False, description="Keep only the layer's input for the backward and recompute the up-projection."
    )
    recompute_dispatch: bool = Field(
        False,
        description="Between expert-parallel ranks, keep the rows that a rank sent, not those that it received, and "
        "send them again in the backward: one exchange more, for all that a rank receives.",
    )
    log_expert_load: Literal[False, True, "brief", "layers", "experts"] = Field(
        False,
        description="Write expert load to DeepSpeed's monitor as `Train/MoE/*`: `brief` (or true) over all layers, "
        "`layers` also for each layer, `experts` also for each expert; see [expert_load.md](expert_load.md).",
    )
    log_expert_load_steps: int = Field(10, ge=1, description="Optimizer steps that one written value covers.")
    expert_bias_update_rate: float | None = Field(
        None,
        gt=0,
        allow_inf_nan=False,
        description="After every step, move the bias on each expert's choice by this much towards balance, in layers "
        "that have such a bias; left out, nothing moves it.",
    )
    deep_ep: DeepEPConfig = Field(default_factory=DeepEPConfig, description="Settings of the deep_ep transport.")
    symm_mem: SymmMemConfig = Field(default_factory=SymmMemConfig, description="Settings of the symm_mem transport.")
    overlap: OverlapConfig = Field(
        default_factory=OverlapConfig, description="What runs beside the exchange between ranks."
    )

    @classmethod
    def from_section(cls, section: Mapping[str, Any] | None) -> FlashFuseMoEConfig:
        """Validates the section's contents.

        Raises:
            ValueError: naming every offending key, its value, and what is valid.
        """
        if section is None:
            return cls()
        if not isinstance(section, Mapping):
            raise ValueError(f'"{SECTION}" is {section!r}; it must be a JSON object')
        try:
            return cls.model_validate(dict(section))
        except ValidationError as error:
            raise ValueError("; ".join(_sentence(item) for item in error.errors())) from None

    @classmethod
    def from_ds_config(cls, ds_config: Mapping[str, Any]) -> FlashFuseMoEConfig:
        """The section of a whole DeepSpeed config; defaults if there is none. A near miss of its name raises."""
        if SECTION not in ds_config:
            for key in ds_config:
                if difflib.SequenceMatcher(None, SECTION, str(key).lower()).ratio() > 0.75:
                    raise ValueError(f'"{key}" is not a section of the config; did you mean "{SECTION}"?')
        return cls.from_section(ds_config.get(SECTION))


def _model_at(location: tuple[Any, ...]) -> type[BaseModel]:
    sections = {"deep_ep": DeepEPConfig, "symm_mem": SymmMemConfig, "overlap": OverlapConfig}
    return sections.get(location[0], FlashFuseMoEConfig) if location else FlashFuseMoEConfig


def _sentence(item: Mapping[str, Any]) -> str:
    """One pydantic error as the setting, its value and the valid ones."""
    location, value = tuple(item["loc"]), item.get("input")
    name = ".".join([SECTION, *(str(part) for part in location)])
    if item["type"] == "extra_forbidden":
        keys = list(_model_at(location[:-1]).model_fields)
        near = difflib.get_close_matches(str(location[-1]), keys, n=1, cutoff=0.5)
        hint = f'did you mean "{near[0]}"? ' if near else ""
        return f"{name}: unknown key; {hint}Valid keys: {', '.join(keys)}"
    shown = json.dumps(value, default=repr)
    if item["type"] == "literal_error":
        return f"{name} is {shown}; valid: {item['ctx']['expected']}"
    return f"{name} is {shown}; {item['msg'][0].lower()}{item['msg'][1:]}"
