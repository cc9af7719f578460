"""The order in which a TPU kernel visits rows that are grouped by expert, computed by its scalar core.

A visit is one group's rows in one window: consecutive rows of the array that begin and end at whole sublane tiles, since
that is how rows can be copied. Windows of neighbouring groups share a tile where one group ends and the next begins. All
visits of a column tile come one after the other, so that a group's matrix is read once for all its rows.

        rows      0   16   32   48   64   80   96  112
                  |----|----|----|----|----|----|----|
        group 0   ############                                rows [0, 38): window [0, 48)
        group 1               ###########                     rows [38, 72): window [32, 80)
        group 2                         (no rows: not visited)
        group 3                          ###############      rows [72, 112): window [64, 112)
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


def floor_to(x: Any, multiple: int) -> Any:
    """The last multiple of a power of two that is not above x; without a division, which a scalar core has none of."""
    return x & -multiple


def ceil_to(x: Any, multiple: int) -> Any:
    """The first multiple of a power of two that is not below x."""
    return (x + multiple - 1) & -multiple


class Visit(NamedTuple):
    """Where a kernel stands; int32 scalars.

    Attributes:
      column: tile of columns.
      group: whose rows.
      row: the first of them in this visit.
    """

    column: Any
    group: Any
    row: Any


class Walk:
    """All visits of one core.

    Args:
      ends_G: SMEM, where each group ends, from `write_ends`.
      first: row at which this core begins.
      last: row before which it ends.
      columns: number of column tiles.
      rows: most rows of a window.
      align: rows of a sublane tile.
    """

    def __init__(self, ends_G: Any, first: Any, last: Any, *, columns: int, rows: int, align: int) -> None:
        self._ends_G, self._columns, self._rows, self._align = ends_G, columns, rows, align
        self.first, self.last = first, last

    def begin(self) -> Visit:
        """The first visit; done from the start where there are no rows."""
        column = jnp.where(self.first < self.last, 0, self._columns)
        return Visit(column, self._group_of(jnp.int32(0), self.first), self.first)

    def more(self, visit: Visit) -> Any:
        """Whether there is such a visit."""
        return visit.column < self._columns

    def end(self, visit: Visit) -> Any:
        """The row behind the last one of a visit."""
        window_end = floor_to(visit.row, self._align) + self._rows
        return jnp.minimum(jnp.minimum(window_end, self._ends_G[visit.group]), self.last)

    def window(self, visit: Visit) -> tuple[Any, Any]:
        """First row and number of rows of what is copied, whole tiles."""
        start = floor_to(visit.row, self._align)
        return start, ceil_to(self.end(visit), self._align) - start

    def after(self, visit: Visit) -> Visit:
        """The next visit."""
        return self._at(visit, self.end(visit))

    def after_group(self, visit: Visit) -> Visit:
        """The first visit of the next group."""
        return self._at(visit, jnp.minimum(self._ends_G[visit.group], self.last))

    def _at(self, visit: Visit, row: Any) -> Visit:
        over = row >= self.last
        row = jnp.where(over, self.first, row)
        group = self._group_of(jnp.where(over, 0, visit.group), row)
        return Visit(visit.column + over.astype(jnp.int32), group, row)

    def _group_of(self, group: Any, row: Any) -> Any:
        """The first one from `group` on that ends behind the row."""
        groups = self._ends_G.shape[0]
        return lax.while_loop(
            lambda g: (g < groups - 1) & (self._ends_G[g] <= row), lambda g: g + 1, group
        )  # fmt: skip


def write_ends(sizes_G: Any, ends_G: Any, rows: int) -> jax.Array:
    """Fills `ends_G` with where each group ends, at most `rows`; returns the last."""

    def add(group: jax.Array, end: jax.Array) -> jax.Array:
        end = jnp.minimum(end + sizes_G[group], rows)
        ends_G[group] = end
        return end

    return lax.fori_loop(0, sizes_G.shape[0], add, jnp.int32(0))
