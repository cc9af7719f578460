"""The expert MLP with a capacity: every expert has a buffer of one size, and the products are batched matmuls.

No kernel is needed and no tile is wasted at a border of experts; what a buffer cannot take adds nothing to its token.
Along a mesh axis, parts of buffers go to the devices of their experts by a plain all-to-all.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from kernels.grouped_matmul.mlp_types import Activation, Saved, gated, named
from kernels.routing import combine, permute
from kernels.routing.capacity import buffer_routing


def capped_expert_mlp(
    x_MD: jax.Array,
    weight_MX: jax.Array,
    expert_MX: jax.Array,
    place_MX: jax.Array,
    gate_EDF: jax.Array,
    up_EDF: jax.Array,
    down_EFD: jax.Array,
    *,
    rows: int,
    time: int,
    axis: str | None = None,
    activation: Activation = jax.nn.silu,
) -> jax.Array:
    """Applies each token's experts, where it got a place, and adds their outputs.

    Args:
      x_MD: tokens, batch-major.
      weight_MX: combine weights, float32.
      expert_MX: the experts of each token.
      place_MX: from `routing.capacity.places`.
      gate_EDF: gate projections, in the dtype of `x_MD`; with `axis` those of this device's experts.
      up_EDF: up projections.
      down_EFD: down projections.
      rows: capacity of an expert for one sequence.
      time: tokens of a sequence.
      axis: of a mesh, inside a shard_map, over which the experts are split; None if all of them are here.
      activation: elementwise function of the gate projection.

    Returns:
      [M, D] in the dtype of `x_MD`; sums in float32.
    """
    tokens, width = x_MD.shape
    experts = gate_EDF.shape[0] * (1 if axis is None else jax.lax.axis_size(axis))
    routing = buffer_routing(expert_MX, place_MX, experts, rows, time)
    buffer_ECD = permute(_with_zeros(x_MD), routing)[:-1].reshape(experts, -1, width)
    if axis is not None:
        buffer_ECD = jax.lax.all_to_all(buffer_ECD, axis, split_axis=0, concat_axis=1, tiled=True)
    saved = named(Saved(*(jnp.einsum("ECD,EDF->ECF", buffer_ECD, weight) for weight in (gate_EDF, up_EDF))))
    h_ECF = gated(activation, *saved).astype(x_MD.dtype)
    y_ECD = jnp.einsum("ECF,EFD->ECD", h_ECF, down_EFD)
    if axis is not None:
        y_ECD = jax.lax.all_to_all(y_ECD, axis, split_axis=1, concat_axis=0, tiled=True)
    rows_RD = _with_zeros(y_ECD.reshape(-1, width))
    return combine(rows_RD, _with_zeros(weight_MX.astype(jnp.float32)), routing)[:tokens]


def _with_zeros(x_MD: jax.Array) -> jax.Array:
    return jnp.concatenate([x_MD, jnp.zeros_like(x_MD[:1])])
