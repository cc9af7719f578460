"""The products through jax's own Pallas kernels for TPU (megablox): work for the rows that there are, and no more.

Upstream kernels leave rows of no group uninitialised (NaN and infinity have been seen); here they become zero.
A tile that straddles groups is computed once for each: m / tile + groups - 1 visits at most, so tiles are small where
groups are.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.megablox.gmm import gmm, tgmm

LANES = 128
_MOST_ROWS = 256  # of a tile
_DEEP = 4096  # contracted axis of a tile: whole where it can be, so that a matrix is read once for all its rows
_WIDE = 512  # output axis of a tile
_SQUARE = 1024  # of a tile of the outer product
_SHARE = 16  # a group has so many tiles on average, where that leaves LANES rows to a tile

Tiles = tuple[int, int, int]  # of rows, contracted axis and output axis


def row_tile(rows: int, groups: int) -> int:
    """Rows of a tile: a power of two from LANES on, for about `_SHARE` tiles a group."""
    wanted = rows // groups // _SHARE
    return min(_MOST_ROWS, max(LANES, 2 ** max(wanted, 1).bit_length() // 2))


def product_tiles(rows: int, groups: int, depth: int, width: int) -> Tiles:
    """Of `product`."""
    deep = _padded(depth) if depth <= _DEEP else _DEEP // 2
    return row_tile(rows, groups), deep, min(_WIDE, _padded(width))


def outer_tiles(rows: int, groups: int, depth: int, width: int) -> Tiles:
    """Of `outer`."""
    return row_tile(rows, groups), min(_SQUARE, _padded(depth)), min(_SQUARE, _padded(width))


def product_work(rows: int, groups: int, depth: int, width: int, itemsize: int) -> tuple[float, float]:
    """FLOPs and bytes of HBM that `product` executes at worst, with every border of groups inside a tile."""
    tile, deep, wide = product_tiles(rows, groups, depth, width)
    visits, columns = -(-rows // tile) + groups - 1, -(-width // wide)
    matrices = groups if deep >= depth else visits
    moved = visits * tile * depth * columns + matrices * depth * width + 2 * visits * tile * width
    return 2.0 * visits * tile * depth * width, float(itemsize * moved)


def outer_work(rows: int, groups: int, depth: int, width: int, itemsize: int) -> tuple[float, float]:
    """The same of `outer`."""
    tile, deep, wide = outer_tiles(rows, groups, depth, width)
    visits = -(-rows // tile) + groups - 1
    moved = visits * tile * (depth * -(-width // wide) + width * -(-depth // deep)) + groups * depth * width
    return 2.0 * visits * tile * depth * width, float(itemsize * moved)


def _padded(size: int) -> int:
    return -(-size // LANES) * LANES


def _with_rows(rows_MK: jax.Array, tile: int) -> jax.Array:
    """More rows, of no group, so that tiles fit."""
    missing = -rows_MK.shape[0] % tile
    return jnp.pad(rows_MK, ((0, missing), (0, 0))) if missing else rows_MK


def _clear_tail(rows_MK: jax.Array, group_sizes_G: jax.Array) -> jax.Array:
    row_M1 = jnp.arange(rows_MK.shape[0], dtype=jnp.int32).reshape(-1, 1)
    return jnp.where(row_M1 < jnp.sum(group_sizes_G), rows_MK, jnp.zeros_like(rows_MK))


def _on_platform(function: Callable[..., jax.Array], *operands: jax.Array) -> jax.Array:
    """Interpreted on CPU, for tests."""
    interpreted, compiled = (functools.partial(function, interpret=each) for each in (True, False))
    return jax.lax.platform_dependent(*operands, cpu=interpreted, default=compiled)


def product(
    lhs_MK: jax.Array, rhs_GKN: jax.Array, group_sizes_G: jax.Array, *,
    transpose_rhs: bool = False, tiles: Tiles | None = None,
) -> jax.Array:  # fmt: skip
    """out[m] = lhs[m] @ rhs[group of m], zero for rows of no group: [M, N] in the dtype of `lhs_MK`.

    With `transpose_rhs` the matrices are [G, N, K], and read as they lie. Tiles are chosen by shape if None.
    """
    rows, groups = lhs_MK.shape[0], rhs_GKN.shape[0]
    width = rhs_GKN.shape[1 if transpose_rhs else 2]
    if tiles is None:
        tiles = product_tiles(rows, groups, lhs_MK.shape[1], width)
    call = functools.partial(
        gmm, preferred_element_type=lhs_MK.dtype, tiling=tiles, transpose_rhs=transpose_rhs
    )  # fmt: skip
    out_MN = _on_platform(call, _with_rows(lhs_MK, tiles[0]), rhs_GKN, group_sizes_G)
    return _clear_tail(out_MN[:rows], group_sizes_G)


def outer(lhs_MK: jax.Array, dout_MN: jax.Array, group_sizes_G: jax.Array, *, tiles: Tiles | None = None) -> jax.Array:
    """out[g] = lhs[rows of g]^T @ dout[rows of g]: [G, K, N] in the dtype of `lhs_MK`; rows of no group are not read."""
    if tiles is None:
        tiles = outer_tiles(lhs_MK.shape[0], group_sizes_G.shape[0], lhs_MK.shape[1], dout_MN.shape[1])
    lhs_MK, dout_MN = (_with_rows(x, tiles[0]) for x in (lhs_MK, dout_MN))
    call = functools.partial(tgmm, preferred_element_type=lhs_MK.dtype, tiling=tiles)
    return _on_platform(call, lhs_MK.swapaxes(0, 1), dout_MN, group_sizes_G)
