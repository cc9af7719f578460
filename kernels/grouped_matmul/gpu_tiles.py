"""What the two kernels for Hopper share: which tiles there are, and in which order they are walked."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu

SMS = 132  # of an H100 or H200
ALIGNMENT = 8  # rows of a swizzled tile in shared memory: a copy that begins between them would read other rows
DEPTH = 64  # of a step of the contracted axis: 128 bytes, the widest swizzle
STEPS = 4  # in flight
_STRIP = 16  # at most so many tiles of the output axis are walked before the next tile of rows: what SMs share is in L2

SWIZZLED = (plgpu.TilingTransform((8, DEPTH)), plgpu.SwizzleTransform(2 * DEPTH))  # of a tile in shared memory
PARAMETERS = plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup)


class Visits(NamedTuple):
    """Tiles of rows, int32 [V]; those beyond the last have no rows.

    Attributes:
      group: whose matrix.
      block: first row that is read.
      offset: of the first row of the group, from there.
      rows: of the group.
    """

    group: jax.Array
    block: jax.Array
    offset: jax.Array
    rows: jax.Array


def visits(group_sizes_G: jax.Array, rows: int, tile: int) -> Visits:
    """The tiles of `tile` rows that cover all groups of `rows` rows, a multiple of ALIGNMENT, and at least a tile."""
    groups = group_sizes_G.shape[0]
    ends_G = jnp.cumsum(group_sizes_G, dtype=jnp.int32)
    starts_G = ends_G - group_sizes_G
    first_G = starts_G // ALIGNMENT * ALIGNMENT
    counts_G = jnp.where(group_sizes_G > 0, -(-(ends_G - first_G) // tile), 0)
    until_G = jnp.cumsum(counts_G, dtype=jnp.int32)
    visit_V = jnp.arange(most_visits(rows, groups, tile), dtype=jnp.int32)
    group_V = jnp.minimum(jnp.searchsorted(until_G, visit_V, side="right", method="compare_all"), groups - 1)
    group_V = group_V.astype(jnp.int32)
    block_V = first_G[group_V] + (visit_V - (until_G - counts_G)[group_V]) * tile
    own_V = jnp.maximum(starts_G[group_V], block_V)
    rows_V = jnp.where(visit_V < until_G[-1], jnp.minimum(ends_G[group_V], block_V + tile) - own_V, 0)
    block_V = jnp.clip(block_V, 0, rows - tile)  # the last one ends with the array
    return Visits(group_V, block_V, own_V - block_V, rows_V)


def most_visits(rows: int, groups: int, tile: int) -> int:
    """Of any sizes of groups."""
    return (rows + min(groups, rows) * (tile + ALIGNMENT - 2)) // tile


def strip_of(columns: int) -> int:
    """Tiles of the output axis that are walked before the next tile of rows."""
    return max(size for size in range(1, _STRIP + 1) if columns % size == 0)


def place_of(index: Any, rows: int, columns: int) -> tuple[Any, Any]:
    """The tile that is walked `index`-th: strips of columns one after the other, each row by row."""
    strip = strip_of(columns)
    inside = jax.lax.rem(index, jnp.int32(strip * rows))
    first = jax.lax.div(index, jnp.int32(strip * rows)) * strip
    return jax.lax.div(inside, jnp.int32(strip)), first + jax.lax.rem(inside, jnp.int32(strip))
