"""Continues pre-training of the mixture in phases, each with its own data, learning rate and fill-in-the-middle.

python -m experiments.cpt --config=configs/demo.py --workdir=runs/demo
"""

from typing import Any

from experiments import fields, language_model, moments, sections
from experiments.command import main
from experiments.contract import Context, Stage, previous_checkpoint
from experiments.training_stage import build, check_tokenizer, corpus_of, mesh_of, read_model, train
from kwaicoder_jax import checkpoints, models, training, transforms
from kwaicoder_jax.errors import UserError


def run(context: Context) -> dict[str, Any]:
    """Writes cpt/checkpoints."""
    mesh, corpus = mesh_of(context), corpus_of(context)
    meta = checkpoints.read_meta(context.inputs["init_from"])
    config = models.ModelConfig.from_dict(meta["model"])
    check_tokenizer(context, "init_from", meta, corpus)
    balance = build(training.BalanceConfig, context.section["balance"], "cpt.balance")
    job = language_model.job(
        context, config, mesh,
        load=lambda: read_model(context, "init_from", mesh)[0],  # nothing keeps a second copy
        lineage=meta["lineage"], balance=balance, **_continued(context, meta, config, mesh),
    )  # fmt: skip
    return train(context, job, corpus, mesh) | language_model.router_summary(context.folder)


def _continued(context: Context, meta: dict[str, Any], config: models.ModelConfig, mesh: Any) -> dict[str, Any]:
    """What goes on from the training before: data, Adam's moments, and rates that follow the scaled matrices."""
    section, more = context.section, {}
    if section["continue_data"]:
        more["data_position"] = moments.data_position(meta).get("data_position")
    if section["continue_optimizer"]:
        moments.check_carried(context.inputs["init_from"])
        abstract = training.abstract_params(config, mesh)
        more["moments"] = lambda: moments.read(context.inputs["init_from"], abstract)
    if section["match_rates"]:
        record = next((step["record"] for step in reversed(meta["lineage"]) if step["stage"] == "upcycle"), None)
        if record is None:
            raise UserError("the model was not upcycled", where="cpt.match_rates", remedy="set it to False")
        more["multipliers"] = transforms.optimizer_state.rate_multipliers(record)
        more["epsilons"] = transforms.optimizer_state.epsilon_factors(record)
    return more


def inputs(context: Context) -> dict[str, str]:
    """The corpus, and the checkpoint to start from."""
    return {"corpus": "prepare_data", "init_from": previous_checkpoint(context)}


STAGE = Stage("cpt", run, ("loader", "validation"), inputs, fields=fields.of_class(sections.Cpt), together=True)

if __name__ == "__main__":
    main(STAGE)
