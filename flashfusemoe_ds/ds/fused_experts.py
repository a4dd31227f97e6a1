# SPDX-License-Identifier: GPL-3.0-or-later
"""Stacked experts that look like DeepSpeed's from outside: its state-dict names, its parameter marks, its `apply`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from flashfusemoe_ds.ds.expert_layout import ExpertLayout
from flashfusemoe_ds.nn.experts import GroupedExperts

STOCK_PREFIX = "deepspeed_experts."


class FusedExperts(GroupedExperts):
    """`GroupedExperts` made from the user's expert modules, which are consumed: their storage is freed.

    `state_dict` and `load_state_dict` speak stock names, `deepspeed_experts.{i}.<the expert's own name>`, so that
    checkpoints of stock DeepSpeed and of this layer are the same files. `named_parameters` lists the stacked ones.

    `apply(fn)` reaches the experts too: a model's own weight initialisation, written for nn.Linear, has the effect and
    the random draws that it has on stock experts.
    """

    def __init__(self, modules: list[nn.Module], layout: ExpertLayout) -> None:
        tensors = [dict(m.named_parameters()) for m in modules]
        down = tensors[0][f"{layout.down}.weight"]
        super().__init__(
            num_local_experts=len(modules),
            d_model=down.shape[0],
            intermediate_size=down.shape[1],
            activation=layout.activation,
            up_bias=layout.bias[0],
            down_bias=layout.bias[1],
            device=down.device,
            dtype=down.dtype,
        )
        self.layout = layout
        # Structure without storage: what `apply` hands to the user's function. In a tuple, because a module attribute
        # would register as a child.
        self._template = (copy.deepcopy(modules[0]).to("meta"),)
        for i, own in enumerate(tensors):
            self._write_expert(i, own)
        for name, parts in layout.sources().items():
            source, param = tensors[0][parts[0]], getattr(self, name)
            param.requires_grad_(source.requires_grad)
            # Marks that DeepSpeed and users put on parameters: allreduce, group_name, and the like.
            param.__dict__.update(source.__dict__)
            # Lists of parameters made before this find the successor here (ds/replace.py).
            param.num_parts = len(parts) * len(tensors)
            for own in tensors:
                for part in parts:
                    own[part].fused_into = param
                    own[part].data = own[part].data.new_empty(0)

    def reset_parameters(self) -> None:
        """Nothing: the weights come from the user's modules, and no random number may be drawn for them."""

    def stacked(self) -> dict[str, nn.Parameter]:
        """The stacked parameters by name."""
        return {name: getattr(self, name) for name in self.layout.sources()}

    def expert_tensors(self, i: int, stacked: dict[str, Tensor]) -> dict[str, Tensor]:
        """Expert i's tensors under its own names, from parameters (or gradients) by stacked name."""
        return self.layout.unstack({name: tensor[i] for name, tensor in stacked.items()})

    def _values(self, i: int) -> dict[str, Tensor]:
        return self.expert_tensors(i, {name: p.detach() for name, p in self.stacked().items()})

    @torch.no_grad()
    def _write_expert(self, i: int, own: dict[str, Tensor]) -> None:
        for name, value in self.layout.stack(own).items():
            getattr(self, name)[i].copy_(value)

    def apply(self, fn: Callable[[nn.Module], None]) -> FusedExperts:
        """nn.Module.apply, with the experts as the modules they were: weights, dtype, device and requires_grad that fn
        sets arrive.

        Weights are written back only if fn changed them: DeepSpeed's profiler applies functions that do not, between
        forward and backward, where autograd refuses parameters that were written to. Hooks that fn registers on an
        expert are lost: the modules it sees do not run.

        Raises:
            ValueError: fn renamed parameters, or treated parts of one stacked parameter differently.
        """
        part_of = {part: name for name, parts in self.layout.sources().items() for part in parts}
        kinds: dict[str, set[tuple[Any, ...]]] = {name: set() for name in self.layout.sources()}
        for i in range(self.num_local_experts):
            own = self._values(i)
            expert = self._as_module(own, part_of)
            expert.apply(fn)
            now = dict(expert.named_parameters())
            if set(now) != set(own):
                raise ValueError(
                    f"apply: the function changed an expert's parameters from {sorted(own)} to {sorted(now)}; "
                    "do that before the layer is built or replaced"
                )
            for name, param in now.items():
                kinds[part_of[name]].add((param.requires_grad, param.dtype, param.device))
            if any(not _same_values(now[name].detach(), own[name]) for name in own):
                self._write_expert(i, {name: p.detach() for name, p in now.items()})
        for name, kind in kinds.items():
            if len(kind) > 1:
                raise ValueError(f"apply: the function set {kind} on parts of the stacked {name}")
            param, (trained, dtype, device) = getattr(self, name), kind.pop()
            param.requires_grad_(trained)
            if (param.dtype, param.device) != (dtype, device):
                param.data = param.data.to(device, dtype)
        # The stacked parameters are no matrices: an initialisation by fan would scale them wrongly, a second time.
        stacked, self.__dict__["_parameters"] = self._parameters, {}
        try:
            fn(self)
        finally:
            self.__dict__["_parameters"] = stacked
        return self

    def _as_module(self, own: dict[str, Tensor], part_of: dict[str, str]) -> nn.Module:
        """One expert as the user's module, with copies of these weights."""
        expert = copy.deepcopy(self._template[0]).to_empty(device=self.down_proj.device).train(self.training)
        for name, param in expert.named_parameters():
            param.data = own[name].clone()
            param.requires_grad_(getattr(self, part_of[name]).requires_grad)
        return expert

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        stacked = {name: p if keep_vars else p.detach() for name, p in self.stacked().items()}
        for i in range(self.num_local_experts):
            for name, tensor in self.expert_tensors(i, stacked).items():
                destination[f"{prefix}{STOCK_PREFIX}{i}.{name}"] = tensor

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        for hook in self._load_state_dict_pre_hooks.values():
            hook(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        assign = local_metadata.get("assign_to_params_buffers", False)
        known, loaded, faults = set(), [], len(missing_keys) + len(error_msgs)
        for i in range(self.num_local_experts):
            own = self._values(i)
            for name, value in own.items():
                key = f"{prefix}{STOCK_PREFIX}{i}.{name}"
                known.add(key)
                if key not in state_dict:
                    missing_keys.append(key)
                elif state_dict[key].shape != value.shape:
                    error_msgs.append(
                        f"size mismatch for {key}: the checkpoint has {tuple(state_dict[key].shape)}, "
                        f"the expert {tuple(value.shape)}"
                    )
                else:
                    own[name] = state_dict[key]
            if assign:
                loaded.append(self.layout.stack(own))
            else:
                self._write_expert(i, own)
        # What is incomplete cannot be assigned as a whole; the reports above say what is missing.
        if assign and len(missing_keys) + len(error_msgs) == faults:
            self._assign(loaded)
        if strict:
            unexpected_keys.extend(key for key in state_dict if key.startswith(prefix) and key not in known)

    def _assign(self, experts: list[dict[str, Tensor]]) -> None:
        """load_state_dict(assign=True): parameters take dtype and device of what was loaded."""
        for name, old in self.stacked().items():
            new = nn.Parameter(torch.stack([own[name].detach() for own in experts]), old.requires_grad)
            new.__dict__.update(old.__dict__)
            setattr(self, name, new)


def _same_values(a: Tensor, b: Tensor) -> bool:
    """Equal, NaN with NaN; on the meta device there are no values to differ."""
    if a.is_meta or b.is_meta:
        return a.is_meta == b.is_meta
    return a.dtype == b.dtype and bool(((a == b) | ((a != a) & (b != b))).all())
