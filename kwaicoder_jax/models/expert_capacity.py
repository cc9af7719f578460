"""Experts with a capacity on a mesh: buffers of one size, made where the tokens are."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, PartitionSpec

from kernels import grouped_matmul
from kernels.routing import capacity
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.models.expert_sharding import WEIGHT_AXES, Choice
from kwaicoder_jax.models.mesh_axes import gathered, token_axes, weight_axis


def capped_experts(
    mesh: AbstractMesh | None,
    choice: Choice,
    x_MD: jax.Array,
    weights: tuple[jax.Array, jax.Array, jax.Array],
    mask_BT: jax.Array,
    *,
    factor: float,
    gather_weights: bool,
    stage: int = 0,
) -> tuple[jax.Array, jax.Array]:
    """What the experts add to each token that finds a place, and how many of the choices do not.

    Args:
      mesh: from `token_mesh`; None for one device.
      choice: combine weights and experts of all tokens.
      x_MD: tokens, batch-major.
      weights: gate_EDF, up_EDF, down_EFD of all experts.
      mask_BT: tokens that count; the others get zeros.
      factor: of the capacity, see `routing.capacity.capacity`.
      gather_weights: whether the weights of all experts come to the tokens, or the tokens go to the experts.
      stage: of scattered gradients, see `mesh_axes.gathered`.

    Returns:
      [M, D], and the share of the counted tokens' choices that were dropped.

    Raises:
      UserError: a mesh that splits sequences.
    """
    if mesh is not None and mesh.shape.get("context", 1) > 1:
        raise UserError(
            "a capacity counts the rows of whole sequences", where="balance.capacity_factor",
            remedy="set it to None, or mesh.context to 1",
        )  # fmt: skip
    (batch, time), (_, index_MX), experts = mask_BT.shape, choice, weights[0].shape[0]
    rows = capacity.capacity(factor, time, index_MX.shape[1], experts)
    place_BTX = capacity.places(index_MX.reshape(batch, time, -1), mask_BT, experts, rows)
    lost_BTX = (place_BTX == rows) & mask_BT[:, :, None]
    counted = jnp.maximum(jnp.sum(mask_BT) * index_MX.shape[1], 1)
    dropped = jnp.sum(lost_BTX).astype(jnp.float32) / counted.astype(jnp.float32)
    place_MX = place_BTX.reshape(index_MX.shape)
    if mesh is None:
        return grouped_matmul.capped_expert_mlp(x_MD, *choice, place_MX, *weights, rows=rows, time=time), dropped
    expert, fsdp, tensor = (
        weight_axis(mesh, axis, size) for axis, size in zip(WEIGHT_AXES, weights[0].shape, strict=True)
    )

    def local(choice: Choice, place_MX: jax.Array, x_MD: jax.Array, *weights: Any) -> jax.Array:
        weights = tuple(gathered(w, fsdp, dimension, stage) for w, dimension in zip(weights, (1, 1, 2), strict=True))
        if gather_weights:
            weights = tuple(gathered(w, expert, 0, stage) for w in weights)
        y_MD = grouped_matmul.capped_expert_mlp(
            x_MD, *choice, place_MX, *weights, rows=rows, time=time, axis=None if gather_weights else expert
        )
        return y_MD if tensor is None else jax.lax.psum(y_MD, tensor)

    tokens = PartitionSpec(token_axes(mesh))
    weights_in, weights_out = PartitionSpec(expert, fsdp, tensor), PartitionSpec(expert, tensor, fsdp)
    in_specs = (tokens, tokens, tokens, weights_in, weights_in, weights_out)
    sharded = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=tokens, check_vma=False)
    return sharded(choice, place_MX, x_MD, *weights), dropped
