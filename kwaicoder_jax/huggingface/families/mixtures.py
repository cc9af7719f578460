"""Mixtures with grouped-query attention and a softmax router: Mixtral, Qwen2-MoE, Qwen3-MoE, OLMoE."""

from typing import Any

from kwaicoder_jax.huggingface.families import tensors
from kwaicoder_jax.huggingface.families.dense import sliding
from kwaicoder_jax.huggingface.families.family import (
    Family,
    Filler,
    Rules,
    common,
    common_fields,
    divisible,
    read_layer_types,
    window,
)
from kwaicoder_jax.huggingface.fields import Fields
from kwaicoder_jax.huggingface.rules import Rule
from kwaicoder_jax.models import ExpertsConfig, ModelConfig, QkNorm, Router


def experts_of(config: ModelConfig) -> ExpertsConfig:
    """The mixture of a config that has one."""
    assert config.experts is not None
    return config.experts


def _router(fields: Fields) -> Router:
    """Of the families that say whether the probabilities of the chosen experts are made to sum to 1."""
    return Router.SOFTMAX_TOPK_RENORMALISED if fields.flag("norm_topk_prob") else Router.SOFTMAX_TOPK


def _normalised(config: ModelConfig) -> bool:
    return experts_of(config).router is not Router.SOFTMAX_TOPK


def dense_layers(fields: Fields) -> int:
    """How many first layers `mlp_only_layers` and `decoder_sparse_step` make dense; no other pattern is represented."""
    only, step = fields.get("mlp_only_layers", []), fields.size("decoder_sparse_step", 1)
    layers = fields.size("num_hidden_layers")
    if not isinstance(only, list):
        raise fields.error("mlp_only_layers", f"{only!r} is no list of layers")
    dense = [layer for layer in range(layers) if layer in only or (layer + 1) % step]
    if dense != list(range(len(dense))) or len(dense) == layers:
        name = "mlp_only_layers" if only else "decoder_sparse_step"
        what = f"{fields.get(name)!r} makes layers {dense} of {layers} dense"
        raise fields.error(name, what, "only the first layers of a mixture can be dense")
    return len(dense)


# Mixtral


def _read_mixtral(fields: Fields) -> ModelConfig:
    experts = ExpertsConfig(
        fields.size("num_local_experts", 8), fields.size("num_experts_per_tok", 2), fields.size("intermediate_size"),
        Router.TOPK_SOFTMAX,
    )  # fmt: skip
    windows = (fields.size("sliding_window", 0, least=0),) * fields.size("num_hidden_layers")
    return ModelConfig(**common(fields, epsilon=1e-5, theta=1e6), experts=experts, windows=windows)


def _write_mixtral(config: ModelConfig) -> dict[str, Any]:
    experts = experts_of(config)
    return common_fields(config) | {
        "intermediate_size": experts.mlp_dim,
        "num_local_experts": experts.num_experts,
        "num_experts_per_tok": experts.experts_per_token,
        "sliding_window": window(config),
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
        "router_jitter_noise": 0.0,
    }


_MIXTRAL: Rules = {
    **tensors.DENSE,
    "moe/router": Rule("block_sparse_moe.gate.weight", "E D -> D E"),
    "moe/gate": Rule("block_sparse_moe.experts.{expert}.w1.weight", "F D -> D F"),
    "moe/up": Rule("block_sparse_moe.experts.{expert}.w3.weight", "F D -> D F"),
    "moe/down": Rule("block_sparse_moe.experts.{expert}.w2.weight", "D F -> F D"),
}
MIXTRAL = Family("mixtral", "MixtralForCausalLM", _read_mixtral, _write_mixtral, lambda config: _MIXTRAL)


# Qwen2-MoE: without a shared expert of our own it has one of width 0


def _sizes(fields: Fields, num: int, used: int, width: int) -> tuple[int, int, int, Router]:
    """Experts, experts per token, their width and the router, with the family's defaults."""
    number = "num_local_experts" if fields.get("num_local_experts") else "num_experts"  # transformers 5 and 4
    return (
        fields.size(number, num), fields.size("num_experts_per_tok", used),
        fields.size("moe_intermediate_size", width), _router(fields),
    )  # fmt: skip


def _qwen_experts(config: ModelConfig) -> dict[str, Any]:
    experts = experts_of(config)
    return {
        "num_experts": experts.num_experts,
        "num_experts_per_tok": experts.experts_per_token,
        "moe_intermediate_size": experts.mlp_dim,
        "norm_topk_prob": _normalised(config),
        "mlp_only_layers": list(range(config.dense_layers)),
        "decoder_sparse_step": 1,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.001,
    }


def _read_qwen2_moe(fields: Fields) -> ModelConfig:
    shared = fields.size("shared_expert_intermediate_size", 5632, least=0)
    experts = ExpertsConfig(*_sizes(fields, 60, 4, 1408), shared_mlp_dim=shared, shared_gate=bool(shared))
    up_to = fields.size("max_window_layers", 28, least=0)
    windows = read_layer_types(fields, lambda layer: layer % 2 == 0 and layer < up_to)  # transformers' own reading
    return ModelConfig(
        **common(fields), qkv_bias=fields.flag("qkv_bias", True), windows=windows, experts=experts,
        dense_layers=dense_layers(fields),
    )  # fmt: skip


def _write_qwen2_moe(config: ModelConfig) -> dict[str, Any]:
    shared = {"shared_expert_intermediate_size": experts_of(config).shared_mlp_dim, "qkv_bias": config.qkv_bias}
    return common_fields(config) | _qwen_experts(config) | sliding(config) | shared


def no_shared_expert(config: ModelConfig, theirs: str) -> list[Filler]:
    """The empty matrices of a shared expert of width 0."""
    width = config.model_dim
    return [Filler(f"{theirs}{name}_proj.weight", (0, width)) for name in ("gate", "up")] + [
        Filler(f"{theirs}down_proj.weight", (width, 0))
    ]


def _fill_qwen2_moe(config: ModelConfig) -> list[Filler]:
    if experts_of(config).shared_mlp_dim:
        return []
    gate = Filler("mlp.shared_expert_gate.weight", (1, config.model_dim))
    return [*no_shared_expert(config, "mlp.shared_expert."), gate]


_QWEN2_MOE: Rules = {
    **tensors.EXPERTS,
    **tensors.swiglu("moe/shared/", "mlp.shared_expert."),
    "moe/shared_gate": Rule("mlp.shared_expert_gate.weight", "C D -> D C"),
}
QWEN2_MOE = Family(
    "qwen2_moe", "Qwen2MoeForCausalLM", _read_qwen2_moe, _write_qwen2_moe, lambda config: _QWEN2_MOE, _fill_qwen2_moe
)


# Qwen3-MoE


def _read_qwen3_moe(fields: Fields) -> ModelConfig:
    width = fields.size("sliding_window", 4096) if fields.flag("use_sliding_window") else 0
    bias = fields.flag("attention_bias")
    return ModelConfig(
        **common(fields), qkv_bias=bias, out_bias=bias, qk_norm=QkNorm.HEAD, dense_layers=dense_layers(fields),
        windows=(width,) * fields.size("num_hidden_layers"), experts=ExpertsConfig(*_sizes(fields, 128, 8, 768)),
    )  # fmt: skip


def _write_qwen3_moe(config: ModelConfig) -> dict[str, Any]:
    windows = {"use_sliding_window": bool(config.windows), "sliding_window": window(config)}
    return common_fields(config) | _qwen_experts(config) | windows | {"attention_bias": config.qkv_bias}


QWEN3_MOE = Family(
    "qwen3_moe", "Qwen3MoeForCausalLM", _read_qwen3_moe, _write_qwen3_moe, lambda config: tensors.EXPERTS
)


# OLMoE: a norm over all heads at once


def _read_olmoe(fields: Fields) -> ModelConfig:
    heads, width, bias = fields.size("num_attention_heads"), fields.size("hidden_size"), fields.flag("attention_bias")
    if width % heads:
        raise fields.error("hidden_size", f"{width} is no multiple of {heads} heads")
    experts = ExpertsConfig(
        fields.size("num_experts", 64), fields.size("num_experts_per_tok", 8), fields.size("intermediate_size"),
        _router(fields),
    )  # fmt: skip
    return ModelConfig(
        **common(fields, epsilon=1e-5, head_dim=width // heads), qkv_bias=bias, out_bias=bias, qk_norm=QkNorm.FULL,
        qkv_clip=fields.optional("clip_qkv"), experts=experts,
    )  # fmt: skip


def _write_olmoe(config: ModelConfig) -> dict[str, Any]:
    divisible(config)
    experts, values = experts_of(config), common_fields(config)
    del values["head_dim"]  # the sizes of its norms know only hidden_size / heads
    return values | {
        "intermediate_size": experts.mlp_dim,
        "num_experts": experts.num_experts,
        "num_experts_per_tok": experts.experts_per_token,
        "norm_topk_prob": _normalised(config),
        "attention_bias": config.qkv_bias,
        "clip_qkv": config.qkv_clip,
        "output_router_logits": False,
        "router_aux_loss_coef": 0.01,
    }


_OLMOE: Rules = {
    **tensors.EXPERTS,
    "attention/query_norm/scale": Rule("self_attn.q_norm.weight", "(H N) -> H N"),
    "attention/key_norm/scale": Rule("self_attn.k_norm.weight", "(K N) -> K N"),
}
OLMOE = Family("olmoe", "OlmoeForCausalLM", _read_olmoe, _write_olmoe, lambda config: _OLMOE)
