"""Attention kernels on a mesh: each device runs them on the rows and heads that it holds."""

from collections.abc import Callable

import jax
from jax.sharding import PartitionSpec

from kwaicoder_jax.models.mesh_axes import TENSOR_AXIS, row_axes, token_mesh


def on_each_device(
    function: Callable[..., jax.Array], heads: tuple[jax.Array, ...], segments_BT: jax.Array
) -> jax.Array:
    """function(*heads, segments_BT) on each device's part; XLA would gather what a kernel reads.

    Args:
      function: of arrays [B, T, heads, width] and the segments; returns one more of them.
      heads: queries, keys and values; their numbers of heads are multiples of the mesh's tensor axis.
      segments_BT: of the tokens.
    """
    mesh = token_mesh(heads[0], heads[0].shape[0])
    if mesh is None:
        return function(*heads, segments_BT)
    rows = row_axes(mesh)
    part = PartitionSpec(rows, None, TENSOR_AXIS if TENSOR_AXIS in mesh.shape else None)
    specs = (*(part for _ in heads), PartitionSpec(rows))
    return jax.shard_map(function, mesh=mesh, in_specs=specs, out_specs=part, check_vma=False)(*heads, segments_BT)
