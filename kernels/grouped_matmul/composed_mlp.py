"""The expert MLP from the three grouped products of any back end; rows in expert order are made in memory."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kernels.grouped_matmul.api import Backend, outer, product
from kernels.grouped_matmul.mlp_types import Activation, Arguments, Gradients, Saved, gated
from kernels.routing import Routing, permute
from kernels.routing.api import take_rows, weighted_sum


def forward(
    backend: Backend, activation: Activation, arguments: Arguments, routing: Routing
) -> tuple[jax.Array, Saved]:
    """The experts' outputs, rows in expert order, and what the backward pass needs."""
    x_MD, _, gate_EDF, up_EDF, down_EFD = arguments
    sizes_E = routing.group_sizes_E
    x_RD = permute(x_MD, routing)
    gate_RF, up_RF = product(backend, x_RD, gate_EDF, sizes_E), product(backend, x_RD, up_EDF, sizes_E)
    h_RF = gated(activation, gate_RF, up_RF).astype(x_MD.dtype)
    return product(backend, h_RF, down_EFD, sizes_E), Saved(gate_RF, up_RF)


def backward(
    backend: Backend,
    activation: Activation,
    arguments: Arguments,
    routing: Routing,
    saved: Saved,
    dy_MD: jax.Array,
) -> Gradients:
    """Gradients of all arguments; None of quantized matrices."""
    x_RD, dy_RD = take_rows(arguments.x_MD, routing.token_R), take_rows(dy_MD, routing.token_R)
    weight_R1 = take_rows(arguments.weight_MX.reshape(-1, 1), routing.slot_R)
    rows = row_gradients(backend, activation, arguments, routing.group_sizes_E, saved, x_RD, dy_RD, weight_R1)
    return rows._replace(
        x_MD=weighted_sum(rows.x_MD, routing.row_MX).astype(arguments.x_MD.dtype),
        weight_MX=take_rows(rows.weight_MX, routing.row_MX),
    )


def row_gradients(
    backend: Backend,
    activation: Activation,
    arguments: Arguments,
    sizes_E: jax.Array,
    saved: Saved,
    x_RD: jax.Array,
    dy_RD: jax.Array,
    weight_R1: jax.Array,
) -> Gradients:
    """Gradients from rows in expert order; those of x [R, D] and of the combine weights [R] are of rows, too.

    Args:
      backend: of the grouped products.
      activation: of the gate.
      arguments: the matrices count.
      sizes_E: rows of each expert.
      saved: what the forward pass kept of these rows.
      x_RD: their inputs.
      dy_RD: gradients of their tokens' outputs, in the dtype of the inputs.
      weight_R1: their combine weights.
    """
    _, _, gate_EDF, up_EDF, down_EFD = arguments
    dtype = x_RD.dtype
    h_RF, pull = jax.vjp(functools.partial(gated, activation), saved.gate_RF, saved.up_RF)
    dh_RF = product(backend, dy_RD, down_EFD, sizes_E, transpose_rhs=True).astype(jnp.float32)
    dgate_RF, dup_RF = pull(dh_RF * weight_R1)
    dx_RD = product(backend, dgate_RF, gate_EDF, sizes_E, transpose_rhs=True).astype(jnp.float32)
    dx_RD = dx_RD + product(backend, dup_RF, up_EDF, sizes_E, transpose_rhs=True).astype(jnp.float32)
    dweight_R = jnp.sum(dh_RF * h_RF, axis=-1)
    if arguments.is_scaled:
        constants: Any = (None, None, None)
        return Gradients(dx_RD.astype(dtype), dweight_R, *constants)
    return Gradients(
        x_MD=dx_RD.astype(dtype),  # rows that are written: half the memory
        weight_MX=dweight_R,
        gate_EDF=outer(backend, x_RD, dgate_RF, sizes_E),
        up_EDF=outer(backend, x_RD, dup_RF, sizes_E),
        # Like the others, with D before F: the three then lie alike for whoever scatters them along D.
        down_EFD=outer(backend, dy_RD, (h_RF * weight_R1).astype(dtype), sizes_E).swapaxes(1, 2),
    )
