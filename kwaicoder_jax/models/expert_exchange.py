"""Expert parallelism by exchange: each (token, choice) row travels to the device of its expert, and back.

What `expert_sharding.tokens_to_experts` does by a gather of all tokens of the group and a scatter of all outputs, this
does with the rows that an expert wants, and nothing else.
"""

from typing import Any

import jax
from jax.sharding import AbstractMesh

from kernels import grouped_matmul
from kwaicoder_jax.models.expert_sharding import Choice, on_expert_shards


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

    def local(tokens: tuple[Choice, jax.Array], weights: Any, expert: str | None) -> tuple[jax.Array, None]:
        assert expert is not None
        choice, x_MD = tokens
        y_MD = grouped_matmul.exchanged_expert_mlp(
            x_MD, *choice, *weights, axis=expert, mesh_axes=mesh.axis_names, rows=rows, backend=backend
        )
        return y_MD.astype(x_MD.dtype), None

    weights = (gate_EDF, up_EDF, down_EFD)
    return on_expert_shards(local, mesh, (choice, x_MD), weights, whole=False, stage=stage)[0]
