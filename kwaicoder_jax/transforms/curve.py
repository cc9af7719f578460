"""What pruning costs before any training: the held-out loss along a row of widths and a row of depths.

One size is cut at a time, so that the curves can be compared; depths also by rules that know nothing of the model, as the
negative control of importance. "Deeper layers hold least" (Gromov et al. 2024, arXiv 2403.17887; KwaiCoder-23BA4-v1) is
the claim that `deepest` costs less than `shallowest`.
"""

import dataclasses
import enum
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from kwaicoder_jax import models
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.transforms import prune
from kwaicoder_jax.transforms.depth import LayerScores
from kwaicoder_jax.transforms.scores import Scores
from kwaicoder_jax.transforms.target import Target, present

Loss = Callable[[models.Params, models.ModelConfig], float]  # held out, nats per token


class Rule(enum.StrEnum):
    """Which units go first."""

    IMPORTANCE = "importance"  # those with the lowest scores
    DEEPEST = "deepest"  # of layers: the last ones before the last one, which stays
    SHALLOWEST = "shallowest"  # the first ones after the first one


@dataclasses.dataclass(frozen=True)
class Point:
    """One pruned model.

    Attributes:
      field: of Target, the one size that differs from the model's.
      size: its value; the model's own in the point that all curves share.
      rule: which units went.
      params: parameters of the pruned model.
      loss: held-out, nats per token, without any training; None before it is measured.
    """

    field: str
    size: int
    rule: Rule
    params: int
    loss: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict, the inverse of `Point.from_dict`."""
        return dataclasses.asdict(self) | {"rule": str(self.rule)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "Point":
        """The inverse of `to_dict`."""
        return cls(**{**values, "rule": Rule(values["rule"])})


def points(config: models.ModelConfig, sizes: Mapping[str, Sequence[int]], rules: Sequence[str] = ()) -> list[Point]:
    """What is to be measured, the whole model first.

    Args:
      config: the model.
      sizes: by field of Target, the sizes of its curve.
      rules: further rules for layers, beside importance.

    Raises:
      UserError: a size that cannot be, a rule that there is not.
    """
    chosen = [Rule.IMPORTANCE, *(_parse(rule) for rule in rules if rule != Rule.IMPORTANCE)]
    found = [Point("layers", config.layers, Rule.IMPORTANCE, models.count(config))]
    for field, values in sizes.items():
        for size in values:
            try:
                smaller = Target(**{field: size}).apply(config)
            except UserError as error:
                raise UserError(error.what, where=f"prune.curve.{field}", remedy=error.remedy) from error
            except TypeError:
                remedy = f"the sizes are {', '.join(present(config))}"
                raise UserError("no such size", where=f"prune.curve.{field}", remedy=remedy) from None
            if size != present(config)[field]:
                count = models.count(smaller)
                found += [Point(field, size, rule, count) for rule in (chosen if field == "layers" else chosen[:1])]
    return found


def measure(
    params: models.Params,
    config: models.ModelConfig,
    scores: Scores,
    wanted: Sequence[Point],
    loss: Loss,
    **options: Any,
) -> Iterator[Point]:
    """Cuts and measures each point in turn; a model is gone before the next one is made.

    Args:
      params: of the whole model.
      config: the model.
      scores: from `importance.collect`.
      wanted: from `points`.
      loss: given a pruned model.
      **options: of `prune.apply`.
    """
    for point in wanted:
        ranked, how = _ranked(scores, point.rule, options)
        if point.size == present(config)[point.field]:
            yield dataclasses.replace(point, loss=loss(params, config))
            continue
        student, student_config, _ = prune.apply(params, config, ranked, Target(**{point.field: point.size}), **how)
        yield dataclasses.replace(point, loss=loss(student, student_config))


def _ranked(scores: Scores, rule: Rule, options: Mapping[str, Any]) -> tuple[Scores, dict[str, Any]]:
    """Scores by which the rule's layers come last, and the options to go with them."""
    if rule is Rule.IMPORTANCE:
        return scores, dict(options)
    order_L = np.arange(len(scores.layers_L), dtype=float)
    invented = scores.replace(layers_L=-order_L if rule is Rule.DEEPEST else order_L)
    return invented, {**options, "layer_scores": LayerScores.INFLUENCE, "protect_ends": True}


def _parse(rule: str) -> Rule:
    try:
        return Rule(rule)
    except ValueError as error:
        remedy = f"use {', '.join(Rule)}"
        raise UserError(f"no rule {rule!r}", where="prune.curve.layer_rules", remedy=remedy) from error
