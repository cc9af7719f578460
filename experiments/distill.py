"""Recovers the pruned student from its unpruned teacher; `distill.baseline` also trains it without the teacher.

python -m experiments.distill --config=configs/demo.py --workdir=runs/demo
"""

import functools
from typing import Any

import jax

from experiments import fields, moments, sections
from experiments.command import main
from experiments.contract import Context, Stage, previous_checkpoint
from experiments.training_stage import (
    Run,
    abstract_tree,
    build,
    check_tokenizer,
    corpus_of,
    mesh_of,
    read_model,
    runtime_of,
    train,
)
from kwaicoder_jax import distillation, models, training
from kwaicoder_jax.errors import UserError


def run(context: Context) -> dict[str, Any]:
    """Writes distill/checkpoints, and with the baseline distill/baseline/checkpoints."""
    mesh, corpus = mesh_of(context), corpus_of(context)
    student, config, meta = read_model(context, "init_from", mesh)
    teacher, teacher_config, teacher_meta = read_model(context, "teacher", mesh)
    check_tokenizer(context, "init_from", meta, corpus)
    check_tokenizer(context, "teacher", teacher_meta, corpus)
    settings = build(distillation.DistillConfig, context.section["loss"], "distill.loss")
    pairs, projections = _projections(context, meta, teacher_meta, teacher_config)

    def loss(trainable: Any, batch: Any, frozen: Any) -> Any:
        return distillation.distillation_loss(
            trainable, batch, frozen, student_config=config, teacher_config=teacher_config, pairs=pairs,
            config=settings, runtime=runtime_of(context),
        )  # fmt: skip

    def flops_per_token(length: int) -> float:
        return models.train_flops_per_token(config, length) + models.forward_flops_per_token(teacher_config, length)

    projections = jax.device_put(projections, training.replicated(mesh)) if settings.hidden else {}
    extras = {"projections": projections} if settings.hidden else {}
    position = moments.data_position(meta).get("data_position") if context.section["continue_data"] else None
    abstract = {"model": training.abstract_params(config, mesh)}
    job = Run(
        folder=context.folder,
        model=config,
        abstract={**abstract, **abstract_tree(extras, mesh)},
        load=lambda: {"model": student, **extras},
        loss=loss,
        frozen=teacher,
        flops_per_token=flops_per_token,
        lineage=[*meta["lineage"], {"stage": "distill", "identity": context.identity}],
        data_position=position,
    )
    summary = train(context, job, corpus, mesh, "with teacher")
    if context.section["baseline"]:
        job = _baseline(context, job, student, config)
        alone = train(context, job, corpus, mesh, "without teacher")
        summary["valid_loss_end_without_teacher"] = alone["valid_loss_end"]
    return summary


def _projections(
    context: Context, meta: dict[str, Any], teacher_meta: dict[str, Any], teacher_config: models.ModelConfig
) -> tuple[list[tuple[int, int]], dict[str, Any]]:
    """The layer map and the first projections, from what pruning kept."""
    record = next((step["record"] for step in reversed(meta["lineage"]) if step["stage"] == "prune"), None)
    if record is None or record["config_before"] != teacher_meta["model"]:
        raise UserError(
            "the student's lineage has no pruning of this teacher", where="distill.teacher",
            remedy="name the checkpoint that was pruned",
        )  # fmt: skip
    pairs = distillation.layer_map(record["kept"]["layers"], context.section["hidden_every"])
    return pairs, distillation.initial_projections(pairs, record["kept"]["embed"], teacher_config.model_dim)


def _baseline(context: Context, job: Run, student: Any, config: models.ModelConfig) -> Run:
    """The same student, data, schedule and steps, on labels alone."""
    settings: dict[str, Any] = {"runtime": runtime_of(context), "balance": training.BalanceConfig()}

    def loss(trainable: Any, batch: Any, frozen: Any) -> Any:
        del frozen
        return training.language_model_loss(trainable["model"], config, batch, **settings)

    return Run(
        folder=context.folder / "baseline",
        model=config,
        abstract={"model": job.abstract["model"]},
        load=lambda: {"model": student},
        loss=loss,
        frozen={},
        flops_per_token=functools.partial(models.train_flops_per_token, config),
        lineage=[*job.lineage[:-1], {"stage": "distill/baseline", "identity": context.identity}],
        data_position=job.data_position,
    )


def inputs(context: Context) -> dict[str, str]:
    """The corpus, the student, and its teacher."""
    return {
        "corpus": "prepare_data",
        "init_from": previous_checkpoint(context),
        "teacher": context.section.get("teacher") or "pretrain",
    }


STAGE = Stage("distill", run, ("loader", "validation"), inputs, fields=fields.of_class(sections.Distill))

if __name__ == "__main__":
    main(STAGE)
