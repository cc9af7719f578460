"""Masked grouped-query attention as a function of arrays; back ends differ in speed only."""

import enum

import jax
import jax.numpy as jnp


class AttentionBackend(enum.StrEnum):
    """Which implementation computes attention."""

    AUTO = "auto"
    REFERENCE = "reference"  # the full square of scores, in float32


def dot_product_attention(
    q_BTHN: jax.Array,
    k_BSKN: jax.Array,
    v_BSKN: jax.Array,
    *,
    q_positions_BT: jax.Array,
    k_positions_BS: jax.Array,
    q_segments_BT: jax.Array,
    k_segments_BS: jax.Array,
    same_sequence: bool,
    backend: str = "auto",
) -> jax.Array:
    """Softmax attention inside a segment, at or before a query's position.

    Args:
      q_BTHN: queries; H is a multiple of K, and query head h reads KV head h // (H/K).
      k_BSKN: keys.
      v_BSKN: values.
      q_positions_BT: position of each query inside its segment.
      k_positions_BS: the same for keys.
      q_segments_BT: segment of each query; a query sees only keys of its own segment. 0 is padding.
      k_segments_BS: the same for keys.
      same_sequence: queries and keys are the same tokens in the same order (T == S, no cache), so no key after a query
        is ever visible and a back end may skip that half.
      backend: a value of AttentionBackend.

    Returns:
      [B, T, H, N] in the dtype of the queries.
    """
    del same_sequence
    AttentionBackend(backend)
    batch, time, heads, width = q_BTHN.shape
    groups = k_BSKN.shape[2]
    q_BTKGN = q_BTHN.reshape(batch, time, groups, heads // groups, width)
    scores_BKGTS = jnp.einsum("BTKGN,BSKN->BKGTS", q_BTKGN, k_BSKN, preferred_element_type=jnp.float32)
    visible_BTS = (q_segments_BT[:, :, None] == k_segments_BS[:, None, :]) & (
        q_positions_BT[:, :, None] >= k_positions_BS[:, None, :]
    )
    scores_BKGTS = jnp.where(visible_BTS[:, None, None], scores_BKGTS * width**-0.5, -1e30)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1).astype(v_BSKN.dtype)
    return jnp.einsum("BKGTS,BSKN->BTKGN", weights_BKGTS, v_BSKN).reshape(q_BTHN.shape)
