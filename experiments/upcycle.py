"""Splits the student by width, merges the shards into a mixture with exact scaling, and checks that nothing was lost.

python -m experiments.upcycle --config=configs/demo.py --workdir=runs/demo
"""

from collections.abc import Iterator
from typing import Any

from experiments import fields, moments, sections, transformed
from experiments.command import main
from experiments.contract import Context, Stage, previous_checkpoint
from experiments.training_stage import (
    calibration_of,
    check_tokenizer,
    corpus_of,
    mesh_of,
    read_model,
    runtime_of,
    validation_of,
)
from kwaicoder_jax import checkpoints, files, models, training, transforms
from kwaicoder_jax.transforms import optimizer_state

OWN = fields.of_class(sections.Upcycle)  # the other fields of the section are arguments of upcycle.plan
COLLECTED = ("params", "config", "batches", "runtime", "seed")  # what coactivation.collect is given here
GIVEN = ("config", "seed", "scores", "coactivation", "mlp_inputs")


def run(context: Context) -> dict[str, Any]:
    """Writes upcycle/checkpoints, upcycle/verify.json and, if asked for, upcycle/moments."""
    section, mesh, corpus = context.section, mesh_of(context), corpus_of(context)
    arguments = {key: value for key, value in section.items() if key not in OWN}
    fields.check(
        fields.of_function(transforms.coactivation.collect, COLLECTED), section["coactivation"], "upcycle.coactivation"
    )
    optimizer_state.SecondMoment.parse(section["second_moment"])
    meta = checkpoints.read_meta(context.inputs["init_from"])
    check_tokenizer(context, "init_from", meta, corpus)
    if section["optimizer_state"]:
        moments.check(context)
    config = models.ModelConfig.from_dict(meta["model"])
    compare = not section["streamed"] or section["verify"]
    dense = read_model(context, "init_from", mesh)[0] if compare or needs(section) else None
    place = context.folder / "record.json"  # of an interrupted run: measured anew it might differ in the last bit
    if not place.exists():
        measured = measure(context, dense, config, mesh, corpus)
        files.write_json(place, transforms.upcycle.plan(config, seed=context.seed, **measured, **arguments))
    record = files.read_json(place)
    for reason in record["lossy_because"]:
        context.display.line(f"lossy: {reason}")
    described = transformed.describe(context, meta, record)
    moe = transformed.save(context, transforms.upcycle, dense, config, record, described, mesh)
    if section["optimizer_state"]:
        moments.upcycle(context, record, described)
    summary = {
        "params_total": record["params_total"],
        "params_active": record["params_active"],
        "lossless": record["lossless"],
        "verified": compare,
    }
    if not compare:
        context.display.line("not compared with the dense model, as upcycle.verify says")
        return summary
    batches = [training.shard_batch(b, mesh) for each in validation_of(context, corpus).values() for b in each]
    moe_config = models.ModelConfig.from_dict(record["config_after"])
    report = transforms.verify.verify(
        dense, config, moe, moe_config, batches, runtime=runtime_of(context), per_layer=True,
        granularity=record["granularity"],
    )  # fmt: skip
    show(context, report)
    files.write_json(context.folder / "verify.json", report.to_dict())
    numbers = {key: value for key, value in report.to_dict().items() if isinstance(value, int | float)}
    return {**summary, **numbers}


def needs(section: dict[str, Any]) -> set[str]:
    """What the choices have to know of the model on calibration data."""
    wanted = {
        "scores": section["shared_neurons"] or "balanced" in section["partition"],
        "coactivation": "coactivation" in section["partition"],
        "mlp_inputs": section["router_init"] == "centroids",
    }
    return {name for name, yes in wanted.items() if yes}


def measure(context: Context, dense: Any, config: models.ModelConfig, mesh: Any, corpus: Any) -> dict[str, Any]:
    """That, measured."""
    section, runtime = context.section, runtime_of(context)

    def batches() -> Iterator[Any]:
        return calibration_of(context, corpus, mesh)

    measured: dict[str, Any] = {}
    wanted = needs(section)
    if "scores" in wanted:
        measured["scores"] = transforms.importance.collect(dense, config, batches(), runtime=runtime)
    if "coactivation" in wanted:
        options = section["coactivation"]
        measured["coactivation"] = transforms.coactivation.collect(
            dense, config, batches(), runtime=runtime, seed=context.seed, **options
        )
    if "mlp_inputs" in wanted:
        measured["mlp_inputs"] = transforms.router_init.mlp_inputs(dense, config, batches(), runtime=runtime)
    return measured


def show(context: Context, report: transforms.verify.Report) -> None:
    """A small table of the check; of a lossy choice also by how much."""
    for line in report.table().splitlines():
        context.display.line(line)
    context.display.line(
        f"relative logit error {report.max_relative_logit_error:.1e}, KL {report.kl_dense_to_moe:.1e} nats, "
        f"loss {report.valid_loss_dense:.4f} -> {report.valid_loss_moe:.4f}, jump {report.loss_jump:+.4f}"
    )


def inputs(context: Context) -> dict[str, str]:
    """The corpus, and the dense student."""
    return {"corpus": "prepare_data", "init_from": previous_checkpoint(context)}


FIELDS = fields.of_function(transforms.upcycle.plan, GIVEN) | OWN
STAGE = Stage("upcycle", run, ("loader", "validation"), inputs, fields=FIELDS)

if __name__ == "__main__":
    main(STAGE)
