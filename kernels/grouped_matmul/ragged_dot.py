"""The products through `jax.lax.ragged_dot`: good forward and dlhs on TPU, a dense loop over groups elsewhere."""

from __future__ import annotations

import jax
import jax.numpy as jnp

_OUTER = jax.lax.RaggedDotDimensionNumbers(
    dot_dimension_numbers=(((0,), (0,)), ((), ())), lhs_ragged_dimensions=[0], rhs_group_dimensions=[]
)


def _clear_tail(rows_MK: jax.Array, group_sizes_G: jax.Array) -> jax.Array:
    row_M1 = jnp.arange(rows_MK.shape[0], dtype=jnp.int32).reshape(-1, 1)
    return jnp.where(row_M1 < jnp.sum(group_sizes_G), rows_MK, jnp.zeros_like(rows_MK))


def product(lhs_MK: jax.Array, rhs_GKN: jax.Array, group_sizes_G: jax.Array) -> jax.Array:
    """out[m] = lhs[m] @ rhs[group of m], zero for rows of no group: [M, N] in the dtype of `lhs_MK`."""
    lhs_MK = _clear_tail(lhs_MK, group_sizes_G)
    out_MN = jax.lax.ragged_dot(lhs_MK, rhs_GKN, group_sizes_G, preferred_element_type=jnp.float32)
    return _clear_tail(out_MN, group_sizes_G).astype(lhs_MK.dtype)  # some back ends leave the tail uninitialised


def outer(lhs_MK: jax.Array, dout_MN: jax.Array, group_sizes_G: jax.Array) -> jax.Array:
    """out[g] = lhs[rows of g]^T @ dout[rows of g]: [G, K, N] in the dtype of `lhs_MK`."""
    lhs_MK, dout_MN = _clear_tail(lhs_MK, group_sizes_G), _clear_tail(dout_MN, group_sizes_G)
    out_GKN = jax.lax.ragged_dot_general(
        lhs_MK, dout_MN, group_sizes_G, _OUTER, preferred_element_type=jnp.float32
    )  # fmt: skip
    return out_GKN.astype(lhs_MK.dtype)
