"""Splits the student by width, merges the shards into a mixture with exact scaling, and checks that nothing was lost.

python -m experiments.upcycle --config=configs/demo.py --workdir=runs/demo
"""

from collections.abc import Iterator
from typing import Any

import jax

from experiments.command import main
from experiments.contract import Context, Stage, previous_checkpoint
from experiments.training_stage import (
    check_tokenizer,
    corpus_of,
    mesh_of,
    phases_of,
    read_model,
    runtime_of,
    validation_of,
)
from kwaicoder_jax import checkpoints, data, files, models, training, transforms

OWN_FIELDS = ("init_from", "seed", "steps", "calibration", "coactivation")  # the others are upcycle.plan's


def run(context: Context) -> dict[str, Any]:
    """Writes upcycle/checkpoints and upcycle/verify.json."""
    mesh, corpus = mesh_of(context), corpus_of(context)
    dense, config, meta = read_model(context, "init_from", mesh)
    check_tokenizer(context, "init_from", meta, corpus)
    arguments = {key: value for key, value in context.section.items() if key not in OWN_FIELDS}
    measured = measure(context, dense, config, mesh, corpus)
    moe, moe_config, record = transforms.upcycle.apply(dense, config, seed=context.seed, **measured, **arguments)
    moe = jax.device_put(moe, training.param_shardings(moe_config, mesh))

    batches = [training.shard_batch(b, mesh) for each in validation_of(context, corpus).values() for b in each]
    report = transforms.verify.verify(
        dense, config, moe, moe_config, batches, runtime=runtime_of(context), per_layer=True,
        granularity=record["granularity"],
    )  # fmt: skip
    show(context, record, report)
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


def measure(context: Context, dense: Any, config: models.ModelConfig, mesh: Any, corpus: Any) -> dict[str, Any]:
    """What the chosen partition, shared expert and router start need to know of the model on calibration data."""
    section, runtime = context.section, runtime_of(context)

    def batches() -> Iterator[Any]:
        phases = phases_of({**section, "phases": {"calibration": section["calibration"]}}, "upcycle")
        streams = context.config["loader"]["streams"]
        loader = data.TrainingLoader(corpus, phases.data, seed=context.seed, streams=streams)
        return (training.shard_batch(batch, mesh) for batch in loader)

    measured: dict[str, Any] = {}
    if section.get("shared_neurons") or "balanced" in section["partition"]:
        measured["scores"] = transforms.importance.collect(dense, config, batches(), runtime=runtime)
    if "coactivation" in section["partition"]:
        options = section["coactivation"]
        measured["coactivation"] = transforms.coactivation.collect(dense, config, batches(), runtime=runtime, **options)
    if section.get("router_init") == "centroids":
        measured["mlp_inputs"] = transforms.router_init.mlp_inputs(dense, config, batches(), runtime=runtime)
    return measured


def show(context: Context, record: dict[str, Any], report: transforms.verify.Report) -> None:
    """A small table of the check; of a lossy choice also why and by how much."""
    for line in report.table().splitlines():
        context.display.line(line)
    context.display.line(
        f"relative logit error {report.max_relative_logit_error:.1e}, KL {report.kl_dense_to_moe:.1e} nats, "
        f"loss {report.valid_loss_dense:.4f} -> {report.valid_loss_moe:.4f}, jump {report.loss_jump:+.4f}"
    )
    for reason in record["lossy_because"]:
        context.display.line(f"lossy: {reason}")


def inputs(context: Context) -> dict[str, str]:
    """The corpus, and the dense student."""
    return {"corpus": "prepare_data", "init_from": previous_checkpoint(context)}


STAGE = Stage("upcycle", run, ("loader", "validation"), inputs)

if __name__ == "__main__":
    main(STAGE)
