# SPDX-License-Identifier: GPL-3.0-or-later
"""The model that a plan is for, on the meta device, with `PlannedExperts` in the place of every layer's experts.

a folder or config.json     Transformers' own class, built from the config
package.module:factory      whatever the factory builds: deepspeed.moe layers, this package's, Transformers' experts
T,D,F,E,K and layers        nothing but MoE layers
"""

from __future__ import annotations

import contextlib
import importlib
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flashfusemoe_ds.config import FlashFuseMoEConfig
from flashfusemoe_ds.nn.moe_layer import MoELayer
from flashfusemoe_ds.plan_trace import PlannedExperts
from flashfusemoe_ds.planning import Load, MoEShape, expected_load, router_bytes


@dataclass
class Subject:
    """A model to plan.

    Attributes:
        model: on the meta device.
        experts: its MoE layers, in order.
        tokens: of a micro batch on one GPU.
        loss: runs one micro batch; None where nobody has said what the model takes.
        inputs: tensors of that batch.
        experts_apart: whether DeepSpeed sees the experts as such at ep_size 1 too.
        has_dense: whether there is more than MoE layers.
        one_rank: whether some layer has no expert parallelism inside an engine.
    """

    model: nn.Module
    experts: list[PlannedExperts]
    tokens: int
    loss: Callable[[], Tensor] | None
    inputs: list[Tensor]
    experts_apart: bool
    has_dense: bool = True
    one_rank: bool = False

    def expert_params(self) -> set[nn.Parameter]:
        """Parameters of all layers' experts: those of one rank, after `configure`."""
        return {param for layer in self.experts for param in layer.parameters()}

    def shapes(self) -> list[MoEShape]:
        """Of each MoE layer, in order."""
        return [layer.shape for layer in self.experts]

    def configure(
        self, ep_size: int, skew: float, room: Callable[[MoEShape], tuple[int, int] | None], dtype: torch.dtype,
        section: FlashFuseMoEConfig,
    ) -> list[Load]:  # fmt: skip
        """Sizes every layer for an ep_size; returns their loads."""
        loads = []
        for layer in self.experts:
            load = expected_load(layer.shape, self.tokens, ep_size, skew, room(layer.shape))
            layer.configure(load, dtype, section)
            loads.append(load)
        return loads


# --- Transformers ------------------------------------------------------------------------------------------------


def from_transformers(
    path: Path, dtype: torch.dtype, batch: int, length: int, checkpointing: bool, autoep: bool
) -> Subject:
    """A model of a Transformers config, trained on `batch` texts of `length` tokens.

    Raises:
        ImportError: transformers is missing, or older than 5.6.
        ValueError: no such config, or a model without MoE layers.
    """
    from flashfusemoe_ds.hf.meta_model import model_from_config, top_k_of

    with quiet():
        model = model_from_config(path, dtype)
    experts = replace_packed(model, top_k_of(model), gate_apart=autoep)
    if not experts:
        raise ValueError(f"--model {path} is a {type(model).__name__}, which has no packed experts: nothing to plan")
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = torch.zeros(batch, length, dtype=torch.int64, device="meta")

    def loss() -> Tensor:
        return model(input_ids=ids, labels=ids, use_cache=False).loss

    return Subject(model, experts, batch * length, loss, [ids], experts_apart=autoep)


def replace_packed(model: nn.Module, top_k: int | None, *, gate_apart: bool = False) -> list[PlannedExperts]:
    """Puts PlannedExperts in the place of modules that hold all experts in a few parameters, as Transformers' do.

    Args:
        gate_apart: gate and up are two parameters, as AutoEP makes them.
    """
    found = []
    for parent in list(model.modules()):
        for name, module in list(parent.named_children()):
            if isinstance(module, PlannedExperts) or not hasattr(module, "is_transposed"):
                continue  # all of Transformers' experts say it, and nothing else does
            up = "gate_up_proj" if isinstance(getattr(module, "gate_up_proj", None), Tensor) else "up_proj"
            if top_k is None:
                kind = type(module).__name__
                raise ValueError(f"{kind}: the model's config does not say how many experts a token has")
            transposed = module.is_transposed
            num_experts, *sizes = getattr(module, up).shape
            hidden, width = sizes if transposed else sizes[::-1]
            inner = module.down_proj.shape[1 if transposed else 2]
            shape = MoEShape(hidden, inner, width, num_experts, top_k)
            stacked = {n: tuple(p.shape) for n, p in module.named_parameters(recurse=False)}
            if gate_apart and up in stacked and width == 2 * inner:
                del stacked[up]
                stacked |= {"w1": (num_experts, inner, hidden), "w3": (num_experts, inner, hidden)}
            setattr(parent, name, PlannedExperts(shape, stacked))
            found.append(getattr(parent, name))
    return found


# --- a user's own model ------------------------------------------------------------------------------------------


def from_factory(name: str, dtype: torch.dtype, tokens: int | None) -> Subject:
    """A model that `package.module:factory()` builds, alone or as (model, batch).

    Args:
        name: the factory, called without arguments while new tensors are made on the meta device. A batch is what one
            micro batch passes to the model: a tensor, a tuple or a dict of them. Of what the model then returns, the
            plan takes an attribute `loss`, or a tensor's, or a tuple's first tensor's sum.
        tokens: of a micro batch; None to take those of the batch's first tensor.
    """
    module, _, factory = name.partition(":")
    if not factory:
        raise ValueError(
            f"--model is {name!r}; valid: a folder with a config.json, such a file, or package.module:factory"
        )
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    make = getattr(importlib.import_module(module), factory, None)
    if not callable(make):
        raise ValueError(f"--model is {name!r}; module {module} has no function {factory!r}")
    with quiet(), torch.device("meta"):
        built = make()
    model, batch = built if isinstance(built, tuple) else (built, None)
    if not isinstance(model, nn.Module):
        raise ValueError(f"--model {name}: it returned {type(model).__name__}; valid: a module, or (module, batch)")
    model = model.to("meta", dtype).train()
    experts, one_rank, apart = replace_layers(model)
    if not experts:
        raise ValueError(f"--model {name}: {type(model).__name__} has no MoE layers that a plan knows")
    inputs = [t.to("meta") for t in _tensors(batch)]
    if tokens is None:
        if not inputs:
            raise ValueError(f"--tokens is missing: --model {name} returned no batch that says how many there are")
        first = inputs[0]
        tokens = first.numel() if not first.is_floating_point() else first.numel() // first.shape[-1]
    loss = None if batch is None else _loss(model, batch)
    return Subject(model, experts, tokens, loss, inputs, apart, one_rank=one_rank)


def replace_layers(model: nn.Module) -> tuple[list[PlannedExperts], bool, bool]:
    """PlannedExperts in the place of every layer's experts; whether some layer has no expert parallelism, and whether
    DeepSpeed sees the experts as such."""
    own = [_replace_moe_layer(module) for module in list(model.modules()) if isinstance(module, MoELayer)]
    stock = _replace_deepspeed(model) if "deepspeed" in sys.modules else []
    packed = replace_packed(model, _top_k(model))
    order = {id(module): i for i, module in enumerate(model.modules())}
    found = sorted([*packed, *own, *stock], key=lambda layer: order[id(layer)])
    return found, bool(own), bool(stock)


def _top_k(model: nn.Module) -> int | None:
    if not hasattr(getattr(model, "config", None), "get_text_config"):
        return None
    from flashfusemoe_ds.hf.meta_model import top_k_of

    return top_k_of(model)


def _replace_moe_layer(layer: MoELayer) -> PlannedExperts:
    inner, num_experts, top_k = layer.experts, layer.num_experts, layer.top_k
    shape = MoEShape(
        inner.d_model, inner.intermediate_size, inner.activation.up_width(inner.intermediate_size), num_experts, top_k
    )
    stacked = {n: tuple(p.shape) for n, p in inner.named_parameters(recurse=False)}
    planned = PlannedExperts(shape, stacked, extra_kept=lambda tokens: router_bytes(tokens, num_experts, top_k))
    layer.experts = planned

    def forward(hidden_states: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        shape, hidden_states = hidden_states.shape, hidden_states.reshape(-1, layer.d_model)
        rows = hidden_states if layer.latent_down is None else layer.latent_down(hidden_states)
        # A gradient for the gate, as from its logits.
        weight = (layer.router.weight.sum() * 0).expand(rows.shape[0], top_k)
        y = planned(rows, weight)
        y = y if layer.latent_up is None else layer.latent_up(y)
        y = y if layer.shared_experts is None else y + layer.shared_experts(hidden_states)
        return y.reshape(shape), {}

    layer.forward = forward
    return planned


def _replace_deepspeed(model: nn.Module) -> list[PlannedExperts]:
    from flashfusemoe_ds.ds.moe import MoE
    from flashfusemoe_ds.ds.replace import replace_moe

    with quiet():
        replace_moe(model)
    found = []
    for layer in [m for m in model.modules() if isinstance(m, MoE)]:
        moe = layer.deepspeed_moe
        if not hasattr(moe.experts, "deepspeed_experts"):
            raise ValueError("the factory has built its MoE layers outside the meta device: leave out device=")
        template = moe.experts.deepspeed_experts[0]
        shape, params = _of_template(template, moe.gate.wg.in_features, layer.num_experts, moe.gate.k)
        moe.experts = PlannedExperts(shape, params)
        found.append(moe.experts)
        # One rank's transport: PlannedExperts has the exchange in its sizes.
        moe.ep_size = 1
    return found


def _of_template(
    expert: nn.Module, hidden: int, num_experts: int, top_k: int
) -> tuple[MoEShape, dict[str, tuple[int, ...]]]:
    """Shape and stacked parameters of experts that are copies of an MLP."""
    linears = [m for m in expert.modules() if isinstance(m, nn.Linear)]
    downs = [m for m in linears if m.out_features == hidden]
    ups = [m for m in linears if downs and m is not downs[-1]]
    if not ups or any(m.in_features != hidden for m in ups):
        raise ValueError(
            f"{type(expert).__name__}: its experts' sizes cannot be told; a plan takes MLPs of two or three nn.Linear "
            f"that begin and end with the hidden size ({hidden})"
        )
    width, inner = sum(m.out_features for m in ups), downs[-1].in_features
    params: dict[str, tuple[int, ...]] = {
        "gate_up_proj": (num_experts, width, hidden), "down_proj": (num_experts, hidden, inner)
    }  # fmt: skip
    if ups[0].bias is not None:
        params["gate_up_proj_bias"] = (num_experts, width)
    if downs[-1].bias is not None:
        params["down_proj_bias"] = (num_experts, hidden)
    return MoEShape(hidden, inner, width, num_experts, top_k), params


def _tensors(batch: Any) -> Iterable[Tensor]:
    values = batch.values() if isinstance(batch, Mapping) else batch if isinstance(batch, tuple) else [batch]
    return [value for value in values if isinstance(value, Tensor)]


def _loss(model: nn.Module, batch: Any) -> Callable[[], Tensor]:
    def loss() -> Tensor:
        if isinstance(batch, Mapping):
            out = model(**batch)
        else:
            out = model(*batch) if isinstance(batch, tuple) else model(batch)
        out = getattr(out, "loss", out)
        out = out[0] if isinstance(out, tuple) else out
        return out if out.dim() == 0 else out.sum()

    return loss


# --- numbers alone -----------------------------------------------------------------------------------------------


class _Layer(nn.Module):
    """A gate and experts, with a residual around them."""

    def __init__(self, shape: MoEShape) -> None:
        super().__init__()
        self.gate = nn.Linear(shape.hidden_size, shape.num_experts, bias=False)
        params = {
            "gate_up_proj": (shape.num_experts, shape.up_width, shape.hidden_size),
            "down_proj": (shape.num_experts, shape.hidden_size, shape.intermediate_size),
        }
        self.experts = PlannedExperts(
            shape, params, extra_kept=lambda tokens: router_bytes(tokens, shape.num_experts, shape.top_k)
        )

    def forward(self, x: Tensor) -> Tensor:
        weight = (self.gate.weight.sum() * 0).expand(x.shape[0], self.experts.shape.top_k)
        return x + self.experts(x, weight)


def from_shape(shape: MoEShape, tokens: int, layers: int, dtype: torch.dtype) -> Subject:
    """Nothing but `layers` MoE layers with their gates."""
    with torch.device("meta"):
        model = nn.Sequential(*(_Layer(shape) for _ in range(layers))).to(dtype)
        x = torch.empty(tokens, shape.hidden_size, dtype=dtype, requires_grad=True)
    experts = [layer.experts for layer in model]
    return Subject(model, experts, tokens, lambda: model(x).sum(), [x], experts_apart=True, has_dense=False)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without what libraries say of a model that nobody is going to run."""
    loggers = [logging.getLogger(name) for name in ("DeepSpeed", "transformers")]
    before = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)
