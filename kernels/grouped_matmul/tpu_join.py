"""Rows of a TPU kernel's output that need care: tiles that groups share, and rows of no group."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.grouped_matmul.tpu_copies import rows_at
from kernels.grouped_matmul.tpu_walk import ceil_to, floor_to


def join(out_RN: Any, shared_AN: Any, begin: Any, end: Any, is_last: Any, align: int) -> Any:
    """Puts together what groups have in common: the tile that one ends and another begins in.

    Args:
      out_RN: results of a window, right in rows [begin, end).
      shared_AN: the tile in which the visit before ended, right up to there; then the one in which this visit ends.
      begin: row of the window, in its first tile.
      end: row of the window.
      is_last: whether nobody comes after.
      align: rows of a tile.

    Returns:
      How many rows of the window are ready: all but a tile that the next visit shares.
    """
    row_A1 = lax.broadcasted_iota(jnp.int32, (align, 1), 0)
    top = pl.ds(0, align)

    @pl.when(begin > 0)
    def _() -> None:
        out_RN[top] = jnp.where(row_A1 < begin, shared_AN[...], out_RN[top])

    whole = floor_to(end, align)

    @pl.when(whole < end)
    def _() -> None:
        bottom = pl.ds(pl.multiple_of(whole, align), align)
        tile_AN = out_RN[bottom]
        tile_AN = jnp.where(row_A1 < end - whole, tile_AN, jnp.zeros_like(tile_AN))
        shared_AN[...] = tile_AN
        out_RN[bottom] = tile_AN

    return jnp.where(is_last, ceil_to(end, align), whole)


def write_zeros(out_MN: Any, zero_RN: Any, done: Any, total: Any, core: Any, cores: int, align: int) -> Any:
    """Starts copies of zeros to the whole tiles that hold no group's rows; returns what waits for them."""
    rows, most = out_MN.shape[0], zero_RN.shape[0]
    first = ceil_to(total, align)
    if cores > 1:
        middle = first + floor_to((rows - first) >> 1, align)
        first, last = jnp.where(core == 0, first, middle), jnp.where(core == 0, middle, rows)
    else:
        last = rows

    def copy(start: Any, size: Any) -> Any:
        return pltpu.make_async_copy(
            zero_RN.at[rows_at(0, size, align)], out_MN.at[rows_at(start, size, align)], done
        )  # fmt: skip

    whole = lax.shift_right_logical(last - first, most.bit_length() - 1)
    rest = last - first - whole * most

    @pl.when(last > first)
    def _() -> None:
        zero_RN[...] = jnp.zeros_like(zero_RN)
        pl.loop(0, whole)(lambda number: copy(first + number * most, most).start())
        pl.when(rest > 0)(lambda: copy(last - rest, rest).start())

    def wait() -> None:
        pl.loop(0, whole)(lambda number: copy(0, most).wait())
        pl.when(rest > 0)(lambda: copy(0, rest).wait())

    return wait
