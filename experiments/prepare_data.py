"""Builds the corpus: reads and curates, removes duplicates, splits, trains the tokenizer, writes shards.

python -m experiments.prepare_data --config=configs/demo.py --workdir=runs/demo
"""

from collections.abc import Mapping
from typing import Any

from experiments import curation, fields, sections
from experiments.command import main
from experiments.contract import Context, Stage
from experiments.training_stage import on_disk
from kwaicoder_jax import data


def run(context: Context) -> dict[str, Any]:
    """Writes prepare_data/corpus."""
    on_disk(context, "a corpus is read from a disk")
    section = {key: value for key, value in context.section.items() if key not in ("sources", *curation.NAMES)}
    target = context.folder / "corpus"
    curated = curation.run(context)
    if target.exists():  # whole, since it appears by a rename; a kill came between it and the summary
        manifest = data.Corpus.open(target).manifest
    else:
        manifest = _prepare(context, target, section, curated.sources)
    keys = ("documents_in", "documents_train", "documents_valid", "tokens_train", "tokens_valid", "vocab_size")
    for name, source in sorted(manifest["sources"].items()):
        context.display.line(f"{name}: {source['tokens_train']} tokens in {source['documents_train']} documents")
    return {key: manifest[key] for key in keys} | curated.summary


def _prepare(
    context: Context, target: Any, section: dict[str, Any], curated: Mapping[str, data.Source]
) -> dict[str, Any]:
    def progress(task: str, done: int, total: int | None) -> None:
        if total and done == total:
            context.display.line(f"{task}: {done}")

    section.pop("seed", None)
    place = section.pop("tokenizer", None)
    if place is not None:
        folder = context.inputs.get("tokenizer")
        section["given"] = data.Tokenizer.from_file(folder / "tokenizer.json" if folder is not None else place)
        section.pop("vocab_size", None)
    sources = dict(context.section["sources"]) | dict(curated)
    return data.prepare(sources, target, seed=context.seed, progress=progress, **section)


def inputs(context: Context) -> dict[str, str]:
    """The stage whose tokenizer is used, where `prepare_data.tokenizer` names one."""
    return {"tokenizer": "import_hf"} if context.section.get("tokenizer") == "import_hf" else {}


def other_files(context: Context) -> dict[str, str]:
    """The tokenizer.json that it names otherwise."""
    named = context.section.get("tokenizer")
    return {"tokenizer": named} if named and named != "import_hf" else {}


FIELDS = fields.of_function(data.prepare, ("sources", "target", "seed", "given", "progress"))
STAGE = Stage(
    "prepare_data", run, inputs=inputs, other_files=other_files,
    fields=FIELDS | fields.of_class(sections.PrepareData), places=("tokenizer", "engine", "store"),
)  # fmt: skip

if __name__ == "__main__":
    main(STAGE)
