"""Grouped-query self-attention with rotary positions and an optional cache of keys and values."""

from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp

from kwaicoder_jax.models import remat
from kwaicoder_jax.models.attention_config import QkNorm
from kwaicoder_jax.models.attention_ops import dot_product_attention
from kwaicoder_jax.models.config import ModelConfig, Runtime
from kwaicoder_jax.models.layers import InnerNorm, declare, declare_bias, plus, project
from kwaicoder_jax.models.rotary import rotary
from kwaicoder_jax.models.statistics import group_norms, record, recording

LayerCache = tuple[jax.Array, jax.Array]  # one layer of Cache.key_LBKSN and Cache.value_LBKSN


@flax.struct.dataclass
class Cache:
    """Keys and values of the tokens seen so far, for S slots; layers are in the order of the model.

    Heads stand before slots, as the products of attention want them: a decode step would transpose all slots otherwise.
    `index` is the next free slot, the same in every row: prompts are padded on the left, with segment 0. Under latent
    attention keys are the rotary part that all heads share, and values the latent: K = 1, N of its own for each.
    """

    key_LBKSN: jax.Array
    value_LBKSN: jax.Array
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
    lengths_BT: jax.Array | None = None  # of their documents, where rotary frequencies depend on it
    window: jax.Array | None = None  # of this layer, see `attention_ops`; None where no layer has one
    # Devices that share the time of the tokens, which are then in the order of `context_order`.
    context: int = flax.struct.field(pytree_node=False, default=1)

    def masks(self) -> dict[str, Any]:
        """The arguments of `dot_product_attention` that say which keys a query sees."""
        return {
            "q_positions_BT": self.positions_BT, "k_positions_BS": self.k_positions_BS,
            "q_segments_BT": self.segments_BT, "k_segments_BS": self.k_segments_BS, "window": self.window,
        }  # fmt: skip


class Attention(nn.Module):
    """Softmax attention; `layer_cache` is (key_BSKN, value_BSKN) or None, and comes back updated."""

    config: ModelConfig
    runtime: Runtime

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, tokens: Tokens, layer_cache: LayerCache | None
    ) -> tuple[jax.Array, LayerCache | None]:
        c = self.config
        init = nn.initializers.normal(c.initializer_range)
        out_init = nn.initializers.normal(c.initializer_range / (2 * c.layers) ** 0.5)
        q_shape, kv_shape = (c.model_dim, c.heads, c.head_dim), (c.model_dim, c.kv_heads, c.head_dim)
        query_DHN = declare(self, "query", q_shape, ("embed", "heads", "head_dim"), init, c.param_dtype)
        key_DKN = declare(self, "key", kv_shape, ("embed", "kv_heads", "head_dim"), init, c.param_dtype)
        value_DKN = declare(self, "value", kv_shape, ("embed", "kv_heads", "head_dim"), init, c.param_dtype)
        out_shape = (c.heads, c.head_dim, c.model_dim)
        out_HND = declare(self, "out", out_shape, ("heads", "head_dim", "embed"), out_init, c.param_dtype)

        q_BTHN = self._rotated("query", "heads", x_BTD, query_DHN, tokens)
        k_BSKN = self._rotated("key", "kv_heads", x_BTD, key_DKN, tokens)
        v_BSKN = self._clipped(
            self._biased("value", "kv_heads", project(x_BTD, value_DKN, runtime=self.runtime, channels=0))
        )
        q_BTHN, k_BSKN, v_BSKN = (remat.named(x, remat.HEADS) for x in (q_BTHN, k_BSKN, v_BSKN))
        if layer_cache is not None:
            layer_cache, (k_BSKN, v_BSKN) = updated(layer_cache, (k_BSKN, v_BSKN), tokens)
        mixed_BTHN = dot_product_attention(
            q_BTHN,
            k_BSKN,
            v_BSKN,
            same_sequence=k_BSKN.shape[1] == x_BTD.shape[1],
            backend=self.runtime.attention,
            platform=self.runtime.platform,
            context=tokens.context,
            **tokens.masks(),
        )
        return write(self, c, self.runtime, mixed_BTHN, out_HND, tokens), layer_cache

    def _rotated(self, name: str, axis: str, x_BTD: jax.Array, weight: jax.Array, tokens: Tokens) -> jax.Array:
        """Queries or keys: projected, normed where the model does so, rotated; in a compact call."""
        c = self.config
        x_BTHN = self._biased(name, axis, project(x_BTD, weight, runtime=self.runtime, channels=0))
        if c.qk_norm is not QkNorm.NONE:
            axes = ("head_dim",) if c.qk_norm is QkNorm.HEAD else (axis, "head_dim")
            x_BTHN = InnerNorm(axes, c.norm_epsilon, c.param_dtype, name=f"{name}_norm")(x_BTHN)
        return rotary(self._clipped(x_BTHN), tokens.positions_BT, c, tokens.lengths_BT)

    def _biased(self, name: str, axis: str, x_BTHN: jax.Array) -> jax.Array:
        if not self.config.qkv_bias:
            return x_BTHN
        return plus(x_BTHN, declare_bias(self, f"{name}_bias", x_BTHN.shape[2:], (axis, "head_dim"), self.config))

    def _clipped(self, x_BTHN: jax.Array) -> jax.Array:
        limit = self.config.qkv_clip
        return x_BTHN if limit is None else jnp.clip(x_BTHN, -limit, limit)


def updated(layer_cache: LayerCache, new: LayerCache, tokens: Tokens) -> tuple[LayerCache, LayerCache]:
    """Writes this call's keys and values, [B, T, K, N], at `tokens.index`.

    Returns:
      The cache, and all of it seen as [B, S, K, N]; that is `new` itself where it fills all slots.
    """
    assert tokens.index is not None
    new_BKTN = tuple(x_BTKN.swapaxes(1, 2).astype(old.dtype) for old, x_BTKN in zip(layer_cache, new, strict=True))
    key_BKSN, value_BKSN = jax.lax.platform_dependent(
        layer_cache, new_BKTN, tokens.index, cpu=_written_in_a_loop, default=_written
    )
    if new[0].shape[1] == key_BKSN.shape[2]:
        return (key_BKSN, value_BKSN), new
    return (key_BKSN, value_BKSN), (key_BKSN.swapaxes(1, 2), value_BKSN.swapaxes(1, 2))


def _written(layer_cache: LayerCache, new: LayerCache, index: jax.Array) -> LayerCache:
    key, value = (jax.lax.dynamic_update_slice(old, x, (0, 0, index, 0)) for old, x in zip(layer_cache, new))
    return key, value


def _written_in_a_loop(layer_cache: LayerCache, new: LayerCache, index: jax.Array) -> LayerCache:
    """As `_written`, once, in a loop whose length the compiler does not see.

    Otherwise XLA on CPU fuses the update into each of its readers where there is one row, and each updates a copy.
    """
    once = 1 + jnp.minimum(index, 0)
    return jax.lax.fori_loop(0, once, lambda _, cache: _written(cache, new, index), layer_cache)


def write(
    module: nn.Module, config: ModelConfig, runtime: Runtime, mixed_BTHN: jax.Array, out_HND: jax.Array, tokens: Tokens
) -> jax.Array:
    """What the heads' outputs add to the residual stream, with their statistics; in the module's compact call."""
    y_BTD = remat.named(project(mixed_BTHN, out_HND, 2, runtime, channels=-1), remat.MIXED)
    if recording(module):
        mask_BT = tokens.segments_BT > 0
        record(module, "heads", jnp.linalg.norm(mixed_BTHN.astype(jnp.float32), axis=-1), mask_BT)
        record(module, "groups", group_norms(mixed_BTHN, out_HND, y_BTD, config.kv_heads), mask_BT)
    if not config.out_bias:
        return y_BTD
    return plus(y_BTD, declare_bias(module, "out_bias", config.model_dim, "embed", config))
