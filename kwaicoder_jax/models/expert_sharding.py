"""The routed experts on a mesh: every device sorts and computes the tokens it holds, and drops none.

Under plain jit the sort by expert is global, and XLA would gather all tokens and repeat all products on every device.
Here the tokens stay where they are and the weights come to them, gathered once a layer; the transpose of that gather is
a reduce-scatter, so a device receives the gradient of its own shard only.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax.sharding import AbstractMesh, PartitionSpec

from kwaicoder_jax.models.mesh_axes import EMBED_AXIS, TENSOR_AXIS, gathered, token_axes, weight_axis

Outputs = TypeVar("Outputs")
LocalFunction = Callable[[Any, jax.Array, jax.Array, jax.Array, jax.Array], tuple[jax.Array, Outputs]]

Weights = tuple[jax.Array, jax.Array, jax.Array]  # gate, up, down

WEIGHT_AXES = ("expert", EMBED_AXIS, TENSOR_AXIS)  # of [E, D, F] weights


def neuron_axis(mesh: AbstractMesh | None, neurons: int) -> str | None:
    """The mesh axis over which the function of `on_each_shard` sees a part of the neurons, if there is one."""
    return None if mesh is None else weight_axis(mesh, WEIGHT_AXES[-1], neurons)


def on_expert_shards(
    function: Callable[[Any, Weights, str | None], tuple[jax.Array, Outputs]],
    mesh: AbstractMesh,
    tokens: Any,
    weights: Weights,
    *,
    whole: bool,
    stage: int = 0,
) -> tuple[jax.Array, Outputs]:
    """Calls `function` on each device with its tokens and weights of whole width.

    Args:
      function: (tokens, weights, axis) -> (y_MD, more arrays with a leading M or B). `axis` is that of the mesh along which
        experts are still split. Additive over slices of F: where the mesh has a tensor axis it sees a part of the neurons,
        and y is summed.
      mesh: from `token_mesh`.
      tokens: arrays [M, ...] in any tree.
      weights: gate_EDF, up_EDF, down_EFD of all experts.
      whole: whether the weights of all experts come to each device; `axis` is None then.
      stage: of scattered gradients, see `mesh_axes.gathered`.
    """
    expert, fsdp, tensor = (
        weight_axis(mesh, axis, size) for axis, size in zip(WEIGHT_AXES, weights[0].shape, strict=True)
    )

    def local(tokens: Any, weights: Weights) -> tuple[jax.Array, Outputs]:
        gate_EDF, up_EDF, down_EFD = (gathered(w, expert, 0, stage) if whole else w for w in weights)
        wide = (
            gathered(gate_EDF, fsdp, 1, stage),
            gathered(up_EDF, fsdp, 1, stage),
            gathered(down_EFD, fsdp, 2, stage),
        )
        y_MD, rest = function(tokens, wide, None if whole else expert)
        return (y_MD if tensor is None else jax.lax.psum(y_MD, tensor)), rest

    spread = PartitionSpec(token_axes(mesh))
    weights_in, weights_out = PartitionSpec(expert, fsdp, tensor), PartitionSpec(expert, tensor, fsdp)
    # check_vma would want every zero that starts a loop inside the kernels to be marked as varying over the mesh.
    return jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(spread, (weights_in, weights_in, weights_out)),
        out_specs=spread,
        check_vma=False,
    )(tokens, weights)


def on_each_shard(
    function: LocalFunction[Outputs],
    mesh: AbstractMesh | None,
    router_ME: Any,
    x_MD: jax.Array,
    gate_EDF: jax.Array,
    up_EDF: jax.Array,
    down_EFD: jax.Array,
    *,
    stage: int = 0,
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
      stage: of scattered gradients, see `mesh_axes.gathered`.
    """
    weights = (gate_EDF, up_EDF, down_EFD)
    if mesh is None:
        return function(router_ME, x_MD, *weights)

    def local(tokens: Any, weights: Weights, _: str | None) -> tuple[jax.Array, Outputs]:
        router_ME, x_MD = tokens
        return function(router_ME, x_MD, *weights)

    return on_expert_shards(local, mesh, (router_ME, x_MD), weights, whole=True, stage=stage)


Choice = tuple[jax.Array, jax.Array]  # combine weights and experts, [M, X]
LocalExperts = Callable[[jax.Array, Choice, jax.Array, jax.Array, jax.Array], jax.Array]


def tokens_to_experts(
    function: LocalExperts,
    mesh: AbstractMesh,
    choice: Choice,
    x_MD: jax.Array,
    gate_EDF: jax.Array,
    up_EDF: jax.Array,
    down_EFD: jax.Array,
    *,
    stage: int = 0,
) -> jax.Array:
    """Expert parallelism: the tokens of an expert group come to each of its devices, and what they add goes back.

    A gather and a scatter of [M, D] over the expert axis, in place of a gather of the weights of all experts.

    Args:
      function: (x_MD, choice, gate_EDF, up_EDF, down_EFD) -> [M, D] float32, what the given experts add; experts are
        counted from the first of those given. Additive over slices of F, as in `on_each_shard`.
      mesh: from `token_mesh`, with an expert axis that divides E.
      choice: combine weights and experts of all tokens.
      x_MD: tokens, batch-major.
      gate_EDF: gate projections of all experts.
      up_EDF: up projections.
      down_EFD: down projections.
      stage: of scattered gradients, see `mesh_axes.gathered`.
    """

    def local(tokens: tuple[Choice, jax.Array], weights: Weights, expert: str | None) -> tuple[jax.Array, None]:
        assert expert is not None
        choice, x_MD = tokens
        weight_MX, index_MX = (gathered(each, expert, 0) for each in choice)
        index_MX = index_MX - jax.lax.axis_index(expert) * weights[0].shape[0]
        y_MD = function(gathered(x_MD, expert, 0), (weight_MX, index_MX), *weights).astype(x_MD.dtype)
        return jax.lax.psum_scatter(y_MD, expert, scatter_dimension=0, tiled=True), None

    weights = (gate_EDF, up_EDF, down_EFD)
    return on_expert_shards(local, mesh, (choice, x_MD), weights, whole=False, stage=stage)[0]


def expert_shares(mesh: AbstractMesh | None, experts: int) -> int:
    """Into how many parts the mesh can split that many experts."""
    axis = None if mesh is None else weight_axis(mesh, WEIGHT_AXES[0], experts)
    return 1 if mesh is None or axis is None else mesh.shape[axis]
