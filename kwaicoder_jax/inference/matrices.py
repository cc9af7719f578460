"""Matrices in the forms that decode steps read fastest: columns in tiles, float or int8."""

import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from kwaicoder_jax.models import StoredMatrix

TILE = 64  # columns; half and twice as many are slower on CPU (AVX-512), whatever the dtype
FEW_ROWS = 32  # up to so many rows of x, a product reads the tiles as they lie


@flax.struct.dataclass
class TiledMatrix(StoredMatrix):
    """A matrix [J, F] as I tiles of n columns, so that one product reads one piece of memory from end to end.

    XLA on CPU (YNNPACK) does not pack the weights of a product with few rows, and reads them a block of columns at a
    time: in the declared layout each row of a block lies in a page of its own.
    """

    tiles_IJn: jax.Array
    outer: tuple[int, ...] = flax.struct.field(pytree_node=False)

    def multiply(self, x_MJ: jax.Array, dtype: Any) -> jax.Array:
        """See StoredMatrix."""
        return _product(x_MJ, self.tiles_IJn, jnp.float32)[:, : math.prod(self.outer)].astype(dtype)


@flax.struct.dataclass
class Int8Matrix(StoredMatrix):
    """w[j, f] ~ scale[f] * q[j, f], q in int8: symmetric, one scale per column. x is quantised too, a scale per row.

    So the products are of int8 on both sides, summed exactly in int32 (the vector-wise quantisation of Dettmers et al.
    2022, arXiv 2208.07339, section 3.1).
    """

    tiles_IJn: jax.Array
    scale_F: jax.Array
    outer: tuple[int, ...] = flax.struct.field(pytree_node=False)

    def multiply(self, x_MJ: jax.Array, dtype: Any) -> jax.Array:
        """See StoredMatrix."""
        q_MJ, scale_M1 = quantise(x_MJ, axis=1)
        sums_MF = _product(q_MJ, self.tiles_IJn, jnp.int32)[:, : math.prod(self.outer)]
        return (sums_MF.astype(jnp.float32) * scale_M1 * self.scale_F[None]).astype(dtype)


def quantise(x: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """int8 and scales such that x ~ q * scale, one scale along `axis`, which stays with size 1.

    scale = max |x| / 127, and |x - q * scale| <= scale / 2.
    """
    x32 = x.astype(jnp.float32)
    scale = jnp.maximum(jnp.max(jnp.abs(x32), axis=axis, keepdims=True), 1e-30) / 127.0
    return jnp.round(x32 / scale).astype(jnp.int8), scale


def tiled(weight: jax.Array, inner: int, tile: int = TILE) -> TiledMatrix:
    """A float weight of which a product contracts the first `inner` axes."""
    return TiledMatrix(_tiles(_matrix(weight, inner), tile), weight.shape[inner:])


def int8(weight: jax.Array, inner: int, tile: int = TILE) -> Int8Matrix:
    """The same, quantised."""
    q_JF, scale_1F = quantise(_matrix(weight, inner), axis=0)
    return Int8Matrix(_tiles(q_JF, tile), scale_1F[0], weight.shape[inner:])


def _matrix(weight: jax.Array, inner: int) -> jax.Array:
    return weight.reshape(math.prod(weight.shape[:inner]), -1)


def _tiles(matrix_JF: jax.Array, tile: int) -> jax.Array:
    """[I, J, n]; zeros fill up the last tile."""
    depth, width = matrix_JF.shape
    padded_JF = jnp.pad(matrix_JF, ((0, 0), (0, -width % tile)))
    return padded_JF.reshape(depth, -1, tile).swapaxes(0, 1)


def _product(x_MJ: jax.Array, tiles_IJn: jax.Array, sums: Any) -> jax.Array:
    """x times all tiles, [M, I * n] in the dtype `sums`."""
    rows, (count, depth, _) = x_MJ.shape[0], tiles_IJn.shape
    if rows > FEW_ROWS:
        matrix_JF = tiles_IJn.swapaxes(0, 1).reshape(depth, -1)
        return jax.lax.dot(x_MJ, matrix_JF, preferred_element_type=sums)
    # A row of zeros beside a single one: a product with a vector would go to code that knows neither bf16 nor int8.
    x_MJ = jnp.pad(x_MJ, ((0, max(0, 2 - rows)), (0, 0)))
    x_IMJ = jnp.broadcast_to(x_MJ[None], (count, *x_MJ.shape))
    y_IMn = jax.lax.dot_general(x_IMJ, tiles_IJn, (((2,), (1,)), ((0,), (0,))), preferred_element_type=sums)
    return y_IMn[:, :rows].swapaxes(0, 1).reshape(rows, -1)
