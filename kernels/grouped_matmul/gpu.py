"""The products through our Pallas kernels for Hopper: work for the rows that there are, and half a tile a group in vain.

For bfloat16 and float16 whose widths are multiples of 64; `fits` says so, and "auto" takes `ragged_dot` for the rest.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp

from kernels.grouped_matmul import gpu_outer, gpu_product
from kernels.grouped_matmul.gpu_tiles import ALIGNMENT, DEPTH, SMS, strip_of

_ROWS = 128  # of a tile
_FEW_ROWS = 64  # where groups have no more than a tile on average
_COLUMNS = (256, 128, DEPTH)  # of a tile of `product`, the first that divides
_WIDE = 128  # columns and rows of a tile of `outer`


def fits(dtype: Any, depth: int, width: int) -> bool:
    """Whether the kernels take matrices of [depth, width], in all three products, on the GPUs that are here."""
    return dtype in (jnp.bfloat16, jnp.float16) and depth % DEPTH == 0 and width % DEPTH == 0 and _on_hopper()


@functools.cache
def _on_hopper() -> bool:
    """Of a process that has no GPU it is assumed: it compiles for one."""
    return jax.default_backend() != "gpu" or jax.local_devices()[0].compute_capability == "9.0"


def product_tile(rows: int, groups: int, width: int) -> tuple[int, int]:
    """Rows and columns of a tile of `product`. 64 x 64 would leave each of two warpgroups half a swizzled line."""
    columns = next(size for size in _COLUMNS if width % size == 0)
    few = rows < _ROWS * max(groups, 1) and columns > DEPTH
    return _FEW_ROWS if few else _ROWS, columns


def outer_tile(width: int) -> int:
    """Columns of a tile of `outer`, and its rows."""
    return _WIDE if width % _WIDE == 0 else DEPTH


def product_work(rows: int, groups: int, depth: int, width: int, itemsize: int) -> tuple[float, float]:
    """FLOPs that `product` executes and bytes of HBM that it moves, for groups that end anywhere in a tile.

    Columns of a strip share rows in L2, and the tiles that are worked on at the same time share a matrix.
    """
    tile, wide = product_tile(rows, groups, width)
    columns = width // wide
    visits, strip = rows / tile + groups / 2, strip_of(columns)
    reads = max(1.0, visits / groups * strip / SMS)  # of a matrix
    moved = visits * tile * depth * columns / strip + reads * groups * depth * width + rows * width
    return 2.0 * visits * tile * depth * width, itemsize * moved


def outer_work(rows: int, groups: int, depth: int, width: int, itemsize: int) -> tuple[float, float]:
    """The same of `outer`: a group begins and ends in a step of DEPTH rows that is computed whole."""
    executed, columns = rows + groups * (DEPTH - 1), width // outer_tile(width)
    moved = executed * (depth * columns / strip_of(columns) + width) + groups * depth * width
    return 2.0 * executed * depth * width, itemsize * moved


def _with_rows(rows_MK: jax.Array, multiple: int, least: int) -> jax.Array:
    """More rows, of no group, so that tiles fit."""
    missing = max(least - rows_MK.shape[0], -rows_MK.shape[0] % multiple)
    return jnp.pad(rows_MK, ((0, missing), (0, 0))) if missing else rows_MK


def _clear_tail(rows_MK: jax.Array, group_sizes_G: jax.Array) -> jax.Array:
    row_M1 = jnp.arange(rows_MK.shape[0], dtype=jnp.int32).reshape(-1, 1)
    return jnp.where(row_M1 < jnp.sum(group_sizes_G), rows_MK, jnp.zeros_like(rows_MK))


def _check(dtype: Any, depth: int, width: int) -> None:
    if not fits(dtype, depth, width):
        wanted = f"bfloat16 or float16, widths that are multiples of {DEPTH}, and a Hopper GPU"
        raise ValueError(f"gpu needs {wanted}; got {dtype}, {depth} and {width}: use auto or ragged_dot")


def product(
    lhs_MK: jax.Array, rhs_GKN: jax.Array, group_sizes_G: jax.Array, *, transpose_rhs: bool = False,
    interpret: Any = None,
) -> jax.Array:  # fmt: skip
    """out[m] = lhs[m] @ rhs[group of m], zero for rows of no group: [M, N] in the dtype of `lhs_MK`.

    With `transpose_rhs` the matrices are [G, N, K], and read as they lie.
    """
    rows, depth = lhs_MK.shape
    groups, width = rhs_GKN.shape[0], rhs_GKN.shape[1 if transpose_rhs else 2]
    _check(lhs_MK.dtype, depth, width)
    tile, columns = product_tile(rows, groups, width)
    out_MN = gpu_product.rows_product(
        _with_rows(lhs_MK, ALIGNMENT, tile), rhs_GKN, group_sizes_G, rows_tile=tile, width_tile=columns,
        transpose_rhs=transpose_rhs, interpret=interpret,
    )  # fmt: skip
    return _clear_tail(out_MN[:rows], group_sizes_G)


def outer(
    lhs_MK: jax.Array, dout_MN: jax.Array, group_sizes_G: jax.Array, *, interpret: Any = None
) -> jax.Array:  # fmt: skip
    """out[g] = lhs[rows of g]^T @ dout[rows of g]: [G, K, N] in the dtype of `lhs_MK`; rows of no group reach nothing."""
    depth, width = lhs_MK.shape[1], dout_MN.shape[1]
    _check(lhs_MK.dtype, depth, width)
    lhs_MK, dout_MN = (_with_rows(x, DEPTH, DEPTH) for x in (lhs_MK, dout_MN))
    return gpu_outer.outer_product(
        lhs_MK, dout_MN, group_sizes_G, depth_tile=outer_tile(depth), width_tile=outer_tile(width), interpret=interpret
    )
