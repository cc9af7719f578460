"""The reduction over sequences behind importance scores: sums that add up over batches, and what is read from them."""

import dataclasses
import enum

import jax
import jax.numpy as jnp
import numpy as np

from kwaicoder_jax.errors import UserError


class Aggregation(enum.StrEnum):
    """How many values become one."""

    MEAN = "mean"
    L2 = "l2"  # root of the sum of squares, not divided by the count
    VAR = "var"  # population variance


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
        batch, sequence = _parse(batch, "batch"), _parse(sequence, "sequence")
        first, second = self.first[sequence], self.second[sequence]
        if batch is Aggregation.L2:
            return np.sqrt(second)
        mean = first / sequences
        if batch is Aggregation.MEAN:
            return mean
        return np.maximum(second / sequences - np.square(mean), 0.0)


def _parse(value: str, where: str) -> Aggregation:
    try:
        return Aggregation(value)
    except ValueError as error:
        choices = ", ".join(Aggregation)
        raise UserError(
            f"no aggregation {value!r}", where=f"prune.{where}_aggregation", remedy=f"use {choices}"
        ) from error


def batch_sums(statistics: dict[str, jax.Array]) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Sums [..., B, U] over sequences: (of s, of s^2), each [..., U]. A row of padding has s = 0 and adds nothing."""
    first = {name: jnp.sum(s, axis=-2) for name, s in statistics.items()}
    second = {name: jnp.sum(jnp.square(s), axis=-2) for name, s in statistics.items()}
    return first, second
