"""Tiny models of every family, made and saved by transformers itself: what imports are held against."""

import pathlib
from typing import Any

import numpy as np
import torch
import transformers

SIZES = {
    "vocab_size": 53, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 16, "attn_implementation": "eager",
}  # fmt: skip
_LATENT = {"kv_lora_rank": 10, "q_lora_rank": 7, "qk_rope_head_dim": 4, "v_head_dim": 6, "qk_nope_head_dim": 8,
           "num_key_value_heads": 4}  # fmt: skip
_ROUTED = {"n_routed_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "first_k_dense_replace": 1,
           "num_hidden_layers": 3}  # fmt: skip
_YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8, "rope_theta": 5000.0}
_QWEN_EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 12}

# By name: family, and what differs from SIZES. Every family, and every variant that changes which tensors there are.
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"head_dim": 8}),
    "llama_tied_linear": ("Llama", {
        "tie_word_embeddings": True, "num_key_value_heads": 1,
        "rope_parameters": {"rope_type": "linear", "factor": 3.0, "rope_theta": 1e5},
    }),
    "llama_biases_llama3": ("Llama", {
        "attention_bias": True, "mlp_bias": True, "num_key_value_heads": 4,
        "rope_parameters": {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                            "original_max_position_embeddings": 16, "rope_theta": 500.0},
    }),
    "llama_dynamic": ("Llama", {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}),
    "mistral": ("Mistral", {"sliding_window": 5, "head_dim": 10, "num_attention_heads": 5, "num_key_value_heads": 1}),
    "qwen2": ("Qwen2", {"rope_parameters": _YARN}),
    "qwen2_windows": ("Qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1,
                                "tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 10, "attention_bias": True}),
    "mixtral": ("Mixtral", {"num_local_experts": 5, "num_experts_per_tok": 2}),
    "qwen2_moe": ("Qwen2Moe", {**_QWEN_EXPERTS, "shared_expert_intermediate_size": 14, "mlp_only_layers": [0]}),
    "qwen2_moe_renormalised": ("Qwen2Moe", {**_QWEN_EXPERTS, "shared_expert_intermediate_size": 0,
                                            "norm_topk_prob": True, "qkv_bias": False}),
    "qwen3_moe": ("Qwen3Moe", {**_QWEN_EXPERTS, "head_dim": 10, "norm_topk_prob": True}),
    "olmoe": ("Olmoe", {"num_experts": 5, "num_experts_per_tok": 2, "clip_qkv": 1.5}),
    "deepseek_v2": ("DeepseekV2", {
        **_LATENT, **_ROUTED, "n_shared_experts": 2, "routed_scaling_factor": 1.5,
        "topk_method": "group_limited_greedy", "n_group": 3, "topk_group": 2,
        "rope_parameters": {**_YARN, "mscale": 0.707, "mscale_all_dim": 0.707},
    }),
    "deepseek_v2_lite": ("DeepseekV2", {**_LATENT, **_ROUTED, "q_lora_rank": None, "attention_bias": True,
                                        "mlp_bias": True, "tie_word_embeddings": True}),
    "deepseek_v3": ("DeepseekV3", {**_LATENT, **_ROUTED, "n_group": 3, "topk_group": 2, "n_shared_experts": 1,
                                   "rope_parameters": {**_YARN, "mscale": 1.0, "mscale_all_dim": 1.0}}),
    "glm4_moe": ("Glm4Moe", {**_ROUTED, "head_dim": 8, "use_qk_norm": True, "attention_bias": True,
                             "routed_scaling_factor": 2.5, "num_key_value_heads": 2}),
}  # fmt: skip


def make(name: str, dtype: torch.dtype = torch.float32) -> Any:
    """The model, with weights that matter: every layer changes the logits, which spread by some nats."""
    family, fields = MODELS[name]
    config = getattr(transformers, f"{family}Config")(**{**SIZES, **fields})
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for place, value in [*model.named_parameters(), *model.named_buffers()]:
            if "norm" in place:
                value.uniform_(0.5, 1.5, generator=generator)
            elif place.endswith("e_score_correction_bias"):
                value.normal_(0, 0.1, generator=generator)
            elif place.endswith("bias"):
                value.normal_(0, 0.3, generator=generator)
            elif "shared_expert_gate" in place and not config.shared_expert_intermediate_size:
                value.zero_()  # it gates nothing, and is not kept
            elif value.ndim > 1:
                scale = 3.0 if place in ("lm_head.weight", "model.embed_tokens.weight") else 1.0
                value.normal_(0, scale * value.shape[-1] ** -0.5 if value.shape[-1] else 0, generator=generator)
    return model.to(dtype)


def save(name: str, place: pathlib.Path, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """Saves the model with `save_pretrained`, and returns it."""
    model = make(name, dtype)
    model.save_pretrained(place, **options)
    return model


def logits(model: Any, inputs_BT: np.ndarray, mask_BT: np.ndarray) -> np.ndarray:
    """What transformers makes of it, float32; positions are counted over the mask."""
    mask = torch.from_numpy(mask_BT.astype(np.int64))
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    with torch.no_grad():
        out = model(torch.from_numpy(inputs_BT).long(), attention_mask=mask, position_ids=positions)
    return out.logits.numpy()
