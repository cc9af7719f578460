"""Activation statistics, collected inside the forward pass and reduced there: no activation leaves its layer.

A module calls `record`, or `store` for what it reduced itself; both cost nothing unless the caller asked for the
"statistics" collection (`models.forward(..., statistics=True)`), which `transforms.importance` does. What is stored are
float32 sums over the batch, so that batches add up.
"""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

COLLECTION = "statistics"
Sums = dict[str, dict[str, jax.Array]]  # {"first", "second"} to {"mean", "l2", "var"} to [...]: see `over_sequences`


def recording(module: nn.Module) -> bool:
    """Whether the caller asked for statistics, so that work done for them alone is not traced without need."""
    return module.is_mutable_collection(COLLECTION) and not module.is_initializing()


def store(module: nn.Module, name: str, value: Any) -> None:
    """Stores a tree of arrays under `name`, if statistics are wanted."""
    if recording(module):
        module.sow(COLLECTION, name, value, reduce_fn=lambda _, new: new, init_fn=lambda: None)


def record(module: nn.Module, name: str, values_BTU: jax.Array, mask_BT: jax.Array) -> None:
    """Stores the moments over sequences of `values_BTU`'s statistics over the unmasked positions: arrays [U]."""
    if recording(module):
        store(module, name, over_sequences(sequence_statistics(values_BTU, mask_BT)))


def sequence_statistics(values_BTU: jax.Array, mask_BT: jax.Array) -> dict[str, jax.Array]:
    """Reduces over time: {"mean", "l2", "var"} of |values|, each [B, U] in float32; masked positions do not count."""
    weight_BT1 = mask_BT.astype(jnp.float32)[:, :, None]
    absolute_BTU = jnp.abs(values_BTU.astype(jnp.float32)) * weight_BT1
    count_B1 = jnp.sum(weight_BT1, axis=1)
    return from_sums(jnp.sum(absolute_BTU, axis=1), jnp.sum(jnp.square(absolute_BTU), axis=1), count_B1)


def from_sums(absolute: jax.Array, square: jax.Array, count: jax.Array) -> dict[str, jax.Array]:
    """Mean, root of the sum of squares and population variance of |a|, of shape [..., U].

    Args:
      absolute: sum of |a|, [..., U].
      square: sum of a^2, [..., U].
      count: how many were summed, [..., 1]; the statistics of nothing are zero.
    """
    count = jnp.maximum(count, 1.0)
    mean = absolute / count
    variance = jnp.maximum(square / count - jnp.square(mean), 0.0)
    return {"mean": mean, "l2": jnp.sqrt(square), "var": variance}


def over_sequences(statistics: dict[str, jax.Array]) -> Sums:
    """Sums [B, ...] over sequences: of s ("first") and of s^2 ("second"). A row of padding has s = 0 and adds nothing."""
    first = {name: jnp.sum(s, axis=0) for name, s in statistics.items()}
    second = {name: jnp.sum(jnp.square(s), axis=0) for name, s in statistics.items()}
    return {"first": first, "second": second}


def energy_share(values_BTU: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """Sum over unmasked tokens of v_u^2 / sum_u v_u^2: [U], sums to the number of tokens with any energy."""
    square_BTU = jnp.square(values_BTU.astype(jnp.float32))
    total_BT1 = jnp.maximum(jnp.sum(square_BTU, axis=-1, keepdims=True), 1e-30)
    weight_BT1 = mask_BT.astype(jnp.float32)[:, :, None]
    return jnp.sum(square_BTU / total_BT1 * weight_BT1, axis=(0, 1))


def influence(in_BTD: jax.Array, out_BTD: jax.Array, mask_BT: jax.Array) -> jax.Array:
    """Sum over unmasked tokens of 1 - cos(in, out), a scalar (block influence, Men et al. 2024, arXiv 2403.03853)."""
    a, b = in_BTD.astype(jnp.float32), out_BTD.astype(jnp.float32)
    norms_BT = jnp.linalg.norm(a, axis=-1) * jnp.linalg.norm(b, axis=-1)
    cosine_BT = jnp.sum(a * b, axis=-1) / jnp.maximum(norms_BT, 1e-20)
    return jnp.sum(mask_BT * (1.0 - cosine_BT))


def group_norms(mixed_BTHN: jax.Array, out_HND: jax.Array, y_BTD: jax.Array, groups: int) -> jax.Array:
    """||attn_g W_o,g||: the norm of what each KV group adds to the residual stream, [B, T, K] in float32.

    The naive way makes every group's [B, T, D]. ||x W||^2 = x (W W^T) x^T needs instead one small matrix per group,
    which is cheaper while a group's heads are together narrower than the model.

    Args:
      mixed_BTHN: the heads' outputs.
      out_HND: the output projection.
      y_BTD: their product, the sum over groups.
      groups: K.
    """
    if groups == 1:
        return jnp.linalg.norm(y_BTD.astype(jnp.float32), axis=-1, keepdims=True)
    batch, time, width = y_BTD.shape
    x_KMJ = mixed_BTHN.reshape(batch * time, groups, -1).swapaxes(0, 1).astype(jnp.float32)
    out_KJD = out_HND.reshape(groups, -1, width).astype(jnp.float32)
    if out_KJD.shape[1] > width:
        square_KM = jnp.sum(jnp.square(x_KMJ @ out_KJD), axis=-1)
    else:
        square_KM = jnp.sum((x_KMJ @ (out_KJD @ out_KJD.swapaxes(1, 2))) * x_KMJ, axis=-1)
    return jnp.sqrt(jnp.maximum(square_KM, 0.0)).T.reshape(batch, time, groups)
