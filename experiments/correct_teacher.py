"""Fine-tunes the teacher on the target data before it is pruned or teaches (Minitron's teacher correction).

python -m experiments.correct_teacher --config=configs/demo.py --workdir=runs/demo

Then prune and distill take it for the teacher where "correct_teacher" stands among the stages, or is named.
"""

from typing import Any

from experiments import fields, language_model, moments, sections
from experiments.command import main
from experiments.contract import Context, Stage
from experiments.training_stage import build, check_tokenizer, corpus_of, mesh_of, read_model, train
from kwaicoder_jax import checkpoints, models, training
from kwaicoder_jax.errors import UserError

SOURCES = ("pretrain", "import_hf")  # where a teacher comes from, unless init_from names it


def run(context: Context) -> dict[str, Any]:
    """Writes correct_teacher/checkpoints."""
    mesh, corpus = mesh_of(context), corpus_of(context)
    meta = checkpoints.read_meta(context.inputs["init_from"])
    check_tokenizer(context, "init_from", meta, corpus)
    balance = build(training.BalanceConfig, context.section.get("balance", {}), "correct_teacher.balance")
    position = moments.data_position(meta).get("data_position") if context.section.get("continue_data", True) else None
    job = language_model.job(
        context, models.ModelConfig.from_dict(meta["model"]), mesh,
        load=lambda: read_model(context, "init_from", mesh)[0],  # nothing keeps a second copy
        lineage=meta["lineage"], balance=balance, data_position=position,
    )  # fmt: skip
    return train(context, job, corpus, mesh) | language_model.router_summary(context.folder)


def inputs(context: Context) -> dict[str, str]:
    """The corpus, and the teacher as it is."""
    named = context.section.get("init_from") or next((s for s in SOURCES if s in context.config["stages"]), None)
    if named is None:
        what, remedy = "the recipe neither pretrains nor imports a teacher", "name a stage or a folder"
        raise UserError(what, where="correct_teacher.init_from", remedy=remedy)
    return {"corpus": "prepare_data", "init_from": named}


STAGE = Stage(
    "correct_teacher", run, ("loader", "validation"), inputs, fields=fields.of_class(sections.CorrectTeacher),
    together=True,
)  # fmt: skip

if __name__ == "__main__":
    main(STAGE)
