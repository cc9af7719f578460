"""The routed experts on a mesh: every device sorts and computes the tokens it holds, and drops none.

Under plain jit the sort by expert is global, and XLA would gather all tokens and repeat all products on every device.
Here the tokens stay where they are and the weights come to them, gathered once a layer; the transpose of that gather is
a reduce-scatter, so a device receives the gradient of its own shard only.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax.sharding import AbstractMesh, AxisType, PartitionSpec

Outputs = TypeVar("Outputs")
LocalFunction = Callable[[Any, jax.Array, jax.Array, jax.Array, jax.Array], tuple[jax.Array, Outputs]]

# Mesh axes, by the names that training.mesh gives them: those that split the tokens, and those of [E, D, F] weights.
TOKEN_AXES = ("data", "fsdp", "expert")
WEIGHT_AXES = ("expert", "fsdp", "tensor")


def token_mesh(x: jax.Array, batch: int) -> AbstractMesh | None:
    """The mesh that `x` is on, read from its type; None where there is nothing to split.

    That is: no mesh, one device, a batch that the devices cannot share evenly, or a caller that is already inside a
    shard_map.
    """
    mesh = jax.typeof(x).sharding.mesh
    if mesh.empty or mesh.size == 1 or any(kind is not AxisType.Auto for kind in mesh.axis_types):
        return None
    return mesh if batch % _devices(mesh, TOKEN_AXES) == 0 else None


def _devices(mesh: AbstractMesh, axes: tuple[str, ...]) -> int:
    count = 1
    for axis in axes:
        count *= mesh.shape.get(axis, 1)
    return count


def _weight_axis(mesh: AbstractMesh, axis: str, size: int) -> str | None:
    """`axis`, where it can split a dimension of `size`; otherwise the weights come in whole, gathered by XLA."""
    return axis if axis in mesh.shape and size % mesh.shape[axis] == 0 else None


def neuron_axis(mesh: AbstractMesh | None, neurons: int) -> str | None:
    """The mesh axis over which the function of `on_each_shard` sees a part of the neurons, if there is one."""
    return None if mesh is None else _weight_axis(mesh, WEIGHT_AXES[-1], neurons)


def on_each_shard(
    function: LocalFunction[Outputs],
    mesh: AbstractMesh | None,
    router_ME: Any,
    x_MD: jax.Array,
    gate_EDF: jax.Array,
    up_EDF: jax.Array,
    down_EFD: jax.Array,
) -> tuple[jax.Array, Outputs]:
    """Calls `function` with the tokens of each device and the weights of all experts.

    Args:
      function: (router_ME, x_MD, gate_EDF, up_EDF, down_EFD) -> (y_MD, more arrays with a leading M or B). It must be
        additive over slices of F: where the mesh has a tensor axis it sees a part of the neurons, and y is summed.
      mesh: from `token_mesh`; None calls `function` as it is.
      router_ME: what the router computed: arrays [M, ...] in any tree.
      x_MD: tokens; M is batch-major, so that a shard of the batch is a shard of M.
      gate_EDF: gate projections of all experts.
      up_EDF: up projections.
      down_EFD: down projections.
    """
    if mesh is None:
        return function(router_ME, x_MD, gate_EDF, up_EDF, down_EFD)
    expert, fsdp, tensor = (
        _weight_axis(mesh, axis, size) for axis, size in zip(WEIGHT_AXES, gate_EDF.shape, strict=True)
    )

    def gathered(weights: jax.Array, embed_axis: int) -> jax.Array:
        for axis, dimension in ((expert, 0), (fsdp, embed_axis)):
            if axis is not None:
                weights = jax.lax.all_gather(weights, axis, axis=dimension, tiled=True)
        return weights

    def local(
        router_ME: Any, x_MD: jax.Array, gate_EDF: jax.Array, up_EDF: jax.Array, down_EFD: jax.Array
    ) -> tuple[jax.Array, Outputs]:
        y_MD, rest = function(router_ME, x_MD, gathered(gate_EDF, 1), gathered(up_EDF, 1), gathered(down_EFD, 2))
        return (y_MD if tensor is None else jax.lax.psum(y_MD, tensor)), rest

    tokens = PartitionSpec(tuple(axis for axis in TOKEN_AXES if axis in mesh.shape))
    weights_in, weights_out = PartitionSpec(expert, fsdp, tensor), PartitionSpec(expert, tensor, fsdp)
    # check_vma would want every zero that starts a loop inside the kernels to be marked as varying over the mesh.
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(tokens, tokens, weights_in, weights_in, weights_out),
        out_specs=tokens,
        check_vma=False,
    )(router_ME, x_MD, gate_EDF, up_EDF, down_EFD)
