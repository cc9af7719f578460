"""Fill-in-the-middle (Bavarian et al. 2022, arXiv 2207.14255): splitting a text in three, and its two orders as tokens.

    PSM  <prefix> P <suffix> S <middle> M <end>
    SPM  <prefix> <suffix> S <middle> P M <end>

SPM is the "SPMv2" of Bavarian et al., which StarCoder trains too. The middle follows the prefix directly, which suits a
key-value cache of the suffix when the cursor moves; and it shares every sentinel's role with PSM (the middle token
starts what is generated), so the two orders help each other when they are trained together. The parts are tokenised
separately, here and in the prompt, so that a model meets the same tokens at the cursor in training and in use.
"""

import dataclasses
import hashlib
from typing import Literal, NamedTuple, get_args

import numpy as np

from kwaicoder_jax.data.tokenizer import Tokenizer
from kwaicoder_jax.errors import UserError

Order = Literal["psm", "spm"]
Unit = Literal["character", "line", "mixed"]


@dataclasses.dataclass(frozen=True)
class FimOptions:
    """How often and how texts are split.

    Attributes:
      rate: share of the pieces that become fill-in-the-middle samples.
      spm_rate: share of those in SPM order.
      unit: where the two cuts lie: between any characters, at line borders, or one or the other by a fair coin.
    """

    rate: float = 0.5
    spm_rate: float = 0.5
    unit: Unit = "mixed"

    def __post_init__(self) -> None:
        for field in ("rate", "spm_rate"):
            if not 0.0 <= getattr(self, field) <= 1.0:
                raise UserError(f"{getattr(self, field)} is not between 0 and 1", where=f"fim.{field}")
        if self.unit not in get_args(Unit):
            raise UserError(f"{self.unit!r} is not a unit", where="fim.unit", remedy=f"one of {get_args(Unit)}")


class Split(NamedTuple):
    """A text in three parts, which joined give the text back, and the order in which they are shown."""

    prefix: str
    middle: str
    suffix: str
    order: Order


def generator(seed: int, source: str, record: int, epoch: int, start: int) -> np.random.Generator:
    """Returns the random numbers of one piece: a function of its coordinates and of nothing else.

    Args:
      seed: the run's seed.
      source: the source's name.
      record: the record's place in its source.
      epoch: how often the source was passed through before.
      start: the character of the document at which the piece starts.
    """
    name = f"{seed}/{source}/{record}/{epoch}/{start}"
    key = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=16).digest())
    return np.random.Generator(np.random.Philox(key=key))


def apply(text: str, rng: np.random.Generator, options: FimOptions) -> Split | None:
    """Splits `text` in three, with probability `options.rate`; None means to leave it whole.

    Both cuts are uniform over the unit's borders, ends included, and differ: a middle is never empty. A text of one
    line is cut between characters whatever the unit; an empty text is left whole.
    """
    if not text or rng.random() >= options.rate:
        return None
    order: Order = "spm" if rng.random() < options.spm_rate else "psm"
    by_line = options.unit == "line" or (options.unit == "mixed" and rng.random() < 0.5)
    borders = [0, *(i + 1 for i, c in enumerate(text[:-1]) if c == "\n"), len(text)] if by_line else []
    if len(borders) > 2:
        first, last = (borders[i] for i in _two(rng, len(borders)))
    else:
        first, last = _two(rng, len(text) + 1)
    return Split(text[:first], text[first:last], text[last:], order)


def _two(rng: np.random.Generator, count: int) -> tuple[int, int]:
    """Two different numbers below `count`, the smaller one first, all pairs alike."""
    a, b = int(rng.integers(count)), int(rng.integers(count - 1))
    b += b >= a
    return min(a, b), max(a, b)


def assemble(tokenizer: Tokenizer, split: Split) -> list[int]:
    """Returns the sample's tokens, from the first sentinel to the end token, both included."""
    prefix, middle, suffix = tokenizer.encode_batch([split.prefix, split.middle, split.suffix])
    return _arrange(tokenizer, prefix, suffix, split.order) + middle + [tokenizer.end_of_text]


def infilling_prompt(tokenizer: Tokenizer, prefix: str, suffix: str, order: Order = "psm") -> list[int]:
    """Returns the tokens after which a model writes the middle and the end token; begins as training samples do."""
    if order not in get_args(Order):
        raise UserError(f"{order!r} is not an order", where="fim order", remedy=f"one of {get_args(Order)}")
    before, after = tokenizer.encode_batch([prefix, suffix])
    return [tokenizer.end_of_text, *_arrange(tokenizer, before, after, order)]


def _arrange(tokenizer: Tokenizer, prefix: list[int], suffix: list[int], order: Order) -> list[int]:
    start, hole, middle = tokenizer.fim_prefix, tokenizer.fim_suffix, tokenizer.fim_middle
    if order == "psm":
        return [start, *prefix, hole, *suffix, middle]
    return [start, hole, *suffix, middle, *prefix]
