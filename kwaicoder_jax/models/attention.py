"""Grouped-query self-attention with rotary positions and an optional cache of keys and values."""

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from kwaicoder_jax.models.attention_ops import dot_product_attention
from kwaicoder_jax.models.config import ModelConfig, Runtime
from kwaicoder_jax.models.layers import declare, project, rotary
from kwaicoder_jax.models.statistics import group_norms, record, recording


@flax.struct.dataclass
class Cache:
    """Keys and values of the tokens seen so far, for S slots.

    `index` is the next free slot, the same in every row: prompts are padded on the left, with segment 0.
    """

    key_LBSKN: jax.Array
    value_LBSKN: jax.Array
    positions_BS: jax.Array
    segments_BS: jax.Array
    index: jax.Array


@flax.struct.dataclass
class Tokens:
    """What every layer needs to know of the tokens it sees, beside their hidden states."""

    positions_BT: jax.Array
    segments_BT: jax.Array
    k_positions_BS: jax.Array
    k_segments_BS: jax.Array
    index: jax.Array | None = None  # where this call's keys go in the cache; None without a cache


class Attention(nn.Module):
    """Softmax attention; `layer_cache` is (key_BSKN, value_BSKN) or None, and comes back updated."""

    config: ModelConfig
    runtime: Runtime

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, tokens: Tokens, layer_cache: tuple[jax.Array, jax.Array] | None
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        c = self.config
        init = nn.initializers.normal(c.initializer_range)
        out_init = nn.initializers.normal(c.initializer_range / (2 * c.layers) ** 0.5)
        q_shape, kv_shape = (c.model_dim, c.heads, c.head_dim), (c.model_dim, c.kv_heads, c.head_dim)
        query_DHN = declare(self, "query", q_shape, ("embed", "heads", "head_dim"), init, c.param_dtype)
        key_DKN = declare(self, "key", kv_shape, ("embed", "kv_heads", "head_dim"), init, c.param_dtype)
        value_DKN = declare(self, "value", kv_shape, ("embed", "kv_heads", "head_dim"), init, c.param_dtype)
        out_shape = (c.heads, c.head_dim, c.model_dim)
        out_HND = declare(self, "out", out_shape, ("heads", "head_dim", "embed"), out_init, c.param_dtype)

        q_BTHN = rotary(project(x_BTD, query_DHN), tokens.positions_BT, c.rope_theta)
        k_BSKN = rotary(project(x_BTD, key_DKN), tokens.positions_BT, c.rope_theta)
        v_BSKN = project(x_BTD, value_DKN)
        if layer_cache is not None:
            assert tokens.index is not None
            start = (0, tokens.index, 0, 0)
            k_BSKN = jax.lax.dynamic_update_slice(layer_cache[0], k_BSKN.astype(layer_cache[0].dtype), start)
            v_BSKN = jax.lax.dynamic_update_slice(layer_cache[1], v_BSKN.astype(layer_cache[1].dtype), start)
        mixed_BTHN = dot_product_attention(
            q_BTHN,
            k_BSKN,
            v_BSKN,
            q_positions_BT=tokens.positions_BT,
            k_positions_BS=tokens.k_positions_BS,
            q_segments_BT=tokens.segments_BT,
            k_segments_BS=tokens.k_segments_BS,
            same_sequence=layer_cache is None,
            backend=self.runtime.attention,
        )
        y_BTD = project(mixed_BTHN, out_HND, inner=2)
        if recording(self):
            mask_BT = tokens.segments_BT > 0
            record(self, "heads", jnp.linalg.norm(mixed_BTHN.astype(jnp.float32), axis=-1), mask_BT)
            record(self, "groups", group_norms(mixed_BTHN, out_HND, y_BTD, c.kv_heads), mask_BT)
        return y_BTD, (None if layer_cache is None else (k_BSKN, v_BSKN))
