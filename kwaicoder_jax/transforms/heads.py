"""Which query heads stay, so that each still reads its own KV head; and what the dropped ones leave in those that stay.

Head residual merge (Minitron, Muralidharan et al. 2024, arXiv 2407.14679, section 2.3): of L heads ranked by
importance and counted from 1, K stay, and head i of [2K-L+1, K] becomes head_i + (head_i - head_{2K-i+1}).
The paper gives it as the analogue of merging whole layers' weights, and under grouped-query attention for the query
heads alone. So here a head is its *query projection*: the keys and values are shared by the group, and the output rows
stay as they were, since they say where a head writes and were not averaged out of anything. A projection is linear and
the rotary embedding too, so the attention scores of a merged head are exactly 2 s_i - s_{2K-i+1}. Ranks are inside a
KV group, whose heads read the same keys; a group that goes as a whole leaves nothing.
"""

import numpy as np

from kwaicoder_jax import models
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.transforms.arrays import Array, namespace, take

ALONE = -1  # in place of a partner: this head is kept as it is


def best(scores: np.ndarray, count: int) -> np.ndarray:
    """Indices of the `count` highest along the last axis, ascending; among equals the lowest index wins."""
    return np.sort(ranked(scores)[..., :count], axis=-1)


def ranked(scores: np.ndarray) -> np.ndarray:
    """Indices along the last axis, the highest score first."""
    return np.argsort(-scores, axis=-1, kind="stable")


def keep(heads_LH: np.ndarray, groups_LK: np.ndarray, heads: int, groups: int) -> tuple[np.ndarray, np.ndarray]:
    """The best groups of each layer, and inside each the best heads, so that head h still reads group h // (H'/K').

    Args:
      heads_LH: scores of the query heads.
      groups_LK: scores of the KV groups.
      heads: H', a multiple of `groups`.
      groups: K'.

    Returns:
      Original indices, ascending: heads [L, H'] and groups [L, K'].
    """
    layers, have = groups_LK.shape
    per_group = heads_LH.shape[1] // have
    kept_LK = best(groups_LK, groups)
    inside_LKG = np.take_along_axis(heads_LH.reshape(layers, have, per_group), kept_LK[:, :, None], axis=1)
    kept_LKG = best(inside_LKG, heads // groups) + kept_LK[:, :, None] * per_group
    return kept_LKG.reshape(layers, heads), kept_LK


def check_merge(before: int, after: int) -> None:
    """UserError unless each dropped head of a group finds a kept one to go to: K >= L / 2."""
    if 2 * after < before:
        raise UserError(
            f"{after} of the {before} heads in each KV group cannot take up the other {before - after}",
            where="prune.head_merge", remedy=f"keep {-(-before // 2)} or more in each group, or prune.head_merge=False",
        )  # fmt: skip


def check_linear(config: models.ModelConfig) -> None:
    """UserError unless the scores of a merged head are those of its two heads, merged: queries have to be linear."""
    if config.qk_norm is not models.QkNorm.NONE or config.qkv_clip is not None:
        field, value = ("qk_norm", config.qk_norm) if config.qkv_clip is None else ("qkv_clip", config.qkv_clip)
        raise UserError(
            f"model.{field} is {value}, so the scores of a sum of two query projections are not the sum of their scores",
            where="prune.head_merge", remedy="prune.head_merge=False",
        )  # fmt: skip


def partners(heads_LH: np.ndarray, kept_LK: np.ndarray, heads: int, kv_heads: int) -> np.ndarray:
    """For each kept head the dropped head that is merged into it, [L, H'], original index; ALONE where there is none.

    Args:
      heads_LH: scores of all query heads.
      kept_LK: the KV groups that stay, from `keep`.
      heads: H'.
      kv_heads: K, before pruning.
    """
    layers, per_group, stay = len(heads_LH), heads_LH.shape[1] // kv_heads, heads // kept_LK.shape[1]
    check_merge(per_group, stay)
    first_LK1 = kept_LK[:, :, None] * per_group  # of each kept group
    inside_LKG = np.take_along_axis(heads_LH.reshape(layers, kv_heads, per_group), kept_LK[:, :, None], axis=1)
    order_LKG = ranked(inside_LKG)
    partner_LKG = np.full(inside_LKG.shape, ALONE)
    for rank in range(2 * stay - per_group + 1, stay + 1):  # from 1, as in the paper
        other = 2 * stay - rank + 1
        goes_to_LK1, from_LK1 = order_LKG[:, :, rank - 1 : rank], order_LKG[:, :, other - 1 : other]
        np.put_along_axis(partner_LKG, goes_to_LK1, from_LK1 + first_LK1, axis=-1)
    return np.take_along_axis(partner_LKG, best(inside_LKG, stay), axis=-1).reshape(layers, heads)


def merge(array: Array, kept_LH: np.ndarray, partner_LH: np.ndarray, axes: tuple[str, ...]) -> Array:
    """The query projections of the kept heads, 2 * head - partner where there is a partner, rounded once.

    Args:
      array: all heads of the kept layers, [L', ...].
      kept_LH: original indices, [L', H'].
      partner_LH: from `partners`.
      axes: declared axes of the array, among them "heads".
    """
    axis = axes.index("heads")
    alone_LH = partner_LH == ALONE
    xp, wide = namespace(array), np.promote_types(array.dtype, np.float32)
    shape = [1] * array.ndim
    shape[0], shape[axis] = kept_LH.shape
    here, there = (take(array, index, axis, axes=axes) for index in (kept_LH, np.where(alone_LH, kept_LH, partner_LH)))
    difference = here.astype(wide) - there.astype(wide)  # zero where alone
    return (here.astype(wide) + difference * xp.asarray(~alone_LH.reshape(shape), dtype=wide)).astype(array.dtype)
