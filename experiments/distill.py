"""Recovers the pruned student from its unpruned teacher; `distill.baseline` also trains it without the teacher.

python -m experiments.distill --config=configs/demo.py --workdir=runs/demo

With `distill.cache` the teacher's logits come from the files of cache_teacher, and its model is not loaded.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax

from experiments import fields, guides, language_model, moments, sections
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
    train,
    training_runtime_of,
)
from kwaicoder_jax import distillation, models, training

CACHE_STAGE = "cache_teacher"


def run(context: Context) -> dict[str, Any]:
    """Writes distill/checkpoints, and with the baseline distill/baseline/checkpoints."""
    mesh, corpus = mesh_of(context), corpus_of(context)
    student, config, meta = read_model(context, "init_from", mesh)
    check_tokenizer(context, "init_from", meta, corpus)
    settings = build(distillation.DistillConfig, context.section["loss"], "distill.loss")
    if context.section.get("cache"):
        guide = guides.cached(context, corpus, config, settings)
    else:
        guide = guides.live(context, corpus, mesh, meta, settings)
    balance = build(training.BalanceConfig, context.section.get("balance", {}), "distill.balance")
    guide = dataclasses.replace(guide, projections=jax.device_put(guide.projections, training.replicated(mesh)))
    job = job_of(context, config, guide, balance, mesh, load=lambda: student, meta=meta)
    summary = train(context, job, corpus, mesh, "with teacher") | language_model.router_summary(context.folder)
    if context.section["baseline"]:
        alone = language_model.job(
            context, config, mesh, load=lambda: student, lineage=meta["lineage"], balance=balance,
            data_position=job.data_position,
        )  # fmt: skip
        lineage = [*meta["lineage"], {"stage": "distill/baseline", "identity": context.identity}]
        alone = dataclasses.replace(alone, folder=context.folder / "baseline", lineage=lineage)
        summary["valid_loss_end_without_teacher"] = train(context, alone, corpus, mesh, "without teacher")[
            "valid_loss_end"
        ]
    return summary


def job_of(
    context: Context, config: models.ModelConfig, guide: guides.Guide, balance: training.BalanceConfig, mesh: Any, *,
    load: Callable[[], Any], meta: dict[str, Any],
) -> Run:  # fmt: skip
    """The student's run under its teacher, whose projections lie on the mesh (or are shapes)."""
    language_model.check_capacity(balance, config, "distill.balance", mesh)
    extras = {"projections": guide.projections} if guide.projections else {}
    options: dict[str, Any] = {
        "student_config": config, "teacher_config": guide.config, "pairs": guide.pairs, "config": guide.settings,
        "runtime": training_runtime_of(context, mesh), "router_loss": language_model.router_loss(balance),
        "shards": row_shards(mesh), "capacity_factor": balance.capacity_factor,
    }  # fmt: skip
    return Run(
        folder=context.folder,
        model=config,
        abstract={"model": training.abstract_params(config, mesh), **abstract_tree(extras, mesh)},
        load=lambda: {"model": load(), **extras},
        loss=lambda trainable, batch, frozen: distillation.distillation_loss(trainable, batch, frozen, **options),
        frozen=guide.params,
        flops_per_token=lambda length: models.train_flops_per_token(config, length) + guide.flops_per_token(length),
        lineage=[*meta["lineage"], {"stage": "distill", "identity": context.identity}],
        data_position=data_position(context, meta),
        prepare=guide.prepare,
        bias_rate=language_model.bias_rate(balance, config, "distill.balance"),
    )


def row_shards(mesh: Any) -> int:
    """Devices that the rows of a batch are spread over."""
    return math.prod(mesh.shape[axis] for axis in training.BATCH_AXES)


def data_position(context: Context, meta: dict[str, Any]) -> dict[str, Any] | None:
    """Where the data goes on that the student's own training ended at; None for its start."""
    return moments.data_position(meta).get("data_position") if context.section["continue_data"] else None


def inputs(context: Context) -> dict[str, str]:
    """The corpus, the student, and its teacher or the cache of this work folder."""
    cache = context.section.get("cache")
    guide = {} if cache else {"teacher": guides.name_of(context)}
    if cache == CACHE_STAGE:
        guide = {"cache": cache}
    return {"corpus": "prepare_data", "init_from": previous_checkpoint(context), **guide}


def contents(context: Context) -> dict[str, str]:
    """The identity of a cache in another folder."""
    cache = context.section.get("cache")
    return {"cache": distillation.CacheReader(cache).identity} if cache and cache != CACHE_STAGE else {}


STAGE = Stage(
    "distill", run, ("loader", "validation"), inputs, fields=fields.of_class(sections.Distill), places=("cache",),
    contents=contents, together=True,
)  # fmt: skip

if __name__ == "__main__":
    main(STAGE)
