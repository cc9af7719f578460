"""The products written to be read: a mask of which row is in which group, and einsums in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def membership(rows: int, group_sizes_G: jax.Array) -> jax.Array:
    """1.0 where row m is in group g: [M, G] float32."""
    ends_1G = jnp.cumsum(group_sizes_G).reshape(1, -1)
    starts_1G = ends_1G - group_sizes_G.reshape(1, -1)
    row_M1 = jnp.arange(rows, dtype=ends_1G.dtype).reshape(-1, 1)
    return ((row_M1 >= starts_1G) & (row_M1 < ends_1G)).astype(jnp.float32)


def _grouped_rows(rows_MK: jax.Array, mask_MG: jax.Array) -> jax.Array:
    # A select, not a product: a row outside all groups may hold NaN, and 0 * NaN is NaN.
    return jnp.where(jnp.any(mask_MG > 0, axis=1, keepdims=True), rows_MK.astype(jnp.float32), 0.0)


def product(lhs_MK: jax.Array, rhs_GKN: jax.Array, group_sizes_G: jax.Array) -> jax.Array:
    """out[m] = lhs[m] @ rhs[group of m], zero for rows of no group: [M, N] in the dtype of `lhs_MK`."""
    mask_MG = membership(lhs_MK.shape[0], group_sizes_G)
    lhs32_MK = _grouped_rows(lhs_MK, mask_MG)
    out_MN = jnp.einsum("MG,MK,GKN->MN", mask_MG, lhs32_MK, rhs_GKN.astype(jnp.float32), precision="highest")
    return out_MN.astype(lhs_MK.dtype)


def outer(lhs_MK: jax.Array, dout_MN: jax.Array, group_sizes_G: jax.Array) -> jax.Array:
    """out[g] = lhs[rows of g]^T @ dout[rows of g]: [G, K, N] in the dtype of `lhs_MK`."""
    mask_MG = membership(lhs_MK.shape[0], group_sizes_G)
    lhs32_MK, dout32_MN = _grouped_rows(lhs_MK, mask_MG), _grouped_rows(dout_MN, mask_MG)
    out_GKN = jnp.einsum("MG,MK,MN->GKN", mask_MG, lhs32_MK, dout32_MN, precision="highest")
    return out_GKN.astype(lhs_MK.dtype)
