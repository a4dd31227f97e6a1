# SPDX-License-Identifier: GPL-3.0-or-later
"""Training steps of a model in plain PyTorch, without DeepSpeed's engine: all that is not the model.

    precision  parameters  gradients  forward
    autocast   float32     float32    under bfloat16 autocast: FlashFusedMoE's published benchmark
    bf16       bfloat16    bfloat16   as the parameters; the optimizer has float32 copies, like DeepSpeed's bf16 engine
    float32    float32     float32    as the parameters

Dense gradients are averaged over all ranks while the backward runs, experts' gradients summed over the ranks that hold
the same experts. All gradients are clipped to a norm over all ranks. AdamW is torch's, fused on GPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from device_trace import BACKWARD, FORWARD, OPTIMIZER
from seed_layers import routed_layers
from seed_model import SeedLM
from torch import Tensor, nn
from torch.nn.utils import get_total_norm
from torch.profiler import record_function

from flashfusemoe_ds import OverlappedGradSync

PRECISIONS = {"autocast": torch.float32, "bf16": torch.bfloat16, "float32": torch.float32}  # of the parameters


@dataclass(frozen=True)
class TrainingGroups:
    """Process groups of one rank.

    Attributes:
        everyone: who averages dense gradients.
        ep_group: who shares one set of experts.
        same_experts: who holds the same experts.
    """

    everyone: Any
    ep_group: Any
    same_experts: Any


class PlainTraining:
    """One model's training; call it with words [B, S + 1] for a step, which returns the loss.

    Args:
        forward: the model, or what torch.compile made of it.
        learning_rate, gradient_clipping: the latter 0 for none.
    """

    def __init__(
        self,
        model: SeedLM,
        forward: Callable[[Tensor], Any],
        precision: str,
        learning_rate: float,
        gradient_clipping: float,
        groups: TrainingGroups,
    ) -> None:
        self.model, self.forward, self.precision = model, forward, precision
        self.gradient_clipping, self.groups = gradient_clipping, groups
        device = next(model.parameters()).device
        self.device_type = device.type
        parts = [layer.parts for layer in routed_layers(model)]
        self.experts = [param for part in parts for param in part.experts]
        known = set(self.experts)
        self.dense = [param for param in model.parameters() if param not in known]
        world, ep_size = dist.get_world_size(groups.everyone), dist.get_world_size(groups.ep_group)
        # A rank's loss is a mean over its tokens, and an expert's gradient the sum over ep_size ranks' losses.
        self.expert_scale = (ep_size if ep_size > 1 and parts[0].averaged else 1) / world
        self.syncs: list[OverlappedGradSync] = []
        if world > 1:
            self.syncs.append(OverlappedGradSync(self.dense[::-1], groups.everyone))
        if dist.get_world_size(groups.same_experts) > 1:
            self.syncs.append(OverlappedGradSync(self.experts[::-1], groups.same_experts, divisor=1.0))
        params = [*self.dense, *self.experts]
        self.masters = None
        if precision == "bf16":
            self.masters = [nn.Parameter(param.detach().float()) for param in params]
        self.optimizer = torch.optim.AdamW(
            self.masters or params,
            lr=learning_rate,
            betas=(0.9, 0.95),
            weight_decay=0.1,
            fused=self.device_type == "cuda",
        )

    def __call__(self, words_BS: Tensor) -> Tensor:
        with record_function(FORWARD), self.autocast():
            loss = self.forward(words_BS).loss
        with record_function(BACKWARD):
            loss.backward()
            for sync in self.syncs:
                sync.finish()
        with record_function(OPTIMIZER):
            self._update()
        return loss.detach()

    def autocast(self) -> torch.autocast:
        return torch.autocast(self.device_type, torch.bfloat16, enabled=self.precision == "autocast")

    @torch.no_grad()
    def _update(self) -> None:
        updated = params = [*self.dense, *self.experts]
        if self.masters is not None:
            updated = self.masters
            for master in updated:
                master.grad = torch.empty_like(master)
            torch._foreach_copy_([master.grad for master in updated], [param.grad for param in params])
            self.model.zero_grad()
        gradients = [param.grad for param in updated]
        self._clip(gradients[: len(self.dense)], gradients[len(self.dense) :])
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.masters is not None:
            torch._foreach_copy_(params, self.masters)

    def _clip(self, dense: list[Tensor], experts: list[Tensor]) -> None:
        """Scales all gradients so that their norm over all ranks is at most `gradient_clipping`; the experts' by
        `expert_scale` as well. The host waits for nothing."""
        scale = torch.ones((), device=dense[0].device)
        if self.gradient_clipping:
            of_experts = (get_total_norm(experts).float() * self.expert_scale) ** 2
            if dist.get_world_size(self.groups.ep_group) > 1:
                dist.all_reduce(of_experts, group=self.groups.ep_group)
            norm = (get_total_norm(dense).float() ** 2 + of_experts).sqrt()
            scale = (self.gradient_clipping / (norm + 1e-6)).clamp(max=1.0)
            torch._foreach_mul_(dense, scale)
        torch._foreach_mul_(experts, scale * self.expert_scale)
