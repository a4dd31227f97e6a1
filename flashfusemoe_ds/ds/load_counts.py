# SPDX-License-Identifier: GPL-3.0-or-later
"""Counting, on the device, how often each expert is chosen: MoE layers whose training forwards add up what they route.

A module becomes a counting one in place, by its class, and then owns `load_sums`, float64 of E + 4 entries:

    [0, E)      routes per expert, before any were dropped
    KEPT        routes that were not dropped; stays 0 where a layer never drops
    FORWARDS    forwards that counted
    AUX, Z      sums of the load-balancing and z losses, as the layer returns them

A forward that backward runs again, under whichever activation checkpointing, adds nothing; nor does one in evaluation
mode. Nothing here waits for the device. What becomes of the sums is the matter of `ds.expert_load`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from deepspeed.module_inject.auto_ep_layer import AutoEPMoELayer
from deepspeed.moe.layer import MoE as StockMoE
from torch import Tensor, nn

from flashfusemoe_ds.ds.autoep import FusedAutoEPMoELayer, FusedRouter
from flashfusemoe_ds.ds.moe import FusedTopKGate, MoE
from flashfusemoe_ds.nn.moe_layer import MoELayer
from flashfusemoe_ds.nn.router import Router
from flashfusemoe_ds.types import Routing

KEPT, FORWARDS, AUX, Z = -4, -3, -2, -1
EXTRAS = 4


def tally(
    sums: Tensor,
    counts_E: Tensor | None = None,
    idx_TK: Tensor | None = None,
    aux_loss: Tensor | None = None,
    z_loss: Tensor | None = None,
) -> None:
    """Adds what one forward routed, in place, unless that forward is a recomputed one.

    Args:
        sums: float64 [E + 4], see above.
        counts_E: routes per expert before any were dropped; given once per forward.
        idx_TK: expert ids, -1 where dropped.
        aux_loss, z_loss: scalars.
    """
    if torch.compiler.is_compiling():
        from flashfusemoe_ds.ds import load_counts_operator  # not at the top: it loads torch's compiler

        load_counts_operator.tally(sums, counts_E, idx_TK, aux_loss, z_loss)
    else:
        add_unless_recomputed(sums, counts_E, idx_TK, aux_loss, z_loss)


@torch.no_grad()
def add_unless_recomputed(
    sums: Tensor, counts_E: Tensor | None, idx_TK: Tensor | None, aux_loss: Tensor | None, z_loss: Tensor | None
) -> None:
    """`tally` outside graphs."""
    # The number of the backward that this thread is in, -1 if in none. torch.utils.checkpoint asks the same.
    if torch._C._current_graph_task_id() != -1:
        return
    if counts_E is not None:
        sums[:-EXTRAS].add_(counts_E)
        sums[FORWARDS].add_(1)
    if idx_TK is not None:
        sums[KEPT].add_((idx_TK >= 0).sum())
    if aux_loss is not None:
        sums[AUX].add_(aux_loss.detach())
    if z_loss is not None:
        sums[Z].add_(z_loss.detach())


class CountingTopKGate(FusedTopKGate):
    """The gate of a deepspeed.moe layer, counting."""

    load_sums: Tensor

    def forward(self, input: Tensor, used_token: Tensor | None = None) -> tuple[Routing, Tensor]:
        """As FusedTopKGate."""
        routing, l_aux = super().forward(input, used_token)
        if self.training:
            tally(self.load_sums, routing.counts_E, routing.idx_TK if self.drop_tokens else None, l_aux.detach())
        return routing, l_aux


class CountingAutoEPRouter(FusedRouter):
    """The router of an AutoEP layer, counting. The auxiliary loss is made by the model, where nothing here sees it."""

    load_sums: Tensor

    def forward(self, x_TD: Tensor, expert_bias: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """As FusedRouter."""
        weight_TK, idx_TK, counts_E, logits_TE = super().forward(x_TD, expert_bias)
        if self.training:
            tally(self.load_sums, counts_E)
        return weight_TK, idx_TK, counts_E, logits_TE


class CountingRouter(Router):
    """The router of a MoELayer, counting, and with or without a bias to be moved."""

    load_sums: Tensor

    @property
    def counts(self) -> bool:
        """Whether this forward's routes are to be counted."""
        return self.training

    def tally(self, counts_E: Tensor) -> None:
        """Adds to `load_sums`, and to the bias's own `routed_counts` as before."""
        if self.gating.expert_bias:
            super().tally(counts_E)
        tally(self.load_sums, counts_E)


class CountingMoELayer(MoELayer):
    """A MoELayer whose router counts, adding what the router does not know: losses and dropped routes."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """As MoELayer."""
        y, losses = super().forward(hidden_states)
        if self.training and losses:
            detached = {name: loss.detach() for name, loss in losses.items()}
            tally(self.router.load_sums, aux_loss=detached.get("aux_loss"), z_loss=detached.get("z_loss"))
        return y, losses

    def _limited(self, routing: Routing) -> Routing:
        limited = super()._limited(routing)
        if self.training and _drops(self):
            tally(self.router.load_sums, idx_TK=limited.idx_TK)
        return limited


@dataclass(frozen=True)
class CountedLayer:
    """A layer that counts, and how to read its sums.

    Attributes:
        name: the layer's path in the model.
        module: the layer.
        router: the module that holds `load_sums`.
        num_experts: E, over all ranks.
        drops: whether routes can be dropped.
        aux_loss_coeff, z_loss_coeff: what the losses in the sums were multiplied by; 0 where there is no such loss.
        bias_name: the router's attribute that holds the bias on its choices, if it has one.
    """

    name: str
    module: nn.Module
    router: nn.Module
    num_experts: int
    drops: bool = False
    aux_loss_coeff: float = 0.0
    z_loss_coeff: float = 0.0
    bias_name: str | None = None

    @property
    def sums(self) -> Tensor:
        """float64 [E + 4]."""
        return self.router.load_sums


# By exact class: one of a user's own would lose what it overrides.
_COUNTING: dict[type[nn.Module], type[nn.Module]] = {
    FusedTopKGate: CountingTopKGate,
    FusedRouter: CountingAutoEPRouter,
    Router: CountingRouter,
    MoELayer: CountingMoELayer,
}


def find_layers(model: nn.Module) -> tuple[list[CountedLayer], list[str]]:
    """The MoE layers that can count, in the model's order, and the names of those that cannot: stock DeepSpeed's, and
    subclasses of MoELayer or of a router."""
    layers, others = [], []
    for path, module in model.named_modules():
        layer = _describe(path.replace("_orig_mod.", ""), module)  # without what torch.compile adds
        if layer is not None:
            layers.append(layer)
        elif isinstance(module, (StockMoE, AutoEPMoELayer, MoELayer)):
            others.append(path)
    return layers, others


def count_in_place(model: nn.Module, device: torch.device | str) -> list[CountedLayer]:
    """Makes every MoE layer that can count do so from now on, from zero."""
    layers, _ = find_layers(model)
    for layer in layers:
        for module in (layer.module, layer.router):
            module.__class__ = _COUNTING.get(type(module), type(module))
        layer.router.load_sums = torch.zeros(layer.num_experts + EXTRAS, dtype=torch.float64, device=device)
    return layers


def _describe(name: str, module: nn.Module) -> CountedLayer | None:
    """The layer as one that counts; None if it is no MoE layer, or cannot."""
    if isinstance(module, MoE):
        gate = module.deepspeed_moe.gate
        layer = CountedLayer(name, module, gate, module.num_experts, drops=gate.drop_tokens, aux_loss_coeff=1.0)
    elif isinstance(module, FusedAutoEPMoELayer):
        has_bias = module.router.e_score_correction_bias is not None
        bias_name = "e_score_correction_bias" if has_bias else None
        layer = CountedLayer(name, module, module.router, module.num_experts, bias_name=bias_name)
    elif type(module) in (MoELayer, CountingMoELayer):
        router = module.router
        layer = CountedLayer(
            name,
            module,
            router,
            module.num_experts,
            drops=_drops(module),
            aux_loss_coeff=router.aux_loss_coeff,
            z_loss_coeff=router.z_loss_coeff,
            bias_name="expert_bias" if router.gating.expert_bias else None,
        )
    else:
        return None
    return layer if type(layer.router) in (*_COUNTING, *_COUNTING.values()) else None


def _drops(layer: MoELayer) -> bool:
    return layer.allow_dropped_tokens and layer._limits()
