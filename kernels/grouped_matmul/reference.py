"""The products written to be read: a mask of which row is in which group, and products with every group in float32.

Masks select; they do not multiply, since what is not selected may hold NaN, and 0 * NaN is NaN.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def membership(rows: int, group_sizes_G: jax.Array) -> jax.Array:
    """Whether row m is in group g: [M, G]."""
    ends_1G = jnp.cumsum(group_sizes_G).reshape(1, -1)
    starts_1G = ends_1G - group_sizes_G.reshape(1, -1)
    row_M1 = jnp.arange(rows, dtype=ends_1G.dtype).reshape(-1, 1)
    return (row_M1 >= starts_1G) & (row_M1 < ends_1G)


def product(lhs_MK: jax.Array, rhs_GKN: jax.Array, group_sizes_G: jax.Array) -> jax.Array:
    """out[m] = lhs[m] @ rhs[group of m], zero for rows of no group: [M, N] in the dtype of `lhs_MK`."""
    lhs32_MK, rhs32_GKN = lhs_MK.astype(jnp.float32), rhs_GKN.astype(jnp.float32)
    each_MGN = jnp.einsum("MK,GKN->MGN", lhs32_MK, rhs32_GKN, precision="highest")
    mask_MG1 = membership(lhs_MK.shape[0], group_sizes_G)[:, :, None]
    return jnp.sum(jnp.where(mask_MG1, each_MGN, 0.0), axis=1).astype(lhs_MK.dtype)


def outer(lhs_MK: jax.Array, dout_MN: jax.Array, group_sizes_G: jax.Array) -> jax.Array:
    """out[g] = lhs[rows of g]^T @ dout[rows of g]: [G, K, N] in the dtype of `lhs_MK`."""
    mask_GM1 = membership(lhs_MK.shape[0], group_sizes_G).T[:, :, None]
    lhs_GMK, dout_GMN = (jnp.where(mask_GM1, rows[None].astype(jnp.float32), 0.0) for rows in (lhs_MK, dout_MN))
    return jnp.einsum("GMK,GMN->GKN", lhs_GMK, dout_GMN, precision="highest").astype(lhs_MK.dtype)
