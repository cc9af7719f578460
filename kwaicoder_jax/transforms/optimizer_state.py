"""Adam's moments through a transform, so that training goes on instead of starting over.

Scaling a matrix by s and giving it to R replicas, of which k serve a token, makes the gradient of each copy g / (s*R) on
average (the replicas share the tokens): m' = m / (s*R). The second moment lies between v / (s^2 R^2), where the gradient
is mostly signal (its mean over a batch shrinks by R), and v / (s^2 R k), where it is mostly noise (a copy sees k/R of
the tokens, and the variance of a sum over tokens shrinks with their number, not with its square). The step count stays.
For k = R both are the same, and with a uniform router, a learning rate times s and an epsilon over s*R each copy moves
by s times the dense step: the function moves as the dense model's would have.
"""

import enum
from typing import Any

import numpy as np

from kwaicoder_jax import models
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.transforms import drop, parameterwise, prune, upcycle
from kwaicoder_jax.transforms.arrays import Array, like, scaled

Record = parameterwise.Record


class SecondMoment(enum.StrEnum):
    """What the gradient is taken to be made of."""

    SIGNAL = "signal"  # v / (s^2 R^2)
    NOISE = "noise"  # v / (s^2 R k)
    BETWEEN = "between"  # the geometric mean of both

    @classmethod
    def parse(cls, name: str) -> "SecondMoment":
        """The choice of that name, or a UserError."""
        try:
            return cls(name)
        except ValueError as error:
            remedy = f"use {', '.join(cls)}"
            raise UserError(f"no choice {name!r}", where="upcycle.second_moment", remedy=remedy) from error


class Moment:
    """One moment through upcycling, a parameter at a time: a `parameterwise.Transform` on the record of `upcycle`."""

    def __init__(self, order: int, second_moment: str = SecondMoment.BETWEEN):
        """Takes 0 for m or 1 for v, and a value of SecondMoment."""
        self.order, self.second_moment = order, second_moment
        self.__name__ = f"moment{order}_{second_moment}"

    def sources(self, record: Record, name: str, layer: int | None = None) -> dict[str, int | None]:
        """See `parameterwise.Transform`."""
        return upcycle.sources(record, name, layer)

    def parameter(self, record: Record, name: str, arrays: dict[str, Array], layer: int | None = None) -> Array:
        """See `parameterwise.Transform`: as the parameter itself, with its own factor; zeros where that is new."""
        d = models.declarations(parameterwise.configs(record)[1])[name]
        if not arrays:
            return np.zeros(d.shape if layer is None else (1, *d.shape[1:]), np.float32)
        factors = {name: pair[self.order] for name, pair in moment_factors(record, self.second_moment).items()}
        same = {**record, "factors": factors, "drop": {**record["drop"], "replicas": []}}
        array = upcycle.parameter(same, name, arrays, layer)
        if "expert_mlp" in d.axes and record["drop"]["replicas"]:
            dropped = drop.chosen(
                d.axes, array.shape, drop=record["drop"], granularity=record["granularity"], seed=record["seed"],
                layer=layer or 0,
            )  # fmt: skip
            return scaled(array, like(array, 1.0 - dropped.astype(np.float32)))
        return array


def upcycled(
    first: models.Params,
    second: models.Params,
    config: models.ModelConfig,
    record: Record,
    *,
    second_moment: str = SecondMoment.BETWEEN,
) -> tuple[models.Params, models.Params]:
    """The moments of an upcycled model, in memory.

    Args:
      first: Adam's m, laid out as the dense parameters; numpy, device or sharded arrays.
      second: Adam's v.
      config: the dense model.
      record: of `upcycle.apply`.
      second_moment: a value of SecondMoment.

    Returns:
      m and v, laid out as the mixture's parameters and of the same kind of arrays. New parameters (router, bias, gate)
      and neurons that were drawn anew have zeros.
    """
    m, v = (
        parameterwise.replay(Moment(order, second_moment), moments, config, record)
        for order, moments in enumerate((first, second))
    )
    return m, v


def moment_factors(record: Record, second_moment: str = SecondMoment.BETWEEN) -> dict[str, tuple[float, float]]:
    """By parameter that upcycling scaled or copied: the factors on m and on v."""
    chosen = SecondMoment.parse(second_moment)
    declared = models.declarations(parameterwise.configs(record)[1])
    replicas, top = record["replicas"], record["experts_per_token"] / record["granularity"]
    noise = {SecondMoment.SIGNAL: 0.0, SecondMoment.NOISE: 1.0, SecondMoment.BETWEEN: 0.5}[chosen]
    factors = {}
    for name, s in record["factors"].items():
        d = declared[name]
        copies, served = (replicas, top) if d.of_experts else (1, 1)
        if d.of_experts and "expert_mlp" not in d.axes:  # the bias on the output is in every shard, too
            copies, served = copies * record["granularity"], served * record["granularity"]
        factors[name] = (1 / (s * copies), 1 / (s * copies) ** 2 * (copies / served) ** noise)
    return factors


def rate_multipliers(record: Record) -> dict[str, float]:
    """By expert matrix, the learning-rate multiplier s with which its relative step stays what it was."""
    return dict(record["factors"])


def epsilon_factors(record: Record) -> dict[str, float]:
    """By expert matrix, the factor 1 / (s*R) on Adam's epsilon, which follows the size of its gradients."""
    return {name: first for name, (first, _) in moment_factors(record).items()}


def pruned(
    first: models.Params, second: models.Params, config: models.ModelConfig, record: Record
) -> tuple[models.Params, models.Params]:
    """The moments of a pruned model: those of the kept units; a norm that was multiplied by c has m / c and v / c^2.

    A kept head that another one was merged into keeps its own: v of a difference is not a difference of v.

    Arguments and result as in `upcycled`; the record is of `prune.apply`.
    """

    def inverse(value: Any, power: int) -> Any:
        return [inverse(x, power) for x in value] if isinstance(value, list) else float(value) ** -power

    results = []
    for power, moments in ((1, first), (2, second)):
        factors = {name: inverse(value, power) for name, value in record["norm_factors"].items()}
        results.append(
            parameterwise.replay(prune, moments, config, {**record, "norm_factors": factors, "merged_heads": []})
        )
    return results[0], results[1]
