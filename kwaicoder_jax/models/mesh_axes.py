"""The mesh that an array is on, and the names that its axes have for the models."""

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


def cast(weight: jax.Array, dtype: str, mesh: AbstractMesh | None) -> jax.Array:
    """One layer's weight in the dtype of the computation.

    On a mesh behind a barrier: XLA would cast the weights of all layers before the loop over them, and keep both.
    """
    if mesh is not None and weight.dtype != jax.numpy.dtype(dtype):
        weight = jax.lax.optimization_barrier(weight)
    return weight.astype(dtype)
