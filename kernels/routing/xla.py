"""Routing by what XLA has: compiles everywhere, and is meant for CPU and GPU."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def top_experts(scores_ME: jax.Array, choices: int) -> tuple[jax.Array, jax.Array]:
    """See `api.top_experts`."""
    score_MX, expert_MX = jax.lax.top_k(scores_ME, choices)
    return score_MX, expert_MX


def take(x_ME: jax.Array, expert_MX: jax.Array) -> jax.Array:
    """x_ME[m, expert_MX[m, x]]."""
    return jnp.take_along_axis(x_ME, expert_MX, axis=1, mode="promise_in_bounds")


def spread(x_MX: jax.Array, expert_MX: jax.Array, experts: int) -> jax.Array:
    """The transpose of `take`."""
    token_M1 = jnp.arange(x_MX.shape[0], dtype=jnp.int32).reshape(-1, 1)
    return jnp.zeros((x_MX.shape[0], experts), x_MX.dtype).at[token_M1, expert_MX].add(x_MX, mode="promise_in_bounds")


def sort_by_expert(expert_MX: jax.Array, experts: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The arrays of `api.sort_by_expert`."""
    pairs = expert_MX.size
    expert_R, slots_R = expert_MX.reshape(-1), jnp.arange(pairs, dtype=jnp.int32)
    if (experts + 1) * pairs < 2**31:
        # One integer that carries both keys sorts three times as fast on CPU as a stable sort of pairs.
        slot_R = jax.lax.sort(expert_R * pairs + slots_R, is_stable=False) % pairs
    else:
        slot_R = jnp.argsort(expert_R, stable=True).astype(jnp.int32)
    row_R = jnp.zeros_like(slots_R).at[slot_R].set(slots_R, unique_indices=True, mode="promise_in_bounds")
    sizes_E = jnp.zeros(experts, jnp.int32).at[expert_R].add(1, mode="drop")  # not `experts` itself
    return slot_R, row_R.reshape(expert_MX.shape), sizes_E
