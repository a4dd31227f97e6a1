# SPDX-License-Identifier: GPL-3.0-or-later
"""A small MoE model for tests with several ranks, its weights under global expert ids, and its data.

Rank r belongs to expert-parallel group r // ep_size and is its member r % ep_size (DeepSpeed's default, expert before
data parallelism), so local expert i of E/ep_size is global expert (r % ep_size) * E/ep_size + i.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from deepspeed.moe.layer import MoE as StockMoE
from torch import Tensor, nn

from tests.ds.experts_zoo import GatedMLP, PlainMLP

D_IN, D_MODEL, FFN_DIM, D_OUT = 6, 16, 24, 5
TOKENS = 48  # per rank and micro batch
WORLD_SIZE = 4

_EXPERT_KEY = re.compile(r"(.*\.deepspeed_experts\.)(\d+)(\..*)")


class TinyModel(nn.Module):
    """Linear -> x + residual MoE (8 plain experts, top-2) -> LayerNorm -> x + MoE (4 gated, top-1) -> Linear."""

    def __init__(self, moe_class: type[nn.Module], ep_size: int, checkpoint: Callable[..., Any] | None = None) -> None:
        """checkpoint(module, x) runs a MoE layer under activation checkpointing; None runs it plainly."""
        super().__init__()
        self.run = checkpoint or (lambda module, x: module(x))
        self.embed = nn.Linear(D_IN, D_MODEL)
        self.moe_a = moe_class(
            D_MODEL,
            PlainMLP(D_MODEL, FFN_DIM, nn.GELU(), bias=True),
            num_experts=8,
            ep_size=ep_size,
            k=2,
            use_residual=True,
        )
        self.norm = nn.LayerNorm(D_MODEL)
        self.moe_b = moe_class(
            D_MODEL,
            GatedMLP(D_MODEL, FFN_DIM),
            num_experts=4,
            ep_size=ep_size,
            k=1,
            noisy_gate_policy="Jitter",
        )
        self.head = nn.Linear(D_MODEL, D_OUT)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        x = self.embed(x)
        out, aux_a, _ = self.run(self.moe_a, x)
        x = self.norm(x + out)
        out, aux_b, _ = self.run(self.moe_b, x)
        return (self.head(x + out) - target).square().mean() + 0.1 * (aux_a + aux_b)


def num_experts_of(key: str) -> int:
    return 8 if "moe_a." in key else 4


def global_weights(seed: int = 1234) -> dict[str, Tensor]:
    """The whole model's state_dict (all experts, stock names), every tensor different."""
    state = TinyModel(StockMoE, ep_size=1).state_dict()
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, value in state.items():
        noise = torch.randn(value.shape, generator=generator)
        scale = 0.5 if "gate.wg" in name else (value.shape[-1] ** -0.5 if value.dim() > 1 else 0.1)
        weights[name] = (1.0 if name == "norm.weight" else 0.0) + scale * noise
    return weights


def to_local(weights: dict[str, Tensor], ep_size: int, rank: int) -> dict[str, Tensor]:
    """The entries of this rank's state_dict: its own experts, with local ids."""
    local = {}
    for name, value in weights.items():
        match = _EXPERT_KEY.fullmatch(name)
        if match:
            owner, i = divmod(int(match[2]), num_experts_of(name) // ep_size)
            if owner != rank % ep_size:
                continue
            name = f"{match[1]}{i}{match[3]}"
        local[name] = value
    return local


def to_global(local: dict[str, Tensor], ep_size: int, rank: int) -> dict[str, Tensor]:
    """Inverse of to_local for the experts that this rank holds."""
    renamed = {}
    for name, value in local.items():
        match = _EXPERT_KEY.fullmatch(name)
        if match:
            offset = rank % ep_size * (num_experts_of(name) // ep_size)
            name = f"{match[1]}{int(match[2]) + offset}{match[3]}"
        renamed[name] = value.detach().clone()
    return renamed


def merge(per_rank: Iterable[dict[str, Tensor]]) -> dict[str, Tensor]:
    """One dict of all ranks' weights. Ranks that hold the same tensor must hold the same bits."""
    whole: dict[str, Tensor] = {}
    for rank, weights in enumerate(per_rank):
        for name, value in weights.items():
            assert torch.equal(whole.setdefault(name, value), value), f"rank {rank} has another {name}"
    return whole


def build(
    moe_class: type[nn.Module],
    ep_size: int,
    rank: int,
    weights: dict[str, Tensor],
    checkpoint: Callable[..., Any] | None = None,
) -> TinyModel:
    model = TinyModel(moe_class, ep_size, checkpoint)
    model.load_state_dict(to_local(weights, ep_size, rank), strict=True)
    return model


def config(
    stage: int, optimizer: str = "adamw", clip: float = 0.0, accumulation: int = 2, **extra: Any
) -> dict[str, Any]:
    params = {
        # torch's own AdamW. With its default eps of 1e-8 the first steps are lr * sign(gradient), which turns rounding
        # errors of gradients near zero into full steps; 1e-3 keeps the update a smooth function of the gradient.
        "adamw": {"type": "AdamW", "params": {"lr": 3e-3, "eps": 1e-3, "weight_decay": 0.01, "torch_adam": True}},
        "sgd": {"type": "SGD", "params": {"lr": 3e-2, "momentum": 0.9}},
    }
    return {
        "train_micro_batch_size_per_gpu": TOKENS,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": clip,
        "optimizer": params[optimizer],
        "zero_optimization": {"stage": stage},
        "zero_allow_untested_optimizer": True,  # SGD
        "steps_per_print": 10**9,
        **extra,
    }


def start(initialize: Callable[..., Any], model: nn.Module, ds_config: dict[str, Any]) -> Any:
    engine, _, _, _ = initialize(model=model, model_parameters=list(model.parameters()), config=ds_config)
    return engine


def batch(rank: int, step: int, micro: int) -> tuple[Tensor, Tensor]:
    """Another batch for every rank, step and micro step, the same whatever the parallel layout."""
    generator = torch.Generator().manual_seed(1_000_000 + 10_000 * rank + 10 * step + micro)
    return torch.randn(TOKENS, D_IN, generator=generator), torch.randn(TOKENS, D_OUT, generator=generator)


def train_step(engine: Any, rank: int, step: int) -> tuple[float, float]:
    """One optimizer step. Returns this rank's mean loss and the true global gradient norm before clipping."""
    total, norm = 0.0, float("nan")
    accumulation = engine.gradient_accumulation_steps()
    for micro in range(accumulation):
        torch.manual_seed(7_000_000 + 1000 * step + 10 * rank + micro)  # jitter, RTS and second-expert sampling
        loss = engine(*batch(rank, step, micro))
        engine.backward(loss)
        total += float(loss.detach())
        if micro == accumulation - 1 and engine.zero_optimization_stage() == 0:
            norm = true_grad_norm(engine.module)
        engine.step()
    if engine.zero_optimization_stage() > 0:
        norm = float(engine.get_global_grad_norm())
    return total / accumulation, norm


def true_grad_norm(model: nn.Module) -> float:
    """L2 norm over all parameters of the whole model, once the gradients are reduced (stage 0).

    DeepSpeed's own fp32 stage-0 clipping instead averages the ranks' local norms, each of its own experts only, and
    stores no norm on the engine.
    """
    from deepspeed import comm as dist
    from deepspeed.moe.utils import is_moe_param
    from deepspeed.utils import groups

    squares = {name: torch.zeros(()) for name in ("dense", *groups._get_expert_parallel_group_dict())}
    for parameter in model.parameters():
        if parameter.grad is not None:
            kind = parameter.group_name if is_moe_param(parameter) else "dense"
            squares[kind] += parameter.grad.square().sum()
    for name, group in groups._get_expert_parallel_group_dict().items():
        dist.all_reduce(squares[name], group=group)
    return float(sum(squares.values()).sqrt())


def eval_loss(engine: Any, rank: int) -> float:
    """Loss of one batch in eval mode, with the draws of a fixed seed."""
    engine.eval()
    torch.manual_seed(99 + rank)
    with torch.no_grad():
        loss = float(engine(*batch(rank, 500, 0)))
    engine.train()
    return loss


def average(values: list[list[float]]) -> Tensor:
    """Mean over ranks of one float per step: [ranks][steps] -> [steps]."""
    return torch.tensor(values, dtype=torch.float64).mean(dim=0)
