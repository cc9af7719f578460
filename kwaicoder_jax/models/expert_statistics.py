"""The routed experts with their statistics: the pass of `kernels.grouped_matmul.expert_mlp`, taken apart.

Neurons and outputs are reduced as rows in expert order; nothing has a token axis and an expert axis and a wide one.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from kernels import routing
from kernels.grouped_matmul import expert_rows
from kernels.grouped_matmul.api import Backend, outer
from kernels.grouped_matmul.mlp_types import Arguments, gated
from kernels.routing.api import take_rows
from kwaicoder_jax.models.statistics import Sums, from_sums, over_sequences


class ExpertSums(NamedTuple):
    """What one device's tokens tell of the experts, float32; the leading axis is that of tokens or sequences.

    Attributes:
      output_MX: norm of each chosen expert's output times its combine weight.
      absolute_BEF: sum over the sequence's unmasked tokens that chose the expert, of |a| of each neuron.
      square_BEF: the same of a^2.
    """

    output_MX: jax.Array
    absolute_BEF: jax.Array
    square_BEF: jax.Array


def expert_mlp(
    x_MD: jax.Array,
    weight_MX: jax.Array,
    order: routing.Routing,
    weights: tuple[jax.Array, jax.Array, jax.Array],
    mask_M: jax.Array,
    *,
    time: int,
    backend: str,
    neuron_axis: str | None,
) -> tuple[jax.Array, ExpertSums]:
    """The mixture's output [M, D] and its statistics; not differentiable in all back ends.

    Args:
      x_MD: tokens, batch-major.
      weight_MX: combine weights.
      order: the rows in expert order.
      weights: gate_EDF, up_EDF, down_EFD.
      mask_M: tokens that count.
      time: tokens of one sequence.
      backend: of the grouped matmul.
      neuron_axis: mesh axis over which F is split, if this runs inside a shard_map that splits it.
    """
    rows_RD, saved = expert_rows(Arguments(x_MD, weight_MX, *weights), order, backend=backend)
    a_RF = gated(jax.nn.silu, *saved)
    y_MD = routing.combine(rows_RD, weight_MX, order)

    whole_RD = rows_RD.astype(jnp.float32)
    if neuron_axis is not None:
        whole_RD = jax.lax.psum(whole_RD, neuron_axis)
    norm_MX = take_rows(jnp.linalg.norm(whole_RD, axis=-1), order.row_MX)

    # The sum over an expert's rows of a sequence is a product of groups' rows, with this matrix of zeros and ones.
    sequences_1B = jnp.arange(x_MD.shape[0] // time, dtype=jnp.int32).reshape(1, -1)
    member_RB = (order.token_R.reshape(-1, 1) // time == sequences_1B) & take_rows(mask_M, order.token_R).reshape(-1, 1)
    member_RB = member_RB.astype(jnp.float32)

    def summed(values_RF: jax.Array) -> jax.Array:
        sums_BEF = outer(Backend(backend), member_RB, values_RF, order.group_sizes_E).swapaxes(0, 1)
        return sums_BEF if neuron_axis is None else jax.lax.all_gather(sums_BEF, neuron_axis, axis=2, tiled=True)

    return y_MD, ExpertSums(norm_MX * weight_MX, summed(jnp.abs(a_RF)), summed(jnp.square(a_RF)))


def reduce(sums: ExpertSums, index_BTX: jax.Array, mask_BT: jax.Array) -> tuple[jax.Array, Sums]:
    """Over the whole batch: output norms summed over tokens [E], and the moments over sequences of neurons [E, F].

    Args:
      sums: of all devices, by rows: output_BTX, and of the neurons [B, C, E, F], C parts of each sequence.
      index_BTX: the experts that each token chose.
      mask_BT: tokens that count.
    """
    experts_111E = jnp.arange(sums.absolute_BEF.shape[2], dtype=jnp.int32).reshape(1, 1, 1, -1)
    here_BTXE = (index_BTX[..., None] == experts_111E) & mask_BT[:, :, None, None]
    output_E = jnp.sum(jnp.where(here_BTXE, sums.output_MX[..., None], 0.0), axis=(0, 1, 2))
    count_BE1 = jnp.sum(here_BTXE, axis=(1, 2), dtype=jnp.float32)[:, :, None]
    absolute_BEF, square_BEF = (jnp.sum(x_BCEF, axis=1) for x_BCEF in (sums.absolute_BEF, sums.square_BEF))
    return output_E, over_sequences(from_sums(absolute_BEF, square_BEF, count_BE1))
