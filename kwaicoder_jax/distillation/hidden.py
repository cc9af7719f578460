"""Losses on hidden states: which layers teach which, and through which projection."""

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
    "cosine" is 1 - cos per token. No gradient flows to the teacher.
    """
    teacher_PBTC = jax.lax.stop_gradient(teacher_PBTC).astype(jnp.float32)
    projected_PBTC = jnp.einsum(
        "PBTD,PDC->PBTC", student_PBTD, projection_PDC.astype(student_PBTD.dtype), preferred_element_type=jnp.float32
    )
    mask_1BT = mask_BT[None]
    if kind == "mse":
        error_P = jnp.sum(mask_1BT * jnp.sum(jnp.square(projected_PBTC - teacher_PBTC), -1), axis=(1, 2))
        energy_P = jnp.sum(mask_1BT * jnp.sum(jnp.square(teacher_PBTC), -1), axis=(1, 2))
        return jnp.mean(error_P / jnp.maximum(energy_P, 1e-20))
    if kind == "cosine":
        distance_PBT = 1.0 - jnp.sum(_unit(projected_PBTC) * _unit(teacher_PBTC), -1)
        return jnp.mean(jnp.sum(mask_1BT * distance_PBT, axis=(1, 2))) / jnp.maximum(jnp.sum(mask_BT), 1.0)
    raise UserError(f"no loss {kind!r}", where="loss.hidden_loss", remedy=" or ".join(KINDS))


def _unit(x: jax.Array) -> jax.Array:
    """`x` over its length along the last axis; zero, with a gradient that is not NaN, where it is zero."""
    return x * jax.lax.rsqrt(jnp.maximum(jnp.sum(jnp.square(x), axis=-1, keepdims=True), 1e-20))
