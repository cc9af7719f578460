"""The same functions as `api`, written to be read: one-hot matrices in float32, no sorting of rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def sort_by_expert(experts_MX: jax.Array, num_experts: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The permutation, its inverse [M, X] and the group sizes [E]."""
    expert_R = experts_MX.reshape(-1)
    slot_R = jnp.argsort(expert_R, stable=True)
    row_R = jnp.argsort(slot_R, stable=True)
    return slot_R, row_R.reshape(experts_MX.shape), jnp.bincount(expert_R, length=num_experts + 1)[:num_experts]


def permute(x_MD: jax.Array, row_MX: jax.Array) -> jax.Array:
    """out[row_MX[m, x]] = x_MD[m]."""
    selection_MXR = jax.nn.one_hot(row_MX, row_MX.size, dtype=jnp.float32)
    return jnp.einsum("MXR,MD->RD", selection_MXR, x_MD.astype(jnp.float32), precision="highest")


def combine(rows_RD: jax.Array, weight_MX: jax.Array, row_MX: jax.Array) -> jax.Array:
    """out[m] = sum over x of weight_MX[m, x] * rows_RD[row_MX[m, x]]."""
    selection_MXR = jax.nn.one_hot(row_MX, row_MX.size, dtype=jnp.float32)
    return jnp.einsum(
        "MXR,MX,RD->MD", selection_MXR, weight_MX.astype(jnp.float32), rows_RD.astype(jnp.float32), precision="highest"
    )
