"""The vocabulary projection and the losses fused with it."""

from typing import Any

import jax
import jax.numpy as jnp


def projection(params: Any) -> jax.Array:
    """The matrix from hidden states to logits, [V, D]: the head, or the embedding where they are tied."""
    return params["head"] if "head" in params else params["embedding"]


def logits(hidden_BTD: jax.Array, projection_VD: jax.Array) -> jax.Array:
    """Float32 logits [B, T, V]; for short inputs and tests, since training never needs the whole array."""
    return jnp.einsum(
        "BTD,VD->BTV", hidden_BTD, projection_VD.astype(hidden_BTD.dtype), preferred_element_type=jnp.float32
    )


def cross_entropy(
    hidden_BTD: jax.Array, projection_VD: jax.Array, targets_BT: jax.Array, mask_BT: jax.Array
) -> jax.Array:
    """Sum over positions of mask * (-log softmax(hidden . projection)[target]), float32, nats."""
    logits_BTV = logits(hidden_BTD, projection_VD)
    chosen_BT = jnp.take_along_axis(logits_BTV, targets_BT[:, :, None], axis=-1)[:, :, 0]
    return jnp.sum(mask_BT * (jax.nn.logsumexp(logits_BTV, axis=-1) - chosen_BT))
