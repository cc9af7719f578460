"""Model FLOPs: the work that the mathematics needs, whatever an implementation executes."""

import math

from kwaicoder_jax.models.config import ModelConfig
from kwaicoder_jax.models.parameters import declarations


def forward_flops_per_token(config: ModelConfig, sequence_length: int, *, logits: bool = True) -> float:
    """FLOPs of one token's forward pass: 2 per active matmul parameter, and causal attention at half the square."""
    matmul = 0.0
    for name, d in declarations(config).items():
        if name in ("embedding", "head") or len(d.shape) - ("layers" in d.axes) < 2:
            continue  # a lookup, the projection (below), or a norm
        share = 1.0
        if config.experts is not None and "expert_mlp" in d.axes:
            share = config.experts.experts_per_token / config.experts.num_experts
        matmul += 2.0 * share * math.prod(d.shape)
    attention = 2.0 * config.layers * config.heads * config.head_dim * sequence_length  # scores and mix, causal half
    return matmul + attention + (2.0 * config.vocab_size * config.model_dim if logits else 0.0)


def train_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """FLOPs of one token's forward and backward pass (backward is twice forward; nothing recomputed is counted)."""
    return 3.0 * forward_flops_per_token(config, sequence_length)
