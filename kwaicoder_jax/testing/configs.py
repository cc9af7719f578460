"""Models small enough to run in milliseconds, in which no two dimensions are equal.

Equal dimensions hide transposed axes, so every size of a config here is its own.
"""

from typing import Any

from kwaicoder_jax.models import ExpertsConfig, ModelConfig, Router


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
