"""Expert parallelism by exchange: each (token, choice) row travels to the device of its expert, and back.

What `expert_sharding.tokens_to_experts` does by a gather of all tokens of the group and a scatter of all outputs, this
does with the rows that an expert wants, and nothing else.
"""

import jax
from jax.sharding import AbstractMesh, PartitionSpec

from kernels import grouped_matmul
from kwaicoder_jax.models.expert_sharding import WEIGHT_AXES, Choice
from kwaicoder_jax.models.mesh_axes import gathered, token_axes, weight_axis


def exchanged_experts(
    mesh: AbstractMesh,
    choice: Choice,
    x_MD: jax.Array,
    gate_EDF: jax.Array,
    up_EDF: jax.Array,
    down_EFD: jax.Array,
    *,
    rows: int,
    backend: str,
    stage: int = 0,
) -> jax.Array:
    """What the experts add to each token: [M, D] in the dtype of `x_MD`, where its tokens are.

    Args:
      mesh: from `token_mesh`, with an expert axis that divides E.
      choice: combine weights and experts of all tokens; an expert of E stands for none.
      x_MD: tokens, batch-major.
      gate_EDF: gate projections of all experts.
      up_EDF: up projections.
      down_EFD: down projections.
      rows: that a device works on at a time, see `grouped_matmul.exchanged_expert_mlp`.
      backend: of the grouped matmul.
      stage: of scattered gradients, see `mesh_axes.gathered`.
    """
    expert, fsdp, tensor = (
        weight_axis(mesh, axis, size) for axis, size in zip(WEIGHT_AXES, gate_EDF.shape, strict=True)
    )
    assert expert is not None

    def local(choice: Choice, x_MD: jax.Array, *weights: jax.Array) -> jax.Array:
        weights = tuple(gathered(w, fsdp, dimension, stage) for w, dimension in zip(weights, (1, 1, 2), strict=True))
        y_MD = grouped_matmul.exchanged_expert_mlp(
            x_MD, *choice, *weights, axis=expert, mesh_axes=mesh.axis_names, rows=rows, backend=backend
        ).astype(x_MD.dtype)
        return y_MD if tensor is None else jax.lax.psum(y_MD, tensor)

    tokens = PartitionSpec(token_axes(mesh))
    weights_in, weights_out = PartitionSpec(expert, fsdp, tensor), PartitionSpec(expert, tensor, fsdp)
    in_specs = (tokens, tokens, weights_in, weights_in, weights_out)
    return jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=tokens, check_vma=False)(
        choice, x_MD, gate_EDF, up_EDF, down_EFD
    )
