"""The expert MLP over devices of which each holds some of the experts: rows go to their experts, and come back.

A device works on `rows` of the rows for its experts at a time. One window is enough as long as routing is about even;
if any device needs more, all of them go on with further windows, whose work is done again in the backward pass. No row
is dropped.

The gradient moves what the forward pass moved, in the opposite direction: rows of the output's gradient to the experts,
and gradients of inputs back. Numbers (combine weights and their gradients) take another way, see `gathered_exchange`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kernels.grouped_matmul.api import Backend, product
from kernels.grouped_matmul.composed_mlp import row_gradients
from kernels.grouped_matmul.local_experts import OVERFLOW
from kernels.grouped_matmul.mlp_types import Activation, Arguments, Gradients, Saved, gated, named
from kernels.routing import ORDER, Routing, exchange, sort_by_expert
from kernels.routing.api import take_rows, weighted_sum


class _Plan(NamedTuple):
    """What does not change from window to window; hashable."""

    axis: str
    mesh_axes: tuple[str, ...]
    rows: int
    backend: Backend
    activation: Activation


def exchanged_expert_mlp(
    x_MD: jax.Array,
    weight_MX: jax.Array,
    expert_MX: jax.Array,
    gate_LDF: jax.Array,
    up_LDF: jax.Array,
    down_LFD: jax.Array,
    *,
    axis: str,
    mesh_axes: tuple[str, ...],
    rows: int,
    activation: Activation = jax.nn.silu,
    backend: Backend | str = Backend.AUTO,
) -> jax.Array:
    """Applies each token's experts, wherever they are, and adds their outputs; inside a shard_map.

    Differentiable in everything but `expert_MX`.

    Args:
      x_MD: this device's tokens.
      weight_MX: their combine weights, float32.
      expert_MX: the experts of all devices that they chose, in [0, E); E for a choice that counts for nothing.
      gate_LDF: gate projections of this device's experts, in the dtype of `x_MD`. The devices' experts follow one
        another in the order of the axis.
      up_LDF: up projections.
      down_LFD: down projections.
      axis: of the mesh, over which the experts are split.
      mesh_axes: all axes of the mesh: their devices agree on the number of windows, since collectives that only some
        of a mesh's devices come to are nothing that a compiler promises.
      rows: of a window.
      activation: elementwise function of the gate projection; a module-level function, so that it hashes equal.
      backend: a Backend or its value.

    Returns:
      [M, D] float32.
    """
    devices = jax.lax.axis_size(axis)
    routing = sort_by_expert(expert_MX, gate_LDF.shape[0] * devices)
    counts_SE = checkpoint_name(jax.lax.all_gather(routing.group_sizes_E, axis), ORDER)
    arguments = Arguments(x_MD, weight_MX.astype(jnp.float32), gate_LDF, up_LDF, down_LFD)
    plan = _Plan(axis, mesh_axes, min(rows, devices * expert_MX.size), Backend(backend), activation)
    return _exchanged(plan, arguments, routing, counts_SE)


def _further(plan: _Plan, routing: Routing, counts_SE: jax.Array, body: Callable[..., Any], carry: Any) -> Any:
    """carry = body(window, carry) for the windows after the first, as many as the mesh's fullest device needs."""
    if plan.rows >= counts_SE.shape[0] * routing.slot_R.size:
        return carry
    needed = jax.lax.pmax(exchange.windows(counts_SE, plan.rows), plan.mesh_axes)

    def step(number: jax.Array, carry: Any) -> Any:
        return body(exchange.window(counts_SE, number * plan.rows, plan.rows), carry)

    with jax.named_scope(OVERFLOW):
        return jax.lax.fori_loop(1, needed, step, carry)


def _sent(plan: _Plan, rows_RD: jax.Array, here: exchange.Window) -> jax.Array:
    """The rows for this device's experts, [C, D]; zeros where there are fewer."""
    empty_CD = jnp.zeros((plan.rows, rows_RD.shape[1]), rows_RD.dtype)
    return exchange.exchange(rows_RD, empty_CD, exchange.to_experts(here, plan.axis), plan.axis)


def _returned(plan: _Plan, rows_CD: jax.Array, before_RD: jax.Array, here: exchange.Window) -> jax.Array:
    """`before_RD` with the rows of this window in their places."""
    return exchange.exchange(rows_CD, before_RD, exchange.to_senders(here, plan.axis), plan.axis)


def _projections(plan: _Plan, arguments: Arguments, x_CD: jax.Array, here: exchange.Window) -> Saved:
    sizes_L = exchange.group_sizes(here, plan.axis)
    gate_CF, up_CF = (product(plan.backend, x_CD, w, sizes_L) for w in (arguments.gate_EDF, arguments.up_EDF))
    return Saved(gate_CF, up_CF)


def _outputs(plan: _Plan, arguments: Arguments, saved: Saved, before_RD: jax.Array, here: exchange.Window) -> jax.Array:
    h_CF = gated(plan.activation, *saved).astype(arguments.x_MD.dtype)
    y_CD = product(plan.backend, h_CF, arguments.down_EFD, exchange.group_sizes(here, plan.axis))
    return _returned(plan, y_CD, before_RD, here)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _exchanged(plan: _Plan, arguments: Arguments, routing: Routing, counts_SE: jax.Array) -> jax.Array:
    return _forward(plan, arguments, routing, counts_SE)[0]


_Residuals = tuple[Arguments, Routing, jax.Array, jax.Array, Saved]


def _forward(plan: _Plan, arguments: Arguments, routing: Routing, counts_SE: jax.Array) -> tuple[jax.Array, _Residuals]:
    x_RD = take_rows(arguments.x_MD, routing.token_R)
    first = exchange.window(counts_SE, 0, plan.rows)
    x_CD = _sent(plan, x_RD, first)
    saved = _projections(plan, arguments, x_CD, first)
    y_RD = _outputs(plan, arguments, saved, jnp.zeros_like(x_RD), first)

    def more(here: exchange.Window, y_RD: jax.Array) -> jax.Array:
        return _outputs(plan, arguments, _projections(plan, arguments, _sent(plan, x_RD, here), here), y_RD, here)

    y_RD = _further(plan, routing, counts_SE, more, y_RD)
    y_MD = weighted_sum(y_RD, routing.row_MX, arguments.weight_MX)
    return y_MD, (arguments, routing, counts_SE, x_CD, named(saved))


class _Sums(NamedTuple):
    """Gradients over the windows so far: of this device's rows, and of its experts."""

    x_RD: jax.Array
    weight_R: jax.Array
    matrices: tuple[jax.Array, ...]


def _backward(plan: _Plan, residuals: _Residuals, dy_MD: jax.Array) -> tuple[Gradients, None, None]:
    arguments, routing, counts_SE, x_CD, saved = residuals
    dy_RD = take_rows(dy_MD, routing.token_R).astype(arguments.x_MD.dtype)
    weight_R = take_rows(arguments.weight_MX.reshape(-1), routing.slot_R)

    def of_window(
        here: exchange.Window, x_CD: jax.Array, saved: Saved, dx_RD: jax.Array, dweight_R: jax.Array
    ) -> _Sums:
        there, back = exchange.to_experts(here, plan.axis), exchange.to_senders(here, plan.axis)
        weight_C = exchange.gathered_exchange(weight_R, jnp.zeros(plan.rows, jnp.float32), there, plan.axis)
        sizes_L, dy_CD = exchange.group_sizes(here, plan.axis), _sent(plan, dy_RD, here)
        new = row_gradients(
            plan.backend, plan.activation, arguments, sizes_L, saved, x_CD, dy_CD, weight_C.reshape(-1, 1)
        )
        return _Sums(
            _returned(plan, new.x_MD, dx_RD, here),
            exchange.gathered_exchange(new.weight_MX, dweight_R, back, plan.axis),
            tuple(new[2:]),  # type: ignore[arg-type]
        )

    def more(here: exchange.Window, sums: _Sums) -> _Sums:
        x_CD = _sent(plan, take_rows(arguments.x_MD, routing.token_R), here)
        new = of_window(here, x_CD, _projections(plan, arguments, x_CD, here), sums.x_RD, sums.weight_R)
        return new._replace(matrices=jax.tree.map(jnp.add, sums.matrices, new.matrices))

    first = exchange.window(counts_SE, 0, plan.rows)
    sums = of_window(first, x_CD, saved, jnp.zeros_like(dy_RD), jnp.zeros_like(weight_R))
    sums = _further(plan, routing, counts_SE, more, sums)
    dx_MD = weighted_sum(sums.x_RD, routing.row_MX).astype(dy_RD.dtype)
    return Gradients(dx_MD, take_rows(sums.weight_R, routing.row_MX), *sums.matrices), None, None


_exchanged.defvjp(_forward, _backward)
