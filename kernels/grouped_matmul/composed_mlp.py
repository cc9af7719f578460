"""The expert MLP from the three grouped products of any back end; rows in expert order are made in memory."""

from __future__ import annotations

import functools

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
    """Gradients of all arguments."""
    x_MD, weight_MX, gate_EDF, up_EDF, down_EFD = arguments
    sizes_E, dtype = routing.group_sizes_E, x_MD.dtype
    x_RD, dy_RD = take_rows(x_MD, routing.token_R), take_rows(dy_MD, routing.token_R)
    weight_R1 = take_rows(weight_MX.reshape(-1, 1), routing.slot_R)

    h_RF, pull = jax.vjp(functools.partial(gated, activation), saved.gate_RF, saved.up_RF)
    dh_RF = product(backend, dy_RD, down_EFD, sizes_E, transpose_rhs=True).astype(jnp.float32)
    dweight_R = jnp.sum(dh_RF * h_RF, axis=-1)
    dgate_RF, dup_RF = pull(dh_RF * weight_R1)
    dx_RD = product(backend, dgate_RF, gate_EDF, sizes_E, transpose_rhs=True).astype(jnp.float32)
    dx_RD = dx_RD + product(backend, dup_RF, up_EDF, sizes_E, transpose_rhs=True).astype(jnp.float32)
    dx_RD = dx_RD.astype(dtype)  # rows that are written: half the memory
    return Gradients(
        x_MD=weighted_sum(dx_RD, routing.row_MX).astype(dtype),
        weight_MX=take_rows(dweight_R, routing.row_MX),
        gate_EDF=outer(backend, x_RD, dgate_RF, sizes_E),
        up_EDF=outer(backend, x_RD, dup_RF, sizes_E),
        down_EFD=outer(backend, (h_RF * weight_R1).astype(dtype), dy_RD, sizes_E),
    )
