"""The expert MLP of a device that holds some of the experts, and sees tokens of which most want others.

Rows for its own experts come first once they are sorted, so `rows` of them are worked on at a time: memory is bounded
by that, and nothing is dropped. One pass is enough as long as routing is about even; each further one is recomputed in
the backward pass.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels.grouped_matmul.api import Backend, product
from kernels.grouped_matmul.composed_mlp import row_gradients
from kernels.grouped_matmul.mlp_types import Activation, Arguments, Gradients, Saved, gated, named
from kernels.routing import Routing, sort_by_expert
from kernels.routing.api import take_rows

OVERFLOW = "overflow"  # scope of the passes after the first, in the names of instructions


def local_expert_mlp(
    x_MD: jax.Array,
    weight_MX: jax.Array,
    expert_MX: jax.Array,
    gate_EDF: jax.Array,
    up_EDF: jax.Array,
    down_EFD: jax.Array,
    *,
    rows: int,
    activation: Activation = jax.nn.silu,
    backend: Backend | str = Backend.AUTO,
) -> jax.Array:
    """What these experts add to each token's output; differentiable in everything but `expert_MX`.

    Args:
      x_MD: tokens.
      weight_MX: combine weights, float32.
      expert_MX: expert of each choice, from 0; anything outside of [0, E) is another device's.
      gate_EDF: gate projections of these experts, in the dtype of `x_MD`.
      up_EDF: up projections.
      down_EFD: down projections.
      rows: worked on at a time.
      activation: elementwise function of the gate projection; a module-level function, so that it hashes equal.
      backend: a Backend or its value.

    Returns:
      [M, D] float32.
    """
    experts = gate_EDF.shape[0]
    ours_MX = jnp.where((expert_MX >= 0) & (expert_MX < experts), expert_MX, experts)
    routing = sort_by_expert(ours_MX, experts)
    arguments = Arguments(x_MD, weight_MX.astype(jnp.float32), gate_EDF, up_EDF, down_EFD)
    return _local(Backend(backend), activation, min(rows, expert_MX.size), arguments, routing)


class _Pass(NamedTuple):
    """The rows of one pass."""

    slot_C: jax.Array
    token_C: jax.Array
    row_MX: jax.Array  # of each choice in this pass; outside of [0, C) where it is not in it
    sizes_E: jax.Array


def _pass(routing: Routing, rows: int, number: jax.Array | int) -> _Pass:
    first = number * rows
    padded_R = jnp.pad(routing.slot_R, (0, -routing.slot_R.size % rows))
    slot_C = jax.lax.dynamic_slice_in_dim(padded_R, first, rows)
    ends_E = jnp.clip(jnp.cumsum(routing.group_sizes_E) - first, 0, rows)
    sizes_E = jnp.diff(ends_E, prepend=0)
    return _Pass(slot_C, slot_C // routing.row_MX.shape[1], routing.row_MX - first, sizes_E)


def _further(routing: Routing, rows: int, body, carry):
    """carry = body(pass, carry) for the passes after the first that have rows."""
    if rows >= routing.slot_R.size:
        return carry
    passes = -(-jnp.sum(routing.group_sizes_E) // rows)
    with jax.named_scope(OVERFLOW):
        return jax.lax.fori_loop(1, passes, lambda number, x: body(_pass(routing, rows, number), x), carry)


def _summed(rows_CD: jax.Array, here: _Pass, weight_MX: jax.Array | None = None) -> jax.Array:
    """The rows of each token, added up (weighted), float32; choices that are not in this pass are left out."""
    count = rows_CD.shape[0]
    total_MD = jnp.zeros((here.row_MX.shape[0], rows_CD.shape[1]), jnp.float32)
    for choice in range(here.row_MX.shape[1]):
        row_M = here.row_MX[:, choice]
        inside_M1 = ((row_M >= 0) & (row_M < count))[:, None]
        chosen_MD = take_rows(rows_CD, jnp.clip(row_M, 0, count - 1)).astype(jnp.float32)
        if weight_MX is not None:
            chosen_MD = chosen_MD * weight_MX[:, choice, None]
        total_MD = total_MD + jnp.where(inside_M1, chosen_MD, 0.0)
    return total_MD


def _projections(backend: Backend, arguments: Arguments, here: _Pass) -> tuple[jax.Array, Saved]:
    x_CD = take_rows(arguments.x_MD, here.token_C)
    gate_CF = product(backend, x_CD, arguments.gate_EDF, here.sizes_E)
    return x_CD, Saved(gate_CF, product(backend, x_CD, arguments.up_EDF, here.sizes_E))


def _outputs(backend: Backend, activation: Activation, arguments: Arguments, here: _Pass, saved: Saved) -> jax.Array:
    h_CF = gated(activation, *saved).astype(arguments.x_MD.dtype)
    return _summed(product(backend, h_CF, arguments.down_EFD, here.sizes_E), here, arguments.weight_MX)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _local(backend: Backend, activation: Activation, rows: int, arguments: Arguments, routing: Routing) -> jax.Array:
    return _forward(backend, activation, rows, arguments, routing)[0]


_Residuals = tuple[Arguments, Routing, Saved]


def _forward(
    backend: Backend, activation: Activation, rows: int, arguments: Arguments, routing: Routing
) -> tuple[jax.Array, _Residuals]:
    first = _pass(routing, rows, 0)
    _, saved = _projections(backend, arguments, first)
    y_MD = _outputs(backend, activation, arguments, first, saved)

    def more(here: _Pass, y_MD: jax.Array) -> jax.Array:
        return y_MD + _outputs(backend, activation, arguments, here, _projections(backend, arguments, here)[1])

    return _further(routing, rows, more, y_MD), (arguments, routing, named(saved))


def _backward(
    backend: Backend, activation: Activation, rows: int, residuals: _Residuals, dy_MD: jax.Array
) -> tuple[Gradients, None]:
    arguments, routing, saved = residuals
    first = _pass(routing, rows, 0)
    x_CD = take_rows(arguments.x_MD, first.token_C)
    gradients = _gradients(backend, activation, arguments, first, x_CD, saved, dy_MD)

    def more(here: _Pass, sums: Gradients) -> Gradients:
        x_CD, saved = _projections(backend, arguments, here)
        new = _gradients(backend, activation, arguments, here, x_CD, saved, dy_MD)
        return jax.tree.map(jnp.add, sums, new)

    gradients = _further(routing, rows, more, gradients)
    return jax.tree.map(lambda gradient, x: gradient.astype(x.dtype), gradients, arguments), None


_local.defvjp(_forward, _backward)


def _gradients(
    backend: Backend, activation: Activation, arguments: Arguments, here: _Pass, x_CD: jax.Array, saved: Saved,
    dy_MD: jax.Array,
) -> Gradients:  # fmt: skip
    """Of the rows of one pass."""
    count = x_CD.shape[0]
    dy_CD = take_rows(dy_MD, here.token_C).astype(x_CD.dtype)
    weight_C1 = take_rows(arguments.weight_MX.reshape(-1, 1), here.slot_C)
    rows = row_gradients(backend, activation, arguments, here.sizes_E, saved, x_CD, dy_CD, weight_C1)
    inside_MX = (here.row_MX >= 0) & (here.row_MX < count)
    dweight_MX = jnp.where(inside_MX, take_rows(rows.weight_MX, jnp.clip(here.row_MX, 0, count - 1)), 0.0)
    return rows._replace(x_MD=_summed(rows.x_MD, here), weight_MX=dweight_MX)
