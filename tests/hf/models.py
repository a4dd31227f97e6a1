# SPDX-License-Identifier: GPL-3.0-or-later
"""Tiny random models of the MoE families, from Transformers' own classes, and a batch for them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor

VOCABULARY, NUM_EXPERTS = 64, 8

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
    # For those that have one. DeepSeek-V3 and GPT-OSS do not add it to their loss here.
    "router_aux_loss_coef": 0.1,
}
_QWEN = {"num_experts": NUM_EXPERTS, "moe_intermediate_size": 24, "head_dim": 8, "output_router_logits": True}

# Stem of the classes, and the config beyond what all share.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": NUM_EXPERTS, "output_router_logits": True}),
    "qwen2_moe": ("Qwen2Moe", {**_QWEN, "shared_expert_intermediate_size": 40}),
    "qwen3_moe": ("Qwen3Moe", {**_QWEN, "norm_topk_prob": True}),
    "olmoe": ("Olmoe", {"num_experts": NUM_EXPERTS, "output_router_logits": True}),
    "deepseek_v3": (
        "DeepseekV3",
        {
            "first_k_dense_replace": 1,
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 8,
            "v_head_dim": 8,
            "n_routed_experts": NUM_EXPERTS,
            "n_shared_experts": 1,
            "moe_intermediate_size": 24,
            "n_group": 4,
            "topk_group": 2,
        },
    ),
    "gpt_oss": ("GptOss", {"num_local_experts": NUM_EXPERTS, "head_dim": 8, "swiglu_limit": 0.1}),
}


def build(name: str, experts_implementation: str, dtype: torch.dtype = torch.float32) -> Any:
    """A causal language model. Equal names, equal weights; gates far from ties, which two orders of summation might
    break differently; biases that are not zero; a clamp of GPT-OSS's that clamps."""
    stem, extra = MODELS[name]
    config = getattr(transformers, f"{stem}Config")(**{**_COMMON, **extra})
    torch.manual_seed(0)
    model = getattr(transformers, f"{stem}ForCausalLM")(config)
    with torch.no_grad():
        for path, tensor in (*model.named_parameters(), *model.named_buffers()):
            if path.endswith(("mlp.gate.weight", "router.weight")):
                tensor.normal_(0, 0.3)
            elif path.endswith(("_proj_bias", "router.bias", "e_score_correction_bias")):
                tensor.normal_(0, 0.1)
    model.set_experts_implementation(experts_implementation)
    return model.to(dtype)


def batch(seed: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(0, VOCABULARY, (2, 12), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def rows() -> list[dict[str, Tensor]]:
    """32 texts for a data loader, eight of them four times, so that something can be learned."""
    ids = torch.randint(0, VOCABULARY, (8, 12), generator=torch.Generator().manual_seed(1)).repeat(4, 1)
    return [{"input_ids": text, "labels": text} for text in ids]
