# SPDX-License-Identifier: GPL-3.0-or-later
"""MoELayer: route, dispatch, experts, combine, and what runs beside them. Knows no DeepSpeed engine.

x [*, D]
  router                 who goes where, and how much it counts
  latent down (optional) [T, D] -> [T, latent]
  dispatch               tokens to the ranks of their experts
  experts                fused grouped MLPs
  combine                sums back to their tokens
  latent up (optional)   [T, latent] -> [T, D]
  + shared experts (optional)
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flashfusemoe_ds.config import FlashFuseMoEConfig, OverlapConfig
from flashfusemoe_ds.dispatch.base import Dispatcher, Geometry
from flashfusemoe_ds.dispatch.local import LocalDispatcher
from flashfusemoe_ds.dispatch.select import check_ep_backend, make_dispatcher
from flashfusemoe_ds.kernels.activation import get_activation
from flashfusemoe_ds.nn.checks import check_coefficient, check_hidden, check_positive
from flashfusemoe_ds.nn.experts import GroupedExperts
from flashfusemoe_ds.nn.functional import route_to_experts
from flashfusemoe_ds.nn.limits import capacity, limit_routes, refuse_overflow
from flashfusemoe_ds.nn.parallel_experts import LateGradient, SideStream, through_experts
from flashfusemoe_ds.nn.router import Gating, Router
from flashfusemoe_ds.nn.shared import SharedExperts
from flashfusemoe_ds.types import Routing


class MoELayer(nn.Module):
    """A Mixture-of-Experts feed-forward layer, dropless unless told otherwise.

    Args:
        d_model: D, the hidden size.
        ffn_dim: width of the up-projection: gate and up stacked (F = ffn_dim // 2) for a gated activation, F for a
            plain one.
        num_experts: E, routed experts over all ranks.
        top_k: experts per token.
        activation: swiglu, geglu, geglu_tanh, reglu, relu_squared (gated), silu, gelu, gelu_tanh, relu (plain).
        gating: a name or a `Gating`.
        num_shared_experts: MLPs of the same shape that every token passes.
        latent_dim: run dispatch and experts in this smaller hidden size, between two learnt projections.
        capacity_factor: at most ceil(T * K / E * capacity_factor) routes of this rank per expert.
        max_tokens_per_expert: the same limit as a number; with both, the smaller holds.
        allow_dropped_tokens: whether routes over the limit are dropped (smallest weights first). If not, exceeding it
            raises RuntimeError on every rank.
        aux_loss_coeff: where positive, `losses` holds "aux_loss", the load-balancing loss times this.
        z_loss_coeff: where positive, `losses` holds "z_loss", the router's z-loss times this.
        recompute_activations: keep only the experts' input for the backward.
        recompute_dispatch: once experts are sharded, keep the rows that this rank sent, not those that it received,
            and send them again in the backward.
        gemm_backend: "triton", "grouped_mm" or "reference"; None for the fastest that runs on the operands.

    Initialisation: gate kaiming_uniform times 0.01, every expert's matrices kaiming_uniform on their own.
    """

    def __init__(
        self,
        d_model: int,
        ffn_dim: int,
        num_experts: int,
        top_k: int,
        activation: str = "swiglu",
        gating: str | Gating = "softmax_topk",
        num_shared_experts: int = 0,
        latent_dim: int | None = None,
        capacity_factor: float | None = None,
        max_tokens_per_expert: int | None = None,
        allow_dropped_tokens: bool = False,
        aux_loss_coeff: float = 0.0,
        z_loss_coeff: float = 0.0,
        recompute_activations: bool = False,
        recompute_dispatch: bool = False,
        gemm_backend: str | None = None,
    ) -> None:
        super().__init__()
        for name, value in (("d_model", d_model), ("ffn_dim", ffn_dim), ("num_experts", num_experts)):
            check_positive(name, value)
        for name, value in (("latent_dim", latent_dim), ("max_tokens_per_expert", max_tokens_per_expert)):
            if value is not None:
                check_positive(name, value)
        if capacity_factor is not None and not 0 < capacity_factor < math.inf:
            raise ValueError(f"capacity_factor is {capacity_factor}; it must be positive, or None for no limit")
        check_coefficient("aux_loss_coeff", aux_loss_coeff)
        check_coefficient("z_loss_coeff", z_loss_coeff)
        if num_shared_experts < 0:
            raise ValueError(f"num_shared_experts is {num_shared_experts}; it must be 0 or more")
        gated = get_activation(activation).gated
        if gated and ffn_dim % 2:
            raise ValueError(f"ffn_dim is {ffn_dim}; with the gated activation {activation!r} it must be even")

        self.d_model, self.num_experts, self.top_k = d_model, num_experts, top_k
        self.capacity_factor, self.max_tokens_per_expert = capacity_factor, max_tokens_per_expert
        self.allow_dropped_tokens = allow_dropped_tokens
        intermediate = ffn_dim // 2 if gated else ffn_dim
        width = latent_dim or d_model
        self.router = Router(d_model, num_experts, top_k, gating, aux_loss_coeff, z_loss_coeff)
        self.experts = GroupedExperts(
            num_experts,
            width,
            intermediate,
            activation,
            gemm_backend=gemm_backend,
            recompute_activations=recompute_activations,
            recompute_dispatch=recompute_dispatch,
        )
        self.latent_down = nn.Linear(d_model, latent_dim, bias=False) if latent_dim else None
        self.latent_up = nn.Linear(latent_dim, d_model, bias=False) if latent_dim else None
        self.shared_experts = (
            SharedExperts(num_shared_experts, d_model, intermediate, activation) if num_shared_experts else None
        )
        self.ep_group: dist.ProcessGroup | None = None
        self.dispatcher: Dispatcher = LocalDispatcher()
        self.overlap = OverlapConfig()
        self._side_stream = SideStream()

    @property
    def expert_params(self) -> list[nn.Parameter]:
        """Parameters of this rank's routed experts, which must not be averaged over the expert-parallel group."""
        return list(self.experts.parameters())

    def shard_experts(self, ep_group: dist.ProcessGroup, ep_backend: str = "nccl", **settings: Any) -> MoELayer:
        """Keeps this rank's share of the experts and exchanges tokens with the group's other ranks.

        Call it once, on every rank, before an optimizer is built. Rank p keeps experts [p * e, (p + 1) * e) of the
        layer it holds, so ranks that start from equal weights hold the parts of one layer.

        The parameters are marked `allreduce = False`: their gradients are sums over the whole group's tokens. Where
        dense gradients are averaged over W ranks, add these up over the W / ep_size ranks that hold the same experts,
        and divide by W.

        Args:
            ep_group: one rank per share.
            ep_backend: the transport, as in the "flashfusemoe" section (docs/config.md).
            settings: further keys of that section: deep_ep, symm_mem, overlap, as dicts.

        Raises:
            ValueError: the group's size does not divide num_experts, the backend cannot run, a setting is wrong, or it
                is sharded already.
            ImportError: the backend's package is missing.
        """
        if self.ep_group is not None:
            raise ValueError("shard_experts was already called on this layer")
        config = FlashFuseMoEConfig.from_section({"ep_backend": ep_backend, **settings})
        check_ep_backend(ep_backend, ep_group)
        ep_size, rank = dist.get_world_size(ep_group), dist.get_rank(ep_group)
        if self.num_experts % ep_size:
            raise ValueError(f"ep_group has {ep_size} ranks; its size must divide num_experts ({self.num_experts})")
        geometry = Geometry(self.num_experts, self.experts.d_model, self.top_k, self.experts.down_proj.dtype)
        self.dispatcher, self.overlap = make_dispatcher(config, ep_group, geometry), config.overlap
        local = self.num_experts // ep_size
        for name, param in list(self.experts.named_parameters()):
            kept = nn.Parameter(param.detach()[rank * local : (rank + 1) * local].clone(), param.requires_grad)
            kept.allreduce = False
            setattr(self.experts, name, kept)
        self.experts.num_local_experts = local
        self.ep_group = ep_group
        return self

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """[*, D] -> ([*, D], losses). Losses are scalar float32 means over this rank's tokens.

        Raises:
            ValueError: wrong hidden size, device or dtype.
            RuntimeError: an expert exceeds its limit and dropping is not allowed.
        """
        check_hidden("MoELayer", hidden_states, self.d_model, self.router.weight)
        x_TD = hidden_states if hidden_states.dim() == 2 else hidden_states.reshape(-1, self.d_model)
        rows_TD = self.experts.prepare(x_TD if self.latent_down is None else self.latent_down(x_TD))
        if self.dispatcher.ep_size == 1 and self.latent_down is None and not self._limits():
            y_TD, losses = self._on_this_gpu(x_TD, rows_TD)
            return (y_TD if hidden_states.dim() == 2 else y_TD.reshape(hidden_states.shape)), losses
        parallel, late = self.dispatcher.ep_size > 1, None
        if parallel and not torch.compiler.is_compiling() and self.overlap.input_grad and self.overlap.router_grad:
            late = LateGradient()
            rows_TD = late.mark(rows_TD)
        routing = self._limited(self.router(x_TD))
        if parallel and torch.compiler.is_compiling():
            from flashfusemoe_ds.nn import compiled  # not at the top: it loads torch's compiler

            y_TD, shared_TD = compiled.outside_graphs(self._routed, x_TD, rows_TD, routing, late)
        else:
            y_TD, shared_TD = self._routed(x_TD, rows_TD, routing, late)
        if self.latent_up is not None:
            y_TD = self.latent_up(y_TD)
        if self.shared_experts is not None:
            y_TD = y_TD + (self.shared_experts(x_TD) if shared_TD is None else shared_TD)
        return (y_TD if hidden_states.dim() == 2 else y_TD.reshape(hidden_states.shape)), routing.losses

    def _on_this_gpu(self, x_TD: Tensor, rows_TD: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The layer where nothing is dropped or sent: y [T, D] and the losses."""
        router, experts = self.router, self.experts  # nn.Module looks longer for what is not in its __dict__
        (w_up, w_down, b_up, b_down), products = experts.operands(rows_TD)
        counts = router.counts
        y_TD, losses, counts_E = route_to_experts(
            x_TD, rows_TD, router.weight, w_up, w_down, experts.activation, products, router.gating, self.top_k,
            router.aux_loss_coeff, router.z_loss_coeff, b_up=b_up, b_down=b_down, bias_E=router.bias_E,
            count=counts, recompute=experts.recompute_activations,
        )  # fmt: skip
        if counts:
            router.tally(counts_E)
        if self.shared_experts is not None:
            # Nobody else has seen these sums yet, so that they may be added to in place.
            y_TD = self.shared_experts(rows_TD, y_TD)
        return y_TD, losses

    def _routed(
        self, x_TD: Tensor, rows_TD: Tensor, routing: Routing, late: LateGradient | None
    ) -> tuple[Tensor, Tensor | None]:
        """The routed experts' sums, and the shared experts' where they run beside the exchange."""
        beside = None
        if self.shared_experts is not None and self.dispatcher.ep_size > 1 and self.overlap.shared_experts:
            beside = partial(self._side_stream.start, self.shared_experts, x_TD)
        return through_experts(rows_TD, routing, self.experts, self.dispatcher, self.overlap, beside=beside, late=late)

    @torch.no_grad()
    def update_expert_bias(self, group: dist.ProcessGroup | None = None) -> None:
        """One step of aux-loss-free balancing; call after the optimizer's step.

        Args:
            group: ranks whose tokens count, usually the data-parallel group; None counts this rank alone.
        """
        if group is not None and self.router.gating.expert_bias:
            dist.all_reduce(self.router.routed_counts, group=group)
        self.router.update_expert_bias()

    def _limits(self) -> bool:
        return self.max_tokens_per_expert is not None or self.capacity_factor is not None

    def _limited(self, routing: Routing) -> Routing:
        """Applies capacity_factor and max_tokens_per_expert."""
        if not self._limits():
            return routing
        num_tokens, num_routes = routing.idx_TK.shape[0], routing.idx_TK.numel()
        limits = [] if self.max_tokens_per_expert is None else [self.max_tokens_per_expert]
        if self.capacity_factor is not None:
            limits.append(capacity(num_routes, self.num_experts, self.capacity_factor))
        limit = min(*limits, num_tokens)  # no expert sees a token twice
        if self.allow_dropped_tokens:
            return limit_routes(routing, limit)
        settings = f"max_tokens_per_expert={self.max_tokens_per_expert}, capacity_factor={self.capacity_factor}"
        if not torch.compiler.is_compiling():
            refuse_overflow(routing.counts_E, limit, settings, self.ep_group)
            return routing
        from flashfusemoe_ds.nn import compiled  # not at the top: it loads torch's compiler

        if self.dispatcher.ep_size > 1:
            compiled.outside_graphs(refuse_overflow, routing.counts_E, limit, settings, self.ep_group)
            return routing
        counts_E = routing.counts_E
        idx_TK = compiled.refuse_overflow(routing.idx_TK, counts_E, limit, settings)
        return Routing(idx_TK, routing.weight_TK, counts_E, routing.losses)

    def extra_repr(self) -> str:
        shown: dict[str, Any] = {"d_model": self.d_model, "num_experts": self.num_experts, "top_k": self.top_k}
        return ", ".join(f"{k}={v}" for k, v in shown.items()) + f", dispatch={self.dispatcher.name}"
