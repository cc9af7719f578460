"""The search part of the prune stage: a shape inside a budget, with rows on disk so that a killed search goes on."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from typing import Any

import jax

from experiments.contract import Context
from experiments.training_stage import build, runtime_of
from kwaicoder_jax import data, distillation, files, models, training, transforms
from kwaicoder_jax.evaluation.report import search as report
from kwaicoder_jax.transforms import search

_BUDGET = ("max_params", "max_active_params", "max_bytes", "max_latency")


def wanted(context: Context) -> bool:
    """Whether the config sets a budget."""
    section = context.section.get("search") or {}
    return any(section.get(name) is not None for name in _BUDGET)


def rules(context: Context) -> tuple[transforms.shapes.Budget, transforms.shapes.Space]:
    """The budget and the space of the config, checked as far as they can be without scores."""
    section = context.section["search"]
    budget = {name: section[name] for name in (*_BUDGET, "chip", "context", "batch")}
    space = {name: section[name] for name in ("least", "granularity")}
    space |= {name: {k: x for k, x in section[name].items() if x is not None} for name in ("multiples", "minimum")}
    limits = build(transforms.shapes.Budget, budget, "prune.search")
    limits.serving()  # an unknown chip is an error before the work begins
    return limits, build(transforms.shapes.Space, space, "prune.search")


@dataclasses.dataclass
class Teacher:
    """What is searched for a smaller shape of."""

    params: Any
    config: models.ModelConfig
    scores: transforms.Scores


def run(
    context: Context,
    teacher: Teacher,
    batches: Sequence[Any],
    options: dict[str, Any],
    distil: search.Distil,
) -> search.Result:
    """Searches, going on from prune/search.jsonl; writes search.jsonl, search.csv, search.svg and report.html.

    Args:
      context: of the prune stage.
      teacher: the model to prune.
      batches: calibration batches on the mesh.
      options: keyword arguments of `prune.apply`.
      distil: see `search.run`; not called unless `prune.search.distill_steps` is set.
    """
    section, place = context.section["search"], context.folder / "search.jsonl"
    budget, space = rules(context)
    rows, planned = _read(place), section["distill_top"] if section["distill_steps"] else 0
    total = section["candidates"] + planned
    runtime = dataclasses.replace(runtime_of(context), scan_unroll=1)  # each candidate compiles: a small program
    with context.display.progress(total, "candidates") as update:

        def keep(row: search.Row) -> None:
            rows[row.name] = row
            files.write_text(place, "".join(json.dumps(each.to_dict()) + "\n" for each in rows.values()))
            update(
                sum((each.kl is not None) + (each.distilled_loss is not None) for each in rows.values()),
                f"KL {row.kl:.3f}",
            )

        result = search.run(
            teacher.params, teacher.config, teacher.scores, batches, budget=budget, space=space, options=options,
            candidates=section["candidates"], runtime=runtime, distil=distil, distil_top=planned,
            known=list(rows.values()), on_row=keep,
        )  # fmt: skip
    _write(context, result)
    return result


def _read(place: Any) -> dict[str, search.Row]:
    if not place.exists():
        return {}
    rows = [search.Row(**json.loads(line)) for line in place.read_text().splitlines()]
    return {row.name: row for row in rows}


def _write(context: Context, result: search.Result) -> None:
    rows, front = ([row.to_dict() for row in each] for each in (result.rows, result.pareto))
    best = result.best.to_dict()
    files.write_text(context.folder / "search.csv", report.as_csv(rows))
    files.write_text(context.folder / "search.svg", report.standalone(report.plot(rows, front, best)))
    files.write_text(context.folder / "report.html", report.page(rows, front, best, result.shapes))
    context.display.line(f"{result.shapes:,} shapes inside the budget, {len(rows)} measured; the nearest:")
    for row in result.ranked[:8]:
        after = "" if row.distilled_loss is None else f", after distillation {row.distilled_loss:.4f}"
        sizes = " ".join(f"{name}={size}" for name, size in row.sizes.items())
        mark = "*" if row == result.best else " "
        context.display.line(
            f"{mark} {row.params:>13,} parameters  KL {row.kl:.4f}  loss {row.loss:.4f}{after}  {sizes}"
        )


def short_distillation(
    context: Context, teacher: Teacher, corpus: data.Corpus, phase: data.PhaseSpec, mesh: Any
) -> Callable[..., float]:
    """A function that teaches a pruned candidate for `prune.search.distill_steps` steps on the teacher's logits.

    It returns the validation loss afterwards. Nothing is saved on the way: it is short, and what was finished stands in
    search.jsonl.
    """
    section, runtime = context.section["search"], runtime_of(context)
    steps, peak = section["distill_steps"], section["distill_rate"]

    def distil(params: Any, config: models.ModelConfig, record: dict[str, Any]) -> float:
        del record

        def loss(trainable: Any, batch: Any, frozen: Any) -> Any:
            return distillation.distillation_loss(
                trainable, batch, frozen, student_config=config, teacher_config=teacher.config, pairs=[],
                config=distillation.DistillConfig(hidden=False), runtime=runtime,
            )  # fmt: skip

        rate = training.join([training.PhaseRate(steps, peak, end=peak / 10, warmup=steps // 10)])
        optimizer = training.make_optimizer(training.OptimizerConfig(), rate, config)
        student = jax.device_put(params, training.param_shardings(config, mesh))
        shardings = training.state_shardings({"model": training.abstract_params(config, mesh)}, optimizer, config, mesh)
        state = jax.jit(training.make_state, static_argnums=1, out_shardings=shardings)({"model": student}, optimizer)
        step = training.make_step(loss, optimizer, rate, shardings)
        batches = data.TrainingLoader(
            corpus, [dataclasses.replace(phase, steps=steps)], seed=context.seed,
            streams=context.config["loader"]["streams"],
        )  # fmt: skip
        for batch in batches:
            state, _ = step(state, training.shard_batch(batch, mesh), teacher.params)
        held_out = data.validation_batches(corpus, **context.config["validation"])
        return training.HeldOutLoss(config, held_out, mesh, runtime)(state.trainable["model"])["valid_loss"]

    return distil
