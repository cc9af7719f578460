"""Splits the student by width, merges the shards into a mixture with exact scaling, and checks that nothing was lost.

python -m experiments.upcycle --config=configs/demo.py --workdir=runs/demo
"""

from typing import Any

import jax

from experiments.command import main
from experiments.contract import Context, Stage, previous_checkpoint
from experiments.training_stage import check_tokenizer, corpus_of, mesh_of, read_model, runtime_of, validation_of
from kwaicoder_jax import checkpoints, files, models, training, transforms


def run(context: Context) -> dict[str, Any]:
    """Writes upcycle/checkpoints and upcycle/verify.json."""
    mesh, corpus = mesh_of(context), corpus_of(context)
    dense, config, meta = read_model(context, "init_from", mesh)
    check_tokenizer(context, "init_from", meta, corpus)
    arguments = {key: value for key, value in context.section.items() if key not in ("init_from", "seed")}
    moe, moe_config, record = transforms.upcycle.apply(dense, config, seed=context.seed, **arguments)
    moe = jax.device_put(moe, training.param_shardings(moe_config, mesh))

    batches = [training.shard_batch(b, mesh) for each in validation_of(context, corpus).values() for b in each]
    report = transforms.verify.verify(
        dense, config, moe, moe_config, batches, runtime=runtime_of(context), per_layer=True
    )
    meta = {
        "model": moe_config.to_dict(),
        "tokenizer": meta["tokenizer"],
        "lineage": [*meta["lineage"], {"stage": "upcycle", "identity": context.identity, "record": record}],
        "identity": context.identity,
    }
    store = checkpoints.CheckpointStore(context.folder / "checkpoints")
    store.save(0, moe, meta)
    store.close()
    files.write_json(context.folder / "verify.json", report.to_dict())
    return {
        "params_total": models.count(moe_config),
        "params_active": models.count_active(moe_config),
        "lossless": record["lossless"],
        **{key: value for key, value in report.to_dict().items() if isinstance(value, int | float)},
    }


def inputs(context: Context) -> dict[str, str]:
    """The corpus, and the dense student."""
    return {"corpus": "prepare_data", "init_from": previous_checkpoint(context)}


STAGE = Stage("upcycle", run, ("validation",), inputs)

if __name__ == "__main__":
    main(STAGE)
