"""Weights that are stored in another form than declared: quantised, or laid out for one kind of hardware."""

import abc
import math
from typing import Any

import jax


class StoredMatrix(abc.ABC):
    """Stands in a tree of parameters for an array that the model reads through `layers.project` alone.

    A subclass is a pytree (its arrays get a layer axis in a stack, as those of a plain parameter do).
    """

    outer: tuple[int, ...]  # the axes of the declared array behind those that a product contracts

    @abc.abstractmethod
    def multiply(self, x_MJ: jax.Array, dtype: Any) -> jax.Array:
        """x times the matrix that this stands for, [M, product of `outer`] in `dtype`; sums in float32 or int32."""

    def project(self, x: jax.Array, inner: int) -> jax.Array:
        """As `layers.project`."""
        outer, depth = x.shape[: x.ndim - inner], math.prod(x.shape[x.ndim - inner :])
        return self.multiply(x.reshape(-1, depth), x.dtype).reshape(*outer, *self.outer)
