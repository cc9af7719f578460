"""Experts with a capacity on a mesh: buffers of one size, made where the tokens are."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh

from kernels import grouped_matmul
from kernels.routing import capacity
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.models.expert_sharding import Choice, Weights, on_expert_shards


def capped_experts(
    mesh: AbstractMesh | None,
    choice: Choice,
    x_MD: jax.Array,
    weights: Weights,
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

    def local(tokens: Any, weights: Any, expert: str | None) -> tuple[jax.Array, None]:
        (weight_MX, index_MX), place_MX, x_MD = tokens
        y_MD = grouped_matmul.capped_expert_mlp(
            x_MD, weight_MX, index_MX, place_MX, *weights, rows=rows, time=time, axis=expert
        )
        return y_MD, None

    tokens = (choice, place_MX, x_MD)
    return on_expert_shards(local, mesh, tokens, weights, whole=gather_weights, stage=stage)[0], dropped
