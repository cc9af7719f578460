"""Gradients of a batch, a part of its rows at a time."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

# (trainable, batch, frozen) -> ((loss, metrics), gradients), as `jax.value_and_grad(..., has_aux=True)` makes it.
GradientFunction = Callable[[Any, dict[str, jax.Array], Any], tuple[tuple[jax.Array, dict[str, jax.Array]], Any]]


def accumulate(gradient_of: GradientFunction, parts: int) -> GradientFunction:
    """The same function, which works on `parts` parts of the rows, one after the other.

    Each part counts by its "tokens" (a metric that the function has to report), so a loss that is a mean over tokens comes
    out as that of the whole batch, and its gradient too, but for the order of float32 sums. What is no such mean, the balance
    losses of a mixture above all, is taken within a part.

    Args:
      gradient_of: of the loss.
      parts: a divisor of the rows of each device.
    """

    def accumulated(trainable: Any, batch: dict[str, jax.Array], frozen: Any) -> Any:
        pieces = {name: _split(x, parts) for name, x in batch.items()}
        shapes = jax.eval_shape(lambda: gradient_of(trainable, {name: x[0] for name, x in pieces.items()}, frozen))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), shapes)

        def add(sums: Any, piece: dict[str, jax.Array]) -> tuple[Any, jax.Array]:
            new = gradient_of(trainable, piece, frozen)
            weight = new[0][1]["tokens"].astype(jnp.float32)
            return jax.tree.map(lambda total, x: total + weight * x.astype(jnp.float32), sums, new), weight

        sums, weights_P = jax.lax.scan(add, zeros, pieces)
        tokens = jnp.sum(weights_P)
        means = jax.tree.map(lambda x: x / jnp.maximum(tokens, 1.0), sums)
        (loss, metrics), gradients = jax.tree.map(lambda x, like: x.astype(like.dtype), means, shapes)
        return (loss, metrics | {"tokens": tokens.astype(shapes[0][1]["tokens"].dtype)}), gradients

    return accumulated


def _split(x_BT: jax.Array, parts: int) -> jax.Array:
    """[B, ...] to [parts, B / parts, ...]; of the rows that lie together, on one device, each part takes some."""
    return x_BT.reshape(x_BT.shape[0] // parts, parts, *x_BT.shape[1:]).swapaxes(0, 1)
