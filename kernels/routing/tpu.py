"""Routing on TPU: two Pallas kernels, and around them what XLA does well there. docs/routing.md says which, and why.

A gather or a scatter of single numbers is a serial loop there, so there is none: what would be one is a sum over all
experts with all others masked, or a sort.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kernels.routing import tpu_kernels
from kernels.routing.tpu_kernels import LANES, SHIFT_BITS, SUBLANES, tiled, untiled

_MOST_EXPERTS, _MOST_CHOICES = 1024, 32  # VMEM, and code that is unrolled


def fits(experts: int, choices: int) -> bool:
    """Whether the kernels are made for so many."""
    return experts <= _MOST_EXPERTS and choices <= _MOST_CHOICES


def top_experts(scores_ME: jax.Array, choices: int, *, interpret: Any = False) -> tuple[jax.Array, jax.Array]:
    """See `api.top_experts`; `interpret` is `pltpu.InterpretParams` to run on CPU."""
    tokens, experts = scores_ME.shape
    _check(experts, choices)
    if not tokens:
        return jnp.zeros((0, choices), scores_ME.dtype), jnp.zeros((0, choices), jnp.int32)
    scores_EM = jnp.pad(scores_ME.T, ((0, -experts % SUBLANES), (0, -tokens % LANES)))
    found = tpu_kernels.top(tiled(scores_EM), experts, choices, interpret)
    score_MX, expert_MX = (untiled(each)[:choices, :tokens].T for each in found)
    return score_MX, expert_MX


def take(x_ME: jax.Array, expert_MX: jax.Array) -> jax.Array:
    """x_ME[m, expert_MX[m, x]]."""
    return jnp.sum(jnp.where(_is_chosen(expert_MX, x_ME.shape[1]), x_ME[:, None, :], 0), axis=2)


def spread(x_MX: jax.Array, expert_MX: jax.Array, experts: int) -> jax.Array:
    """The transpose of `take`."""
    return jnp.sum(jnp.where(_is_chosen(expert_MX, experts), x_MX[:, :, None], 0), axis=1)


def _is_chosen(expert_MX: jax.Array, experts: int) -> jax.Array:
    return expert_MX[:, :, None] == jnp.arange(experts, dtype=jnp.int32).reshape(1, 1, -1)


def sort_by_expert(
    expert_MX: jax.Array, experts: int, *, interpret: Any = False
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The arrays of `api.sort_by_expert`."""
    tokens, choices = expert_MX.shape
    _check(experts, choices)
    pairs = tokens * choices
    if not pairs:
        return jnp.zeros(0, jnp.int32), jnp.zeros(expert_MX.shape, jnp.int32), jnp.zeros(experts, jnp.int32)
    filled_XM = jnp.pad(expert_MX.T, ((0, 0), (0, -tokens % LANES)), constant_values=-1)  # belong nowhere
    groups = -(-(experts + 1) // SUBLANES) * SUBLANES  # with that of `experts` itself, "none of these"
    of_XCL1 = filled_XM.reshape(choices, -1, LANES, 1)
    counts_CG = jnp.sum(
        of_XCL1 == jnp.arange(groups, dtype=jnp.int32).reshape(1, 1, 1, -1), axis=(0, 2), dtype=jnp.int32
    )
    sizes_G = jnp.sum(counts_CG, axis=0)
    starts_1G = (jnp.cumsum(sizes_G) - sizes_G).reshape(1, -1)
    base_CG = jnp.cumsum(counts_CG, axis=0) - counts_CG + (starts_1G - SHIFT_BITS)
    filled = tiled(jnp.pad(filled_XM, ((0, -choices % SUBLANES), (0, 0))))
    row_XM = untiled(tpu_kernels.places(filled, base_CG, choices, interpret))[:choices, :tokens]
    # In whatever order they are sorted: this one needs no copy.
    slot_XM = jnp.arange(choices, dtype=jnp.int32).reshape(-1, 1) + choices * jnp.arange(tokens, dtype=jnp.int32)[None]
    if (experts + 1) * pairs < 2**31:
        slot_R = lax.rem(lax.sort((expert_MX.T * pairs + slot_XM).reshape(-1), is_stable=False), jnp.int32(pairs))
    else:
        slot_R = lax.sort((row_XM.reshape(-1), slot_XM.reshape(-1)), num_keys=1, is_stable=False)[1]
    return slot_R, row_XM.T, sizes_G[:experts]


def _check(experts: int, choices: int) -> None:
    if not fits(experts, choices):
        most = f"{_MOST_EXPERTS} experts and {_MOST_CHOICES} choices"
        raise ValueError(f"{choices} of {experts} experts: the kernels take up to {most}; use another back end")
