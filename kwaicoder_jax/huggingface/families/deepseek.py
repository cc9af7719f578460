"""DeepSeek-V2, DeepSeek-V3 and GLM-4-MoE: dense first layers, shared experts, latent attention or a sigmoid router."""

import math
from typing import Any

from kwaicoder_jax.huggingface.families import tensors
from kwaicoder_jax.huggingface.families.family import Family, Filler, Rules, common, common_fields, divisible
from kwaicoder_jax.huggingface.families.mixtures import experts_of, no_shared_expert
from kwaicoder_jax.huggingface.fields import Fields
from kwaicoder_jax.huggingface.rules import Rule
from kwaicoder_jax.models import ExpertsConfig, GroupScore, MlaConfig, ModelConfig, QkNorm, Router

_BIAS = "mlp.gate.e_score_correction_bias"


# What they share


def _read_experts(
    fields: Fields, *, router: Router, groups: tuple[int, int], score: GroupScore, shared: int
) -> ExpertsConfig:
    """The mixture; `shared` is the family's default of n_shared_experts (null is none)."""
    width = fields.size("moe_intermediate_size")
    shared = shared if "n_shared_experts" not in fields.values else fields.size("n_shared_experts", 0, least=0)
    fields.only("moe_layer_freq", 1, why="every layer behind the dense ones is a mixture")
    return ExpertsConfig(
        fields.size("n_routed_experts"), fields.size("num_experts_per_tok"), width, router,
        routed_scale=fields.number("routed_scaling_factor", 1.0), router_bias=router is Router.SIGMOID,
        shared_mlp_dim=width * shared,
        groups=groups[0], top_groups=groups[1], group_score=score,
    )  # fmt: skip


def _groups(fields: Fields, default: tuple[int, int]) -> tuple[int, int]:
    return fields.size("n_group", default[0]), fields.size("topk_group", default[1])


def _expert_fields(config: ModelConfig) -> dict[str, Any]:
    experts = experts_of(config)
    return {
        "n_routed_experts": experts.num_experts,
        "num_experts_per_tok": experts.experts_per_token,
        "moe_intermediate_size": experts.mlp_dim,
        "n_shared_experts": experts.shared_mlp_dim // experts.mlp_dim,
        "routed_scaling_factor": experts.routed_scale,
        "first_k_dense_replace": config.dense_layers,
        "moe_layer_freq": 1,
        "n_group": experts.groups if experts.limited else 1,
        "topk_group": experts.top_groups if experts.limited else 1,
        "norm_topk_prob": experts.router is not Router.SOFTMAX_TOPK,
    }


def _fill(config: ModelConfig) -> list[Filler]:
    experts = experts_of(config)
    fillers = [] if experts.shared_mlp_dim else no_shared_expert(config, "mlp.shared_experts.")
    if experts.router is Router.SIGMOID and not experts.router_bias:
        fillers.append(Filler(_BIAS, (experts.num_experts,), "float32"))
    return fillers


_EXPERTS: Rules = {
    **tensors.EXPERTS,
    **tensors.swiglu("moe/shared/", "mlp.shared_experts."),
    "moe/router_bias": Rule(_BIAS, "E -> E"),
}


# Latent attention


def _read_latent(fields: Fields, q_rank: int) -> dict[str, Any]:
    ranks = fields.values.get("q_lora_rank", q_rank)  # null: queries straight from the hidden states
    mla = MlaConfig(
        0 if ranks is None else fields.size("q_lora_rank", q_rank), fields.size("kv_lora_rank", 512),
        fields.size("qk_nope_head_dim", 128), fields.size("qk_rope_head_dim", 64), fields.size("v_head_dim", 128),
    )  # fmt: skip
    bias = fields.flag("attention_bias")
    values = common(fields, head_dim=mla.nope_dim + mla.rope_dim)
    values["kv_heads"] = values["heads"]  # every head has keys and values of its own, whatever config.json says
    return {**values, "mla": mla, "qkv_bias": bias, "out_bias": bias}


def _latent_fields(config: ModelConfig) -> dict[str, Any]:
    mla = config.mla or MlaConfig(0, 1, 1, 2, 1)  # of a model without: reading it again shows the difference
    values = common_fields(config) | {
        "q_lora_rank": mla.q_rank or None,
        "kv_lora_rank": mla.kv_rank,
        "qk_nope_head_dim": mla.nope_dim,
        "qk_rope_head_dim": mla.rope_dim,
        "v_head_dim": mla.value_dim,
        "attention_bias": config.qkv_bias,
    }
    return values | {"num_key_value_heads": config.heads, "head_dim": mla.rope_dim}


def _latent_rules(config: ModelConfig) -> Rules:
    """Rotary parts are in pairs there; queries and keys may be reordered alike, which leaves the scores as they are."""
    assert config.mla is not None
    nope, rank = config.mla.nope_dim, config.mla.kv_rank
    return {
        **_EXPERTS,
        "attention/query": Rule("self_attn.q_proj.weight", "(H N) D -> D H N", interleaved=nope),
        "attention/query_down": Rule("self_attn.q_a_proj.weight", "R D -> D R"),
        "attention/query_down_bias": Rule("self_attn.q_a_proj.bias", "R -> R"),
        "attention/query_down_norm/scale": Rule("self_attn.q_a_layernorm.weight", "R -> R"),
        "attention/query_up": Rule("self_attn.q_b_proj.weight", "(H N) R -> R H N", interleaved=nope),
        "attention/kv_down": Rule("self_attn.kv_a_proj_with_mqa.weight", "R D -> D R", interleaved=rank),
        "attention/kv_down_bias": Rule("self_attn.kv_a_proj_with_mqa.bias", "R -> R", interleaved=rank),
        "attention/kv_down_norm/scale": Rule("self_attn.kv_a_layernorm.weight", "R -> R"),
        "attention/kv_up": Rule("self_attn.kv_b_proj.weight", "(H N) R -> R H N"),
    }


# DeepSeek-V2: softmax over all experts, not renormalised


def _read_v2(fields: Fields) -> ModelConfig:
    fields.only("norm_topk_prob", False, why="transformers' DeepSeek-V2 never renormalises")
    fields.only("scoring_func", "softmax", why="the router of DeepSeek-V2 is a softmax")
    fields.only("topk_method", "greedy", "group_limited_greedy", why="there is no such choice of experts")
    groups = _groups(fields, (1, 1)) if fields.get("topk_method", "greedy") != "greedy" else (1, 1)
    experts = _read_experts(fields, router=Router.SOFTMAX_TOPK, groups=groups, score=GroupScore.MAX, shared=2)
    return ModelConfig(
        **_read_latent(fields, 1536), experts=experts, mlp_bias=fields.flag("mlp_bias"),
        dense_layers=fields.size("first_k_dense_replace", 0, least=0),
    )  # fmt: skip


def _write_v2(config: ModelConfig) -> dict[str, Any]:
    divisible(config)
    method = "group_limited_greedy" if experts_of(config).limited else "greedy"
    values = _latent_fields(config) | _expert_fields(config) | {"topk_method": method, "mlp_bias": config.mlp_bias}
    return values | {"norm_topk_prob": False, "scoring_func": "softmax"}


# DeepSeek-V3: sigmoid, renormalised, with a bias that only selects


def _sigmoid(fields: Fields, groups: tuple[int, int]) -> ExpertsConfig:
    fields.only("norm_topk_prob", True, why="the weights of a sigmoid router sum to one here")
    fields.only("scoring_func", "sigmoid", why="the router of this family is a sigmoid")
    fields.only("topk_method", "noaux_tc", why="there is no such choice of experts")
    return _read_experts(fields, router=Router.SIGMOID, groups=_groups(fields, groups), score=GroupScore.TOP2, shared=1)


def _read_v3(fields: Fields) -> ModelConfig:
    fields.only("rope_interleave", True, why="the rotary parts of DeepSeek-V3 lie in pairs")
    return ModelConfig(
        **_read_latent(fields, 1536), experts=_sigmoid(fields, (8, 4)),
        dense_layers=fields.size("first_k_dense_replace", 3, least=0),
    )  # fmt: skip


def _write_v3(config: ModelConfig) -> dict[str, Any]:
    values = _latent_fields(config) | _expert_fields(config)
    return values | {"rope_interleave": True, "num_nextn_predict_layers": 0}


# GLM-4-MoE: the same router behind grouped-query attention


def _read_glm(fields: Fields) -> ModelConfig:
    values = common(fields, epsilon=1e-5)
    scaling = fields.part("rope_scaling" if fields.get("rope_scaling") else "rope_parameters")
    part = scaling.optional("partial_rotary_factor") or fields.number("partial_rotary_factor", 0.5)
    rotary = int(values["head_dim"] * part)
    return ModelConfig(
        **values, experts=_sigmoid(fields, (1, 1)), qkv_bias=fields.flag("attention_bias"),
        qk_norm=QkNorm.HEAD if fields.flag("use_qk_norm") else QkNorm.NONE,
        rotary_dim=rotary if rotary != values["head_dim"] else None,
        dense_layers=fields.size("first_k_dense_replace", 1, least=0),
    )  # fmt: skip


def _write_glm(config: ModelConfig) -> dict[str, Any]:
    rotary = config.rotary_dim or config.head_dim
    part = rotary / config.head_dim
    if int(part * config.head_dim) != rotary:  # what transformers makes of it, where the quotient was rounded down
        part = math.nextafter(part, 2)
    return common_fields(config) | _expert_fields(config) | {
        "attention_bias": config.qkv_bias,
        "use_qk_norm": config.qk_norm is QkNorm.HEAD,
        "partial_rotary_factor": part,
        "num_nextn_predict_layers": 0,
    }  # fmt: skip


DEEPSEEK_V2 = Family("deepseek_v2", "DeepseekV2ForCausalLM", _read_v2, _write_v2, _latent_rules, _fill)
DEEPSEEK_V3 = Family("deepseek_v3", "DeepseekV3ForCausalLM", _read_v3, _write_v3, _latent_rules, _fill, True)
GLM4_MOE = Family("glm4_moe", "Glm4MoeForCausalLM", _read_glm, _write_glm, lambda config: _EXPERTS, _fill, True)
