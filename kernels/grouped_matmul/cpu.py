"""The products as loops over row tiles, for XLA on CPU, which runs a loop's body as Eigen matmuls on all cores.

The outer loop visits the groups that have rows and slices their matrix once; the inner loops walk the group's rows,
with large tiles first and small masked ones for the remainder, so that few rows are computed in vain (less than one
small tile a group) and nothing is padded, copied or gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp
from jax import lax

from kernels.grouped_matmul.scaled import Matrices, ScaledMatrices

Carry = TypeVar("Carry")

#: Rows of a tile, largest first. Large ones amortise reading the matrix and adding up drhs; a group computes less than the
#: last one in vain.
TILES = (512, 128, 32, 8)


def for_each_group(
    group_sizes_G: jax.Array, body: Callable[[jax.Array, jax.Array, jax.Array, Carry], Carry], carry: Carry
) -> Carry:
    """carry = body(group, first row, end row, carry) for each group with rows, in order."""
    ends_G = jnp.cumsum(group_sizes_G)
    visited_G = jnp.argsort(group_sizes_G == 0, stable=True)  # groups with rows first, in order

    def step(index: jax.Array, carry: Carry) -> Carry:
        group = visited_G[index]
        return body(group, ends_G[group] - group_sizes_G[group], ends_G[group], carry)

    return lax.fori_loop(0, jnp.sum(group_sizes_G > 0), step, carry)


class Tile:
    """Consecutive rows of one group: all of them, or those that a mask selects."""

    def __init__(self, first: jax.Array, rows: int, mask_T1: jax.Array | None) -> None:
        self.first, self.rows, self.mask_T1 = first, rows, mask_T1

    def select(self, rows_TN: jax.Array) -> jax.Array:
        """The rows, with zeros for those outside the group (which may hold anything)."""
        return rows_TN if self.mask_T1 is None else jnp.where(self.mask_T1, rows_TN, jnp.zeros_like(rows_TN))

    def read(self, array_MN: jax.Array) -> jax.Array:
        """The tile's rows of an array."""
        return lax.dynamic_slice_in_dim(array_MN, self.first, self.rows)

    def write(self, array_MN: jax.Array, rows_TN: jax.Array) -> jax.Array:
        """The array with the group's rows of this tile replaced, cast to its dtype."""
        rows_TN = rows_TN.astype(array_MN.dtype)
        if self.mask_T1 is not None:
            rows_TN = jnp.where(self.mask_T1, rows_TN, self.read(array_MN))
        return lax.dynamic_update_slice_in_dim(array_MN, rows_TN, self.first, axis=0)


def for_each_tile(
    rows: int, start: jax.Array, end: jax.Array, body: Callable[[Tile, Carry], Carry], carry: Carry
) -> Carry:
    """carry = body(tile, carry) until tiles cover rows [start, end) of `rows` in all."""
    small = min(TILES[-1], rows)
    for size in [size for size in TILES[:-1] if size <= rows]:
        count = (end - start) // size

        def full(index: jax.Array, carry: Carry, start: jax.Array = start, size: int = size) -> Carry:
            return body(Tile(start + index * size, size, None), carry)

        carry = lax.fori_loop(0, count, full, carry)
        start = start + count * size

    def partial(index: jax.Array, carry: Carry) -> Carry:
        # Moved back where it would pass the last row; the mask keeps rows of this step only.
        wanted = start + index * small
        first = jnp.minimum(wanted, rows - small)
        row_T1 = (first + jnp.arange(small, dtype=jnp.int32)).reshape(-1, 1)
        return body(Tile(first, small, (row_T1 >= wanted) & (row_T1 < end)), carry)

    return lax.fori_loop(0, (end - start + small - 1) // small, partial, carry)


def executed_rows(sizes: Sequence[int], rows: int) -> int:
    """Rows that the tiles of groups of these sizes compute, of arrays of `rows` rows."""
    small = min(TILES[-1], rows)
    executed = 0
    for size in sizes:
        for tile in [tile for tile in TILES[:-1] if tile <= rows]:
            executed, size = executed + size // tile * tile, size % tile
        executed += -(-size // small) * small
    return executed


def read_matrix(rhs_GKN: Matrices, group: jax.Array) -> jax.Array:
    """rhs_GKN[group] in float32 (Eigen has no fast bfloat16 matmul on CPU, so XLA would convert it for every tile)."""
    one_KN = jax.tree.map(lambda each: lax.dynamic_index_in_dim(each, group, keepdims=False), rhs_GKN)
    return one_KN.dense(jnp.float32) if isinstance(one_KN, ScaledMatrices) else one_KN.astype(jnp.float32)


def product(lhs_MK: jax.Array, rhs_GKN: Matrices, group_sizes_G: jax.Array) -> jax.Array:
    """out[m] = lhs[m] @ rhs[group of m], zero for rows of no group: [M, N] in the dtype of `lhs_MK`."""
    rows, width = lhs_MK.shape[0], rhs_GKN.shape[2]
    out_MN = jnp.zeros((rows, width), lhs_MK.dtype)
    if not rows:
        return out_MN

    def group_step(group: jax.Array, start: jax.Array, end: jax.Array, out_MN: jax.Array) -> jax.Array:
        rhs_KN = read_matrix(rhs_GKN, group)

        def tile_step(tile: Tile, out_MN: jax.Array) -> jax.Array:
            return tile.write(out_MN, tile.read(lhs_MK).astype(jnp.float32) @ rhs_KN)

        return for_each_tile(rows, start, end, tile_step, out_MN)

    return for_each_group(group_sizes_G, group_step, out_MN)


def outer(lhs_MK: jax.Array, dout_MN: jax.Array, group_sizes_G: jax.Array) -> jax.Array:
    """out[g] = lhs[rows of g]^T @ dout[rows of g]: [G, K, N] in the dtype of `lhs_MK`."""
    groups, rows, shape_KN = group_sizes_G.shape[0], lhs_MK.shape[0], (lhs_MK.shape[1], dout_MN.shape[1])
    out_GKN = jnp.zeros((groups, *shape_KN), lhs_MK.dtype)
    if not rows:
        return out_GKN

    def group_step(group: jax.Array, start: jax.Array, end: jax.Array, out_GKN: jax.Array) -> jax.Array:
        def tile_step(tile: Tile, sum_KN: jax.Array) -> jax.Array:
            lhs_TK = tile.select(tile.read(lhs_MK)).astype(jnp.float32)
            dout_TN = tile.select(tile.read(dout_MN)).astype(jnp.float32)
            return sum_KN + lhs_TK.T @ dout_TN

        sum_KN = for_each_tile(rows, start, end, tile_step, jnp.zeros(shape_KN, jnp.float32))
        return lax.dynamic_update_index_in_dim(out_GKN, sum_KN.astype(out_GKN.dtype), group, axis=0)

    return for_each_group(group_sizes_G, group_step, out_GKN)
