# SPDX-License-Identifier: GPL-3.0-or-later
"""`experts_implementation="flashfusemoe"`: the experts of a Transformers v5 model, all on one rank, in our kernels.

    import flashfusemoe_ds as ffmoe
    ffmoe.register_experts_implementation()
    model = AutoModelForCausalLM.from_pretrained(path, experts_implementation="flashfusemoe")

Transformers v5 looks the forward of every experts module up in a registry, by the name in the model's config. What
stands there under our name is `experts_forward`. The model keeps its router, its shared experts, its losses and its
packed parameters: nothing is converted, moved or renamed, so that whatever works on them (checkpoints, ZeRO, PEFT,
`set_experts_implementation`) goes on working.

    a module with                                     runs
      gate_up_proj [E, 2F, D] or up_proj [E, F, D],   in our kernels, on the parameters where they lie
        and one of our activations
      parameters lying transposed, or any other       the same stage with PyTorch's grouped products, which take any
        activation: GPT-OSS                           layout, around the module's own code
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import torch
from torch import Tensor, nn

try:
    import transformers
    from transformers.integrations.moe import ExpertsInterface
except ImportError as error:
    raise ImportError(
        f'experts_implementation="flashfusemoe" needs transformers >= 5.7 ({error}): pip install "flashfusemoe_ds[hf]"'
    ) from error

from flashfusemoe_ds.hf.activation import OwnActivation, known_activation
from flashfusemoe_ds.hf.transposed import TransposedProducts
from flashfusemoe_ds.kernels.activation import Activation
from flashfusemoe_ds.kernels.experts import experts
from flashfusemoe_ds.kernels.grouped_gemm import TorchGroupedGemm
from flashfusemoe_ds.kernels.products import ExpertProducts
from flashfusemoe_ds.kernels.select import check_gemm_backend, select_products
from flashfusemoe_ds.nn.checks import check_hidden
from flashfusemoe_ds.nn.experts import dtype_under_autocast

NAME = "flashfusemoe"
TRANSFORMERS_FROM = (5, 7)  # 5.6 lets a model take only names that it has itself

_NAMES = {"gate_up_proj", "gate_up_proj_bias", "up_proj", "up_proj_bias", "down_proj", "down_proj_bias"}
_INSTEAD = "choose another experts_implementation for this model"


def register_experts_implementation(*, gemm_backend: str | None = None, recompute_activations: bool = False) -> None:
    """Makes `experts_implementation="flashfusemoe"` known to Transformers, in this process. Call it before a model is
    built or loaded with that name. Called again, the new settings hold from the next forward on, for every model.

    Args:
        gemm_backend: as in MoELayer; None for the fastest that runs.
        recompute_activations: keep only the experts' input for the backward.

    Raises:
        ValueError: gemm_backend is no backend.
        ImportError: Transformers is older than 5.7.
    """
    check_gemm_backend(gemm_backend)
    if tuple(int(part) for part in transformers.__version__.split(".")[:2]) < TRANSFORMERS_FROM:
        raise ImportError(
            f'experts_implementation="{NAME}" needs transformers >= {".".join(map(str, TRANSFORMERS_FROM))}, not '
            f'{transformers.__version__}: pip install "flashfusemoe_ds[hf]"'
        )
    settings = {"gemm_backend": gemm_backend, "recompute": bool(recompute_activations)}
    ExpertsInterface.register(NAME, functools.partial(experts_forward, **settings))


def experts_forward(
    module: nn.Module,
    hidden_states: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    *,
    gemm_backend: str | None = None,
    recompute: bool = False,
) -> Tensor:
    """The forward of an experts module: every token's weighted sum over its experts.

    Args:
        module: of a class under Transformers' `use_experts_implementation`.
        hidden_states: [T, D].
        top_k_index: int [T, K] ids of experts. A route with any other id counts for nothing, as in Transformers, whose
            id num_experts means "no expert of this module".
        top_k_weights: [T, K], any floating dtype.
        gemm_backend, recompute: as in `register_experts_implementation`.

    Returns:
        [T, D] in the dtype of hidden_states.

    Raises:
        ValueError: the module computes what this implementation does not, or the operands do not fit together.
    """
    weights = _Weights.of(module)
    _check_module(module, weights)
    _check_operands(module, weights, hidden_states, top_k_index, top_k_weights)
    x_TD = hidden_states.to(dtype_under_autocast(weights.down))  # as Transformers' own grouped_mm does
    weight_TK = top_k_weights.to(torch.float64 if x_TD.dtype is torch.float64 else torch.float32)
    num_experts = weights.down.shape[0]
    idx_TK = top_k_index.masked_fill((top_k_index < 0) | (top_k_index >= num_experts), -1)
    activation = known_activation(module)
    if activation is not None and not module.is_transposed:
        products = select_products(gemm_backend, x_TD, weights.widths(transposed=False), num_experts)
        y_TD = _stage(x_TD, idx_TK, weight_TK, weights.contiguous(), activation, products, recompute)
    else:
        y_TD = _stage_by_torch(module, x_TD, idx_TK, weight_TK, weights, activation, gemm_backend, recompute)
    return y_TD.to(hidden_states.dtype)


class _Weights(NamedTuple):
    """An experts module's parameters as they lie."""

    up: Tensor
    down: Tensor
    b_up: Tensor | None
    b_down: Tensor | None

    @classmethod
    def of(cls, module: nn.Module) -> _Weights:
        up = "gate_up_proj" if module.has_gate else "up_proj"
        biases = (getattr(module, f"{up}_bias"), module.down_proj_bias) if module.has_bias else (None, None)
        return cls(getattr(module, up), module.down_proj, *biases)

    def widths(self, *, transposed: bool) -> tuple[int, int, int]:
        """(D, F, H)."""
        (_, d, f), h = self.down.shape, self.up.shape[1]
        return (f, d, self.up.shape[2]) if transposed else (d, f, h)

    def contiguous(self) -> _Weights:
        """For the kernels, which know no strides; a copy only of what somebody put in a parameter's place."""
        return _Weights(*(None if t is None else t.contiguous() for t in self))


def _check_module(module: nn.Module, weights: _Weights) -> None:
    """ValueError for experts that compute something else than this file."""
    name = type(module).__name__
    if getattr(module, "has_post_expert_norm", False):
        raise ValueError(f"{name} normalises every expert's output, which {NAME!r} does not; {_INSTEAD}")
    unknown = sorted(set(module._parameters) - _NAMES)
    if unknown:
        raise ValueError(f"{name} has the parameters {', '.join(unknown)}, which {NAME!r} does not know; {_INSTEAD}")
    dtypes = {t.dtype for t in weights if t is not None}
    if len(dtypes) > 1 or not weights.up.is_floating_point():
        raise ValueError(
            f"{name} has parameters of {', '.join(sorted(map(str, dtypes)))}; {NAME!r} takes one floating-point dtype"
        )
    d, f, h = weights.widths(transposed=module.is_transposed)
    num_experts = weights.down.shape[0]
    expected = (num_experts, d, h) if module.is_transposed else (num_experts, h, d)
    if tuple(weights.up.shape) != expected or h != (2 * f if module.has_gate else f):
        raise ValueError(
            f"{name} has an up-projection {tuple(weights.up.shape)} and a down-projection "
            f"{tuple(weights.down.shape)}, which do not fit together; {_INSTEAD}"
        )


def _check_operands(
    module: nn.Module, weights: _Weights, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> None:
    """ValueError unless rows and routes fit the module and each other."""
    name = type(module).__name__
    check_hidden(name, hidden_states, weights.widths(transposed=module.is_transposed)[0], weights.down)
    shapes = [tuple(t.shape) for t in (hidden_states, top_k_index, top_k_weights)]
    if hidden_states.dim() != 2 or top_k_index.dim() != 2 or shapes[1] != shapes[2] or shapes[0][0] != shapes[1][0]:
        raise ValueError(
            f"{name}: rows have shape {shapes[0]}, ids of experts {shapes[1]} and their weights {shapes[2]}; expected "
            "[T, D], [T, K] and [T, K]"
        )


def _stage(
    x_TD: Tensor,
    idx_TK: Tensor,
    weight_TK: Tensor,
    weights: _Weights,
    activation: Activation,
    products: ExpertProducts,
    recompute: bool,
) -> Tensor:
    return experts(
        x_TD, idx_TK, weight_TK, weights.up, weights.down, activation, products, b_up_eH=weights.b_up,
        b_down_eD=weights.b_down, recompute=recompute,
    )  # fmt: skip


@torch.compiler.disable(
    reason="flashfusemoe_ds: experts whose parameters lie transposed, or whose activation is the model's own code, "
    "run in eager mode, between two graphs"
)
def _stage_by_torch(
    module: nn.Module,
    x_TD: Tensor,
    idx_TK: Tensor,
    weight_TK: Tensor,
    weights: _Weights,
    activation: Activation | None,
    gemm_backend: str | None,
    recompute: bool,
) -> Tensor:
    """The stage with products of PyTorch's, for any layout, and around any activation."""
    if gemm_backend == "triton":
        why = "transposed parameters" if module.is_transposed else "an activation that is not among its own"
        raise ValueError(
            f"gemm_backend is 'triton', but {type(module).__name__} has {why}; valid here: 'grouped_mm', 'reference', "
            "or leave it out"
        )
    widths, num_experts = weights.widths(transposed=module.is_transposed), weights.down.shape[0]
    if gemm_backend is None:
        usable = TorchGroupedGemm.why_not(x_TD.dtype, x_TD.device, widths, num_experts) is None
        gemm_backend = "grouped_mm" if usable else "reference"
    products = select_products(gemm_backend, x_TD, widths, num_experts)
    return _stage(
        x_TD,
        idx_TK,
        weight_TK,
        weights,
        OwnActivation.of(module) if activation is None else activation,
        TransposedProducts(products) if module.is_transposed else products,
        recompute,
    )
