"""Matrices in the forms that decode steps read: several side by side as one, float or int8."""

import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp

from kernels.grouped_matmul import scaled
from kwaicoder_jax.models import StoredMatrix


@flax.struct.dataclass
class FloatMatrix:
    """[J, F]; what is declared as several matrices of one input may stand side by side."""

    matrix_JF: jax.Array

    def multiply(self, x_MJ: jax.Array) -> jax.Array:
        """x times the matrix, [M, F] float32."""
        return _product(x_MJ, self.matrix_JF, jnp.float32)


@flax.struct.dataclass
class Int8Matrix:
    """w[j, f] ~ scale[f] * q[j, f], q in int8: symmetric, one scale per column. x is quantised too, a scale per row.

    So the products are of int8 on both sides, summed exactly in int32 (the vector-wise quantisation of Dettmers et al.
    2022, arXiv 2208.07339, section 3.1).
    """

    matrix_JF: jax.Array
    scale_F: jax.Array

    def multiply(self, x_MJ: jax.Array) -> jax.Array:
        """As FloatMatrix.multiply."""
        q_MJ, scale_M1 = quantise(x_MJ, axis=1)
        return _product(q_MJ, self.matrix_JF, jnp.int32).astype(jnp.float32) * scale_M1 * self.scale_F[None]


Matrix = FloatMatrix | Int8Matrix


@flax.struct.dataclass
class Columns(StoredMatrix):
    """A declared weight as some columns of a matrix; XLA computes a product once for all that share it.

    Attributes:
      matrix: the whole.
      start: first of the columns.
      outer: the declared axes that they stand for.
    """

    matrix: Matrix
    start: int = flax.struct.field(pytree_node=False)
    outer: tuple[int, ...] = flax.struct.field(pytree_node=False)

    def multiply(self, x_MJ: jax.Array, dtype: Any) -> jax.Array:
        """See StoredMatrix."""
        return self.matrix.multiply(x_MJ)[:, self.start : self.start + math.prod(self.outer)].astype(dtype)


def quantise(x: jax.Array, axis: int) -> tuple[jax.Array, jax.Array]:
    """int8 and scales such that x ~ q * scale, one scale along `axis`, which stays with size 1.

    scale = max |x| / 127, and |x - q * scale| <= scale / 2.
    """
    return scaled.scaled(x, axis)


def int8(matrix_JF: jax.Array) -> Int8Matrix:
    """A matrix, quantised."""
    q_JF, scale_1F = quantise(matrix_JF, axis=0)
    return Int8Matrix(q_JF, scale_1F[0])


def _product(x_MJ: jax.Array, matrix_JF: jax.Array, sums: Any) -> jax.Array:
    rows = x_MJ.shape[0]
    if rows == 1 and x_MJ.dtype != jnp.float32:
        # A row of zeros beside a single one: XLA on CPU gives a product with a vector to code that knows float32 alone,
        # and converts the whole matrix for it.
        x_MJ = jnp.pad(x_MJ, ((0, 1), (0, 0)))
    return jax.lax.dot(x_MJ, matrix_JF, preferred_element_type=sums)[:rows]
