"""Scores neurons, heads, channels and layers on calibration batches and slices the teacher to a target shape.

python -m experiments.prune --config=configs/demo.py --workdir=runs/demo
"""

from typing import Any

import jax

from experiments import streamed
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


def run(context: Context) -> dict[str, Any]:
    """Writes prune/scores.npz (unless it was given scores) and prune/checkpoints."""
    section, mesh, corpus = context.section, mesh_of(context), corpus_of(context)
    meta = checkpoints.read_meta(context.inputs["init_from"])
    config = models.ModelConfig.from_dict(meta["model"])
    check_tokenizer(context, "init_from", meta, corpus)
    target = build(transforms.Target, section["target"], "prune.target")
    target.resolve(config)  # a target that cannot be reached is an error before the work begins

    compare, given = not section.get("streamed") or section.get("verify", True), section.get("scores")
    params = read_model(context, "init_from", mesh)[0] if compare or not given else None
    scores = transforms.Scores.load(given) if given else _collected(context, params, config, corpus, mesh)
    options = {"norm_correction": section["norm_correction"]}
    if section.get("streamed"):
        record = transforms.prune.plan(config, scores, target, **options)
        student_config = models.ModelConfig.from_dict(record["config_after"])
        streamed.write(context, transforms.prune, record, _meta(context, meta, record))
        if compare:
            student = checkpoints.read_params(context.folder, training.abstract_params(student_config, mesh))
    else:
        student, student_config, record = transforms.prune.apply(params, config, scores, target, **options)
        student = jax.device_put(student, training.param_shardings(student_config, mesh))
        store = checkpoints.CheckpointStore(context.folder / "checkpoints")
        store.save(0, student, _meta(context, meta, record))
        store.close()
    summary = {
        "params_before": models.count(config),
        "params_after": models.count(student_config),
        "calibration_tokens": scores.tokens,
        "verified": compare,
    }
    if not compare:
        context.display.line("not compared with the model before, as prune.verify says")
        return summary
    held_out = validation_of(context, corpus)
    before = training.HeldOutLoss(config, held_out, mesh, runtime_of(context))(params)
    after = training.HeldOutLoss(student_config, held_out, mesh, runtime_of(context))(student)
    return {**summary, "valid_loss_before": before["valid_loss"], "valid_loss_after": after["valid_loss"]}


def _collected(context: Context, params: Any, config: models.ModelConfig, corpus: Any, mesh: Any) -> transforms.Scores:
    """Scores on the calibration batches, also written to prune/scores.npz."""
    section = context.section
    calibration = phases_of({**section, "phases": {"calibration": section["calibration"]}}, "prune")
    streams = context.config["loader"]["streams"]
    batches = (training.shard_batch(batch, mesh) for batch in data.TrainingLoader(
        corpus, calibration.data, seed=context.seed, streams=streams))  # fmt: skip
    scores = transforms.importance.collect(
        params, config, batches, runtime=runtime_of(context), **section["importance"]
    )
    scores.save(context.folder / "scores.npz")
    return scores


def _meta(context: Context, meta: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """The description of the student's checkpoint."""
    source = {"from": context.section.get("init_from") or previous_checkpoint(context), "record": record}
    return {
        "model": record["config_after"],
        "tokenizer": meta["tokenizer"],
        "lineage": [*meta["lineage"], {"stage": "prune", "identity": context.identity, **source}],
        "identity": context.identity,
    }


def inputs(context: Context) -> dict[str, str]:
    """The corpus, and the teacher."""
    return {"corpus": "prepare_data", "init_from": previous_checkpoint(context)}


STAGE = Stage("prune", run, ("loader", "validation"), inputs)

if __name__ == "__main__":
    main(STAGE)
