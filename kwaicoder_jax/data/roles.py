"""What each token of a packed row is there for: to show people batches as a model sees them."""

import enum
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kwaicoder_jax.data.packing import Batch
from kwaicoder_jax.data.tokenizer import Tokenizer


class Role(enum.StrEnum):
    """Of a token."""

    TEXT = "text"
    PREFIX = "prefix"
    SUFFIX = "suffix"
    MIDDLE = "middle"  # in SPM order the prefix stands in front of it, with no border between
    SENTINEL = "sentinel"
    END = "end"


class Run(NamedTuple):
    """Tokens of one segment that have the same role and all carry loss, or none.

    Attributes:
      role: theirs.
      text: decoded together.
      tokens: how many.
      has_loss: whether they are targets.
    """

    role: Role
    text: str
    tokens: int
    has_loss: bool


def segments(batch: Batch, row: int, tokenizer: Tokenizer) -> list[list[Run]]:
    """The segments of a row, in order, as runs of targets: what is learned, each token with its own role.

    Args:
      batch: see `packing.batch`.
      row: of it.
      tokenizer: the corpus's.
    """
    segment_T, target_T, loss_T = (np.asarray(batch[key])[row] for key in ("segment_ids", "targets", "loss_mask"))
    found = []
    for segment in range(1, int(segment_T.max(initial=0)) + 1):
        place = np.flatnonzero(segment_T == segment)
        found.append(_runs(target_T[place].tolist(), loss_T[place] > 0, tokenizer))
    return found


def _runs(targets: Sequence[int], has_loss: np.ndarray, tokenizer: Tokenizer) -> list[Run]:
    runs: list[Run] = []
    first = 0
    given = roles(targets, tokenizer)
    for place in range(1, len(targets) + 1):
        is_border = place == len(targets) or (given[place], has_loss[place]) != (given[first], has_loss[first])
        if is_border or given[first] in (Role.SENTINEL, Role.END):
            ids = targets[first:place]
            text = "".join(tokenizer.spelling(each) or "" for each in ids) if given[first] in _SPECIAL else ""
            runs.append(Run(given[first], text or tokenizer.decode(ids), len(ids), bool(has_loss[first])))
            first = place
    return runs


_SPECIAL = (Role.SENTINEL, Role.END)


def roles(ids: Sequence[int], tokenizer: Tokenizer) -> list[Role]:
    """The role of each token of one segment."""
    specials = tokenizer.specials
    part = dict(zip(specials.sentinels(), (Role.PREFIX, Role.SUFFIX, Role.MIDDLE), strict=True))
    begins = {tokenizer.special_id(spelling): role for spelling, role in part.items()}
    begins.pop(None, None)
    end, now, found = tokenizer.special_id(specials.end_of_text), Role.TEXT, []
    for token in ids:
        if token in begins:
            now = begins[token]
            found.append(Role.SENTINEL)
        else:
            found.append(Role.END if token == end else now)
    return found
