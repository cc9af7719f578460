"""Scores neurons, heads, channels and layers on calibration batches and slices the teacher to a target shape.

python -m experiments.prune --config=configs/demo.py --workdir=runs/demo

With a budget the target is searched for instead of read from the config, as in --config.prune.search.max_params=800000
"""

import itertools
from typing import Any

from experiments import fields, prune_curve, prune_search, sections, transformed
from experiments.command import main
from experiments.contract import Context, Stage, previous_checkpoint
from experiments.training_stage import (
    build,
    calibration_of,
    calibration_phase,
    check_tokenizer,
    corpus_of,
    mesh_of,
    read_model,
    runtime_of,
    validation_of,
)
from kwaicoder_jax import checkpoints, data, models, training, transforms
from kwaicoder_jax.transforms.depth import LayerScores
from kwaicoder_jax.transforms.target import present

GIVEN = ("params", "config", "batches", "blocks", "runtime")  # of importance.collect
OPTIONS = ("norm_correction", "protect_ends", "layer_scores", "head_merge")  # of prune.apply


def run(context: Context) -> dict[str, Any]:
    """Writes prune/scores.npz and prune/checkpoints; with a budget also what `prune_search.run` writes."""
    section, mesh, corpus = context.section, mesh_of(context), corpus_of(context)
    meta = checkpoints.read_meta(context.inputs["init_from"])
    check_tokenizer(context, "init_from", meta, corpus)
    config = models.ModelConfig.from_dict(meta["model"])
    searching = prune_search.wanted(context)
    target = transforms.Target() if searching else build(transforms.Target, section["target"], "prune.target")
    target.resolve(config)  # a target that cannot be reached is an error before the work begins
    phase = calibration_phase(context)
    fields.check(fields.of_function(transforms.importance.collect, GIVEN), section["importance"], "prune.importance")
    if searching:
        prune_search.rules(context)

    drawing = prune_curve.wanted(context)
    curve_batches = prune_curve.held_out(context, corpus) if drawing else {}
    if drawing:
        prune_curve.points(context, config)
    compare = not section["streamed"] or section["verify"]
    in_memory = compare or searching or drawing or not section["scores"]
    params = read_model(context, "init_from", mesh)[0] if in_memory else None
    scores = _scores(context, params, config, corpus, mesh)
    options = {name: section[name] for name in OPTIONS}
    found: dict[str, Any] = {}
    if drawing:
        found = prune_curve.run(context, prune_search.Teacher(params, config, scores), curve_batches, mesh, options)
    if searching:
        target, rows = _search(context, prune_search.Teacher(params, config, scores), corpus, phase, mesh)
        found |= rows
    record = transforms.prune.plan(config, scores, target, **options)
    student_config = models.ModelConfig.from_dict(record["config_after"])
    source = section["init_from"] or previous_checkpoint(context)
    described = transformed.describe(context, meta, record, **{"from": source})
    student = transformed.save(context, transforms.prune, params, config, record, described, mesh)
    summary = {
        "params_before": models.count(config),
        "params_after": models.count(student_config),
        "calibration_tokens": scores.tokens,
        "verified": compare,
        **{f"{name}_after": size for name, size in present(student_config).items()},
        **found,
    }
    if not compare:
        context.display.line("not compared with the model before, as prune.verify says")
        return summary
    held_out = validation_of(context, corpus)
    before = training.HeldOutLoss(config, held_out, mesh, runtime_of(context))(params)
    after = training.HeldOutLoss(student_config, held_out, mesh, runtime_of(context))(student)
    return {**summary, "valid_loss_before": before["valid_loss"], "valid_loss_after": after["valid_loss"]}


def _scores(
    context: Context,
    params: Any,
    config: models.ModelConfig,
    corpus: data.Corpus,
    mesh: Any,
) -> transforms.Scores:
    """Importance: as `prune.scores` has it, from prune/scores.npz where an interrupted run left it, or measured."""
    if context.section["scores"]:
        return transforms.Scores.load(context.section["scores"])
    place = context.folder / "scores.npz"
    if place.exists():
        return transforms.Scores.load(place)
    runtime, by = runtime_of(context), context.section["layer_scores"]
    scores = transforms.importance.collect(
        params, config, calibration_of(context, corpus, mesh), runtime=runtime, blocks=by == LayerScores.BLOCK,
        **context.section["importance"],
    )  # fmt: skip
    if by == LayerScores.LEAVE_ONE_OUT:
        found = transforms.importance.leave_one_out(
            params, config, calibration_of(context, corpus, mesh), runtime=runtime
        )
        scores = scores.replace(leave_one_out_L=found.increase_L)
    scores.save(place)
    return scores


def _search(
    context: Context, teacher: prune_search.Teacher, corpus: data.Corpus, phase: data.PhaseSpec, mesh: Any
) -> tuple[transforms.Target, dict[str, Any]]:
    """The target of the shape that was found, and what the summary says of the search."""
    section = context.section["search"]
    batches = list(itertools.islice(calibration_of(context, corpus, mesh), section["batches"]))
    options = {name: context.section[name] for name in OPTIONS}
    distil = prune_search.short_distillation(context, teacher, corpus, phase, mesh)
    result = prune_search.run(context, teacher, batches, options, distil)
    return transforms.Target(**result.best.sizes), {
        "search_shapes": result.shapes,
        "search_measured": len(result.rows),
        "search_distilled": sum(row.distilled_loss is not None for row in result.rows),
        "search_pareto": len(result.pareto),
        "search_kl": result.best.kl,
    }


def inputs(context: Context) -> dict[str, str]:
    """The corpus, and the teacher."""
    return {"corpus": "prepare_data", "init_from": previous_checkpoint(context)}


def other_files(context: Context) -> dict[str, str]:
    """The file of scores, if one is given."""
    return {"scores": context.section["scores"]} if context.section.get("scores") else {}


STAGE = Stage("prune", run, ("loader", "validation"), inputs, other_files, fields.of_class(sections.Prune))

if __name__ == "__main__":
    main(STAGE)
