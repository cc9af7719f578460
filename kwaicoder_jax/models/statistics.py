"""Activation statistics, collected inside the forward pass and reduced there: no activation leaves its layer.

A module calls `record`; it costs nothing unless the caller asked for the "statistics" collection
(`models.forward(..., statistics=True)`), which `transforms.importance` does.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

COLLECTION = "statistics"


def record(module: nn.Module, name: str, values_BTU: jax.Array, mask_BT: jax.Array, *, share: bool = False) -> None:
    """Stores statistics of `values_BTU` over the unmasked positions, float32.

    Per sequence and unit: mean absolute value, root of the summed squares, and variance of the absolute value, each
    [B, U]; with `share`, instead the mean over tokens of each unit's share of the token's energy, [U].
    """
    if not module.is_mutable_collection(COLLECTION) or module.is_initializing():
        return
    reduced = energy_share(values_BTU, mask_BT) if share else sequence_statistics(values_BTU, mask_BT)
    module.sow(COLLECTION, name, reduced, reduce_fn=lambda _, new: new, init_fn=lambda: None)


def sequence_statistics(values_BTU: jax.Array, mask_BT: jax.Array) -> dict[str, jax.Array]:
    """Reduces over time: {"mean", "l2", "var"} of |values|, each [B, U] in float32; masked positions do not count."""
    weight_BT1 = mask_BT.astype(jnp.float32)[:, :, None]
    absolute_BTU = jnp.abs(values_BTU.astype(jnp.float32)) * weight_BT1
    count_B1 = jnp.maximum(jnp.sum(weight_BT1, axis=1), 1.0)
    mean_BU = jnp.sum(absolute_BTU, axis=1) / count_B1
    square_BU = jnp.sum(jnp.square(absolute_BTU), axis=1)
    variance_BU = jnp.maximum(square_BU / count_B1 - jnp.square(mean_BU), 0.0)
    return {"mean": mean_BU, "l2": jnp.sqrt(square_BU), "var": variance_BU}


def energy_share(values_BTU: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """Mean over unmasked tokens of v_u^2 / sum_u v_u^2: [U], sums to 1."""
    square_BTU = jnp.square(values_BTU.astype(jnp.float32))
    total_BT1 = jnp.maximum(jnp.sum(square_BTU, axis=-1, keepdims=True), 1e-30)
    weight_BT1 = mask_BT.astype(jnp.float32)[:, :, None]
    return jnp.sum(square_BTU / total_BT1 * weight_BT1, axis=(0, 1)) / jnp.maximum(jnp.sum(weight_BT1), 1.0)
