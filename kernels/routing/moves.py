"""The two moves between token order and expert order.

Dimension letters: M tokens, X experts per token, R = M * X rows, E experts, D model.

Both moves are gathers, forward and backward: the transpose of a gather by a permutation is the gather by its inverse,
which costs no scatter-add (slow on every back end, and on a GPU not deterministic).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Routing:
    """Where each (token, choice) pair stands once rows are sorted by expert.

    Attributes:
      slot_R: the pair, token * X + choice, that sorted row r holds (the permutation).
      row_MX: the sorted row of each pair (its inverse).
      group_sizes_E: rows of each expert, int32. Less than R in total if some experts are out of range.
    """

    slot_R: jax.Array
    row_MX: jax.Array
    group_sizes_E: jax.Array

    @property
    def token_R(self) -> jax.Array:
        """The token that sorted row r holds."""
        return self.slot_R // self.row_MX.shape[1]


def take_rows(rows_RD: jax.Array, index_N: jax.Array) -> jax.Array:
    """rows_RD[index_N] without bounds checks."""
    return rows_RD.at[index_N].get(mode="promise_in_bounds")


def weighted_sum(rows_RD: jax.Array, row_MX: jax.Array, weight_MX: jax.Array | None = None) -> jax.Array:
    """sum over x of weight_MX * rows_RD[row_MX], accumulated in float32: [M, D] float32.

    One gather per choice, so that no [M, X, D] array is made.
    """
    total_MD = jnp.zeros((row_MX.shape[0], rows_RD.shape[1]), jnp.float32)
    for choice in range(row_MX.shape[1]):
        chosen_MD = take_rows(rows_RD, row_MX[:, choice]).astype(jnp.float32)
        total_MD = total_MD + (chosen_MD if weight_MX is None else chosen_MD * weight_MX[:, choice, None])
    return total_MD


@jax.custom_vjp
def permute(x_MD: jax.Array, routing: Routing) -> jax.Array:
    """Copies each token's row to its X places in expert order: [R, D], in the dtype of `x_MD`."""
    return take_rows(x_MD, routing.token_R)


def _permute_forward(x_MD: jax.Array, routing: Routing) -> tuple[jax.Array, Routing]:
    return permute(x_MD, routing), routing


def _permute_backward(routing: Routing, dout_RD: jax.Array) -> tuple[jax.Array, None]:
    return weighted_sum(dout_RD, routing.row_MX).astype(dout_RD.dtype), None


permute.defvjp(_permute_forward, _permute_backward)


@jax.custom_vjp
def combine(rows_RD: jax.Array, weight_MX: jax.Array, routing: Routing) -> jax.Array:
    """Brings rows back to token order and adds each token's X rows, weighted.

    Args:
      rows_RD: rows in expert order.
      weight_MX: combine weights, float32.
      routing: how the rows were sorted.

    Returns:
      [M, D], accumulated in float32, in the dtype of `rows_RD`.
    """
    return weighted_sum(rows_RD, routing.row_MX, weight_MX.astype(jnp.float32)).astype(rows_RD.dtype)


_CombineResiduals = tuple[jax.Array, jax.Array, Routing]


def _combine_forward(rows_RD: jax.Array, weight_MX: jax.Array, routing: Routing) -> tuple[jax.Array, _CombineResiduals]:
    return combine(rows_RD, weight_MX, routing), (rows_RD, weight_MX, routing)


def _combine_backward(residuals: _CombineResiduals, dout_MD: jax.Array) -> tuple[jax.Array, jax.Array, None]:
    rows_RD, weight_MX, routing = residuals
    dout32_MD = dout_MD.astype(jnp.float32)
    weight_R = take_rows(weight_MX.astype(jnp.float32).reshape(-1), routing.slot_R)
    drows_RD = take_rows(dout32_MD, routing.token_R) * weight_R[:, None]
    dweight = [
        jnp.sum(take_rows(rows_RD, routing.row_MX[:, choice]).astype(jnp.float32) * dout32_MD, axis=-1)
        for choice in range(weight_MX.shape[1])
    ]
    return drows_RD.astype(rows_RD.dtype), jnp.stack(dweight, axis=-1).astype(weight_MX.dtype), None


combine.defvjp(_combine_forward, _combine_backward)
