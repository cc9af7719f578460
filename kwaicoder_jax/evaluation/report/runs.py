"""Training runs laid end to end on one axis of tokens."""

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from kwaicoder_jax.evaluation.report.material import Material, Part
from kwaicoder_jax.evaluation.report.svg import Point


@dataclasses.dataclass(frozen=True)
class Segment:
    """One training run on the common axis.

    Attributes:
      name: of the stage.
      css: class of its colour.
      start: tokens of the stages before it.
      end: tokens with its own.
      train: (tokens, training loss); empty where the training loss is no cross-entropy.
      valid: (tokens, validation loss).
      sources: by source, (tokens, validation loss).
      phases: (tokens at which it begins, name) of each phase, where there is more than one.
    """

    name: str
    css: str
    start: float
    end: float
    train: list[Point]
    valid: list[Point]
    sources: dict[str, list[Point]]
    phases: list[tuple[float, str]]

    def since(self, start: float) -> "Segment":
        """The same with the points from `start` on."""
        cut = {name: [p for p in points if p[0] >= start] for name, points in self.sources.items()}
        return dataclasses.replace(
            self, sources=cut, train=[p for p in self.train if p[0] >= start],
            valid=[p for p in self.valid if p[0] >= start],
        )  # fmt: skip


def tokens_at(metrics: list[dict[str, Any]], steps: list[int]) -> list[float]:
    """Training tokens seen at each step, interpolated between logged steps."""
    logged = [(0, 0.0), *((r["step"], float(r["tokens"])) for r in metrics if "tokens" in r)]
    return np.interp(steps, [step for step, _ in logged], [tokens for _, tokens in logged]).tolist()


def segments(material: Material) -> tuple[list[Segment], Segment | None]:
    """The training runs in order, and the run without the teacher over the same tokens as distillation."""
    found: list[Segment] = []
    baseline, start = None, 0.0
    for part in (part for part in material.stages if any("loss" in r for r in part.metrics)):
        found.append(_segment(part, start, f"s{len(found) % 4}"))
        if part.name == "distill" and material.baseline is not None:
            baseline = dataclasses.replace(_segment(material.baseline, start, found[-1].css), train=[], phases=[])
        start = found[-1].end
    return found, baseline


def _segment(part: Part, start: float, css: str) -> Segment:
    train = [r for r in part.metrics if "loss" in r]
    valid = [r for r in part.metrics if "valid_loss" in r]
    places = [start + t for t in tokens_at(part.metrics, [r["step"] for r in valid])]
    by_source = [r.get("valid_loss_by_source", {}) for r in valid]
    names = sorted({name for by in by_source for name in by})
    return Segment(
        name=part.name,
        css=css,
        start=start,
        end=start + max([r["tokens"] for r in train], default=0),
        # a stage with a "loss" section trains on something else than the labels' cross-entropy
        train=[] if "loss" in part.section else _finite((start + r["tokens"], r["loss"]) for r in train),
        valid=_finite((x, r["valid_loss"]) for x, r in zip(places, valid)),
        sources={name: _finite((x, by[name]) for x, by in zip(places, by_source) if name in by) for name in names},
        phases=[(start + tokens, name) for tokens, name in phases(part)],
    )


def _finite(points: Iterable[Point]) -> list[Point]:
    """What can be drawn: a run that diverged has no more points."""
    return [point for point in points if math.isfinite(point[1])]


def phases(part: Part) -> list[tuple[float, str]]:
    """(tokens at which it begins, name) of each phase; empty for a run of one phase."""
    names = sorted(part.section.get("phases", {}))
    train = [r for r in part.metrics if "loss" in r]
    if len(names) < 2 or not train:
        return []
    # Borders are not logged; the shares of the steps tell them, as experiments.training_stage cuts them.
    shares = np.array([part.section["phases"][name]["share"] for name in names], float)
    steps = part.section.get("steps", train[-1]["step"])
    borders = np.round(np.cumsum(shares) / shares.sum() * steps)[:-1].astype(int).tolist()
    return list(zip(tokens_at(part.metrics, [0, *borders]), names))
