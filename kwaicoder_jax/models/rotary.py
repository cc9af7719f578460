"""Rotary positions (Su et al. 2021, arXiv 2104.09864, in the Llama layout: pairs (i, i + P)), plain and scaled.

The scaled frequencies are those of transformers' `modeling_rope_utils`, computed in float64 and rounded once.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from kwaicoder_jax.models.attention_config import RopeKind, RopeScaling
from kwaicoder_jax.models.config import ModelConfig


def rotary(
    x_BTHN: jax.Array, positions_BT: jax.Array, config: ModelConfig, lengths_BT: jax.Array | None = None
) -> jax.Array:
    """Rotates pairs (i, i + P) of the first 2P dimensions of each head by position times frequency i.

    Args:
      x_BTHN: queries or keys; under latent attention their rotary part alone.
      positions_BT: position of each token.
      config: of the model.
      lengths_BT: length of each token's document, from `document_lengths`; needed for RopeKind.DYNAMIC.
    """
    width, scaling = rotary_width(config), config.rope_scaling
    if width < x_BTHN.shape[-1]:
        rotated = rotary(x_BTHN[..., :width], positions_BT, config, lengths_BT)
        return jnp.concatenate([rotated, x_BTHN[..., width:]], axis=-1)
    frequency_P = _frequencies(config) if lengths_BT is None else _dynamic_frequencies(config, lengths_BT)
    angle_BT1P = positions_BT.astype(jnp.float32)[:, :, None, None] * frequency_P[(None,) * (4 - frequency_P.ndim)]
    cos, sin = jnp.cos(angle_BT1P), jnp.sin(angle_BT1P)
    if (factor := _attention_factor(scaling)) != 1.0:
        cos, sin = cos * factor, sin * factor
    first, second = jnp.split(x_BTHN.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_BTHN.dtype)


def rotary_width(config: ModelConfig) -> int:
    """How many dimensions of a query or key turn with the position, 2P."""
    if config.mla is not None:
        return config.mla.rope_dim
    return config.head_dim if config.rotary_dim is None else config.rotary_dim


def is_dynamic(config: ModelConfig) -> bool:
    """Whether the frequencies depend on how long a document is."""
    return config.rope_scaling is not None and config.rope_scaling.kind is RopeKind.DYNAMIC


def document_lengths(positions_BT: jax.Array, segments_BT: jax.Array) -> jax.Array:
    """Length of each token's document as far as it is in this call: its last position + 1, [B, T].

    transformers takes the longest of the batch instead; this way a row does not depend on those beside it.
    """
    same_BTS = segments_BT[:, :, None] == segments_BT[:, None, :]
    return 1 + jnp.max(jnp.where(same_BTS, positions_BT[:, None, :], 0), axis=-1)


def score_factor(config: ModelConfig) -> float:
    """What DeepSeek's latent attention multiplies its scores with beside 1 / sqrt(N), see `RopeScaling`."""
    scaling = config.rope_scaling
    if scaling is None or config.mla is None or not scaling.mscale_all_dim:
        return 1.0
    return _magnitude(scaling.factor, scaling.mscale_all_dim) ** 2


def _frequencies(config: ModelConfig) -> jax.Array:
    """[P] float32."""
    half, theta, scaling = rotary_width(config) // 2, config.rope_theta, config.rope_scaling
    if scaling is None:
        return theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    return jnp.asarray(_scaled_frequencies(scaling, theta, half), jnp.float32)


def _dynamic_frequencies(config: ModelConfig, lengths_BT: jax.Array) -> jax.Array:
    """[B, T, 1, P] float32: base^(-i / P) of the base theta * growth^(P / (P - 1)), whose last one is stretched most."""
    assert config.rope_scaling is not None
    assert config.max_length is not None
    half, factor = rotary_width(config) // 2, config.rope_scaling.factor
    length_BT11 = jnp.maximum(lengths_BT, config.max_length)[:, :, None, None].astype(jnp.float32)
    growth_BT11 = factor * length_BT11 / config.max_length - (factor - 1)
    index_111P = jnp.arange(half, dtype=jnp.float32)[None, None, None, :]
    return config.rope_theta ** (-index_111P / half) * growth_BT11 ** (-index_111P / (half - 1))


@functools.lru_cache(maxsize=64)
def _scaled_frequencies(scaling: RopeScaling, theta: float, half: int) -> np.ndarray:
    plain_P = theta ** (-np.arange(half) / half)
    if scaling.kind is RopeKind.LINEAR:
        return plain_P / scaling.factor
    assert scaling.original_length is not None
    if scaling.kind is RopeKind.YARN:
        stretched_P = _yarn_ramp(scaling, theta, half)
    else:
        turns_P = scaling.original_length * plain_P / (2 * math.pi)  # over the length of the first training
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        stretched_P = 1 - np.clip((turns_P - low) / (high - low), 0, 1)
    return plain_P * (1 - stretched_P) + plain_P / scaling.factor * stretched_P


def _yarn_ramp(scaling: RopeScaling, theta: float, half: int) -> np.ndarray:
    """How far each frequency is divided by the factor, from 0 (turns often) to 1 (turns seldom): [P]."""

    def dimension(turns: float) -> float:
        """The (fractional) dimension that turns so often over the original length."""
        assert scaling.original_length is not None
        return half * math.log(scaling.original_length / (turns * 2 * math.pi)) / math.log(theta)

    low, high = dimension(scaling.beta_fast), dimension(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * half - 1)
    if low == high:
        high += 0.001
    return np.clip((np.arange(half) - low) / (high - low), 0, 1)


def _attention_factor(scaling: RopeScaling | None) -> float:
    if scaling is None or scaling.kind is not RopeKind.YARN:
        return 1.0
    if scaling.attention_factor is not None:
        return scaling.attention_factor
    if scaling.mscale and scaling.mscale_all_dim:
        return _magnitude(scaling.factor, scaling.mscale) / _magnitude(scaling.factor, scaling.mscale_all_dim)
    return _magnitude(scaling.factor, 1.0)


def _magnitude(factor: float, mscale: float) -> float:
    """YaRN's correction of the scores' temperature (arXiv 2309.00071, equation 22)."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0
