"""The products through our own Pallas kernels for TPU; docs/grouped_matmul.md explains them.

Rows of no group become zero in outputs and reach nothing. bfloat16 and float32, summed in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from kernels.grouped_matmul import tpu_tiles
from kernels.grouped_matmul.tpu_outer import grouped_outer
from kernels.grouped_matmul.tpu_product import grouped_product
from kernels.grouped_matmul.tpu_tiles import LANES, Chip, OuterTiles, ProductTiles, sublanes


def fits(dtype: jax.typing.DTypeLike) -> bool:
    """Whether the kernels take rows of this dtype."""
    return jnp.dtype(dtype) in (jnp.bfloat16, jnp.float32)


def product(
    lhs_MK: jax.Array, rhs_GKN: jax.Array, group_sizes_G: jax.Array, *,
    transpose_rhs: bool = False, tiles: ProductTiles | None = None, chip: Chip | None = None, interpret: Any = None,
) -> jax.Array:  # fmt: skip
    """out[m] = lhs[m] @ rhs[group of m], zero for rows of no group: [M, N] in the dtype of `lhs_MK`.

    With `transpose_rhs` the matrices are [G, N, K], and read as they lie.

    Args:
      lhs_MK: rows, sorted by group.
      rhs_GKN: one matrix per group.
      group_sizes_G: int32.
      transpose_rhs: see above.
      tiles: chosen by shape and chip if None.
      chip: the one that jax compiles for if None.
      interpret: parameters of the interpreter; None for the compiler, on CPU the interpreter.
    """
    here = chip or tpu_tiles.chip()
    rows, width = lhs_MK.shape[0], rhs_GKN.shape[1 if transpose_rhs else 2]
    lhs_MK, rhs_GKN = _padded(lhs_MK, sublanes(lhs_MK.dtype)), _padded(rhs_GKN, LANES)
    depth, wide = lhs_MK.shape[1], rhs_GKN.shape[1 if transpose_rhs else 2]
    if not (rows and width and rhs_GKN.shape[0] and depth):
        return jnp.zeros((rows, width), lhs_MK.dtype)
    if tiles is None:
        tiles = tpu_tiles.product_tiles(lhs_MK.shape[0], rhs_GKN.shape[0], depth, wide, lhs_MK.dtype.itemsize, here)
    call = functools.partial(grouped_product, transpose_rhs=transpose_rhs, tiles=tiles, here=here)
    return _on_platform(call, interpret, lhs_MK, rhs_GKN, group_sizes_G)[:rows, :width]


def outer(
    lhs_MK: jax.Array, dout_MN: jax.Array, group_sizes_G: jax.Array, *,
    tiles: OuterTiles | None = None, chip: Chip | None = None, interpret: Any = None,
) -> jax.Array:  # fmt: skip
    """out[g] = lhs[rows of g]^T @ dout[rows of g]: [G, K, N] in the dtype of `lhs_MK`; rows of no group are not read.

    The last three arguments are those of `product`.
    """
    here = chip or tpu_tiles.chip()
    (rows, depth), width, groups = lhs_MK.shape, dout_MN.shape[1], group_sizes_G.shape[0]
    if not (rows and depth and width and groups):
        return jnp.zeros((groups, depth, width), lhs_MK.dtype)
    lhs_MK, dout_MN = (_padded(x, sublanes(x.dtype)) for x in (lhs_MK, dout_MN))
    deep, wide = lhs_MK.shape[1], dout_MN.shape[1]
    here = Chip(1, here.vmem_bytes, here.mxu) if deep % (here.cores * LANES) else here
    if tiles is None:
        tiles = tpu_tiles.outer_tiles(lhs_MK.shape[0], groups, deep, wide, lhs_MK.dtype.itemsize, here)
    call = functools.partial(grouped_outer, tiles=tiles, here=here)
    return _on_platform(call, interpret, lhs_MK, dout_MN, group_sizes_G)[:, :depth, :width]


def _padded(x: jax.Array, rows: int) -> jax.Array:
    """With zeros, so that the last two axes are multiples of `rows` and of LANES."""
    missing = [(0, 0)] * (x.ndim - 2) + [
        (0, -size % unit) for size, unit in zip(x.shape[-2:], (rows, LANES), strict=True)
    ]
    return jnp.pad(x, missing) if any(behind for _, behind in missing) else x


def _on_platform(call: Callable[..., jax.Array], interpret: Any, *operands: jax.Array) -> jax.Array:
    if interpret is not None:
        return call(*operands, interpret=interpret)
    interpreted = functools.partial(call, interpret=pltpu.InterpretParams())
    return jax.lax.platform_dependent(*operands, cpu=interpreted, default=call)
