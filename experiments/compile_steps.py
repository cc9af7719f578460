"""The steps of a recipe as functions of shapes: what its stages would run, on a machine that is not here."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from jax.sharding import Mesh

from experiments import cpt, distill, guides, language_model, recipe_models
from experiments.contract import Context, Stage
from experiments.training_stage import Run, abstract_tree, build, phases_of, program_of
from kwaicoder_jax import data, distillation, hardware, training


@dataclasses.dataclass(frozen=True)
class Step:
    """One compiled step's ingredients.

    Attributes:
      function: jitted.
      arguments: shapes with shardings.
      mesh: over the machine.
      model_flops: of one step, of all chips.
    """

    function: Any
    arguments: tuple[Any, ...]
    mesh: Mesh
    model_flops: float


def make(context: Context, step: str, machine: hardware.Topology) -> Step:
    """The step of the stage `step` of the context's recipe; UserError for a recipe that does not tell its shapes."""
    mesh = training.make_mesh(build(training.MeshConfig, context.config.get("mesh", {}), "mesh"), machine.devices)
    if context.workdir is None:  # a run names its folder, though nothing is written to it here
        context = dataclasses.replace(context, workdir=pathlib.Path())
    return STEPS[step](context, mesh)


def _cpt(context: Context, mesh: Mesh) -> Step:
    context, model = _of(context, cpt.STAGE), recipe_models.model_before(context.config, "cpt")
    balance = build(training.BalanceConfig, context.section["balance"], "cpt.balance")
    return _training(context, language_model.job(context, model, mesh, load=_none, lineage=[], balance=balance), mesh)


def _distill(context: Context, mesh: Mesh) -> Step:
    context, student = _of(context, distill.STAGE), recipe_models.model_before(context.config, "distill")
    teacher = recipe_models.teacher_of(context.config)
    settings = build(distillation.DistillConfig, context.section["loss"], "distill.loss")
    guide = guides.Guide(settings, teacher, training.abstract_params(teacher, mesh))
    if settings.hidden:  # the first layers and channels stand for those that pruning would keep
        pairs = distillation.layer_map(list(range(student.layers)), context.section["hidden_every"])
        first = distillation.initial_projections(pairs, list(range(student.model_dim)), teacher.model_dim)
        guide = dataclasses.replace(guide, pairs=pairs, projections=abstract_tree(first, mesh))
    balance = build(training.BalanceConfig, context.section.get("balance", {}), "distill.balance")
    meta: dict[str, Any] = {"lineage": []}
    unread = dataclasses.replace(
        context, config=context.config | {"distill": context.section | {"continue_data": False}}
    )
    return _training(context, distill.job_of(unread, student, guide, balance, mesh, load=_none, meta=meta), mesh)


def _none() -> Any:
    raise AssertionError("nothing is loaded for a machine that is not here")


def _of(context: Context, stage: Stage) -> Context:
    return dataclasses.replace(context, stage=stage)


def _training(context: Context, run: Run, mesh: Mesh) -> Step:
    """The step of a training stage on batches of its first phase."""
    name = context.stage.name
    phases = phases_of(context.section, name).data
    data.check_streams(phases, context.config["loader"]["streams"])
    for phase in phases:
        training.check_rows(phase.batch_size, mesh)
    phase = phases[0]
    program = program_of(context.section, name, run, mesh)
    batch = training.abstract_batch((phase.batch_size, phase.sequence_length), training.batch_sharding(mesh))
    flops = run.flops_per_token(phase.sequence_length) * phase.batch_size * phase.sequence_length
    return Step(program.step, (program.state, batch, run.frozen), mesh, flops)


STEPS: Mapping[str, Callable[[Context, Mesh], Step]] = {"cpt": _cpt, "distill": _distill}

__all__ = ["STEPS", "Step", "make"]
