"""The curves of the prune stage: held-out loss by width and by depth, with rows on disk so that a killed run goes on."""

import json
from collections.abc import Mapping
from typing import Any

from experiments.contract import Context
from experiments.prune_search import Teacher
from experiments.training_stage import runtime_of
from kwaicoder_jax import data, files, training, transforms
from kwaicoder_jax.evaluation.report import curve as report
from kwaicoder_jax.evaluation.report import search
from kwaicoder_jax.transforms import curve

SIZES = ("layers", "mlp_dim", "model_dim", "heads", "kv_heads")  # in the order of the table


def wanted(context: Context) -> bool:
    """Whether the config asks for any point."""
    return any(_sizes(context).values())


def points(context: Context, config: Any) -> list[curve.Point]:
    """What the config asks for, checked before the work begins."""
    return curve.points(config, _sizes(context), context.section["curve"]["layer_rules"])


def _sizes(context: Context) -> dict[str, tuple[int, ...]]:
    section = context.section.get("curve") or {}
    return {name: tuple(section[name]) for name in SIZES if section.get(name)}


def held_out(context: Context, corpus: data.Corpus) -> dict[str, list[data.Batch]]:
    """The first validation batches of the sources that the curve is measured on."""
    section = context.section["curve"]
    limits = {**context.config["validation"], "max_tokens_per_source": section["max_tokens_per_source"]}
    found = data.validation_batches(corpus, **limits)
    return {name: batches for name, batches in found.items() if section["source"] in (None, name)}


def run(
    context: Context, teacher: Teacher, batches: Mapping[str, list[data.Batch]], mesh: Any, options: dict[str, Any]
) -> dict[str, Any]:
    """Measures what prune/curve.jsonl does not hold yet; writes curve.jsonl and curve.svg. Returns summary keys.

    Args:
      context: of the prune stage.
      teacher: the model to prune.
      batches: from `held_out`.
      mesh: of devices.
      options: keyword arguments of `prune.apply`.
    """

    def loss(params: Any, config: Any) -> float:
        return training.HeldOutLoss(config, batches, mesh, runtime_of(context))(params)["valid_loss"]

    place = context.folder / "curve.jsonl"
    done = [curve.Point.from_dict(row) for row in _rows(place)]
    known = {(point.field, point.size, point.rule) for point in done}
    left = [p for p in points(context, teacher.config) if (p.field, p.size, p.rule) not in known]
    with context.display.progress(len(left), "curve points") as update:
        measured = curve.measure(teacher.params, teacher.config, teacher.scores, left, loss, **options)
        for number, point in enumerate(measured, 1):
            done.append(point)
            files.write_text(place, "".join(json.dumps(each.to_dict()) + "\n" for each in done))
            update(number)
    rows = [point.to_dict() for point in done]
    alone = _leave_one_out(context, teacher, batches, mesh)
    files.write_text(context.folder / "curve.svg", search.standalone(report.plot(rows)))
    if alone:
        files.write_text(context.folder / "leave_one_out.svg", search.standalone(report.layers(alone)))
    return {"curve_points": len(rows)}


def _rows(place: Any) -> list[dict[str, Any]]:
    return [json.loads(line) for line in place.read_text().splitlines()] if place.exists() else []


def _leave_one_out(context: Context, teacher: Teacher, batches: Mapping[str, list[data.Batch]], mesh: Any) -> Any:
    """prune/leave_one_out.json: what each layer's absence costs, if the config asks for it."""
    if not context.section["curve"]["leave_one_out"]:
        return {}
    place = context.folder / "leave_one_out.json"
    if not place.exists():
        context.display.line("the loss without each layer in turn")
        found = transforms.importance.leave_one_out(
            teacher.params, teacher.config,
            (training.shard_batch(batch, mesh) for each in batches.values() for batch in each),
            runtime=runtime_of(context),
        )  # fmt: skip
        values = {"loss": found.loss, "increase_L": found.increase_L.tolist(), "tokens": found.tokens}
        files.write_json(place, values)
    return files.read_json(place)
