"""The same model in transformers: its config from ours, and our weights under its names.

Written for the parity tests alone and independent of `kwaicoder_jax.huggingface`. Linear layers there are [out, in], ours
[in, out] with heads apart.
"""

import dataclasses

import numpy as np
import torch
import transformers

from kwaicoder_jax import models

# Our config's family to the name of its classes in transformers.
CLASSES = {
    "llama": "Llama", "mistral": "Mistral", "qwen2": "Qwen2", "qwen3": "Qwen3", "mixtral": "Mixtral", "olmoe": "Olmoe",
    "qwen2_moe": "Qwen2Moe", "qwen3_moe": "Qwen3Moe", "deepseek_v2": "DeepseekV2", "deepseek_v3": "DeepseekV3",
    "glm4_moe": "Glm4Moe",
}  # fmt: skip
INTERLEAVED = ("deepseek_v2", "deepseek_v3")  # pairs of rotary dimensions are neighbours there


def build(family, params, config):
    """The transformers model in float32 with eager attention."""
    name = CLASSES[family]
    theirs = getattr(transformers, f"{name}Config")(**fields(family, config))
    model = getattr(transformers, f"{name}ForCausalLM")(theirs)
    model.load_state_dict(state_dict(family, params, config), strict=True)
    return model.eval().float()


def fields(family, c):
    """Keyword arguments of the family's config class."""
    common = {
        "vocab_size": c.vocab_size,
        "hidden_size": c.model_dim,
        "intermediate_size": c.mlp_dim,
        "num_hidden_layers": c.layers,
        "num_attention_heads": c.heads,
        "num_key_value_heads": c.kv_heads,
        "rms_norm_eps": c.norm_epsilon,
        "rope_parameters": rope(c),
        "tie_word_embeddings": c.tie_embeddings,
        "max_position_embeddings": c.max_length or 16,
        "attn_implementation": "eager",
        "experts_implementation": "eager",  # grouped products refuse odd widths
    }
    if family not in ("olmoe", *INTERLEAVED):
        common["head_dim"] = c.head_dim
    sliding = {"sliding_window": max(c.windows, default=0) or None}
    kinds = {"layer_types": ["sliding_attention" if w else "full_attention" for w in c.windows]} if c.windows else {}
    own = {
        "llama": lambda: {"attention_bias": c.qkv_bias, "mlp_bias": c.mlp_bias},
        "mistral": lambda: sliding,
        "qwen2": lambda: sliding | kinds | {"use_sliding_window": bool(c.windows)},
        "qwen3": lambda: sliding | kinds | {"use_sliding_window": bool(c.windows), "attention_bias": c.qkv_bias},
    }
    own |= {name: lambda: mixture(family, c, sliding, kinds) for name in CLASSES if name not in own}
    return common | own[family]()


def mixture(family, c, sliding, kinds):
    """The fields of a mixture."""
    e = c.experts
    result = {"num_experts_per_tok": e.experts_per_token, "moe_intermediate_size": e.mlp_dim}
    if family in ("mixtral", "olmoe"):
        result["intermediate_size"] = e.mlp_dim
    if family == "mixtral":
        return result | sliding | {"num_local_experts": e.num_experts}
    if family in ("olmoe", "qwen2_moe", "qwen3_moe"):
        normed = e.router == "softmax_topk_renormalised"
        result |= {"num_experts": e.num_experts, "norm_topk_prob": normed, "clip_qkv": c.qkv_clip}
    if family == "qwen2_moe":
        result |= sliding | kinds | {"use_sliding_window": bool(c.windows), "qkv_bias": c.qkv_bias}
        return result | {
            "shared_expert_intermediate_size": e.shared_mlp_dim,
            "mlp_only_layers": list(range(c.dense_layers)),
        }
    if family in ("olmoe", "qwen3_moe"):
        return result
    result |= {
        "n_routed_experts": e.num_experts, "n_shared_experts": e.shared_mlp_dim // e.mlp_dim,
        "routed_scaling_factor": e.routed_scale, "first_k_dense_replace": c.dense_layers, "attention_bias": c.qkv_bias,
        "n_group": e.groups, "topk_group": e.top_groups, "norm_topk_prob": e.router == "sigmoid",
    }  # fmt: skip
    if family == "deepseek_v2":
        result["topk_method"] = "group_limited_greedy" if e.limited else "greedy"
    if family == "glm4_moe":
        return result | {"use_qk_norm": c.qk_norm == "head"}
    m = c.mla
    return result | {
        "q_lora_rank": m.q_rank or None, "kv_lora_rank": m.kv_rank, "qk_nope_head_dim": m.nope_dim,
        "qk_rope_head_dim": m.rope_dim, "v_head_dim": m.value_dim,
    }  # fmt: skip


def rope(c):
    """Their `rope_parameters`."""
    result = {"rope_type": "default", "rope_theta": c.rope_theta}
    if c.rotary_dim is not None:
        result["partial_rotary_factor"] = c.rotary_dim / c.head_dim
    if c.rope_scaling is None:
        return result
    scaling = dataclasses.asdict(c.rope_scaling)
    used = {
        "linear": (), "dynamic": (), "llama3": ("low_freq_factor", "high_freq_factor"),
        "yarn": ("beta_fast", "beta_slow", "mscale", "mscale_all_dim", "attention_factor", "truncate"),
    }[scaling["kind"]]  # fmt: skip
    result |= {"rope_type": str(scaling["kind"]), "factor": scaling["factor"]}
    if used:
        result["original_max_position_embeddings"] = scaling["original_length"]
    return result | {name: scaling[name] for name in used if scaling[name] is not None}


# Our parameter to theirs. "T": to be transposed once heads are one axis; a number is how many last axes become one.
ATTENTION = {
    "query": "q_proj.weight", "key": "k_proj.weight", "value": "v_proj.weight", "out": "o_proj.weight",
    "query_bias": "q_proj.bias", "key_bias": "k_proj.bias", "value_bias": "v_proj.bias", "out_bias": "o_proj.bias",
    "query_norm/scale": "q_norm.weight", "key_norm/scale": "k_norm.weight",
    "query_down": "q_a_proj.weight", "query_down_bias": "q_a_proj.bias", "query_down_norm/scale": "q_a_layernorm.weight",
    "query_up": "q_b_proj.weight", "kv_down": "kv_a_proj_with_mqa.weight", "kv_down_bias": "kv_a_proj_with_mqa.bias",
    "kv_down_norm/scale": "kv_a_layernorm.weight", "kv_up": "kv_b_proj.weight",
}  # fmt: skip
MLP = {f"{name}{bias}": f"{name}_proj.{suffix}" for name in ("gate", "up", "down")
       for bias, suffix in (("", "weight"), ("_bias", "bias"))}  # fmt: skip


def state_dict(family, params, config):
    """Our weights under their names."""
    state = {
        "model.embed_tokens.weight": params["embedding"],
        "lm_head.weight": params.get("head", params["embedding"]),
        "model.norm.weight": params["final_norm"]["scale"],
    }
    for layer in range(config.layers):
        stack, first = ("dense_layers", 0) if layer < config.dense_layers else ("layers", config.dense_layers)
        p = {name: np.asarray(leaf)[layer - first] for name, leaf in models.flatten(params[stack]).items()}
        for name, value in layer_tensors(family, p, config).items():
            state[f"model.layers.{layer}.{name}"] = value
    return {name: torch.from_numpy(np.array(value, np.float32)) for name, value in state.items()}


def layer_tensors(family, p, config):
    """One layer's."""
    result = {
        "input_layernorm.weight": p.pop("attention_norm/scale"),
        "post_attention_layernorm.weight": p.pop("mlp_norm/scale"),
    }
    shared = "shared_expert" if family == "qwen2_moe" else "shared_experts"
    experts = {}
    for name, value in p.items():
        module, _, rest = name.partition("/")
        if module == "attention":
            result[f"self_attn.{ATTENTION[rest]}"] = linear(interleaved(family, rest, value, config), rest)
        elif module == "mlp":
            result[f"mlp.{MLP[rest]}"] = value.T
        elif rest.startswith("shared/"):
            result[f"mlp.{shared}.{MLP[rest.removeprefix('shared/')]}"] = value.T
        else:
            experts[rest] = value
    if experts:
        gate_up_E2FD = np.concatenate([experts["gate"], experts["up"]], axis=-1).swapaxes(1, 2)
        result |= {"mlp.gate.weight": experts["router"].T, "mlp.experts.gate_up_proj": gate_up_E2FD}
        result["mlp.experts.down_proj"] = experts["down"].swapaxes(1, 2)
    if "router_bias" in experts:
        result["mlp.gate.e_score_correction_bias"] = experts["router_bias"]
    if "shared_gate" in experts:
        result["mlp.shared_expert_gate.weight"] = experts["shared_gate"].T
    return result


def linear(value, name):
    """[in, H, N] to [H*N, in], [H, N, out] to [out, H*N], [H, N] to [H*N]."""
    if name == "out":
        return value.reshape(-1, value.shape[-1]).T
    if name.endswith(("bias", "scale")):
        return value.reshape(-1)
    return value.reshape(len(value), -1).T


def interleaved(family, name, value, config):
    """Rotary dimensions (i, i + P) as neighbours (2i, 2i + 1), for the families that pair them so; they come last."""
    if family not in INTERLEAVED or name not in ("query", "query_up", "kv_down", "kv_down_bias"):
        return value
    rope_dim = config.mla.rope_dim
    rest, pairs = value[..., :-rope_dim], value[..., -rope_dim:]
    pairs = np.stack(np.split(pairs, 2, axis=-1), axis=-1).reshape(pairs.shape)
    return np.concatenate([rest, pairs], axis=-1)


def logits(model, batch):
    """Their logits on a batch of ours: [B, T, V]."""
    tokens, positions, segments = (
        torch.from_numpy(np.asarray(batch[name])).long() for name in ("inputs", "positions", "segment_ids")
    )
    with torch.no_grad():
        return model(input_ids=tokens, attention_mask=segments, position_ids=positions).logits.numpy()


def step(model, batch, past):
    """Their logits on the next tokens of one row, and the cache with them."""
    tokens, positions = (torch.from_numpy(np.asarray(batch[name])).long() for name in ("inputs", "positions"))
    with torch.no_grad():
        output = model(input_ids=tokens, position_ids=positions, past_key_values=past, use_cache=True)
    return output.logits.numpy(), output.past_key_values


def count(model):
    """Numbers in their state dict, those of a tied head once."""
    state = dict(model.state_dict())
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    return sum(value.numel() for value in state.values())
