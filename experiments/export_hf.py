"""Exports a checkpoint as the family of Hugging Face transformers that represents it exactly.

python -m experiments.export_hf --checkpoint=runs/demo/cpt --target=runs/demo_hf

With --workdir it is a stage: it leaves WORKDIR/export_hf/summary.json, and the model in WORKDIR/export_hf/model unless
--target says otherwise.
"""

import dataclasses
import pathlib
from typing import Any

from absl import flags

from experiments import command, export_comparison, fields, sections
from experiments.contract import Context, Stage, previous_checkpoint
from experiments.contract import run as run_contract
from experiments.display import Display
from experiments.stopping import Stop
from kwaicoder_jax import checkpoints, data, files, huggingface, models
from kwaicoder_jax.errors import UserError

DEFAULTS = dataclasses.asdict(sections.ExportHf())
CHOICES = ("family", "dtype", "max_shard_bytes", "max_length")  # arguments of plan_export


def main() -> None:
    """The body of the command."""
    holder = command.define_flags()
    flags.DEFINE_string("checkpoint", None, "Stage folder whose newest checkpoint is exported.")
    flags.DEFINE_string("target", None, "Folder to make.")
    flags.DEFINE_string("tokenizer", None, "The checkpoint's tokenizer.json, where it is in no folder beside it.")
    flags.DEFINE_string("family", None, f"One of {', '.join(huggingface.FAMILIES)}; the first exact one if not given.")
    flags.DEFINE_string("dtype", None, "Of the weights: stored (as they are), float32, bfloat16, float16.")
    flags.DEFINE_integer("max_shard_bytes", None, "Of one file of weights.")
    flags.DEFINE_integer("max_length", None, "Positions that config.json promises; the model's own if not given.")
    flags.DEFINE_bool("compare", None, "Load the result in transformers and compare logits and greedy text.")
    flags.DEFINE_multi_string("prompts", None, "A text to compare on; may be given several times.")

    def work(stop: Stop, display: Display) -> None:
        named = {"init_from": flags.FLAGS.checkpoint}
        given = named | {name: flags.FLAGS[name].value for name in DEFAULTS if name != "init_from"}
        context = command.tool_context(STAGE, holder.value, DEFAULTS, given, stop, display)
        if context.workdir is not None:
            run_contract(context, restart=flags.FLAGS.restart)
            return
        for name, field in (("checkpoint", "init_from"), ("target", "target")):
            if not context.section[field]:
                remedy = "as in --checkpoint=runs/demo/cpt --target=runs/demo_hf"
                raise UserError("is required", where=f"--{name}", remedy=remedy)
        display.stage(STAGE.name)
        assert STAGE.fields is not None
        fields.check(STAGE.fields, context.section, STAGE.name)
        write(context, pathlib.Path(context.section["init_from"]), context.section["target"])

    command.execute(work, required=())


def run(context: Context) -> dict[str, Any]:
    """Writes export_hf/model, or the folder that `export_hf.target` names."""
    return write(context, context.inputs["init_from"], context.section.get("target") or context.folder / "model")


def write(context: Context, checkpoint: Any, target: Any) -> dict[str, Any]:
    """Writes the folder; returns what the summary says of it."""
    section = {**DEFAULTS, **context.section}
    if section["compare"]:
        export_comparison.check()
    meta = checkpoints.read_meta(checkpoint)
    config = models.ModelConfig.from_dict(meta["model"])
    tokenizer, companions = find_tokenizer(pathlib.Path(checkpoint), meta.get("tokenizer"), section["tokenizer"])
    tensors = checkpoints.open_tensors(checkpoint)
    exported = huggingface.plan_export(
        tensors, config, tokenizer=tokenizer, companions=companions, lineage=meta["lineage"],
        name=pathlib.Path(target).name, **{name: section[name] for name in CHOICES},
    )  # fmt: skip
    context.display.line(
        f"{exported.family.architecture}, {exported.nbytes / 1e6:,.0f} MB in {len(exported.shards)} files"
    )
    if exported.padding_rows:
        context.display.line(f"the last {exported.padding_rows} rows of the embedding belong to no token, and stay")
    with context.display.megabytes() as show:
        written = huggingface.export(tensors, exported, target, on_progress=show)
    context.display.line(str(target) if written else f"{target} holds this export already")
    compared = _compare(context, checkpoint, target, config, tokenizer) if section["compare"] else {}
    return compared | {
        "params_total": models.count(config),
        "params_active": models.count_active(config),
        "family": exported.family.model_type,
        "tensors": len(exported.slots),
        "weight_bytes": exported.nbytes,
        "weight_files": len(exported.shards),
        "padding_rows": exported.padding_rows,
    }


def _compare(
    context: Context, checkpoint: Any, target: Any, config: models.ModelConfig, tokenizer: data.Tokenizer
) -> dict[str, Any]:
    """Summary keys; the texts go to export_hf/comparison.json where there is a work folder."""
    found = export_comparison.compare(context, checkpoint, target, config, tokenizer)
    if context.workdir is not None:
        files.write_json(context.folder / "comparison.json", found)
    texts = found["texts"]
    return {
        "transformers_max_logit_difference": found["max_logit_difference"],
        "transformers_same_texts": sum(text["ours"] == text["transformers"] for text in texts),
        "transformers_texts": len(texts),
    }


def find_tokenizer(
    checkpoint: pathlib.Path, wanted: str | None, named: str | None
) -> tuple[data.Tokenizer, dict[str, str]]:
    """The tokenizer that a checkpoint was trained with, by its hash, and the files that belong to it.

    Args:
      checkpoint: a stage folder, or the folder of checkpoints in it.
      wanted: its tokenizer's hash.
      named: a tokenizer.json; if None it is looked for in the stage folder and in those beside it (import_hf,
        prepare_data).

    Raises:
      UserError: it is nowhere, or the one that is named is another.
    """
    stage = files.absolute(checkpoint)
    stage = stage.parent if stage.name == "checkpoints" else stage
    beside = sorted(folder for folder in stage.parent.iterdir() if folder.is_dir() and folder != stage)
    folders = [stage, *beside, *(folder / "corpus" for folder in (stage, *beside))]
    for file in [pathlib.Path(named)] if named else [folder / "tokenizer.json" for folder in folders]:
        if not named and not file.exists():
            continue
        tokenizer = data.Tokenizer.from_file(file)
        if wanted in (None, tokenizer.hash):
            places = [file.parent / name for name in huggingface.COMPANIONS]
            return tokenizer, {place.name: files.path(place).read_text() for place in places if place.exists()}
        if named:
            raise UserError("is not the tokenizer that the checkpoint was trained with", where=named)
    what = f"the checkpoint's tokenizer ({wanted}) is in no folder beside it"
    raise UserError(what, where="--tokenizer", remedy="name its tokenizer.json")


def inputs(context: Context) -> dict[str, str]:
    """The checkpoint."""
    return {"init_from": previous_checkpoint(context)}


STAGE = Stage(
    "export_hf", run, inputs=inputs, fields=fields.of_class(sections.ExportHf), places=("target", "tokenizer")
)

if __name__ == "__main__":
    main()
