"""The products through tokamax's Pallas kernels for TPU, a development of megablox: for comparison.

The kernels themselves are called, not `tokamax.ragged_dot`: compiling ahead of time in a process without a TPU that one
takes XLA's own product instead, without a word, and its tiles for shapes that nobody tuned are 128 x 128 x 128. Like megablox
they leave rows of no group uninitialised; here these become zero.

While they are traced the kernels ask jax which TPU they are for. Without one, say it:
`jax.sharding.use_abstract_mesh(...)`, with a mesh whose abstract device is the chip.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from kernels.grouped_matmul import megablox
from kernels.grouped_matmul.megablox import LANES, Tiles

VERSION = "0.0.12"  # the last one for Python 3.11
_PRECISION = (jax.lax.Precision.DEFAULT, jax.lax.Precision.DEFAULT)


def product(
    lhs_MK: jax.Array, rhs_GKN: jax.Array, group_sizes_G: jax.Array, *,
    transpose_rhs: bool = False, tiles: Tiles | None = None, interpret: Any = False,
) -> jax.Array:  # fmt: skip
    """out[m] = lhs[m] @ rhs[group of m], zero for rows of no group: [M, N] in the dtype of `lhs_MK`.

    With `transpose_rhs` the matrices are [G, N, K], and read as they lie.

    Args:
      lhs_MK: rows, sorted by group.
      rhs_GKN: one matrix per group.
      group_sizes_G: int32.
      transpose_rhs: see above.
      tiles: megablox's if None.
      interpret: `pltpu.InterpretParams` to run on CPU.

    Raises:
      ValueError: tokamax is not installed.
    """
    rows, groups, width = lhs_MK.shape[0], rhs_GKN.shape[0], rhs_GKN.shape[1 if transpose_rhs else 2]
    if tiles is None:
        tiles = megablox.product_tiles(rows, groups, lhs_MK.shape[1], width)
    out_MN = _kernels().gmm(
        _padded(lhs_MK, tiles[0]), _padded(rhs_GKN, LANES), group_sizes_G, precision=_PRECISION,
        out_dtype=lhs_MK.dtype, tiling=tiles, transpose_rhs=transpose_rhs, interpret=interpret,
    )[:rows, :width]  # fmt: skip
    row_M1 = jnp.arange(rows, dtype=jnp.int32).reshape(-1, 1)
    return jnp.where(row_M1 < jnp.sum(group_sizes_G), out_MN, jnp.zeros_like(out_MN))


def outer(
    lhs_MK: jax.Array, dout_MN: jax.Array, group_sizes_G: jax.Array, *,
    tiles: Tiles | None = None, interpret: Any = False,
) -> jax.Array:  # fmt: skip
    """out[g] = lhs[rows of g]^T @ dout[rows of g]: [G, K, N] in the dtype of `lhs_MK`; rows of no group reach nothing.

    The last two arguments are those of `product`.
    """
    (rows, depth), width = lhs_MK.shape, dout_MN.shape[1]
    if tiles is None:
        tiles = megablox.outer_tiles(rows, group_sizes_G.shape[0], depth, width)
    lhs_MK, dout_MN = (_padded(x, tiles[0]) for x in (lhs_MK, dout_MN))
    out_GKN = _kernels().tgmm(
        lhs_MK.swapaxes(0, 1), dout_MN, group_sizes_G, precision=_PRECISION, out_dtype=lhs_MK.dtype, tiling=tiles,
        interpret=interpret,
    )  # fmt: skip
    return out_GKN[:, :depth, :width]


def _kernels() -> Any:
    try:
        from tokamax._src.ops.ragged_dot import pallas_mosaic_tpu_kernel
    except ImportError as error:
        raise ValueError(f"backend: tokamax is not installed: pip install tokamax=={VERSION}") from error
    return pallas_mosaic_tpu_kernel


def _padded(x: jax.Array, rows: int) -> jax.Array:
    """With zeros, so that the last two axes are multiples of `rows` and of LANES."""
    missing = [(0, 0)] * (x.ndim - 2) + [
        (0, -size % unit) for size, unit in zip(x.shape[-2:], (rows, LANES), strict=True)
    ]
    return jnp.pad(x, missing) if any(behind for _, behind in missing) else x
