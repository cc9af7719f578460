"""Losses on hidden states: which layers teach which, and through which projection."""

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from kwaicoder_jax.errors import UserError

KINDS = ("mse", "cosine")  # losses on hidden states


def layer_map(kept_layers: Sequence[int], every: int = 1) -> list[tuple[int, int]]:
    """Pairs (student layer, teacher layer): student layer i is what became of the teacher's layer kept_layers[i].

    Args:
      kept_layers: *original* indices of the layers that pruning kept, in order.
      every: take each `every`-th pair, counted from the last layer, which is always one of them.
    """
    if every < 1:
        raise UserError(f"every {every} layers", where="distill.hidden_every", remedy="use 1 or more")
    pairs = list(enumerate(kept_layers))
    return pairs[::-1][::every][::-1]


def selection_matrix(kept_channels: Sequence[int], teacher_dim: int) -> np.ndarray:
    """The 0/1 matrix [D', D] that places the student's channels where the teacher has them.

    Pruning leaves the residual stream's kept channels at their old scale (the norm correction acts behind the norms),
    so for hidden states taken from the residual stream this is the exact starting point, with no further factor.
    """
    kept = np.asarray(kept_channels)
    outside = kept[(kept < 0) | (kept >= teacher_dim)]
    if outside.size:
        raise UserError(f"channel {int(outside[0])} of a teacher with {teacher_dim}", where="kept channels")
    matrix_DC = np.zeros((kept.size, teacher_dim), np.float32)
    matrix_DC[np.arange(kept.size), kept] = 1.0
    return matrix_DC


def hidden_loss(
    student_PBTD: jax.Array, projection_PDC: jax.Array, teacher_PBTC: jax.Array, mask_BT: jax.Array, kind: str = "mse"
) -> jax.Array:
    """Mean over P mapped layers of the distance between projected student and teacher states; masked positions count 0.

    "mse" is the squared error over the teacher's energy, so that late layers with large norms do not drown early ones;
    "cosine" is 1 - cos per token. No gradient flows to the teacher and the mask. Gradients are computed in the forward
    pass, so that the projected states of one layer are in memory at a time.
    """
    if kind not in KINDS:
        raise UserError(f"no loss {kind!r}", where="loss.hidden_loss", remedy=" or ".join(KINDS))
    return _mean_distance(kind, student_PBTD, projection_PDC, teacher_PBTC, mask_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _mean_distance(kind, student_PBTD, projection_PDC, teacher_PBTC, mask_BT):
    def body(total, layer):
        student_BTD, projection_DC, teacher_BTC = layer
        return total + _distance(kind, student_BTD, projection_DC, teacher_BTC, mask_BT), None

    total, _ = jax.lax.scan(body, jnp.zeros((), jnp.float32), (student_PBTD, projection_PDC, teacher_PBTC))
    return total / len(student_PBTD)


def _forward(kind, student_PBTD, projection_PDC, teacher_PBTC, mask_BT):
    def body(total, layer):
        student_BTD, projection_DC, teacher_BTC = layer
        of_layer = jax.value_and_grad(functools.partial(_distance, kind), (0, 1))
        value, gradients = of_layer(student_BTD, projection_DC, teacher_BTC, mask_BT)
        return total + value, gradients

    layers = (student_PBTD, projection_PDC, teacher_PBTC)
    total, gradients = jax.lax.scan(body, jnp.zeros((), jnp.float32), layers)
    return total / len(student_PBTD), gradients


def _backward(kind, gradients, upstream):
    del kind
    factor = upstream / len(gradients[0])
    scaled = [(x.astype(jnp.float32) * factor).astype(x.dtype) for x in gradients]
    return (*scaled, None, None)


_mean_distance.defvjp(_forward, _backward)


def _distance(kind, student_BTD, projection_DC, teacher_BTC, mask_BT) -> jax.Array:
    """Of one layer; see `hidden_loss`."""
    teacher_BTC = teacher_BTC.astype(jnp.float32)
    projected_BTC = jnp.einsum(
        "BTD,DC->BTC", student_BTD, projection_DC.astype(student_BTD.dtype), preferred_element_type=jnp.float32
    )
    if kind == "mse":
        error = jnp.sum(mask_BT * jnp.sum(jnp.square(projected_BTC - teacher_BTC), -1))
        energy = jnp.sum(mask_BT * jnp.sum(jnp.square(teacher_BTC), -1))
        return error / jnp.maximum(energy, 1e-20)
    distance_BT = 1.0 - jnp.sum(_unit(projected_BTC) * _unit(teacher_BTC), -1)
    return jnp.sum(mask_BT * distance_BT) / jnp.maximum(jnp.sum(mask_BT), 1.0)


def _unit(x: jax.Array) -> jax.Array:
    """`x` over its length along the last axis; zero, with a gradient that is not NaN, where it is zero."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-20))
