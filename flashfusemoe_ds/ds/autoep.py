# SPDX-License-Identifier: GPL-3.0-or-later
"""Hugging Face models under DeepSpeed's AutoEP: its MoE layers compute with our router, dispatch and experts.

DeepSpeed's `expert_parallel` section stays as it is. AutoEP finds the model's MoE blocks, slices their weights, and
puts an AutoEPMoELayer in each place; once the engine stands, each of these layers is given the classes of this file.
Nothing is moved or renamed: modules, parameters, hooks and process groups stay the objects they were, so ZeRO, the
optimizer, checkpoints, universal checkpoints and Transformers' recording of router logits see what stock AutoEP left
them. Nothing in DeepSpeed is patched.

    AutoEPMoELayer          FusedAutoEPMoELayer   route, dispatch, experts, combine; the tail is stock's
      router                FusedRouter           the same choices and weights
        gate                Float32Gate           DeepSeek alone, whose own gate computes in float32
      experts               FusedGroupedExperts   w1, w3, w2 of [e, F, D], [e, F, D], [e, D, F]
      shared_experts        as they are
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

import torch
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.moe.ep_experts import GroupedExperts as StockGroupedExperts
from deepspeed.moe.ep_router import TokenChoiceTopKRouter
from deepspeed.utils import log_dist
from torch import Tensor, nn

from flashfusemoe_ds.config import SECTION, FlashFuseMoEConfig
from flashfusemoe_ds.dispatch.base import Dispatcher, Geometry, Pending
from flashfusemoe_ds.dispatch.select import make_dispatcher
from flashfusemoe_ds.ds.collectives import Collectives
from flashfusemoe_ds.kernels.activation import Activation, get_activation
from flashfusemoe_ds.kernels.experts import experts
from flashfusemoe_ds.kernels.products import ExpertProducts, UpWeights
from flashfusemoe_ds.kernels.select import select_products
from flashfusemoe_ds.nn.checks import check_hidden
from flashfusemoe_ds.nn.experts import under_autocast
from flashfusemoe_ds.nn.parallel_experts import LateGradient, parallel_experts, start_dispatch
from flashfusemoe_ds.nn.router import Gating, gate_and_route, route_with_losses, router_logits
from flashfusemoe_ds.types import Dispatched, Routing

EXPERT_PARALLEL = "expert_parallel"  # DeepSpeed's own section

# Where stock AutoEP of deepspeed 0.19.8 trains what Transformers trains. Before 5.6 Transformers took probabilities
# for router logits, so its auxiliary loss is another than AutoEP's; 5.23 has a registry of recorded outputs that
# AutoEP cannot read.
TRANSFORMERS_FROM, TRANSFORMERS_BEFORE = (5, 6), (5, 23)

# DeepSpeed's names of expert activations that the fused experts have, and ours.
ACTIVATIONS = {"swiglu": "swiglu", "geglu_tanh": "geglu_tanh"}

# Presets whose models compute router logits in float32 whatever the model's dtype. The others do it in the model's.
FLOAT32_GATES = ("deepseek_v2", "deepseek_v3")

# Keys of `expert_parallel` that say how stock's layer computes: the values that are also true of ours, and why not
# others.
_HONOURED: dict[str, tuple[tuple[Any, ...], str]] = {
    "comm_backend": (("comm",), f"{SECTION}.ep_backend chooses the transport"),
    "expert_tensor_parallel_size": ((1,), "the fused layer does not split experts over tensor-parallel ranks"),
    "async_split_plan": ((False,), "it is a setting of stock's own exchange"),
    "combine_impl": (("auto", "weighted_sum"), "it is a setting of stock's own combine"),
    "row_weighting_impl": (("auto",), "it is a setting of stock's own DeepEP exchange"),
    "score_apply": (("auto", "post"), "the fused experts weigh their outputs, not their inputs"),
    "use_grouped_mm": ((True,), f"{SECTION}.gemm_backend chooses the products"),
    "disable_triton_grouped_mm": ((False,), f"{SECTION}.gemm_backend chooses the products"),
    "validate_folding_routing": ((False,), "the fused layer does not fold tensor parallelism"),
}


def autoep_enabled(ds_config: Mapping[str, Any]) -> bool:
    """Whether DeepSpeed will build AutoEP layers from this config."""
    section = ds_config.get(EXPERT_PARALLEL)
    return isinstance(section, Mapping) and bool(section.get("enabled", False))


def check_autoep(model: nn.Module, ds_config: Mapping[str, Any], section: FlashFuseMoEConfig) -> None:
    """Refuses what the fused layer cannot do under AutoEP, before DeepSpeed builds anything. Without AutoEP, or with
    replace_moe off, there is nothing to refuse.

    Raises:
        ValueError: a setting of `expert_parallel` that would not be honoured, tensor parallelism, or a Transformers
            version outside the supported range.
    """
    if not autoep_enabled(ds_config) or not section.replace_moe:
        return
    for key, (valid, why) in _HONOURED.items():
        value = ds_config[EXPERT_PARALLEL].get(key, valid[0])
        if value not in valid:
            raise ValueError(
                f"{EXPERT_PARALLEL}.{key} is {value!r}, which the fused layer does not honour: {why}. Valid: "
                f"{', '.join(map(repr, valid))}; or set {SECTION}.replace_moe to false to keep stock AutoEP's layers"
            )
    autotp_size = (ds_config.get("tensor_parallel") or {}).get("autotp_size", 0)
    if autotp_size > 1:
        raise ValueError(
            f"tensor_parallel.autotp_size is {autotp_size}, which the fused layer does not support under AutoEP; "
            f"valid: 0, 1; or set {SECTION}.replace_moe to false to keep stock AutoEP's layers"
        )
    _check_transformers(model)


def _check_transformers(model: nn.Module) -> None:
    """ValueError if the model comes from a Transformers that stock AutoEP does not work with."""
    transformers = sys.modules.get("transformers")  # a model of its making has imported it
    if transformers is None or not any(isinstance(m, transformers.PreTrainedModel) for m in model.modules()):
        return
    version = transformers.__version__
    if not TRANSFORMERS_FROM <= tuple(int(part) for part in version.split(".")[:2]) < TRANSFORMERS_BEFORE:
        first, end = ".".join(map(str, TRANSFORMERS_FROM)), ".".join(map(str, TRANSFORMERS_BEFORE))
        raise ValueError(
            f"transformers is {version}, with which AutoEP of deepspeed 0.19.8 fails or computes another loss; valid: "
            f'>= {first}, < {end}: pip install "transformers>={first},<{end}"'
        )


def fuse_autoep(engine: Any, section: FlashFuseMoEConfig) -> list[FusedAutoEPMoELayer]:
    """Gives the AutoEP layers of an engine's model the classes of this file, in place, and the section's settings.

    Layers whose expert activation the fused experts lack stay stock's, and one sentence says so. Calling it again
    renews the settings.

    Returns:
        The fused layers.
    """
    if not section.replace_moe:
        return []
    fused, left = [], {}
    dispatchers: dict[tuple[Any, Geometry], Dispatcher] = {}
    for layer in engine.module.modules():
        if not isinstance(layer, AutoEPMoELayer):
            continue
        if not isinstance(layer, FusedAutoEPMoELayer) and layer.experts.activation not in ACTIVATIONS:
            left[layer.experts.activation] = left.get(layer.experts.activation, 0) + 1
            continue
        # One transport for all layers of a group and geometry, since a transport may own buffers.
        geometry = Geometry(layer.num_experts, layer.hidden_size, layer.top_k, layer.experts.w2.dtype)
        key = (layer.ep_group, geometry)
        if key not in dispatchers:
            dispatchers[key] = make_dispatcher(section, layer.ep_group, geometry, comm=Collectives)
        fused.append(FusedAutoEPMoELayer.convert(layer, section, dispatchers[key]))
    for activation, count in left.items():
        log_dist(
            f"{SECTION}: {count} AutoEP layers keep stock's own computation, because the fused experts do not have "
            f"their activation {activation!r} (they have {', '.join(ACTIVATIONS)})",
            ranks=[0],
        )
    if fused:
        log_dist(
            f"{SECTION}: {len(fused)} AutoEP layers fused, autoep_size {fused[0].ep_size}, transport "
            f"{fused[0].dispatcher.name}",
            ranks=[0],
        )
        _keep_step_counts_apart(engine)
    return fused


def _keep_step_counts_apart(engine: Any) -> None:
    """Repairs what DeepSpeed 0.19.8 loads from a universal checkpoint at ZeRO-3: the optimizer's step count, one
    tensor for all parameter groups. torch's Adam counts it up in place once per group, so that from then on the
    experts' bias correction is of another step."""
    if engine.zero_optimization_stage() < 3 or not engine.load_universal_checkpoint():
        return
    load = engine.load_checkpoint

    def load_checkpoint(*args: Any, **kwargs: Any) -> Any:
        result = load(*args, **kwargs)
        for state in engine.optimizer.optimizer.state.values():
            if isinstance(state.get("step"), Tensor):
                state["step"] = state["step"].clone()
        return result

    engine.load_checkpoint = load_checkpoint


class FusedAutoEPMoELayer(AutoEPMoELayer):
    """An AutoEPMoELayer that computes with this package. Made by `convert`, from one that AutoEP built."""

    dispatcher: Dispatcher

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise TypeError(
            "a FusedAutoEPMoELayer is made from an AutoEPMoELayer: FusedAutoEPMoELayer.convert(layer, ...)"
        )

    @classmethod
    def convert(
        cls, layer: AutoEPMoELayer, section: FlashFuseMoEConfig, dispatcher: Dispatcher
    ) -> FusedAutoEPMoELayer:
        """Changes the layer's and its children's classes in place; every object and its identity stays."""
        layer.__class__ = cls
        layer.router.__class__ = FusedRouter
        layer.experts.__class__ = FusedGroupedExperts
        if layer.model_family in FLOAT32_GATES and layer.router.gate.bias is None:
            layer.router.gate.__class__ = Float32Gate
        layer.dispatcher = dispatcher
        layer.experts.configure(section, dispatcher)
        return layer

    def forward(self, hidden_states: Tensor) -> Tensor | tuple[Tensor, Tensor | None]:
        """Stands in for the replaced block: [B, S, D] -> [B, S, D], or [T, D] where moe_output_shape is "flat", and
        beside it the router's logits [T, E] where return_router_logits is set."""
        check_hidden("AutoEP MoE layer", hidden_states, self.hidden_size, self.tokens_per_expert)
        x_TD = hidden_states.reshape(-1, self.hidden_size)
        rows_TD = self.experts.prepare(x_TD)
        late = self.experts.late_gradient()
        if late is not None:
            rows_TD = late.mark(rows_TD)
        weight_TK, idx_TK, counts_E, logits_TE = self.router(x_TD, self.expert_bias)
        with torch.no_grad():
            self.tokens_per_expert.add_(counts_E)
        routing = Routing(idx_TK, weight_TK, counts_E)
        if self.dispatcher.ep_size > 1 and torch.compiler.is_compiling():
            from flashfusemoe_ds.nn import compiled  # not at the top: it loads torch's compiler

            y_TD = compiled.outside_graphs(self._routed_and_shared, x_TD, rows_TD, routing, late)
        else:
            y_TD = self._routed_and_shared(x_TD, rows_TD, routing, late)
        output = y_TD if self.moe_output_shape == "flat" else y_TD.reshape(hidden_states.shape)
        if not self.return_router_logits:
            return output
        # Qwen3.5's block. Stock gives its recorder probabilities; Transformers makes the auxiliary loss of logits.
        if logits_TE is None and self.router_logits_capture_target == "router":
            logits_TE = self.router.gate(x_TD)
        return output, logits_TE

    def _routed_and_shared(self, x_TD: Tensor, rows_TD: Tensor, routing: Routing, late: LateGradient | None) -> Tensor:
        """The routed experts' sums plus the shared experts, which run while the rows travel."""
        travelling = start_dispatch(self.dispatcher, rows_TD, routing) if self.dispatcher.ep_size > 1 else None
        shared_TD = None if self.shared_experts is None else self.shared_experts(x_TD)
        if shared_TD is not None and self.shared_experts_gate is not None:
            shared_TD = torch.sigmoid(self.shared_experts_gate(x_TD)) * shared_TD
        # Tensors one by one: ZeRO-3 looks for them among positional arguments, and not inside a dataclass.
        y_TD = self.experts(rows_TD, routing.weight_TK, routing.idx_TK, travelling=travelling, late=late)
        return y_TD if shared_TD is None else y_TD + shared_TD


class FusedRouter(TokenChoiceTopKRouter):
    """Stock's router in our terms: the same experts, weights and counts."""

    @property
    def gating(self) -> Gating:
        """Stock's settings as a `Gating`."""
        return Gating(
            score=self.score_func,
            renormalize=self.route_norm,
            scaling_factor=self.route_scale,
            num_groups=self.num_expert_groups or 0,
            top_groups=self.num_limited_groups or 0,
            group_score=self.group_score_func,
        )

    def forward(self, x_TD: Tensor, expert_bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """[T, D] -> weights [T, K] float32, expert ids [T, K] int64, routes per expert [E] int64, and the gate's
        logits [T, E] if it ran by itself."""
        bias_E = self.e_score_correction_bias
        if expert_bias is not None:
            bias_E = expert_bias if bias_E is None else bias_E + expert_bias
        if self._nobody_sees_the_gate():
            routing = gate_and_route(x_TD, self.gate.weight, self.gating, self.top_k, 0.0, 0.0, bias_E, count=True)
            return routing.weight_TK, routing.idx_TK, routing.counts_E, None
        # Called as a module: Transformers records what it returns, and ZeRO-3 gathers its weight.
        logits_TE = self.gate(x_TD)
        exact_TE = logits_TE if logits_TE.dtype is torch.float64 else logits_TE.float()
        routing = route_with_losses(exact_TE, self.gating, self.top_k, 0.0, 0.0, bias_E)
        return routing.weight_TK, routing.idx_TK, routing.counts_E, logits_TE

    def _nobody_sees_the_gate(self) -> bool:
        """Whether the gate's product may be part of a fused kernel."""
        gate = self.gate
        hooks = gate._forward_hooks or gate._forward_pre_hooks
        return isinstance(gate, Float32Gate) and not hooks and not _is_partitioned(gate.weight)


class Float32Gate(nn.Linear):
    """A gate whose product is float32 whatever the model's dtype, as in DeepSeek's own code."""

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] -> float32 [T, E]."""
        return router_logits(x_TD, self.weight)


class FusedGroupedExperts(StockGroupedExperts):
    """Stock's expert parameters, w1 (gate) and w3 (up) [e, F, D] and w2 (down) [e, D, F], in our kernels.

    Its forward goes from this rank's tokens to their sums over all ranks, so that ZeRO-3, which gathers parameters
    around a module's forward and backward, has them where they are used.
    """

    def configure(self, section: FlashFuseMoEConfig, dispatcher: Dispatcher) -> None:
        """Takes the section's settings and the layer's transport."""
        self.gemm_backend, self.recompute_activations = section.gemm_backend, section.recompute_activations
        self.recompute_dispatch = section.recompute_dispatch
        self.overlap, self.dispatcher = section.overlap, dispatcher

    @property
    def activation(self) -> Activation:
        """Ours, by the name that stock's constructor left."""
        return get_activation(ACTIVATIONS[self.__dict__["activation"]])

    def prepare(self, x_TD: Tensor) -> Tensor:
        """The rows to dispatch, in the dtype of the products. ValueError for what these cannot take: here, before any
        rank waits for another."""
        x_TD = under_autocast(x_TD)
        self._products(x_TD)
        return x_TD

    def late_gradient(self) -> LateGradient | None:
        """What lets the router's backward run while the rows' gradient travels; None where it may not."""
        wanted = self.overlap.input_grad and self.overlap.router_grad and self.dispatcher.ep_size > 1
        return LateGradient() if wanted and not torch.compiler.is_compiling() else None

    def operands(self, x: Tensor) -> tuple[tuple[UpWeights, Tensor, None, None], ExpertProducts]:
        """What the experts stage takes beside the rows `x`: (w_up, w_down, b_up, b_down), and the backend. Gate and up
        stay where they are, two tensors. They are computed in x's dtype whatever theirs, as by stock."""
        return ((self.w1, self.w3), self.w2, None, None), self._products(x)

    def forward(
        self,
        rows_TD: Tensor,
        weight_TK: Tensor,
        idx_TK: Tensor,
        *,
        travelling: Pending[Dispatched] | None,
        late: LateGradient | None,
    ) -> Tensor:
        """[T, D] -> [T, D], each row the weighted sum of its experts; `travelling` are the rows on their way, None
        with one rank."""
        routing = Routing(idx_TK, weight_TK, counts=idx_TK.new_empty(0))  # nobody counts any more
        if travelling is not None:
            return parallel_experts(rows_TD, routing, self, self.dispatcher, travelling, self.overlap, late)
        (w_up, w_down, _, _), products = self.operands(rows_TD)
        return experts(
            rows_TD, idx_TK, weight_TK, w_up, w_down, self.activation, products, recompute=self.recompute_activations
        )

    def _products(self, x: Tensor) -> ExpertProducts:
        # ZeRO-3 leaves parameters empty between uses.
        num_local_experts, intermediate, d_model = getattr(self.w1, "ds_shape", self.w1.shape)
        widths = (d_model, intermediate, self.activation.up_width(intermediate))
        return select_products(self.gemm_backend, x, widths, num_local_experts)


def _is_partitioned(param: nn.Parameter) -> bool:
    """Whether ZeRO-3 owns it, and gathers it for the module that holds it alone."""
    return hasattr(param, "ds_id")
