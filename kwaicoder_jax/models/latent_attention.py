"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1): a cache of one latent instead of all heads.

R is the rank of the latent of keys and values, P the rotary part of a head, U the part without positions, W the width of
a value. A head's key is U numbers made of the latent and P that all heads share.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from kwaicoder_jax.models.attention import LayerCache, Tokens, updated, write
from kwaicoder_jax.models.attention_config import MlaConfig
from kwaicoder_jax.models.attention_ops import dot_product_attention, latent_dot_product_attention
from kwaicoder_jax.models.config import ModelConfig, Runtime
from kwaicoder_jax.models.layers import InnerNorm, declare, declare_bias, plus, project
from kwaicoder_jax.models.rotary import rotary, score_factor


class LatentAttention(nn.Module):
    """As `Attention`; `layer_cache` holds the shared rotary key and the latent."""

    config: ModelConfig
    runtime: Runtime

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, tokens: Tokens, layer_cache: LayerCache | None
    ) -> tuple[jax.Array, LayerCache | None]:
        c, m = self.config, self.config.mla
        assert m is not None
        init = nn.initializers.normal(c.initializer_range)
        out_init = nn.initializers.normal(c.initializer_range / (2 * c.layers) ** 0.5)
        up_shape, up_axes = (m.kv_rank, c.heads, m.nope_dim + m.value_dim), ("kv_latent", "heads", "nope_and_value")
        kv_up_RHN = declare(self, "kv_up", up_shape, up_axes, init, c.param_dtype)
        out_shape, out_axes = (c.heads, m.value_dim, c.model_dim), ("heads", "value_dim", "embed")
        out_HWD = declare(self, "out", out_shape, out_axes, out_init, c.param_dtype)

        q_BTHN = self._queries(x_BTD, m)
        q_BTHU = q_BTHN[..., : m.nope_dim]
        q_BTHP = rotary(q_BTHN[..., m.nope_dim :], tokens.positions_BT, c, tokens.lengths_BT)
        rope_BS1P, latent_BS1R = self._latents(x_BTD, m, tokens)
        if layer_cache is not None:
            layer_cache, (rope_BS1P, latent_BS1R) = updated(layer_cache, (rope_BS1P, latent_BS1R), tokens)

        scale = c.head_dim**-0.5 * score_factor(c)
        if layer_cache is not None and absorb_is_cheaper(m, x_BTD.shape[1]):
            key_RHU, value_RHW = jnp.split(kv_up_RHN.astype(q_BTHU.dtype), [m.nope_dim], axis=-1)
            q_BTHR = jnp.einsum("BTHU,RHU->BTHR", q_BTHU, key_RHU)
            mixed_BTHR = latent_dot_product_attention(
                q_BTHR, q_BTHP, latent_BS1R[:, :, 0], rope_BS1P[:, :, 0], scale=scale, **tokens.masks()
            )
            mixed_BTHW = jnp.einsum("BTHR,RHW->BTHW", mixed_BTHR, value_RHW)
        else:
            k_BSHU, v_BSHW = jnp.split(
                project(latent_BS1R[:, :, 0], kv_up_RHN, runtime=self.runtime), [m.nope_dim], axis=-1
            )
            rope_BSHP = jnp.broadcast_to(rope_BS1P, (*k_BSHU.shape[:3], m.rope_dim))
            mixed_BTHW = dot_product_attention(
                jnp.concatenate([q_BTHU, q_BTHP], axis=-1), jnp.concatenate([k_BSHU, rope_BSHP], axis=-1), v_BSHW,
                same_sequence=k_BSHU.shape[1] == x_BTD.shape[1], scale=scale, backend=self.runtime.attention,
                context=tokens.context, **tokens.masks(),
            )  # fmt: skip
        return write(self, c, self.runtime, mixed_BTHW, out_HWD, tokens), layer_cache

    def _queries(self, x_BTD: jax.Array, m: MlaConfig) -> jax.Array:
        """[B, T, H, N], not rotated; in a compact call."""
        c = self.config
        init = nn.initializers.normal(c.initializer_range)
        if not m.q_rank:
            shape, axes = (c.model_dim, c.heads, c.head_dim), ("embed", "heads", "head_dim")
            return project(
                x_BTD, declare(self, "query", shape, axes, init, c.param_dtype), runtime=self.runtime, channels=0
            )
        down_DQ = declare(self, "query_down", (c.model_dim, m.q_rank), ("embed", "q_latent"), init, c.param_dtype)
        shape, axes = (m.q_rank, c.heads, c.head_dim), ("q_latent", "heads", "head_dim")
        up_QHN = declare(self, "query_up", shape, axes, init, c.param_dtype)
        bias_Q = declare_bias(self, "query_down_bias", m.q_rank, "q_latent", c) if c.qkv_bias else None
        norm = InnerNorm(("q_latent",), m.norm_epsilon, c.param_dtype, name="query_down_norm")
        latent_BTQ = norm(plus(project(x_BTD, down_DQ, runtime=self.runtime, channels=0), bias_Q))
        return project(latent_BTQ, up_QHN, runtime=self.runtime)

    def _latents(self, x_BTD: jax.Array, m: MlaConfig, tokens: Tokens) -> tuple[jax.Array, jax.Array]:
        """The rotated key that all heads share, and the normed latent: [B, T, 1, P] and [B, T, 1, R]."""
        c, width, axes = self.config, m.kv_rank + m.rope_dim, ("embed", "kv_latent_and_rope")
        init = nn.initializers.normal(c.initializer_range)
        down_DJ = declare(self, "kv_down", (c.model_dim, width), axes, init, c.param_dtype)
        bias_J = declare_bias(self, "kv_down_bias", width, axes[1], c) if c.qkv_bias else None
        both_BTJ = plus(project(x_BTD, down_DJ, runtime=self.runtime, channels=0), bias_J)
        latent_BTR, rope_BTP = jnp.split(both_BTJ, [m.kv_rank], axis=-1)
        norm = InnerNorm(("kv_latent",), m.norm_epsilon, c.param_dtype, name="kv_down_norm")
        rope_BT1P = rotary(rope_BTP[:, :, None], tokens.positions_BT, c, tokens.lengths_BT)
        return rope_BT1P, norm(latent_BTR)[:, :, None]


def absorb_is_cheaper(m: MlaConfig, queries: int) -> bool:
    """Whether to attend to the latents themselves, the up-projections moved to queries and outputs.

    Per head and cached token that costs R + P + R products a query, against U + P + W a query and R (U + W) once to
    make the head's key and value: cheaper for few queries, as in a decode step.
    """
    per_query = 2 * m.kv_rank - m.nope_dim - m.value_dim
    return queries * per_query < m.kv_rank * (m.nope_dim + m.value_dim)
