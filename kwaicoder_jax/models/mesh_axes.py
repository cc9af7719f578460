"""The mesh that an array is on, and the names that its axes have for the models."""

import functools
import math

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

# By the names that training.mesh gives them.
ROW_AXES = ("data", "fsdp", "expert")  # the rows of a batch are split over all of these
CONTEXT_AXIS = "context"  # and its time over this one
EMBED_AXIS = "fsdp"  # the channels of parameters
TENSOR_AXIS = "tensor"  # heads, neurons, the vocabulary


def token_mesh(x_BT: jax.Array, batch: int) -> AbstractMesh | None:
    """The mesh that `x_BT` is on, read from its type; None where there is nothing to split.

    That is: no mesh, one device, a batch of rows or a time that the devices cannot share evenly, or a caller that is
    already inside a shard_map.
    """
    mesh = jax.typeof(x_BT).sharding.mesh
    if mesh.empty or mesh.size == 1 or any(kind is not AxisType.Auto for kind in mesh.axis_types):
        return None
    even = batch % math.prod(mesh.shape.get(axis, 1) for axis in ROW_AXES) == 0
    return mesh if even and x_BT.shape[1] % context_shares(mesh) == 0 else None


def row_axes(mesh: AbstractMesh) -> tuple[str, ...]:
    """Those of ROW_AXES that the mesh has."""
    return tuple(axis for axis in ROW_AXES if axis in mesh.shape)


def context_axis(mesh: AbstractMesh) -> str | None:
    """CONTEXT_AXIS, if the mesh has it."""
    return CONTEXT_AXIS if CONTEXT_AXIS in mesh.shape else None


def context_shares(mesh: AbstractMesh | None) -> int:
    """Into how many parts the mesh splits time."""
    return 1 if mesh is None else mesh.shape.get(CONTEXT_AXIS, 1)


def token_axes(mesh: AbstractMesh) -> tuple[str, ...]:
    """All axes that tokens are split over: how a flat list of them lies, see `flat`."""
    return tuple(axis for axis in (*ROW_AXES, CONTEXT_AXIS) if axis in mesh.shape)


def batch_spec(mesh: AbstractMesh) -> PartitionSpec:
    """How arrays [B, T, ...] lie."""
    return PartitionSpec(row_axes(mesh), context_axis(mesh))


def flat(x_BT: jax.Array, mesh: AbstractMesh | None) -> jax.Array:
    """[B, T, ...] to one list of tokens [M, ...]: each device's own, row by row, one device after the other.

    Without a mesh, or where only rows are split, that is a reshape. A row whose time is split is no run of the list,
    so that no token has to move.
    """
    if mesh is None or context_shares(mesh) == 1:
        return x_BT.reshape(-1, *x_BT.shape[2:])
    return jax.shard_map(
        lambda x_BT: x_BT.reshape(-1, *x_BT.shape[2:]),
        mesh=mesh, in_specs=batch_spec(mesh), out_specs=PartitionSpec(token_axes(mesh)),
        axis_names=set(token_axes(mesh)), check_vma=False,  # other axes may split what follows B and T
    )(x_BT)  # fmt: skip


def unflat(x_M: jax.Array, batch: int, mesh: AbstractMesh | None) -> jax.Array:
    """The inverse of `flat`, to `batch` rows; for a list [N, ...] of other things, N / `batch` of each row are together."""
    if mesh is None or context_shares(mesh) == 1:
        return x_M.reshape(batch, -1, *x_M.shape[1:])
    rows = batch // math.prod(mesh.shape[axis] for axis in row_axes(mesh))
    return jax.shard_map(
        lambda x_M: x_M.reshape(rows, -1, *x_M.shape[1:]),
        mesh=mesh, in_specs=PartitionSpec(token_axes(mesh)), out_specs=batch_spec(mesh),
        axis_names=set(token_axes(mesh)), check_vma=False,
    )(x_M)  # fmt: skip


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
    scatter = functools.partial(jax.lax.psum_scatter, axis_name=axis, tiled=True)
    devices = jax.lax.axis_size(axis)
    if not stage or stage >= devices or devices % stage:
        return scatter(x, scatter_dimension=dimension)
    groups = devices // stage
    far = [[group * stage + place for group in range(groups)] for place in range(stage)]
    near = [[group * stage + place for place in range(stage)] for group in range(groups)]
    part = scatter(x, scatter_dimension=dimension, axis_index_groups=far)
    # A part of the second stage may have fewer rows than a tile, for which compilers sum the whole; not so where that
    # dimension is outside of the tiles, for which the others stand in lines of 128.
    rest = jnp.moveaxis(part, dimension, 0)
    lines = rest.reshape(rest.shape[0], -1, math.gcd(math.prod(rest.shape[1:]), 128))
    lines = scatter(lines, scatter_dimension=0, axis_index_groups=near)
    return jnp.moveaxis(lines.reshape(-1, *rest.shape[1:]), 0, dimension)
