"""The products through our own Pallas kernels for TPU; docs/grouped_matmul.md explains them.

Rows of no group become zero in outputs and reach nothing. bfloat16 and float32, summed in float32.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kernels.grouped_matmul import tpu_tiles
from kernels.grouped_matmul.scaled import Matrices, ScaledMatrices
from kernels.grouped_matmul.tpu_outer import grouped_outer
from kernels.grouped_matmul.tpu_product import grouped_product
from kernels.grouped_matmul.tpu_tiles import LANES, Chip, OuterTiles, ProductTiles, padded, sublanes


def product(
    lhs_MK: jax.Array, rhs_GKN: Matrices, group_sizes_G: jax.Array, *,
    transpose_rhs: bool = False, tiles: ProductTiles | None = None, chip: Chip | None = None, interpret: Any = False,
) -> jax.Array:  # fmt: skip
    """out[m] = lhs[m] @ rhs[group of m], zero for rows of no group: [M, N] in the dtype of `lhs_MK`.

    With `transpose_rhs` the matrices are [G, N, K], and read as they lie.

    Args:
      lhs_MK: rows, sorted by group.
      rhs_GKN: one matrix per group, in the dtype of `lhs_MK`, int8 or float8_e4m3fn; with scales unless `transpose_rhs`.
      group_sizes_G: int32.
      transpose_rhs: see above.
      tiles: chosen by shape and chip if None.
      chip: the one that jax compiles for if None.
      interpret: `pltpu.InterpretParams` to run on CPU; not under `jax.checkpoint`, and not while compiling for a chip.

    Raises:
      ValueError: another dtype, or no tiles that fit.
    """
    _check(lhs_MK.dtype)
    here = chip or tpu_tiles.chip()
    rows, width = lhs_MK.shape[0], rhs_GKN.shape[1 if transpose_rhs else 2]
    lhs_MK = _padded(lhs_MK, sublanes(lhs_MK.dtype))
    if isinstance(rhs_GKN, ScaledMatrices):
        rhs_GKN = ScaledMatrices(_padded(rhs_GKN.values_GKN, LANES), _padded(rhs_GKN.scale_G1N, 1))
    else:
        rhs_GKN = _padded(rhs_GKN, LANES)
    depth, wide = lhs_MK.shape[1], rhs_GKN.shape[1 if transpose_rhs else 2]
    if not (rows and width and rhs_GKN.shape[0] and depth):
        return jnp.zeros((rows, width), lhs_MK.dtype)
    if tiles is None:
        tiles = tpu_tiles.product_tiles(
            lhs_MK.shape[0], rhs_GKN.shape[0], depth, wide, lhs_MK.dtype.itemsize, here,
            "dlhs" if transpose_rhs else "forward",
        )  # fmt: skip
    out_MN = grouped_product(
        lhs_MK, rhs_GKN, group_sizes_G, transpose_rhs=transpose_rhs, tiles=tiles, here=here, interpret=interpret
    )
    return out_MN[:rows, :width]


def outer(
    lhs_MK: jax.Array, dout_MN: jax.Array, group_sizes_G: jax.Array, *,
    tiles: OuterTiles | None = None, chip: Chip | None = None, interpret: Any = False,
) -> jax.Array:  # fmt: skip
    """out[g] = lhs[rows of g]^T @ dout[rows of g]: [G, K, N] in the dtype of `lhs_MK`; rows of no group are not read.

    The last three arguments are those of `product`.
    """
    _check(lhs_MK.dtype)
    here = chip or tpu_tiles.chip()
    (rows, depth), width, groups = lhs_MK.shape, dout_MN.shape[1], group_sizes_G.shape[0]
    if not (rows and depth and width and groups):
        return jnp.zeros((groups, depth, width), lhs_MK.dtype)
    lhs_MK, dout_MN = (_padded(x, sublanes(x.dtype)) for x in (lhs_MK, dout_MN))
    deep, wide = lhs_MK.shape[1], dout_MN.shape[1]
    if tiles is None:
        tiles = tpu_tiles.outer_tiles(lhs_MK.shape[0], groups, deep, wide, lhs_MK.dtype.itemsize, here)
    out_GKN = grouped_outer(lhs_MK, dout_MN, group_sizes_G, tiles=tiles, here=here, interpret=interpret)
    return out_GKN[:, :depth, :width]


def product_work(rows: int, groups: int, depth: int, width: int, itemsize: int) -> tuple[float, float]:
    """FLOPs and bytes of HBM that `product` executes at worst: every group begins and ends inside a tile."""
    depth, width = padded(depth), padded(width)
    tiles = tpu_tiles.product_tiles(rows, groups, depth, width, itemsize, tpu_tiles.ANY_CHIP)
    computed = computed_rows(rows, groups, itemsize)
    return 2.0 * computed * depth * width, float(itemsize * tiles.moved(rows, groups, depth, width))


def computed_rows(rows: int, groups: int, itemsize: int) -> int:
    """That products of rows take at worst: a group begins anywhere in a sublane tile and ends anywhere in a step."""
    step = tpu_tiles.ANY_CHIP.mxu // 4
    return rows + groups * (8 * 4 // itemsize - 1 + step - 1)


def outer_work(rows: int, groups: int, depth: int, width: int, itemsize: int) -> tuple[float, float]:
    """The same of `outer`."""
    depth, width = padded(depth), padded(width)
    tiles = tpu_tiles.outer_tiles(rows, groups, depth, width, itemsize, tpu_tiles.ANY_CHIP)
    computed = rows + groups * (8 * 4 // itemsize - 1 + LANES - 1)
    return 2.0 * computed * depth * width, float(itemsize * tiles.moved(rows, groups, depth, width))


def fits(dtype: jax.typing.DTypeLike) -> bool:
    """Whether the kernels take it."""
    return jnp.dtype(dtype) in (jnp.bfloat16, jnp.float32)


def _check(dtype: jax.typing.DTypeLike) -> None:
    if not fits(dtype):
        raise ValueError(f"the TPU kernels take bfloat16 and float32, not {jnp.dtype(dtype)}")


def _padded(x: jax.Array, rows: int) -> jax.Array:
    """With zeros, so that the last two axes are multiples of `rows` and of LANES."""
    missing = [(0, 0)] * (x.ndim - 2) + [
        (0, -size % unit) for size, unit in zip(x.shape[-2:], (rows, LANES), strict=True)
    ]
    return jnp.pad(x, missing) if any(behind for _, behind in missing) else x
