"""Which layers stay: by block influence, by the least influential contiguous block, or by leaving each one out."""

import enum

import numpy as np

from kwaicoder_jax.errors import UserError
from kwaicoder_jax.transforms.heads import best
from kwaicoder_jax.transforms.scores import Scores
from kwaicoder_jax.transforms.target import WHERE


class LayerScores(enum.StrEnum):
    """What layers are ranked by."""

    INFLUENCE = "influence"  # each layer's block influence (ShortGPT, Men et al. 2024, arXiv 2403.03853)
    BLOCK = "block"  # the block of the needed length that turns the stream least (Gromov et al. 2024, 2403.17887)
    LEAVE_ONE_OUT = "leave_one_out"  # the loss without the layer (Minitron, 2407.14679, section 2.2)


def keep(scores: Scores, count: int, chosen: str, protect_ends: bool) -> np.ndarray:
    """Original indices of the `count` layers that stay, ascending, [L'].

    Args:
      scores: with what `chosen` needs.
      count: L'.
      chosen: a value of LayerScores.
      protect_ends: never drop the first and the last layer.
    """
    kind, layers = _parse(chosen), len(scores.layers_L)
    ends = protect_ends and count < layers
    if ends and count < 2:
        raise UserError(
            f"{count} layer cannot hold both the first and the last", where=f"{WHERE}.layers",
            remedy="use 2 or more, or prune.protect_ends=False",
        )  # fmt: skip
    if count == layers:
        return np.arange(layers)
    if kind is LayerScores.BLOCK:
        return _without_block(_measured(scores.blocks_LL, kind), layers - count, ends)
    measured = scores.layers_L if kind is LayerScores.INFLUENCE else _measured(scores.leave_one_out_L, kind)
    scores_L = np.array(measured, dtype=np.float64)
    if ends:
        scores_L[[0, -1]] = np.inf
    return best(scores_L, count)


def _without_block(blocks_LL: np.ndarray, dropped: int, ends: bool) -> np.ndarray:
    """All layers but the block of `dropped` of least influence; among equals the earliest goes."""
    layers = len(blocks_LL)
    starts = np.arange(int(ends), layers - dropped + 1 - int(ends))
    first = starts[np.argmin(blocks_LL[starts, starts + dropped - 1])]
    return np.setdiff1d(np.arange(layers), np.arange(first, first + dropped))


def _measured(values: np.ndarray | None, kind: LayerScores) -> np.ndarray:
    if values is None:
        raise UserError(
            f"the scores do not hold what {str(kind)!r} needs", where="prune.layer_scores",
            remedy=f"measure it, or use {str(LayerScores.INFLUENCE)!r}",
        )  # fmt: skip
    return values


def _parse(chosen: str) -> LayerScores:
    try:
        return LayerScores(chosen)
    except ValueError as error:
        choices = ", ".join(LayerScores)
        raise UserError(f"no scores {chosen!r}", where="prune.layer_scores", remedy=f"use {choices}") from error
