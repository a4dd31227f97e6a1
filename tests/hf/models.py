# SPDX-License-Identifier: GPL-3.0-or-later
"""Tiny random models of the MoE families, from Transformers' own classes, and batches for them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

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
    # For those that have one. DeepSeek's and GPT-OSS do not add it to their loss here.
    "router_aux_loss_coef": 0.1,
    "use_cache": False,
}
_LOGITS = {"output_router_logits": True}
_QWEN = {"moe_intermediate_size": 24, "num_experts": NUM_EXPERTS, **_LOGITS}
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

# Name -> stem of the classes in transformers, and the config beyond what all share.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": NUM_EXPERTS, **_LOGITS}),
    "qwen2_moe": ("Qwen2Moe", _QWEN_SHARED),
    "qwen3_moe": ("Qwen3Moe", {**_QWEN, "head_dim": 8, "norm_topk_prob": True}),
    "qwen3_5_moe": ("Qwen3_5Moe", {**_QWEN_SHARED, "head_dim": 8, "layer_types": ["full_attention"] * 2}),
    "olmoe": ("Olmoe", {"num_experts": NUM_EXPERTS, **_LOGITS}),
    "deepseek_v2": ("DeepseekV2", _DEEPSEEK),
    "deepseek_v2_groups": ("DeepseekV2", {**_DEEPSEEK, **_GROUPS, "topk_method": "group_limited_greedy"}),
    "deepseek_v3": ("DeepseekV3", {**_DEEPSEEK, **_GROUPS}),
    "gpt_oss": ("GptOss", {"num_local_experts": NUM_EXPERTS, "head_dim": 8, "swiglu_limit": 0.1}),
}

_CONFIG_CLASSES = {"qwen3_5_moe": "Qwen3_5MoeTextConfig"}  # of another stem


def config(name: str) -> Any:
    """The model's config."""
    import transformers  # not at the top: ranks that build no model would import it too

    stem, extra = MODELS[name]
    return getattr(transformers, _CONFIG_CLASSES.get(name, f"{stem}Config"))(**{**_COMMON, **extra})


def build(
    name: str, experts_implementation: str | None = None, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Any:
    """A causal language model of two layers, one of them dense in DeepSeek's.

    Equal names and seeds, equal weights; gates far from ties, which two orders of summation might break differently;
    biases that are not zero; a clamp of GPT-OSS's that clamps. Without an experts_implementation it is Transformers'
    choice.
    """
    import transformers

    torch.manual_seed(seed)
    model = getattr(transformers, f"{MODELS[name][0]}ForCausalLM")(config(name))
    with torch.no_grad():
        for path, tensor in (*model.named_parameters(), *model.named_buffers()):
            if path.endswith(("mlp.gate.weight", "router.weight")):
                tensor.normal_(0, 0.3)
            elif path.endswith(("_proj_bias", "router.bias", "e_score_correction_bias")):
                tensor.normal_(0, 0.1)
    if experts_implementation is not None:
        model.set_experts_implementation(experts_implementation)
    return model.to(dtype)


def batch(seed: int = 0) -> dict[str, Tensor]:
    ids = torch.randint(0, VOCABULARY, (BATCH, SEQUENCE), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "labels": ids}


def rows() -> list[dict[str, Tensor]]:
    """32 texts for a data loader, eight of them four times, so that something can be learned."""
    ids = torch.randint(0, VOCABULARY, (8, SEQUENCE), generator=torch.Generator().manual_seed(1)).repeat(4, 1)
    return [{"input_ids": text, "labels": text} for text in ids]
