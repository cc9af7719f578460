"""The teacher's K likeliest tokens with everything else as one bucket: K + 1 classes in place of V.

The loss between the two bucketed distributions is a lower bound of the loss between the whole ones (data processing;
it holds for every f-divergence), tight as K grows. The bucket keeps its mass on both sides, so the student's tail gets
a gradient; renormalising inside the top K would give it none.
"""

from collections.abc import Callable

import flax.struct
import jax
import jax.numpy as jnp

from kwaicoder_jax.distillation.divergences import Pair
from kwaicoder_jax.distillation.top_k import top_k as _largest

_NOTHING = -1e30  # logit of a bucket without tokens (K = V): finite, so that 0 * it is 0


@flax.struct.dataclass
class TopK:
    """A teacher's distribution at each position of [B, T].

    Attributes:
      ids_BTK: its K likeliest tokens, likeliest first; int32.
      log_p_BTK: their log-probabilities, nats, at the temperature they were taken at.
      log_tail_BT: log of the probability of all other tokens together; float32.
      logsumexp_BT: of the logits over the temperature, so that log_p + logsumexp are these logits; float32. No loss
        reads it, and a batch goes without.
    """

    ids_BTK: jax.Array
    log_p_BTK: jax.Array
    log_tail_BT: jax.Array
    logsumexp_BT: jax.Array | None = None


def top_k(logits_VBW: jax.Array, count: int) -> TopK:
    """The `count` likeliest tokens of each position."""
    values_BWK, ids_BWK = _largest(jnp.moveaxis(logits_VBW, 0, -1), count)
    total_BW = jax.nn.logsumexp(logits_VBW, axis=0)
    tail_BW = _tail(logits_VBW, jnp.moveaxis(ids_BWK, -1, 0))[1]
    return TopK(ids_BWK.astype(jnp.int32), values_BWK - total_BW[..., None], tail_BW - total_BW, total_BW)


def through_buckets(compare: Callable[[jax.Array, jax.Array], Pair], student_VBW: jax.Array, teacher: TopK) -> Pair:
    """A loss between K + 1 classes, and its gradient by all V of the student's logits.

    The student's logits of the classes are its own at the teacher's tokens, and the logsumexp of all others.
    """
    ids_KBW = jnp.moveaxis(teacher.ids_BTK, -1, 0)
    others_VBW, tail_BW = _tail(student_VBW, ids_KBW)
    student_KBW = jnp.concatenate([_take(student_VBW, ids_KBW), tail_BW[None]])
    log_p_KBW = jnp.moveaxis(teacher.log_p_BTK.astype(jnp.float32), -1, 0)
    value_BW, d_KBW = compare(student_KBW, jnp.concatenate([log_p_KBW, teacher.log_tail_BT[None]]))
    # d tail / d logit of a token in it: its share of the tail's mass. Zero at the teacher's tokens, which then get theirs.
    d_VBW = jnp.exp(others_VBW - tail_BW[None]) * d_KBW[-1:]
    return value_BW, _put(d_VBW, ids_KBW, d_KBW[:-1])


def _tail(logits_VBW: jax.Array, ids_KBW: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The logits with -inf at `ids`, and their logsumexp: summed up, not subtracted, so a tiny tail keeps its digits."""
    others_VBW = _put(logits_VBW, ids_KBW, jnp.full(ids_KBW.shape, -jnp.inf, logits_VBW.dtype))
    return others_VBW, jnp.maximum(jax.nn.logsumexp(others_VBW, axis=0), _NOTHING)


def _per_token(function: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    """Over the two last axes. Batched, not indexed by row, so that a mesh that splits the rows leaves them where they are."""
    for _ in range(2):
        function = jax.vmap(function, in_axes=-1, out_axes=-1)
    return function


_take = _per_token(lambda x_V, ids_K: x_V[ids_K])
_put = _per_token(lambda x_V, ids_K, values_K: x_V.at[ids_K].set(values_K))
