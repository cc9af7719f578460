"""Continues pre-training of the mixture in phases, each with its own data, learning rate and fill-in-the-middle.

python -m experiments.cpt --config=configs/demo.py --workdir=runs/demo
"""

import functools
from typing import Any

from experiments.command import main
from experiments.contract import Context, Stage, previous_checkpoint
from experiments.training_stage import Run, build, check_tokenizer, corpus_of, mesh_of, read_model, runtime_of, train
from kwaicoder_jax import models, training


def run(context: Context) -> dict[str, Any]:
    """Writes cpt/checkpoints."""
    mesh, corpus = mesh_of(context), corpus_of(context)
    params, config, meta = read_model(context, "init_from", mesh)
    check_tokenizer(context, "init_from", meta, corpus)
    balance = build(training.BalanceConfig, context.section["balance"], "cpt.balance")
    runtime = runtime_of(context)

    def loss(trainable: Any, batch: Any, frozen: Any) -> Any:
        del frozen
        return training.language_model_loss(trainable["model"], config, batch, runtime=runtime, balance=balance)

    job = Run(
        folder=context.folder,
        model=config,
        abstract={"model": training.abstract_params(config, mesh)},
        load=lambda: {"model": params},
        loss=loss,
        frozen={},
        flops_per_token=functools.partial(models.train_flops_per_token, config),
        lineage=[*meta["lineage"], {"stage": "cpt", "identity": context.identity}],
    )
    summary = train(context, job, corpus, mesh)
    loads = [r for r in training.read_metrics(context.folder / "metrics.jsonl") if "expert_load_max_over_mean" in r]
    if loads:
        summary["expert_load_max_over_mean"] = loads[-1]["expert_load_max_over_mean"]
        summary["router_entropy"] = loads[-1]["router_entropy"]
    return summary


def inputs(context: Context) -> dict[str, str]:
    """The corpus, and the checkpoint to start from."""
    return {"corpus": "prepare_data", "init_from": previous_checkpoint(context)}


STAGE = Stage("cpt", run, ("loader", "validation"), inputs)

if __name__ == "__main__":
    main(STAGE)
