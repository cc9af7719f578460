"""Biases of routed experts, on top of grouped products that know none.

A bias on the neurons is one more row of the matrix that every token's constant 1 meets; a bias on the output is added
behind the experts, weighted as they are. Few models have them (a dense model with biases that was upcycled), so nothing
is spent on making this fast.
"""

import jax
import jax.numpy as jnp

Weights = tuple[jax.Array, jax.Array, jax.Array]  # gate_EDF, up_EDF, down_EFD


def widened(
    x_MD: jax.Array, weights: Weights, gate_bias_EF: jax.Array, up_bias_EF: jax.Array
) -> tuple[jax.Array, Weights]:
    """Tokens and weights with D + 1 channels, of which the last is 1 and is written to by nothing."""
    gate_EDF, up_EDF, down_EFD = weights
    gate_EDF, up_EDF = (
        jnp.concatenate([matrix_EDF, bias_EF[:, None].astype(matrix_EDF.dtype)], axis=1)
        for matrix_EDF, bias_EF in ((gate_EDF, gate_bias_EF), (up_EDF, up_bias_EF))
    )
    x_MD = jnp.concatenate([x_MD, jnp.ones_like(x_MD[:, :1])], axis=1)
    return x_MD, (gate_EDF, up_EDF, jnp.pad(down_EFD, ((0, 0), (0, 0), (0, 1))))


def narrowed(y_MD: jax.Array, weight_MX: jax.Array, index_MX: jax.Array, down_bias_ED: jax.Array) -> jax.Array:
    """The experts' output [M, D] of widened tokens, with the biases of the chosen experts, weighted; float32."""
    chosen_MXE = jax.nn.one_hot(index_MX, down_bias_ED.shape[0], dtype=jnp.float32)
    combine_ME = jnp.einsum("MX,MXE->ME", weight_MX, chosen_MXE)
    return y_MD[:, :-1].astype(jnp.float32) + combine_ME @ down_bias_ED.astype(jnp.float32)
