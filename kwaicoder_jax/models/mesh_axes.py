"""The mesh that an array is on, and the names that its axes have for the models."""

import functools
import math

import jax
from jax.sharding import AbstractMesh, AxisType

# By the names that training.mesh gives them.
TOKEN_AXES = ("data", "fsdp", "expert")  # a batch is split over all of these
EMBED_AXIS = "fsdp"  # the channels of parameters
TENSOR_AXIS = "tensor"  # heads, neurons, the vocabulary


def token_mesh(x: jax.Array, batch: int) -> AbstractMesh | None:
    """The mesh that `x` is on, read from its type; None where there is nothing to split.

    That is: no mesh, one device, a batch that the devices cannot share evenly, or a caller that is already inside a
    shard_map.
    """
    mesh = jax.typeof(x).sharding.mesh
    if mesh.empty or mesh.size == 1 or any(kind is not AxisType.Auto for kind in mesh.axis_types):
        return None
    return mesh if batch % math.prod(mesh.shape.get(axis, 1) for axis in TOKEN_AXES) == 0 else None


def token_axes(mesh: AbstractMesh) -> tuple[str, ...]:
    """Those of TOKEN_AXES that the mesh has."""
    return tuple(axis for axis in TOKEN_AXES if axis in mesh.shape)


def weight_axis(mesh: AbstractMesh, axis: str, size: int) -> str | None:
    """`axis`, where it can split a dimension of `size`; otherwise the weights come in whole, gathered by XLA."""
    return axis if axis in mesh.shape and size % mesh.shape[axis] == 0 else None


def gathered(x: jax.Array, axis: str | None, dimension: int, stage: int = 0) -> jax.Array:
    """All parts of an array that `axis` splits along `dimension`, inside a shard_map; its gradient is scattered back.

    Args:
      x: this device's part.
      axis: of the mesh; None for an array that is not split.
      dimension: along which parts are joined.
      stage: devices among which the gradient is scattered at a time, neighbours along the axis; 0 for all of them. The
        same bytes in all. Some compilers scatter over one or two axes of a torus only, and sum over more.
    """
    return x if axis is None else _gathered(axis, dimension, stage, x)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _gathered(axis: str, dimension: int, stage: int, x: jax.Array) -> jax.Array:
    return jax.lax.all_gather(x, axis, axis=dimension, tiled=True)


def _forward(axis: str, dimension: int, stage: int, x: jax.Array) -> tuple[jax.Array, None]:
    return _gathered(axis, dimension, stage, x), None


def _backward(axis: str, dimension: int, stage: int, _: None, gradient: jax.Array) -> tuple[jax.Array]:
    return (scattered(gradient, axis, dimension, stage),)


_gathered.defvjp(_forward, _backward)


def scattered(x: jax.Array, axis: str, dimension: int, stage: int = 0) -> jax.Array:
    """The sum over the axis, of which each device keeps its part of `dimension`; `stage` as in `gathered`."""
    scatter = functools.partial(jax.lax.psum_scatter, axis_name=axis, scatter_dimension=dimension, tiled=True)
    devices = jax.lax.axis_size(axis)
    if not stage or stage >= devices or devices % stage:
        return scatter(x)
    groups = devices // stage
    far = [[group * stage + place for group in range(groups)] for place in range(stage)]
    near = [[group * stage + place for place in range(stage)] for group in range(groups)]
    return scatter(scatter(x, axis_index_groups=far), axis_index_groups=near)


def cast(weight: jax.Array, dtype: str, mesh: AbstractMesh | None) -> jax.Array:
    """One layer's weight in the dtype of the computation.

    On a mesh behind a barrier: XLA would cast the weights of all layers before the loop over them, and keep both.
    """
    if mesh is not None and weight.dtype != jax.numpy.dtype(dtype):
        weight = jax.lax.optimization_barrier(weight)
    return weight.astype(dtype)
