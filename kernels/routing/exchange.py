"""Rows that travel to the devices of their experts and back, by `jax.lax.ragged_all_to_all` over one mesh axis.

Each device has its rows sorted by expert. A device that holds experts receives them sorted by expert, and within one
expert by sender: the grouped products need no further sorting. It receives `rows` of them at a time, a window of the
sequence of all that are for it; a second window holds what did not fit into the first.

Dimension letters: S devices along the axis, E experts of all of them, L experts of one (E = S * L), R rows of a device,
C rows of a window.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels.routing.api import take_rows


class Slices(NamedTuple):
    """Which rows go where: the last arguments of `jax.lax.ragged_all_to_all`, int32 [E], L slices for each device."""

    input_offsets: jax.Array
    send_sizes: jax.Array
    output_offsets: jax.Array
    recv_sizes: jax.Array


class Window(NamedTuple):
    """The rows that all devices exchange at once, by sender and expert, int32 [S, E].

    Attributes:
      size_SE: how many rows.
      from_SE: where they begin among the sender's rows; 0 if there are none.
      at_SE: where they begin among the rows that the expert's device receives; 0 if there are none.
    """

    size_SE: jax.Array
    from_SE: jax.Array
    at_SE: jax.Array


def window(counts_SE: jax.Array, first: jax.Array | int, rows: int) -> Window:
    """The rows at [first, first + rows) of what each device is to receive.

    Args:
      counts_SE: rows of each sender for each expert.
      first: of the window, in the sequence of all rows for a device.
      rows: C.
    """
    senders, experts = counts_SE.shape
    own_SE = jnp.cumsum(counts_SE, axis=1) - counts_SE
    total_SL = jnp.sum(counts_SE, axis=0).reshape(senders, experts // senders)
    expert_1E = (jnp.cumsum(total_SL, axis=1) - total_SL).reshape(1, experts)
    start_SE = expert_1E + jnp.cumsum(counts_SE, axis=0) - counts_SE - first
    at_SE, end_SE = jnp.clip(start_SE, 0, rows), jnp.clip(start_SE + counts_SE, 0, rows)
    size_SE = end_SE - at_SE
    none = jnp.zeros_like(size_SE)
    before_SE = jnp.maximum(-start_SE, 0)  # of a slice, rows that earlier windows took
    return Window(size_SE, jnp.where(size_SE > 0, own_SE + before_SE, none), jnp.where(size_SE > 0, at_SE, none))


def windows(counts_SE: jax.Array, rows: int) -> jax.Array:
    """How many windows of `rows` the device needs that receives most; int32, at least 1."""
    senders = counts_SE.shape[0]
    most = jnp.max(jnp.sum(jnp.sum(counts_SE, axis=0).reshape(senders, -1), axis=1))
    return jnp.maximum(-(-most // rows), 1)


def group_sizes(here: Window, axis: str) -> jax.Array:
    """Rows of each of this device's experts in the window, int32 [L]."""
    return jnp.sum(_of_own_experts(here.size_SE, axis), axis=0)


def to_experts(here: Window, axis: str) -> Slices:
    """From the senders' rows to the experts' devices."""
    me = jax.lax.axis_index(axis)
    return Slices(
        here.from_SE[me], here.size_SE[me], here.at_SE[me], _of_own_experts(here.size_SE, axis).reshape(-1)
    )  # fmt: skip


def to_senders(here: Window, axis: str) -> Slices:
    """From the experts' devices back to where the rows came from."""
    me = jax.lax.axis_index(axis)
    at, size, back = (_of_own_experts(x_SE, axis).reshape(-1) for x_SE in (here.at_SE, here.size_SE, here.from_SE))
    return Slices(at, size, back, here.size_SE[me])


def _of_own_experts(x_SE: jax.Array, axis: str) -> jax.Array:
    """The columns of this device's experts: [S, L]."""
    own = x_SE.shape[1] // x_SE.shape[0]
    return jax.lax.dynamic_slice_in_dim(x_SE, jax.lax.axis_index(axis) * own, own, axis=1)


def exchange(operand: jax.Array, output: jax.Array, slices: Slices, axis: str) -> jax.Array:
    """`jax.lax.ragged_all_to_all`: `output` with the rows that this device receives; not differentiable.

    Args:
      operand: the rows to send from, [R, ...].
      output: [C, ...], in which rows that nobody sends stay as they are.
      slices: what is sent; those that one device receives must not overlap.
      axis: of the mesh, inside a shard_map.
    """

    def primitive(operand: jax.Array, output: jax.Array, slices: Slices) -> jax.Array:
        return jax.lax.ragged_all_to_all(operand, output, *slices, axis_name=axis)

    def by_gather(operand: jax.Array, output: jax.Array, slices: Slices) -> jax.Array:
        return gathered_exchange(operand, output, slices, axis)

    # There is no such primitive on CPU.
    return jax.lax.platform_dependent(operand, output, slices, cpu=by_gather, default=primitive)


def gathered_exchange(operand: jax.Array, output: jax.Array, slices: Slices, axis: str) -> jax.Array:
    """The same as `exchange`, on every platform: a gather of all operands, from which each device takes its rows.

    S times the bytes; for numbers, of which there is one a row, that is less than what a row of the exchange costs.
    """
    senders, me = jax.lax.axis_size(axis), jax.lax.axis_index(axis)
    here_3SE = jax.lax.all_gather(jnp.stack([slices.input_offsets, slices.send_sizes, slices.output_offsets]), axis)
    own = slices.send_sizes.shape[0] // senders
    here_S3L = jax.lax.dynamic_slice_in_dim(here_3SE, me * own, own, axis=2)
    sender_SL = jnp.arange(senders, dtype=jnp.int32)[:, None] * operand.shape[0]
    begin_1K, size_1K, at_1K = (here_S3L[:, which].reshape(1, -1) for which in range(3))
    begin_1K = begin_1K + jnp.broadcast_to(sender_SL, (senders, own)).reshape(1, -1)
    place_C1 = jnp.arange(output.shape[0], dtype=jnp.int32)[:, None]
    inside_CK = (place_C1 >= at_1K) & (place_C1 < at_1K + size_1K)
    row_C = jnp.sum(jnp.where(inside_CK, begin_1K + place_C1 - at_1K, 0), axis=1)
    rows = take_rows(jax.lax.all_gather(operand, axis, tiled=True), row_C)
    received = jnp.any(inside_CK, axis=1).reshape(-1, *[1] * (output.ndim - 1))
    return jnp.where(received, rows, output)
