"""The search for a shape inside a budget: enumerate, take a spread of candidates, measure their KL, distil the best.

Candidates are the shapes that keep most importance at every depth and width (`shapes.spread`), where taking the
largest ones would measure near-copies of one corner. Each is pruned in memory and compared with the teacher on
calibration tokens before any training; rankings still cross in the first steps of training, so a function that distils
for a few steps may be handed in and decides among the best (Minitron, 2407.14679, section 3.2).
"""

import dataclasses
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax

from kwaicoder_jax import models
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.transforms import divergence, prune, shapes
from kwaicoder_jax.transforms.scores import Scores
from kwaicoder_jax.transforms.target import Target

Distil = Callable[[models.Params, models.ModelConfig, prune.Record], float]  # -> its loss afterwards, nats per token


@dataclasses.dataclass(frozen=True)
class Row:
    """One candidate.

    Attributes:
      sizes: by field of Target.
      params: parameters.
      active: those that one token uses.
      bytes: of its weights.
      latency: estimated seconds of a decode step; None without a chip.
      kept: logarithm of the share of importance kept, the proxy.
      kl: mean KL(teacher || candidate) on the calibration tokens, nats.
      loss: its cross-entropy there, nats per token.
      distilled_loss: after short distillation, of the best few.
    """

    sizes: Mapping[str, int]
    params: int
    active: int
    bytes: int
    latency: float | None
    kept: float
    kl: float | None = None
    loss: float | None = None
    distilled_loss: float | None = None

    @property
    def name(self) -> str:
        """The sizes in one word: what tells rows apart."""
        return ",".join(f"{field}={size}" for field, size in sorted(self.sizes.items()))

    def to_dict(self) -> dict[str, Any]:
        """A JSON-able dict, the inverse of `Row(**values)`."""
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class Result:
    """What a search found.

    Attributes:
      shapes: how many were inside the budget.
      rows: the candidates, all measured, in the order in which they were chosen.
    """

    shapes: int
    rows: Sequence[Row]

    @property
    def best(self) -> Row:
        """The least loss after distillation where some were distilled, else the least KL; among equals the smaller."""
        distilled = [row for row in self.rows if row.distilled_loss is not None]
        if distilled:
            return min(distilled, key=lambda row: (row.distilled_loss, row.kl, row.params))
        return self.ranked[0]

    @property
    def ranked(self) -> list[Row]:
        """The rows, the least KL first."""
        return sorted(self.rows, key=lambda row: (row.kl, row.params))

    @property
    def pareto(self) -> list[Row]:
        """Rows that no row with as few parameters beats in KL, by parameters, ascending."""
        front: list[Row] = []
        for row in sorted(self.rows, key=lambda row: (row.params, row.kl)):
            if not front or row.kl < front[-1].kl:  # type: ignore[operator]
                front.append(row)
        return front


def run(
    params: models.Params,
    config: models.ModelConfig,
    scores: Scores,
    batches: Sequence[divergence.Batch],
    *,
    budget: shapes.Budget,
    space: shapes.Space | None = None,
    candidates: int = 16,
    options: Mapping[str, Any] | None = None,
    runtime: models.Runtime | None = None,
    distil: Distil | None = None,
    distil_top: int = 0,
    known: Iterable[Row] = (),
    on_row: Callable[[Row], None] = lambda row: None,
) -> Result:
    """Searches.

    Args:
      params: of the teacher.
      config: the teacher, dense or a mixture.
      scores: its importance.
      batches: what the candidates are compared with the teacher on; see `divergence.Teacher`.
      budget: limits.
      space: rules of the shapes.
      candidates: how many are measured at most. Each compiles a forward pass of its own shape.
      options: keyword arguments of `prune.apply`.
      runtime: how to compute all models.
      distil: trains a pruned candidate for a moment.
      distil_top: how many it is called for, the least KL first.
      known: rows of an earlier, interrupted search of the same arguments: what they hold is not measured again.
      on_row: called with each row that has something new.

    Raises:
      UserError: a budget that nothing or everything fits; see `shapes.enumerate_shapes`.
    """
    options, done = dict(options or {}), {row.name: row for row in known}
    if candidates < 1:
        raise UserError(f"{candidates} candidates", where=f"{shapes.WHERE}.candidates", remedy="use 1 or more")
    rows, count = table(config, scores, budget, space or shapes.Space(), candidates, options)
    rows = [done.get(row.name, row) for row in rows]
    teacher: divergence.Teacher | None = None
    for place, row in enumerate(rows):
        if row.kl is None:
            teacher = teacher or divergence.Teacher(params, config, batches, runtime=runtime)
            student, student_config, _ = _pruned(
                params, config, prune.plan(config, scores, Target(**row.sizes), **options)
            )
            measured = teacher.distance(student, student_config)
            rows[place] = dataclasses.replace(row, kl=measured.kl, loss=measured.loss)
            on_row(rows[place])
    best = sorted(range(len(rows)), key=lambda place: (rows[place].kl, rows[place].params))
    for place in best[: distil_top if distil else 0]:
        if rows[place].distilled_loss is None:
            assert distil is not None
            record = prune.plan(config, scores, Target(**rows[place].sizes), **options)
            rows[place] = dataclasses.replace(rows[place], distilled_loss=distil(*_pruned(params, config, record)))
            on_row(rows[place])
    return Result(count, rows)


def _pruned(
    params: models.Params, config: models.ModelConfig, record: prune.Record
) -> tuple[models.Params, models.ModelConfig, prune.Record]:
    """As `prune.apply` gives it, without compiling a slice for every axis of every parameter of every candidate."""
    student_config = models.ModelConfig.from_dict(record["config_after"])
    if jax.default_backend() == "cpu" and jax.process_count() == 1:  # numpy reads the same memory
        return prune.replay(jax.device_get(params), config, record)[0], student_config, record
    return jax.jit(lambda source: prune.replay(source, config, record)[0])(params), student_config, record


def table(
    config: models.ModelConfig,
    scores: Scores,
    budget: shapes.Budget,
    space: shapes.Space,
    candidates: int,
    options: Mapping[str, Any],
) -> tuple[list[Row], int]:
    """The candidates before any measurement, and how many shapes are inside the budget; arguments as in `run`."""
    named = ("protect_ends", "head_merge", "layer_scores")
    found = shapes.enumerate_shapes(
        config, scores, budget, space, **{name: options[name] for name in named if name in options}
    )
    rows = []
    for shape in shapes.spread(found, candidates):
        sizes = {name: size for name, size in dataclasses.asdict(shape.target).items() if size is not None}
        rows.append(Row(sizes, **dataclasses.asdict(shape.cost), kept=shape.kept))
    return rows, len(found)
