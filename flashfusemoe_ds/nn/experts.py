# SPDX-License-Identifier: GPL-3.0-or-later
"""The experts of one rank as a module: stacked and fused, or any user's modules run one after another.

Both turn a `Dispatched` into y [R, D], each row the weighted sum of its experts on this rank.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from flashfusemoe_ds.kernels.activation import get_activation
from flashfusemoe_ds.kernels.experts import experts
from flashfusemoe_ds.kernels.gather_sum import gather_sum
from flashfusemoe_ds.kernels.order import sort_by_expert
from flashfusemoe_ds.kernels.precision import compute_dtype
from flashfusemoe_ds.kernels.products import ExpertProducts, UpWeights
from flashfusemoe_ds.kernels.select import check_gemm_backend, select_products
from flashfusemoe_ds.types import Dispatched


def dtype_under_autocast(t: Tensor) -> torch.dtype:
    """Autocast's dtype where that is on, the tensor's own where it is off or float64: as torch's products have it."""
    device = t.device.type
    if t.dtype is torch.float64 or not torch.is_autocast_enabled(device):
        return t.dtype
    return torch.get_autocast_dtype(device)


def under_autocast(t: Tensor) -> Tensor:
    """The tensor in that dtype. Parameters stay as they are: the experts' node casts them, and keeps no copies."""
    return t.to(dtype_under_autocast(t))


def check_dtypes(x: Tensor, *parameters: Tensor | None) -> None:
    """ValueError unless the parameters are of x's dtype, or autocast makes them so."""
    for param in parameters:
        if param is not None and dtype_under_autocast(param) is not x.dtype:
            raise ValueError(
                f"input is {x.dtype}, the experts' parameters {dtype_under_autocast(param)}; cast one or use autocast"
            )


class GroupedExperts(nn.Module):
    """All experts of a rank in four stacked parameters, computed together.

    Parameters (Transformers v5's layout; a plain activation has `up_proj` [e, F, D] in place of `gate_up_proj`):
        gate_up_proj [e, 2F, D], down_proj [e, D, F], and with `bias` gate_up_proj_bias [e, 2F], down_proj_bias [e, D].

    Attributes:
        gemm_backend: None for the fastest that runs, or a name.
        recompute_activations: keep only X for the backward.
        recompute_dispatch: across ranks, keep the rows sent, not those received, and send them again in the backward.
    """

    def __init__(
        self,
        num_local_experts: int,
        d_model: int,
        intermediate_size: int,
        activation: str,
        *,
        up_bias: bool = False,
        down_bias: bool = False,
        gemm_backend: str | None = None,
        recompute_activations: bool = False,
        recompute_dispatch: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.num_local_experts, self.d_model, self.intermediate_size = num_local_experts, d_model, intermediate_size
        self.activation = get_activation(activation)
        check_gemm_backend(gemm_backend)
        self.gemm_backend, self.recompute_activations = gemm_backend, recompute_activations
        self.recompute_dispatch = recompute_dispatch
        width = self.activation.up_width(intermediate_size)
        self.up_name = "gate_up_proj" if self.activation.gated else "up_proj"

        def stacked(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(num_local_experts, *shape, device=device, dtype=dtype))

        self.register_parameter(self.up_name, stacked(width, d_model))
        self.register_parameter(f"{self.up_name}_bias", stacked(width) if up_bias else None)
        self.register_parameter("down_proj", stacked(d_model, intermediate_size))
        self.register_parameter("down_proj_bias", stacked(d_model) if down_bias else None)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """kaiming_uniform for each expert's matrices on its own, as nn.Linear has it; zero biases."""
        for name, param in self.named_parameters(recurse=False):
            if name.endswith("_bias"):
                param.zero_()
            else:
                for matrix in param:
                    nn.init.kaiming_uniform_(matrix, a=math.sqrt(5))

    def extra_repr(self) -> str:
        return (
            f"num_local_experts={self.num_local_experts}, d_model={self.d_model}, "
            f"intermediate_size={self.intermediate_size}, activation={self.activation.name}"
        )

    def flops(self, num_routes: int) -> int:
        """Floating-point operations of one forward (2 per multiply-add), for profilers."""
        width = self.activation.up_width(self.intermediate_size)
        return 2 * num_routes * self.d_model * (width + self.intermediate_size)

    def _products(self, x: Tensor) -> ExpertProducts:
        widths = (self.d_model, self.intermediate_size, self.activation.up_width(self.intermediate_size))
        return select_products(self.gemm_backend, x, widths, self.num_local_experts)

    def prepare(self, x_TD: Tensor) -> Tensor:
        """The rows to dispatch, in the dtype the experts compute in. ValueError for what they cannot take: here,
        before any rank waits for another."""
        x_TD = under_autocast(x_TD)
        check_dtypes(x_TD, *self._parameters.values())
        self._products(x_TD)
        return x_TD

    def operands(self, x: Tensor) -> tuple[tuple[UpWeights, Tensor, Tensor | None, Tensor | None], ExpertProducts]:
        """What the experts stage takes beside the rows `x`: (w_up, w_down, b_up, b_down), and the backend."""
        w_up, b_up = getattr(self, self.up_name), getattr(self, f"{self.up_name}_bias")
        weights = w_up, self.down_proj, b_up, self.down_proj_bias
        if parametrize.is_parametrized(self):
            # `prepare` has not seen these: looking at a computed weight is computing it.
            check_dtypes(x, *weights)
        return weights, self._products(x)

    def forward(self, sent: Dispatched) -> Tensor:
        (w_up, w_down, b_up, b_down), products = self.operands(sent.x_RD)
        return experts(
            sent.x_RD,
            sent.idx_RK,
            sent.weight_RK,
            w_up,
            w_down,
            self.activation,
            products,
            b_up_eH=b_up,
            b_down_eD=b_down,
            num_routes=sent.num_routes,
            recompute=self.recompute_activations,
        )


class ModuleExperts(nn.Module):
    """Any modules as experts: dropless, one after another on exactly their own tokens.

    The modules see [1, 1, n, D], the rank that DeepSpeed's experts see, and may return a tuple whose first entry is
    the output. One without tokens still runs, on two rows of zeros, so that its parameters get zero gradients, not
    None.
    """

    def __init__(self, modules: list[nn.Module]) -> None:
        super().__init__()
        # The name is DeepSpeed's: its checkpoints address experts by it.
        self.deepspeed_experts = nn.ModuleList(modules)
        self.num_local_experts = len(modules)

    def flops(self, num_routes: int) -> int:
        """0: the modules are ordinary ones, which profilers count by themselves."""
        return 0

    def prepare(self, x_TD: Tensor) -> Tensor:
        """The rows to dispatch: as they are, the modules know what they take."""
        return x_TD

    def forward(self, sent: Dispatched) -> Tensor:
        if torch.compiler.is_compiling():
            from flashfusemoe_ds.nn import compiled  # not at the top: it loads torch's compiler

            return compiled.outside_graphs(self._run, sent)
        return self._run(sent)

    def _run(self, sent: Dispatched) -> Tensor:
        order = sort_by_expert(sent.idx_RK, self.num_local_experts, sent.num_routes)
        ends = order.ends_e.tolist()
        outputs = []
        for expert, start, end in zip(self.deepspeed_experts, [0, *ends[:-1]], ends, strict=True):
            rows = sent.x_RD[order.row_N[start:end]]
            # Like padded slots of DeepSpeed's: many modules do not take an empty tensor, or a single row.
            rows = rows if end > start else sent.x_RD.new_zeros(2, sent.x_RD.shape[1])
            out = expert(rows.unsqueeze(0).unsqueeze(0))
            out = out[0] if isinstance(out, tuple) else out
            outputs.append(out.reshape(len(rows), out.shape[-1])[: end - start])
        y_ND = torch.cat(outputs)
        if not len(y_ND):
            # Still in the graph with all inputs: the backward of this rank takes part in every exchange.
            nothing = y_ND.sum() + sent.x_RD[:0].sum() + sent.weight_RK[:0].sum()
            return y_ND.new_zeros(sent.x_RD.shape) + nothing.to(y_ND.dtype)
        weight_N1 = sent.weight_RK.reshape(-1)[order.route_N[: ends[-1]]].unsqueeze(1)
        acc = compute_dtype(y_ND.dtype)
        return gather_sum((y_ND.to(acc) * weight_N1), order.pos_RK).to(y_ND.dtype)
