"""Places of (token, choice) pairs in the buffers of experts that take so many rows of a sequence and no more.

As in GShard (Lepikhin et al. 2020, section 2.2) and Switch (Fedus et al. 2021, section 2.2): first choices come before
second ones, and among equals the earlier token. Groups are sequences, so that what is dropped does not depend on how a
batch is spread over devices, nor on what else is in it.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from kernels.routing.api import Routing


def capacity(factor: float, tokens: int, choices: int, experts: int) -> int:
    """Rows that an expert takes of a sequence of `tokens`: `factor` times those of even routing, rounded up.

    No more than there can be, one for each token.
    """
    return min(tokens, max(1, math.ceil(factor * tokens * choices / experts)))


def places(expert_BTX: jax.Array, mask_BT: jax.Array, num_experts: int, rows: int) -> jax.Array:
    """The place of each pair among those that its expert takes of its sequence: int32 in [0, rows), or `rows` for none.

    Args:
      expert_BTX: the expert of each choice, the best one first.
      mask_BT: tokens that count; the others get no place and take none.
      num_experts: E.
      rows: capacity of an expert for one sequence.
    """
    batch, time, choices = expert_BTX.shape
    expert_BS = expert_BTX.swapaxes(1, 2).reshape(batch, choices * time)  # choice by choice
    mask_BS = jnp.tile(mask_BT, (1, choices))
    experts_11E = jnp.arange(num_experts, dtype=jnp.int32).reshape(1, 1, -1)
    wants_BSE = ((expert_BS[:, :, None] == experts_11E) & mask_BS[:, :, None]).astype(jnp.int32)
    before_BSE = jnp.cumsum(wants_BSE, axis=1) - wants_BSE
    place_BS = jnp.where(mask_BS, jnp.sum(wants_BSE * before_BSE, axis=2), rows)
    return jnp.minimum(place_BS, rows).reshape(batch, choices, time).swapaxes(1, 2)


def buffer_routing(expert_MX: jax.Array, place_MX: jax.Array, num_experts: int, rows: int, time: int) -> Routing:
    """Where each pair stands in a buffer [E, B, rows], for `permute` and `combine`.

    Tokens and buffer have one entry more than there are, at the end: empty places hold that token, and pairs without a
    place stand in that row. Both are to be zero.

    Args:
      expert_MX: the expert of each pair; M is batch-major.
      place_MX: from `places`.
      num_experts: E.
      rows: capacity of an expert for one sequence.
      time: tokens of a sequence.
    """
    tokens, choices = expert_MX.shape
    sequences = tokens // time
    sequence_M1 = jnp.arange(tokens, dtype=jnp.int32).reshape(-1, 1) // time
    size, pairs = num_experts * sequences * rows, tokens * choices
    row_MX = jnp.where(place_MX < rows, (expert_MX * sequences + sequence_M1) * rows + place_MX, size)
    row_MX = jnp.concatenate([row_MX, jnp.full((1, choices), size, jnp.int32)])
    slot_R = jnp.full(size + 1, pairs, jnp.int32)
    slot_R = slot_R.at[jnp.where(row_MX[:-1] < size, row_MX[:-1], size + 1).reshape(-1)].set(
        jnp.arange(pairs, dtype=jnp.int32), mode="drop"
    )
    return Routing(slot_R, row_MX, jnp.full(num_experts, sequences * rows, jnp.int32))
