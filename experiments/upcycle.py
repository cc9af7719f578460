"""Splits the student by width, merges the shards into a mixture with exact scaling, and checks that nothing was lost.

python -m experiments.upcycle --config=configs/demo.py --workdir=runs/demo
"""

from typing import Any

import jax

from experiments import streamed
from experiments.command import main
from experiments.contract import Context, Stage, previous_checkpoint
from experiments.training_stage import check_tokenizer, corpus_of, mesh_of, read_model, runtime_of, validation_of
from kwaicoder_jax import checkpoints, files, models, training, transforms

OWN_FIELDS = ("init_from", "seed", "streamed", "verify")  # the others are upcycle.apply's


def run(context: Context) -> dict[str, Any]:
    """Writes upcycle/checkpoints and upcycle/verify.json."""
    mesh, corpus = mesh_of(context), corpus_of(context)
    section, dense = context.section, None
    arguments = {key: value for key, value in section.items() if key not in OWN_FIELDS}
    if section.get("streamed"):
        meta = checkpoints.read_meta(context.inputs["init_from"])
        config = models.ModelConfig.from_dict(meta["model"])
        check_tokenizer(context, "init_from", meta, corpus)
        record = transforms.streaming.record_of(
            lambda params: transforms.upcycle.apply(params, config, seed=context.seed, **arguments), config
        )
        moe_config = models.ModelConfig.from_dict(record["config_after"])
        streamed.write(context, transforms.upcycle, record, _meta(context, meta, record))
        if section.get("verify", True):
            dense, _, _ = read_model(context, "init_from", mesh)
            moe = checkpoints.read_params(context.folder, training.abstract_params(moe_config, mesh))
    else:
        dense, config, meta = read_model(context, "init_from", mesh)
        check_tokenizer(context, "init_from", meta, corpus)
        moe, moe_config, record = transforms.upcycle.apply(dense, config, seed=context.seed, **arguments)
        moe = jax.device_put(moe, training.param_shardings(moe_config, mesh))
        store = checkpoints.CheckpointStore(context.folder / "checkpoints")
        store.save(0, moe, _meta(context, meta, record))
        store.close()
    summary = {
        "params_total": models.count(moe_config),
        "params_active": models.count_active(moe_config),
        "lossless": record["lossless"],
    }
    if dense is None:
        context.display.line("not compared with the dense model, as upcycle.verify says")
        return {**summary, "verified": False}
    batches = [training.shard_batch(b, mesh) for each in validation_of(context, corpus).values() for b in each]
    report = transforms.verify.verify(
        dense, config, moe, moe_config, batches, runtime=runtime_of(context), per_layer=True
    )
    files.write_json(context.folder / "verify.json", report.to_dict())
    return {
        **summary,
        "verified": True,
        **{key: value for key, value in report.to_dict().items() if isinstance(value, int | float)},
    }


def _meta(context: Context, meta: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """The description of the mixture's checkpoint."""
    return {
        "model": record["config_after"],
        "tokenizer": meta["tokenizer"],
        "lineage": [*meta["lineage"], {"stage": "upcycle", "identity": context.identity, "record": record}],
        "identity": context.identity,
    }


def inputs(context: Context) -> dict[str, str]:
    """The corpus, and the dense student."""
    return {"corpus": "prepare_data", "init_from": previous_checkpoint(context)}


STAGE = Stage("upcycle", run, ("validation",), inputs)

if __name__ == "__main__":
    main(STAGE)
