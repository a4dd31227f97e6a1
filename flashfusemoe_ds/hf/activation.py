# SPDX-License-Identifier: GPL-3.0-or-later
"""Which activation a Transformers experts module has: one of ours, or its own code between our products.

Transformers v5 gives every experts class `_apply_gate`, from [N, 2F] to [N, F], or, where the class has no gate,
`act_fn`. Its default `_apply_gate` over an `act_fn` of a type in the table below is an activation that our kernels
have. Everything else (clamps, interleaved gates, other curves) runs as the module's own code on H, differentiated by
autograd. The table knows exact types, so that a subclass or a new formula is never taken for one of ours.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import activations as theirs
from transformers.integrations import moe

from flashfusemoe_ds.kernels.activation import Activation, get_activation

# f of each type, in our terms: (gated, f(gate) * up; plain, f(H)). None where the kernels lack it.
_BY_TYPE: dict[type[nn.Module], tuple[str, str | None]] = {
    theirs.SiLUActivation: ("swiglu", "silu"),
    nn.SiLU: ("swiglu", "silu"),
    theirs.GELUActivation: ("geglu", "gelu"),
    theirs.GELUTanh: ("geglu_tanh", "gelu_tanh"),
    theirs.NewGELUActivation: ("geglu_tanh", "gelu_tanh"),
    nn.ReLU: ("reglu", "relu"),
    theirs.ReLUSquaredActivation: ("relu_squared", None),
}
_BY_FUNCTION: dict[Callable[[Tensor], Tensor], tuple[str, str | None]] = {F.silu: ("swiglu", "silu")}


def known_activation(experts: nn.Module) -> Activation | None:
    """The module's activation as our kernels have it, None where they do not."""
    gated = getattr(experts, "has_gate", True)
    if gated and type(experts)._apply_gate is not moe._default_apply_gate:
        return None
    act_fn = getattr(experts, "act_fn", None)
    names = _BY_TYPE.get(type(act_fn)) if isinstance(act_fn, nn.Module) else _BY_FUNCTION.get(act_fn)
    name = None if names is None else names[0 if gated else 1]
    return None if name is None else get_activation(name)


@dataclass(frozen=True)
class OwnActivation(Activation):
    """An activation that is a module's own code, for products that are PyTorch's: no kernel can take it.

    Attributes:
        apply: [N, H] -> [N, F], row by row.
    """

    apply: Callable[[Tensor], Tensor]

    @classmethod
    def of(cls, experts: nn.Module) -> OwnActivation:
        """What this experts module computes between its products."""
        gated = getattr(experts, "has_gate", True)
        apply = experts._apply_gate if gated else experts.act_fn
        return cls(name=f"{type(experts).__name__}'s own", gated=gated, curve=_no_curve, apply=apply)

    def forward(self, h_NH: Tensor) -> Tensor:
        """[N, H] -> [N, F], in h's dtype. ValueError if it has parameters, which would get no gradient."""
        with torch.enable_grad():
            value_NF = self.apply(h_NH.detach())
        if value_NF.requires_grad:
            raise ValueError(
                f"the activation is {self.name}, and has trainable parameters of its own; valid for "
                "experts_implementation='flashfusemoe' are activations without: choose another experts_implementation"
            )
        return value_NF

    def backward(self, h_NH: Tensor, da_NF: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the recomputed value [N, F] and the gradient with respect to H [N, H], by autograd."""
        with torch.enable_grad():
            h_NH = h_NH.detach().requires_grad_()
            value_NF = self.apply(h_NH)
        (dh_NH,) = torch.autograd.grad(value_NF, h_NH, da_NF)
        return value_NF.detach(), dh_NH


def _no_curve(g: Tensor) -> Any:
    raise AssertionError("an OwnActivation has no curve; it is for TorchProducts")
