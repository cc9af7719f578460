"""Biases of routed experts, on top of grouped products that know none.

Every token gets one more channel, which is 1, and every expert one more neuron, whose activation is 1 for every token:
the row of the channel holds the biases on the neurons, the row of the neuron the bias on the output. Few models have
them (a dense model with biases that was upcycled), so nothing is spent on making this fast.
"""

import jax
import jax.numpy as jnp

Weights = tuple[jax.Array, jax.Array, jax.Array]  # gate_EDF, up_EDF, down_EFD

_GATE = 32.0  # silu(32) is 32 to the bit in every dtype, and 32 * (1 / 32) is 1


def widened(weights: Weights, gate_bias_EF: jax.Array, up_bias_EF: jax.Array, down_bias_ED: jax.Array) -> Weights:
    """The experts' matrices with D + 1 channels and F + 1 neurons; the last channel of the output is zero."""
    gate_EDF, up_EDF, down_EFD = weights

    def with_row(matrix: jax.Array, bias: jax.Array) -> jax.Array:
        return jnp.concatenate([matrix, bias[:, None].astype(matrix.dtype)], axis=1)

    def with_column(matrix: jax.Array, last: float) -> jax.Array:
        """One more column, zero but for `last` in the last row."""
        column = jnp.zeros_like(matrix[:, :, :1]).at[:, -1].set(last)
        return jnp.concatenate([matrix, column], axis=2)

    gate_EDF = with_column(with_row(gate_EDF, gate_bias_EF), _GATE)
    up_EDF = with_column(with_row(up_EDF, up_bias_EF), 1 / _GATE)
    return gate_EDF, up_EDF, with_column(with_row(down_EFD, down_bias_ED), 0.0)


def with_one(x_MD: jax.Array) -> jax.Array:
    """Tokens with one more channel, which is 1."""
    return jnp.concatenate([x_MD, jnp.ones_like(x_MD[:, :1])], axis=1)
