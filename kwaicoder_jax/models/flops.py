"""Model FLOPs: the work that the mathematics needs, whatever an implementation executes."""

import math

from kwaicoder_jax.models.config import ModelConfig
from kwaicoder_jax.models.parameters import declarations


def forward_flops_per_token(config: ModelConfig, sequence_length: int, *, logits: bool = True) -> float:
    """FLOPs of one token's forward pass: 2 per active matmul parameter, and attention to the keys that are visible.

    Attention is counted with the keys and values of every head made once, which is what training does: per visible key
    and head 2 per dimension of a key and of a value. A token sees half the sequence on average, or less in a window.
    """
    visible = sum(_visible(window, sequence_length) for window in config.windows or (0,) * config.layers)
    return _forward(config, visible, logits=logits)


def decode_flops_per_token(config: ModelConfig, cached: int) -> float:
    """FLOPs of one token's forward pass behind `cached` tokens whose keys and values are there."""
    visible = sum(min(window or cached, cached) for window in config.windows or (0,) * config.layers)
    return _forward(config, visible, logits=True)


def _forward(config: ModelConfig, visible: float, *, logits: bool) -> float:
    """Of one token; `visible`: keys that it sees, of all layers."""
    matmul = 0.0
    for name, d in declarations(config).items():
        if name in ("embedding", "head") or d.kind != "matrix":
            continue  # a lookup, the projection (below), a norm or a bias
        share = 1.0
        if config.experts is not None and d.of_experts:
            share = config.experts.experts_per_token / config.experts.num_experts
        matmul += 2.0 * share * math.prod(d.shape)
    widths = config.head_dim + (config.head_dim if config.mla is None else config.mla.value_dim)
    attention = 2.0 * config.heads * widths * visible
    return matmul + attention + (2.0 * config.vocab_size * config.model_dim if logits else 0.0)


def _visible(window: int, length: int) -> float:
    """Keys that a token sees on average: half the square, without the part that lies before the window."""
    if not 0 < window < length:
        return length / 2
    return window - window**2 / (2 * length)


def train_flops_per_token(config: ModelConfig, sequence_length: int) -> float:
    """FLOPs of one token's forward and backward pass (backward is twice forward; nothing recomputed is counted)."""
    return 3.0 * forward_flops_per_token(config, sequence_length)
