"""One code path for numpy and device arrays: the namespace of an array, and arithmetic that keeps its dtype."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec

Array = Any  # numpy.ndarray or jax.Array (sharded or traced too); a transform returns the kind that it was given

# Logical axis of a parameter -> mesh axis that it is spread over: what training.mesh.RULES says, a floor above.
HOMES = {
    "replica": "expert",  # of an MLP on its way to becoming experts
    "embed": "fsdp",
    "experts": "expert",
    **dict.fromkeys(("vocab", "heads", "kv_heads", "mlp", "expert_mlp", "shared_mlp"), "tensor"),
}


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


def take(
    array: Array,
    index: np.ndarray,
    axis: int,
    lists: tuple[int, ...] = (0,),
    *,
    axes: tuple[str, ...] = (),
) -> Array:
    """Takes `index` along `axis`; spread over a mesh, the array is cut without any device holding all of it.

    Args:
      array: any shape.
      index: one list for the whole array [n], or one for each place along the axes `lists`: [L, n], [L, E, n].
      axis: the axis that gets shorter.
      lists: the axes that have a list each, ascending; of the same sizes as in `index`.
      axes: the array's declared axes, by which a mesh spreads it; without them it is cut as it lies.
    """
    if all(_is_everything(row, array.shape[axis]) for row in index.reshape(-1, index.shape[-1])):
        return array
    xp, places = namespace(array), whole_along(array, axis, axes)
    array = spread(array, places)
    if index.ndim == 1:
        taken = xp.take(array, index, axis=axis)
    else:
        shape = [1] * array.ndim
        for place, size in zip((*lists, axis), index.shape, strict=True):
            shape[place] = size
        order = np.argsort((*lists, axis))
        index = xp.asarray(index.transpose(order).reshape(shape))
        taken = xp.take_along_axis(array, index, axis=axis)
    return spread(spread(taken, places), places and homes(taken, axes))


Places = list[tuple[str, ...]] | None  # by axis of an array, the mesh axes that it is spread over


def spread(array: Array, places: Places) -> Array:
    """The same array, over its mesh in this way; as it is for None."""
    if places is None:
        return array
    return jax.lax.with_sharding_constraint(array, NamedSharding(_mesh(array), PartitionSpec(*places)))


def whole_along(array: Array, axis: int, axes: tuple[str, ...]) -> Places:
    """How to spread an array, for a moment, so that each device can reorder `axis` by itself.

    XLA would otherwise have every device take what it holds and add all of them up, each as large as the result. One
    mesh axis moves and the others stay where they are: that is one all-to-all, of what a device holds; XLA makes a
    gather of the whole array of anything harder.

    Args:
      array: any kind.
      axis: what is to be whole.
      axes: declared axes; names without a home are those of axes that are not spread. None at all: nothing is known.

    Returns:
      None where no mesh spreads the axis.
    """
    mesh, moved = _mesh(array), HOMES.get(axes[axis]) if axes else None
    if mesh is None or moved is None or mesh.shape.get(moved, 1) == 1:
        return None
    places = homes(array, axes)
    places[axis] = ()
    share = [size // math.prod(mesh.shape[name] for name in at) for size, at in zip(array.shape, places)]
    others = [place for place in range(array.ndim) if place != axis]
    even = [place for place in others if share[place] % mesh.shape[moved] == 0]
    # Under jit an axis that cannot be shared evenly is filled up: [L, D] of a norm.
    if even or (others and isinstance(array, jax.core.Tracer)):
        place = max(even or others, key=lambda place: share[place])
        places[place] = (*places[place], moved)
    return places


def homes(array: Array, axes: tuple[str, ...]) -> list[tuple[str, ...]]:
    """How a mesh spreads an array of these axes, where that is even."""
    sizes = _mesh(array).shape
    named = [HOMES.get(name, "") for name in axes]
    return [
        (home,) if sizes.get(home, 1) > 1 and size % sizes[home] == 0 else ()
        for home, size in zip(named, array.shape, strict=True)
    ]


def _mesh(array: Array) -> Any:
    """The mesh over which XLA may spread a device array as it likes, if there is one."""
    if isinstance(array, np.ndarray):
        return None
    sharding = jax.typeof(array).sharding if isinstance(array, jax.core.Tracer) else array.sharding
    mesh = getattr(sharding, "mesh", None)
    if mesh is None or mesh.empty or mesh.size == 1 or any(kind is not AxisType.Auto for kind in mesh.axis_types):
        return None
    return mesh


def _is_everything(index: np.ndarray, size: int) -> bool:
    return len(index) == size and bool(np.array_equal(index, np.arange(size)))
