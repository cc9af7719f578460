"""The same functions as `api`, written to be read: one-hot matrices in float32, no sorting of rows."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def top_experts(scores_ME: jax.Array, choices: int) -> tuple[jax.Array, jax.Array]:
    """Scores and experts of the first `choices` in a stable sort by falling score, in the total order of IEEE 754."""
    bits_ME = jax.lax.bitcast_convert_type(scores_ME, jnp.int32)
    rising_ME = jnp.where(bits_ME < 0, bits_ME ^ 0x7FFFFFFF, bits_ME)
    expert_MX = jnp.argsort(~rising_ME, axis=1, stable=True)[:, :choices].astype(jnp.int32)  # ~n = -n - 1
    return jnp.take_along_axis(scores_ME, expert_MX, axis=1), expert_MX


def take(x_ME: jax.Array, expert_MX: jax.Array) -> jax.Array:
    """x_ME[m, expert_MX[m, x]]."""
    return jnp.take_along_axis(x_ME, expert_MX, axis=1)


def spread(x_MX: jax.Array, expert_MX: jax.Array, experts: int) -> jax.Array:
    """The transpose of `take`."""
    is_chosen_MXE = jax.nn.one_hot(expert_MX, experts, dtype=jnp.bool_)
    return jnp.sum(jnp.where(is_chosen_MXE, x_MX[:, :, None], 0), axis=1)


def sort_by_expert(expert_MX: jax.Array, experts: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The permutation, its inverse [M, X] and the group sizes [E]."""
    expert_R = expert_MX.reshape(-1)
    slot_R = jnp.argsort(expert_R, stable=True)
    row_R = jnp.argsort(slot_R, stable=True)
    sizes_E = jnp.sum(jax.nn.one_hot(expert_R, experts, dtype=jnp.int32), axis=0)
    return slot_R.astype(jnp.int32), row_R.astype(jnp.int32).reshape(expert_MX.shape), sizes_E


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
