"""Trains a dense teacher from random parameters.

python -m experiments.pretrain --config=configs/demo.py --workdir=runs/demo
"""

import functools
from typing import Any

import jax

from experiments import fields, language_model, sections
from experiments.command import main
from experiments.contract import Context, Stage
from experiments.training_stage import check_vocabulary, corpus_of, mesh_of, train
from kwaicoder_jax import models, training


def run(context: Context) -> dict[str, Any]:
    """Writes pretrain/checkpoints."""
    mesh, corpus = mesh_of(context), corpus_of(context)
    sizes = {"vocab_size": corpus.tokenizer.vocab_size, **context.config["model"]}
    fields.check(fields.of_class(models.ModelConfig), sizes, "model")
    config = models.ModelConfig.from_dict(sizes)
    check_vocabulary(config.vocab_size, corpus, "model.vocab_size")
    initial = jax.jit(functools.partial(models.init, config), out_shardings=training.param_shardings(config, mesh))
    job = language_model.job(
        context, config, mesh, load=lambda: initial(jax.random.key(context.seed)), lineage=[]
    )  # fmt: skip
    return train(context, job, corpus, mesh)


STAGE = Stage(
    "pretrain", run, ("model", "loader", "validation"), lambda context: {"corpus": "prepare_data"},
    fields=fields.of_class(sections.Training), together=True,
)  # fmt: skip

if __name__ == "__main__":
    main(STAGE)
