# SPDX-License-Identifier: GPL-3.0-or-later
"""Wrong input to the layers and to initialize: each raises its sentence on every rank, and nothing hangs."""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable

import pytest
import torch
from deepspeed.moe.layer import MoE as StockMoE
from torch import nn

import flashfusemoe_ds as ffmoe
from flashfusemoe_ds import MoE, MoELayer, fused_moe
from flashfusemoe_ds.dispatch import select
from tests.distributed import run_ranks

D = 8


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(D, 16), nn.GELU(), nn.Linear(16, D))


def moe(**kwargs) -> MoE:
    return MoE(D, mlp(), **{"num_experts": 4, **kwargs})


def layer(**kwargs) -> MoELayer:
    return MoELayer(**{"d_model": D, "ffn_dim": 16, "num_experts": 4, "top_k": 2, **kwargs})


def functional(**kwargs):
    return fused_moe(
        **{
            "hidden_states": torch.zeros(3, D), "gate_weight": torch.zeros(4, D), "w_up": torch.zeros(4, 16, D),
            "w_down": torch.zeros(4, D, 8), "top_k": 2, **kwargs,
        }
    )  # fmt: skip


DS_CONFIG = {"train_micro_batch_size_per_gpu": 1, "optimizer": {"type": "AdamW", "params": {"torch_adam": True}}}


def initialize(section=None, model: nn.Module | None = None, **kwargs):
    config = dict(DS_CONFIG) if section is None else {**DS_CONFIG, "flashfusemoe": section}
    return ffmoe.initialize(**{"model": model or nn.Sequential(moe()), "config": config, **kwargs})


# name: (what to do, the message). None of them needs a process group, so each must raise before the first collective.
WRONG: dict[str, tuple[Callable[[], object], type[Exception], str]] = {
    "ep_size does not divide": (lambda: moe(ep_size=3), ValueError, "ep_size is 3; it must divide num_experts (4)"),
    "ep_size zero": (lambda: moe(ep_size=0), ValueError, "ep_size is 0; it must be a positive integer"),
    "k too large": (lambda: moe(k=5), ValueError, "k is 5; valid: 1 to num_experts (4)"),
    "k a float": (lambda: moe(k=2.0), ValueError, "k is 2.0; it must be a positive integer"),
    "noise policy": (lambda: moe(noisy_gate_policy="jitter"), ValueError,
                     "noisy_gate_policy is 'jitter'; valid: None, 'Jitter', 'RSample'"),
    "expert a class": (lambda: MoE(D, nn.Linear, 4), ValueError, "it must be a torch.nn.Module"),
    "no group yet": (lambda: moe(ep_size=2)(torch.zeros(3, D)), ValueError,
                     "ep_size is 2, but the layer has no expert-parallel group yet"),
    "MoE hidden size": (lambda: moe()(torch.zeros(3, 9)), ValueError, "MoE: input has shape (3, 9); expected [*, 8]"),
    "MoE no dimension": (lambda: moe()(torch.tensor(1.0)), ValueError, "MoE: input has shape (); expected [*, 8]"),
    "MoE integers": (lambda: moe()(torch.zeros(3, D, dtype=torch.long)), ValueError, "MoE: input is torch.int64"),
    "MoE device": (lambda: moe()(torch.zeros(3, D, device="meta")), ValueError,
                   "MoE: input is on meta, the layer's parameters on cpu"),
    "MoE dtype": (lambda: moe()(torch.zeros(3, D, dtype=torch.bfloat16)), ValueError,
                  "input is torch.bfloat16, the experts' parameters torch.float32"),
    "used_token": (lambda: moe()(torch.zeros(3, D), torch.ones(4, dtype=torch.long)), ValueError,
                   "used_token has 4 entries; the input has 3 tokens"),
    "d_model": (lambda: layer(d_model=-1), ValueError, "d_model is -1; it must be a positive integer"),
    "ffn_dim odd": (lambda: layer(ffn_dim=15), ValueError,
                    "ffn_dim is 15; with the gated activation 'swiglu' it must be even"),
    "top_k": (lambda: layer(top_k=0), ValueError, "top_k is 0; valid: 1 to num_experts (4)"),
    "activation": (lambda: layer(activation="swish"), ValueError, "activation 'swish' is unknown; valid: swiglu, "),
    "gating": (lambda: layer(gating="top2"), ValueError, "gating 'top2' is unknown; valid: softmax, softmax_renorm, "),
    "capacity_factor": (lambda: layer(capacity_factor=0.0), ValueError, "capacity_factor is 0.0; it must be positive"),
    "max_tokens": (lambda: layer(max_tokens_per_expert=0), ValueError, "max_tokens_per_expert is 0; it must be"),
    "aux coefficient": (lambda: layer(aux_loss_coeff=-0.1), ValueError, "aux_loss_coeff is -0.1; it must be 0 or a"),
    "z coefficient": (lambda: layer(z_loss_coeff=float("nan")), ValueError, "z_loss_coeff is nan; it must be 0 or a"),
    "shared experts": (lambda: layer(num_shared_experts=-1), ValueError, "num_shared_experts is -1; it must be 0 or"),
    "no bias to update": (lambda: layer().update_expert_bias(group=object()), ValueError,
                          "gating.expert_bias is False; there is no bias to update"),
    "layer hidden size": (lambda: layer()(torch.zeros(2, 3, 5)), ValueError,
                          "MoELayer: input has shape (2, 3, 5); expected [*, 8]"),
    "layer gemm_backend": (lambda: layer(gemm_backend="grouped_mm").double()(torch.zeros(2, D).double()), ValueError,
                           "gemm_backend 'grouped_mm' cannot run here: torch._grouped_mm does not take torch.float64"),
    "triton in float64": (lambda: layer(gemm_backend="triton").double()(torch.zeros(2, D).double()), ValueError,
                          "gemm_backend 'triton' cannot run here: the triton backend does not take torch.float64"),
    "w_up shape": (lambda: functional(w_up=torch.zeros(4, 15, D)), ValueError, "w_up is (4, 15, 8) and w_down"),
    "w_up dtype": (lambda: functional(w_up=torch.zeros(4, 16, D).double()), ValueError, "they must agree"),
    "functional top_k": (lambda: functional(top_k=9), ValueError, "top_k is 9; valid: 1 to num_experts (4)"),
    "functional bias": (lambda: functional(gating=ffmoe.Gating(expert_bias=True)), ValueError, "use MoELayer"),
    "no model": (lambda: ffmoe.initialize(config=DS_CONFIG), ValueError, "initialize needs a model"),
    "no config": (lambda: initialize(config=None), ValueError, "no DeepSpeed config: pass config="),
    "two configs": (lambda: initialize(args=argparse.Namespace(deepspeed_config="ds.json")), ValueError,
                    "the config was passed twice, as config= and --deepspeed_config ds.json"),
    "unknown key": (lambda: initialize({"ep_backnd": "nccl"}), ValueError, 'did you mean "ep_backend"?'),
    "missing deep_ep": (lambda: initialize({"ep_backend": "deep_ep"}), ImportError,
                        "ep_backend 'deep_ep' cannot be used: package deep_ep is not installed"),
    "gemm_backend": (lambda: initialize({"gemm_backend": "cublas"}), ValueError,
                     "flashfusemoe.gemm_backend is \"cublas\"; valid: 'triton', 'grouped_mm' or 'reference'"),
    "gemm_backend of a layer": (lambda: layer(gemm_backend="bogus"), ValueError, "gemm_backend is 'bogus', which"),
    "gemm_backend of the function": (lambda: functional(gemm_backend="bogus"), ValueError, "gemm_backend is 'bogus'"),
    "sharded layer in an engine": (lambda: initialize({}, nn.Sequential(sharded())), ValueError,
                                   "0 is a MoELayer after shard_experts"),
    "world too small": (lambda: initialize(model=nn.Sequential(moe(ep_size=4))), ValueError,
                        "ep_size is 4, but there are 1 ranks per pipeline stage"),
    "split groups": (lambda: split_groups(), ValueError,
                     "two parameter groups with different options hold experts' parameters that are stacked"),
    "half listed": (lambda: half_listed(), ValueError, "1 parts are listed of the 4 experts' parameters that are"),
    "capacity factor of MoE": (lambda: moe(capacity_factor=-1.0), ValueError, "capacity_factor is -1.0; it must be"),
    "min_capacity": (lambda: moe(min_capacity=-3), ValueError, "min_capacity is -3; it must be 0 or"),
    "gate_weight": (lambda: functional(gate_weight=torch.zeros(4)), ValueError, "gate_weight has shape (4,)"),
    "optimizer with state": (lambda: used_optimizer(), ValueError, "build it after replace_moe(model)"),
}  # fmt: skip


def sharded() -> MoELayer:
    sharded_layer = layer()
    sharded_layer.ep_group = object()  # what shard_experts leaves; a group of one rank would need a process group
    return sharded_layer


def split_groups() -> None:
    model = nn.Sequential(StockMoE(D, mlp(), 4))
    experts = model[0].deepspeed_moe.experts.deepspeed_experts
    groups = [{"params": list(experts[:2].parameters()), "lr": 0.1}, {"params": list(experts[2:].parameters())}]
    ffmoe.initialize(model=model, model_parameters=groups, config=DS_CONFIG)


def half_listed() -> None:
    model = nn.Sequential(StockMoE(D, mlp(), 4))
    first = model[0].deepspeed_moe.experts.deepspeed_experts[0]
    ffmoe.initialize(model=model, model_parameters=list(first.parameters()), config=DS_CONFIG)


def used_optimizer() -> None:
    model = nn.Sequential(StockMoE(D, mlp(), 4))
    optimizer = torch.optim.Adam(model.parameters())
    model(torch.randn(8, D))[0].sum().backward()
    optimizer.step()
    ffmoe.initialize(model=model, optimizer=optimizer, config=DS_CONFIG)


@pytest.mark.parametrize("name", WRONG)
def test_wrong_input(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    if name == "missing deep_ep":
        monkeypatch.setattr(select, "find_spec", lambda package: None)
    do, error, message = WRONG[name]
    with pytest.raises(error, match=re.escape(message)):
        do()


def messages(rank: int, world: int) -> dict[str, str]:
    """What each mistake says on this rank, with a process group up: a rank that waits instead would time out."""
    said = {}
    stock_in_engine = nn.Sequential(StockMoE(D, mlp(), 4))
    attempts = {
        "world": lambda: initialize({}, nn.Sequential(moe(ep_size=4))),
        "world, import only": lambda: moe(ep_size=4).set_deepspeed_parallelism(),
        "backend": lambda: initialize({"ep_backend": "symm_mem"}),
        "key": lambda: initialize({"replace": True}),
        "shape": lambda: initialized().forward(torch.zeros(3, D + 1)),
        "dtype": lambda: initialized().forward(torch.zeros(3, D, dtype=torch.int)),
        "attach": lambda: ffmoe.attach(plain_engine(stock_in_engine)),
    }
    for name, attempt in attempts.items():
        try:
            attempt()
            said[name] = "nothing"
        except ValueError as error:
            said[name] = str(error)
    return said


def initialized():
    return initialize({}, nn.Sequential(moe(ep_size=2)))[0]


def plain_engine(model: nn.Module):
    import deepspeed

    return deepspeed.initialize(model=model, config={**DS_CONFIG, "flashfusemoe": {}})[0]


def test_every_rank_says_the_same() -> None:
    first, second = run_ranks(2, messages)
    assert first == second
    assert first["world"].startswith("ep_size is 4, but there are 2 ranks per pipeline stage; ")
    assert first["world"].endswith("Valid here: 1, 2")
    assert first["world, import only"] == first["world"]
    assert first["backend"].startswith("ep_backend 'symm_mem' cannot be used: it needs CUDA GPUs")
    assert first["key"].startswith('flashfusemoe.replace: unknown key; did you mean "replace_moe"?')
    assert first["shape"] == "MoE: input has shape (3, 9); expected [*, 8]"
    assert first["dtype"].startswith("MoE: input is torch.int32")
    assert "flashfusemoe.replace_moe is true, but the engine was built over stock MoE layers (0)" in first["attach"]
