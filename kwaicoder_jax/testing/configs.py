"""Models small enough to run in milliseconds, in which no two dimensions are equal.

Equal dimensions hide transposed axes, so every size of a config here is its own.
"""

import dataclasses
from typing import Any

from kwaicoder_jax.models import ExpertsConfig, GroupScore, MlaConfig, ModelConfig, RopeKind, RopeScaling, Router


def dense_config(**changes: Any) -> ModelConfig:
    """Grouped-query attention (6 heads on 2), tied embeddings; `changes` are fields of ModelConfig."""
    sizes = {"vocab_size": 97, "layers": 3, "model_dim": 32, "heads": 6, "kv_heads": 2, "head_dim": 8, "mlp_dim": 48}
    return ModelConfig(**(sizes | changes))


def odd_config(**changes: Any) -> ModelConfig:
    """Sizes that no tile likes, an untied head, heads * head_dim != model_dim, and one KV head."""
    sizes = {"vocab_size": 53, "layers": 2, "model_dim": 21, "heads": 5, "kv_heads": 1, "head_dim": 6, "mlp_dim": 37}
    return ModelConfig(**({"tie_embeddings": False, "rope_theta": 500.0, "norm_epsilon": 1e-5} | sizes | changes))


def moe_config(router: Router | str = Router.TOPK_SOFTMAX, **changes: Any) -> ModelConfig:
    """2 of 7 experts of 24 neurons in each of 3 layers; the sigmoid router scales its weights by 2.5 (DeepSeek-V3)."""
    scale = 2.5 if Router(router) is Router.SIGMOID else 1.0
    experts = ExpertsConfig(7, 2, 24, Router(router), routed_scale=scale)
    return dense_config(**({"experts": experts} | changes))


def small_configs() -> dict[str, ModelConfig]:
    """One config of every kind, by name: what a test of "any model" should be parametrized with."""
    dense = {"dense": dense_config(), "untied": dense_config(tie_embeddings=False), "odd": odd_config()}
    mixtures = {f"moe_{router.value}": moe_config(router) for router in Router}
    shared = ExpertsConfig(7, 2, 24, Router.SIGMOID, 2.5, router_bias=True, shared_mlp_dim=10)
    gated = ExpertsConfig(6, 3, 14, Router.SOFTMAX_TOPK_RENORMALISED, shared_mlp_dim=22, shared_gate=True)
    return dense | mixtures | {"moe_bias": moe_config(experts=shared), "moe_shared_gate": moe_config(experts=gated)}


def family_configs() -> dict[str, ModelConfig]:
    """One config for each family of open models, by its name in transformers, and for each kind of rotary scaling.

    Sequences of 24 tokens are longer than any `max_length`, `original_length` or window here.
    """
    return _dense_families() | _mixture_families()


def _dense_families() -> dict[str, ModelConfig]:
    linear = RopeScaling(RopeKind.LINEAR, 3.0)
    llama3 = RopeScaling(RopeKind.LLAMA3, 8.0, original_length=20, low_freq_factor=0.5, high_freq_factor=2.0)
    yarn = RopeScaling(RopeKind.YARN, 4.0, original_length=12)
    uneven = dataclasses.replace(
        yarn, factor=2.5, original_length=9, beta_fast=3.0, beta_slow=0.5, attention_factor=1.3, truncate=False
    )
    every_bias = {"qkv_bias": True, "out_bias": True, "mlp_bias": True}
    return {
        "llama": dense_config(**every_bias, rope_theta=20.0, rope_scaling=llama3),
        "llama_linear": odd_config(rope_scaling=linear),
        "llama_dynamic": dense_config(rope_scaling=RopeScaling(RopeKind.DYNAMIC, 2.0), max_length=10),
        "llama_yarn": odd_config(head_dim=12, rope_theta=5.0, rope_scaling=uneven),
        "mistral": odd_config(windows=(5, 5)),
        "qwen2": dense_config(qkv_bias=True, windows=(0, 7, 4), rope_scaling=yarn, max_length=48),
        "qwen3": odd_config(heads=6, kv_heads=3, head_dim=8, qk_norm="head"),
    }


def _mixture_families() -> dict[str, ModelConfig]:
    mscale = RopeScaling(RopeKind.YARN, 4.0, original_length=8, mscale=1.3, mscale_all_dim=0.7)
    grouped = ExpertsConfig(8, 3, 14, Router.SOFTMAX_TOPK, 1.7, shared_mlp_dim=10, groups=4, top_groups=2)
    biased = ExpertsConfig(
        9, 2, 14, Router.SIGMOID, 2.5, router_bias=True, shared_mlp_dim=10, groups=3, top_groups=2,
        group_score=GroupScore.TOP2,
    )  # fmt: skip
    gated = ExpertsConfig(6, 3, 14, Router.SOFTMAX_TOPK, shared_mlp_dim=22, shared_gate=True)
    glm = ExpertsConfig(7, 2, 24, Router.SIGMOID, 1.5, router_bias=True, shared_mlp_dim=10)
    latent: dict[str, Any] = {"heads": 5, "kv_heads": 5, "head_dim": 10}
    return {
        "mixtral": moe_config(windows=(6, 6, 6), tie_embeddings=False),
        "mixtral_with_biases": moe_config(experts=ExpertsConfig(7, 2, 14, bias=True), mlp_bias=True, out_bias=True),
        "olmoe": moe_config("softmax_topk", qk_norm="full", qkv_clip=1.5),
        "qwen2_moe": moe_config(experts=gated, qkv_bias=True, windows=(0, 6, 0)),
        "qwen3_moe": moe_config("softmax_topk_renormalised", qk_norm="head"),
        "deepseek_v2": moe_config(
            experts=grouped, **latent, mla=MlaConfig(0, 9, 4, 6, 7), dense_layers=1, rope_scaling=mscale
        ),
        "deepseek_v3": moe_config(
            experts=biased, **latent, mla=MlaConfig(11, 9, 4, 6, 7), dense_layers=2, layers=4, tie_embeddings=False
        ),
        "glm4_moe": moe_config(experts=glm, rotary_dim=4, qkv_bias=True, qk_norm="head", dense_layers=1),
    }
