"""The reduction over sequences behind importance scores: sums that add up over batches, and what is read from them."""

import dataclasses
import enum

import numpy as np

from kwaicoder_jax.errors import UserError


class Aggregation(enum.StrEnum):
    """How many values become one."""

    MEAN = "mean"
    L2 = "l2"  # root of the sum of squares, not divided by the count
    VAR = "var"  # population variance

    @classmethod
    def parse(cls, value: str, where: str) -> "Aggregation":
        """The member of that value; a UserError that names prune.importance.`where` otherwise."""
        try:
            return cls(value)
        except ValueError as error:
            where, remedy = f"prune.importance.{where}", f"use {', '.join(cls)}"
            raise UserError(f"no aggregation {value!r}", where=where, remedy=remedy) from error


@dataclasses.dataclass(frozen=True)
class Moments:
    """Sums over sequences of s and of s^2, where s is each sequence's statistic of a unit.

    Attributes:
      first: {"mean", "l2", "var"} (the reduction over the sequence) to an array [..., U].
      second: the same for the squares.
    """

    first: dict[str, np.ndarray]
    second: dict[str, np.ndarray]

    def reduce(self, batch: str, sequence: str, sequences: int) -> np.ndarray:
        """One score per unit, [..., U], float64.

        Args:
          batch: the reduction over sequences, a value of Aggregation.
          sequence: the reduction inside a sequence, a value of Aggregation.
          sequences: how many sequences were summed.
        """
        kind, inner = Aggregation.parse(batch, "batch"), Aggregation.parse(sequence, "sequence")
        if inner not in self.first:
            remedy = f"it has {', '.join(self.first)}; measure with sequence=None for all"
            raise UserError(f"{inner.value!r} was not measured", where="prune.importance.sequence", remedy=remedy)
        first, second = self.first[inner], self.second[inner]
        if kind is Aggregation.L2:
            return np.sqrt(second)
        mean = first / sequences
        if kind is Aggregation.MEAN:
            return mean
        return np.maximum(second / sequences - np.square(mean), 0.0)
