"""Scores neurons, heads, channels and layers on calibration batches and slices the teacher to a target shape.

python -m experiments.prune --config=configs/demo.py --workdir=runs/demo
"""

from typing import Any

import jax

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
    """Writes prune/scores.npz and prune/checkpoints."""
    section, mesh, corpus = context.section, mesh_of(context), corpus_of(context)
    params, config, meta = read_model(context, "init_from", mesh)
    check_tokenizer(context, "init_from", meta, corpus)
    target = build(transforms.Target, section["target"], "prune.target")
    target.resolve(config)  # a target that cannot be reached is an error before the work begins

    calibration = phases_of({**section, "phases": {"calibration": section["calibration"]}}, "prune")
    streams = context.config["loader"]["streams"]
    batches = (training.shard_batch(batch, mesh) for batch in data.TrainingLoader(
        corpus, calibration.data, seed=context.seed, streams=streams))  # fmt: skip
    scores = transforms.importance.collect(
        params, config, batches, runtime=runtime_of(context), **section["importance"]
    )
    scores.save(context.folder / "scores.npz")
    correction = section["norm_correction"]
    student, student_config, record = transforms.prune.apply(params, config, scores, target, norm_correction=correction)
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
    }


def inputs(context: Context) -> dict[str, str]:
    """The corpus, and the teacher."""
    return {"corpus": "prepare_data", "init_from": previous_checkpoint(context)}


STAGE = Stage("prune", run, ("loader", "validation"), inputs)

if __name__ == "__main__":
    main(STAGE)
