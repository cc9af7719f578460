"""The expert MLP as one loop over row tiles on CPU: gathers, products and activation of a tile while it is in cache."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

from kernels.grouped_matmul.cpu import Tile, for_each_group, for_each_tile, read_matrix
from kernels.grouped_matmul.mlp_types import Activation, Arguments, Gradients, Saved, gated
from kernels.routing import Routing
from kernels.routing.api import take_rows, weighted_sum

_Rows = tuple[jax.Array, Saved]  # expert outputs, saved projections
_Sums = tuple[jax.Array, jax.Array, jax.Array, jax.Array]  # dx, dweight, gradients of gate and up, of down


def _read_in(arguments: Arguments, expert: jax.Array) -> jax.Array:
    """Gate and up side by side, [D, 2F]: one wide product is faster than two."""
    return jnp.concatenate([read_matrix(arguments.gate_EDF, expert), read_matrix(arguments.up_EDF, expert)], axis=1)


def _floats(arguments: Arguments) -> Sequence[jax.Array]:
    return arguments[2:]  # type: ignore[return-value]  # see `backward`


def forward(activation: Activation, arguments: Arguments, routing: Routing) -> tuple[jax.Array, Saved]:
    """The experts' outputs, rows in expert order, and what the backward pass needs."""
    x_MD, dtype = arguments.x_MD, arguments.x_MD.dtype
    rows, neurons = arguments.weight_MX.size, arguments.gate_EDF.shape[2]
    token_R = routing.token_R

    def expert_step(expert: jax.Array, start: jax.Array, end: jax.Array, carry: _Rows) -> _Rows:
        in_DF2, down_FD = _read_in(arguments, expert), read_matrix(arguments.down_EFD, expert)

        def tile_step(tile: Tile, carry: _Rows) -> _Rows:
            y_RD, saved = carry
            x_TD = take_rows(x_MD, tile.read(token_R)).astype(jnp.float32)
            gate_TF, up_TF = jnp.split(x_TD @ in_DF2, [neurons], axis=1)
            y_TD = gated(activation, gate_TF, up_TF) @ down_FD
            saved = Saved(tile.write(saved.gate_RF, gate_TF), tile.write(saved.up_RF, up_TF))
            return tile.write(y_RD, y_TD), saved

        return for_each_tile(rows, start, end, tile_step, carry)

    empty_RF = jnp.zeros((rows, neurons), dtype)
    carry = (jnp.zeros((rows, x_MD.shape[1]), dtype), Saved(empty_RF, empty_RF))
    if rows:
        carry = for_each_group(routing.group_sizes_E, expert_step, carry)
    return carry


def backward(
    activation: Activation, arguments: Arguments, routing: Routing, saved: Saved, dy_MD: jax.Array
) -> Gradients:
    """Gradients of all arguments, which are not quantized."""
    x_MD, weight_MX = arguments.x_MD, arguments.weight_MX
    rows, width, neurons = weight_MX.size, x_MD.shape[1], arguments.gate_EDF.shape[2]
    token_R, weight_R1 = routing.token_R, take_rows(weight_MX.reshape(-1, 1), routing.slot_R)

    def expert_step(expert: jax.Array, start: jax.Array, end: jax.Array, carry: Gradients) -> Gradients:
        in_DF2, down_FD = _read_in(arguments, expert), read_matrix(arguments.down_EFD, expert)

        def tile_step(tile: Tile, carry: _Sums) -> _Sums:
            dx_RD, dweight_R1, din_DF2, ddown_FD = carry
            token_T, weight_T1 = tile.read(token_R), tile.select(tile.read(weight_R1))
            x_TD = tile.select(take_rows(x_MD, token_T)).astype(jnp.float32)
            dy_TD = tile.select(take_rows(dy_MD, token_T)).astype(jnp.float32)
            gate_TF, up_TF = (tile.select(tile.read(array_RF)).astype(jnp.float32) for array_RF in saved)
            h_TF, pull = jax.vjp(functools.partial(gated, activation), gate_TF, up_TF)
            dh_TF = dy_TD @ down_FD.T
            din_TF2 = jnp.concatenate(pull(dh_TF * weight_T1), axis=1)
            return (
                tile.write(dx_RD, din_TF2 @ in_DF2.T),
                tile.write(dweight_R1, jnp.sum(dh_TF * h_TF, axis=1, keepdims=True)),
                din_DF2 + x_TD.T @ din_TF2,
                ddown_FD + (h_TF * weight_T1).T @ dy_TD,
            )

        din_DF2, ddown_FD = jnp.zeros((width, 2 * neurons), jnp.float32), jnp.zeros((neurons, width), jnp.float32)
        inner = for_each_tile(rows, start, end, tile_step, (carry.x_MD, carry.weight_MX, din_DF2, ddown_FD))
        dgate_DF, dup_DF = jnp.split(inner[2], [neurons], axis=1)
        return Gradients(
            inner[0],
            inner[1],
            *(
                lax.dynamic_update_index_in_dim(total, part.astype(total.dtype), expert, axis=0)
                for total, part in zip(_floats(carry), (dgate_DF, dup_DF, inner[3]), strict=True)
            ),
        )

    # Inside the loops the first two gradients are in expert order, [R, D] and [R, 1].
    empty_RD, empty_R1 = jnp.zeros((rows, width), jnp.float32), jnp.zeros((rows, 1), jnp.float32)
    carry = Gradients(empty_RD, empty_R1, *map(jnp.zeros_like, _floats(arguments)))
    if rows:
        carry = for_each_group(routing.group_sizes_E, expert_step, carry)
    dx_MD = weighted_sum(carry.x_MD, routing.row_MX).astype(x_MD.dtype)
    return carry._replace(x_MD=dx_MD, weight_MX=take_rows(carry.weight_MX.reshape(-1), routing.row_MX))
