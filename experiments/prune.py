"""Scores neurons, heads, channels and layers on calibration batches and slices the teacher to a target shape.

python -m experiments.prune --config=configs/demo.py --workdir=runs/demo

With a budget the target is searched for instead of read from the config, as in --config.prune.search.max_params=800000
"""

import itertools
from typing import Any

import jax

from experiments import prune_search
from experiments.command import main
from experiments.contract import Context, Stage, previous_checkpoint
from experiments.training_stage import (
    build,
    check_tokenizer,
    corpus_of,
    mesh_of,
    phases_of,
    read_model,
    runtime_of,
    validation_of,
)
from kwaicoder_jax import checkpoints, data, models, training, transforms
from kwaicoder_jax.transforms.target import present

OPTIONS = ("norm_correction", "protect_ends", "layer_scores", "head_merge")  # of prune.apply


def run(context: Context) -> dict[str, Any]:
    """Writes prune/scores.npz and prune/checkpoints; with a budget also what `prune_search.run` writes."""
    section, mesh, corpus = context.section, mesh_of(context), corpus_of(context)
    params, config, meta = read_model(context, "init_from", mesh)
    check_tokenizer(context, "init_from", meta, corpus)
    searching = prune_search.wanted(context)
    target = transforms.Target() if searching else build(transforms.Target, section["target"], "prune.target")
    target.resolve(config)  # a target that cannot be reached is an error before the work begins
    calibration = phases_of({**section, "phases": {"calibration": section["calibration"]}}, "prune").data
    if searching:
        prune_search.rules(context)

    scores = _scores(context, params, config, corpus, calibration, mesh)
    options = {name: section[name] for name in OPTIONS}
    found: dict[str, Any] = {}
    if searching:
        target, found = _search(context, prune_search.Teacher(params, config, scores), corpus, calibration, mesh)
    student, student_config, record = transforms.prune.apply(params, config, scores, target, **options)
    student = jax.device_put(student, training.param_shardings(student_config, mesh))

    held_out = validation_of(context, corpus)
    before = training.HeldOutLoss(config, held_out, mesh, runtime_of(context))(params)
    after = training.HeldOutLoss(student_config, held_out, mesh, runtime_of(context))(student)
    source = {"from": section.get("init_from") or previous_checkpoint(context), "record": record}
    meta = {
        "model": student_config.to_dict(),
        "tokenizer": meta["tokenizer"],
        "lineage": [*meta["lineage"], {"stage": "prune", "identity": context.identity, **source}],
        "identity": context.identity,
    }
    store = checkpoints.CheckpointStore(context.folder / "checkpoints")
    store.save(0, student, meta)
    store.close()
    return {
        "params_before": models.count(config),
        "params_after": models.count(student_config),
        "valid_loss_before": before["valid_loss"],
        "valid_loss_after": after["valid_loss"],
        "calibration_tokens": scores.tokens,
        **{f"{name}_after": size for name, size in present(student_config).items()},
        **found,
    }


def _batches(context: Context, corpus: data.Corpus, phases: list[data.PhaseSpec], mesh: Any) -> Any:
    """The calibration batches, anew."""
    streams = context.config["loader"]["streams"]
    loader = data.TrainingLoader(corpus, phases, seed=context.seed, streams=streams)
    return (training.shard_batch(batch, mesh) for batch in loader)


def _scores(
    context: Context,
    params: Any,
    config: models.ModelConfig,
    corpus: data.Corpus,
    phases: list[data.PhaseSpec],
    mesh: Any,
) -> transforms.Scores:
    """Importance, from prune/scores.npz where an interrupted run left it."""
    place = context.folder / "scores.npz"
    if place.exists():
        return transforms.Scores.load(place)
    scores = transforms.importance.collect(
        params, config, _batches(context, corpus, phases, mesh), runtime=runtime_of(context),
        **context.section["importance"],
    )  # fmt: skip
    scores.save(place)
    return scores


def _search(
    context: Context, teacher: prune_search.Teacher, corpus: data.Corpus, phases: list[data.PhaseSpec], mesh: Any
) -> tuple[transforms.Target, dict[str, Any]]:
    """The target of the shape that was found, and what the summary says of the search."""
    section = context.section["search"]
    batches = list(itertools.islice(_batches(context, corpus, phases, mesh), section["batches"]))
    options = {name: context.section[name] for name in OPTIONS}
    distil = prune_search.short_distillation(context, teacher, corpus, phases[0], mesh)
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


STAGE = Stage("prune", run, ("loader", "validation"), inputs)

if __name__ == "__main__":
    main(STAGE)
