"""One code path for numpy and device arrays: the namespace of an array, and arithmetic that keeps its dtype."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec

Array = Any  # numpy.ndarray or jax.Array (sharded or traced too); a transform returns the kind that it was given


def namespace(array: Array) -> Any:
    """`numpy` for a numpy array, `jax.numpy` for anything else."""
    return np if isinstance(array, np.ndarray) else jnp


def like(example: Array, value: np.ndarray) -> Array:
    """`value` as the kind of array that `example` is; on every device of its mesh, whole, where it has one."""
    if isinstance(example, np.ndarray):
        return value
    if not isinstance(example, jax.core.Tracer) and isinstance(example.sharding, NamedSharding):
        return jax.device_put(value, NamedSharding(example.sharding.mesh, PartitionSpec()))
    return jnp.asarray(value)


def host(array: Array) -> np.ndarray:
    """On this host, also where the array is spread over processes."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable:
        array = multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)


def scaled(array: Array, factor: Any) -> Array:
    """`array * factor`, rounded once to the dtype of `array`: the product itself is float32 or wider.

    Args:
      array: any shape and floating dtype.
      factor: a float, or an array of the same rank that broadcasts.
    """
    if isinstance(factor, float) and factor == 1.0:
        return array
    xp = namespace(array)
    wide = np.promote_types(array.dtype, np.float32)
    return (array.astype(wide) * xp.asarray(factor, dtype=wide)).astype(array.dtype)


def take(array: Array, index: np.ndarray, axis: int, lists: tuple[int, ...] = (0,)) -> Array:
    """Takes `index` along `axis`.

    Args:
      array: any shape.
      index: one list for the whole array [n], or one for each place along the axes `lists`: [L, n], [L, E, n].
      axis: the axis that gets shorter.
      lists: the axes that have a list each, ascending; of the same sizes as in `index`.
    """
    xp = namespace(array)
    if index.ndim == 1:
        return array if _is_everything(index, array.shape[axis]) else xp.take(array, index, axis=axis)
    if all(_is_everything(row, array.shape[axis]) for row in index.reshape(-1, index.shape[-1])):
        return array
    shape = [1] * array.ndim
    for place, size in zip((*lists, axis), index.shape, strict=True):
        shape[place] = size
    order = np.argsort((*lists, axis))
    return xp.take_along_axis(array, xp.asarray(index.transpose(order).reshape(shape)), axis=axis)


def _is_everything(index: np.ndarray, size: int) -> bool:
    return len(index) == size and bool(np.array_equal(index, np.arange(size)))
