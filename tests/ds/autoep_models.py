# SPDX-License-Identifier: GPL-3.0-or-later
"""Tiny random Hugging Face MoE models of every AutoEP preset, their data, and what an engine makes of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

VOCABULARY, SEQUENCE, BATCH, NUM_EXPERTS = 64, 12, 2, 8

_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 64,
    "initializer_range": 0.1,
    "num_experts_per_tok": 2,
    "use_cache": False,
}
_AUX_LOSS = {"output_router_logits": True, "router_aux_loss_coef": 0.1}
_QWEN = {"moe_intermediate_size": 24, "num_experts": NUM_EXPERTS, **_AUX_LOSS}
_QWEN_SHARED = {**_QWEN, "shared_expert_intermediate_size": 40}
_DEEPSEEK = {
    "first_k_dense_replace": 1,
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": NUM_EXPERTS,
    "n_shared_experts": 1,
    "moe_intermediate_size": 24,
    "routed_scaling_factor": 1.5,
}
_GROUPS = {"n_group": 4, "topk_group": 2}

# Name -> stem of the classes in transformers, its config class, and the config beyond what all share.
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", "MixtralConfig", {"num_local_experts": NUM_EXPERTS, **_AUX_LOSS}),
    "qwen2_moe": ("Qwen2Moe", "Qwen2MoeConfig", _QWEN_SHARED),
    "qwen3_moe": ("Qwen3Moe", "Qwen3MoeConfig", {**_QWEN, "head_dim": 8, "norm_topk_prob": True}),
    "qwen3_5_moe": (
        "Qwen3_5Moe",
        "Qwen3_5MoeTextConfig",
        {**_QWEN_SHARED, "head_dim": 8, "layer_types": ["full_attention"] * 2},
    ),
    "deepseek_v2": ("DeepseekV2", "DeepseekV2Config", _DEEPSEEK),
    "deepseek_v2_groups": (
        "DeepseekV2",
        "DeepseekV2Config",
        {**_DEEPSEEK, **_GROUPS, "topk_method": "group_limited_greedy"},
    ),
    "deepseek_v3": ("DeepseekV3", "DeepseekV3Config", {**_DEEPSEEK, **_GROUPS}),
}


def build(name: str, seed: int = 0) -> nn.Module:
    """A causal language model of two layers, one of them dense in DeepSeek's. Equal seeds, equal weights."""
    import transformers

    stem, config_class, extra = MODELS[name]
    torch.manual_seed(seed)
    config = getattr(transformers, config_class)(**{**_COMMON, **extra})
    model = getattr(transformers, f"{stem}ForCausalLM")(config)
    with torch.no_grad():
        for path, tensor in (*model.named_parameters(), *model.named_buffers()):
            if path.endswith("mlp.gate.weight"):
                tensor.normal_(0, 0.3)  # far from ties, which two orders of summation might break differently
            elif path.endswith("e_score_correction_bias"):
                tensor.normal_(0, 0.1)
    return model


def batch(rank: int, step: int) -> dict[str, Tensor]:
    """Another batch for every rank and step."""
    generator = torch.Generator().manual_seed(10_000 * rank + step)
    ids = torch.randint(0, VOCABULARY, (BATCH, SEQUENCE), generator=generator)
    return {"input_ids": ids, "labels": ids}


def config(ep_size: int, stage: int, optimizer: str = "adamw", **extra: Any) -> dict[str, Any]:
    params = {
        # eps: see tests/ds/tiny.py.
        "adamw": {"type": "AdamW", "params": {"lr": 1e-2, "eps": 1e-3, "weight_decay": 0.01, "torch_adam": True}},
        "sgd": {"type": "SGD", "params": {"lr": 1.0}},
    }
    return {
        "train_micro_batch_size_per_gpu": BATCH,
        "optimizer": params[optimizer],
        "zero_optimization": {"stage": stage},
        "gradient_clipping": 0.0,  # at fp32 stage 0, stock clips by an average of the ranks' own norms
        "zero_allow_untested_optimizer": True,  # SGD
        "expert_parallel": {"enabled": True, "autoep_size": ep_size},
        "steps_per_print": 10**9,
        **extra,
    }


def start(initialize: Callable[..., Any], model: nn.Module, ds_config: dict[str, Any]) -> Any:
    return initialize(model=model, model_parameters=list(model.parameters()), config=ds_config)[0]


def train_step(engine: Any, inputs: dict[str, Tensor]) -> float:
    loss = engine(**inputs).loss
    engine.backward(loss)
    engine.step()
    return float(loss.detach())


def eval_loss(engine: Any, rank: int) -> float:
    engine.eval()
    with torch.no_grad():
        loss = float(engine(**batch(rank, 999)).loss)
    engine.train()
    return loss


def weights(model: nn.Module, ep_rank: int) -> dict[str, Tensor]:
    """The model's weights in float32; of its experts those of this rank, each by its global id."""
    from deepspeed import zero

    named = dict(model.named_parameters())
    with zero.GatheredParameters(list(named.values())):
        own = {name: param.detach().float().clone() for name, param in named.items()}
    result = {}
    for name, value in own.items():
        prefix, _, leaf = name.rpartition(".")
        if prefix.endswith(".experts") and leaf in ("w1", "w2", "w3"):
            for i, expert in enumerate(value):
                result[f"{prefix}.{leaf}.{ep_rank * len(value) + i}"] = expert
        else:
            result[name.replace(".router.gate.", ".gate.")] = value
    return result


def plain_weights(model: nn.Module) -> dict[str, Tensor]:
    """The same of a plain Transformers model, whose experts are all here, under the same names."""
    result = {}
    for name, value in model.named_parameters():
        prefix, _, leaf = name.rpartition(".")
        if leaf == "gate_up_proj" and value.dim() == 3:
            for i, expert in enumerate(value.detach()):
                result[f"{prefix}.w1.{i}"], result[f"{prefix}.w3.{i}"] = expert.float().chunk(2)
        elif leaf == "down_proj" and value.dim() == 3:
            result.update({f"{prefix}.w2.{i}": expert.float() for i, expert in enumerate(value.detach())})
        else:
            # AutoEP's names of Qwen's shared expert.
            name = name.replace(".shared_expert.", ".shared_experts.")
            result[name.replace(".shared_expert_gate.", ".shared_experts_gate.")] = value.detach().float()
    return result
