"""Imports a model of the Hugging Face format, or a GGUF file, as a checkpoint that any stage can start from.

python -m experiments.import_hf --source=SmolLM2-135M --workdir=runs/smollm2

Then --config.prune.init_from=import_hf (or another stage), or "import_hf" among the stages of a config.
"""

import dataclasses
import functools
from typing import Any

from absl import flags

from experiments import command, fields, sections
from experiments.contract import Context, Stage
from experiments.contract import run as run_contract
from experiments.display import Display
from experiments.stopping import Stop
from kwaicoder_jax import files, huggingface, models
from kwaicoder_jax.errors import UserError

DEFAULTS = dataclasses.asdict(sections.ImportHf())


def main() -> None:
    """The body of the command."""
    holder = command.define_flags()
    flags.DEFINE_string("source", None, "Folder with config.json and safetensors, or a GGUF file.")
    flags.DEFINE_string("tokenizer", None, "A tokenizer.json to use instead of the model's own.")
    flags.DEFINE_string("param_dtype", None, "What weights become: stored (as they are), float32, bfloat16, float16.")
    flags.DEFINE_string("dtype", None, "Of the computation: float32 or bfloat16.")

    def work(stop: Stop, display: Display) -> None:
        given = {name: flags.FLAGS[name].value for name in DEFAULTS}
        context = command.tool_context(STAGE, holder.value, DEFAULTS, given, stop, display)
        run_contract(context, restart=flags.FLAGS.restart)

    command.execute(work, required=("workdir",))


def run(context: Context) -> dict[str, Any]:
    """Writes import_hf/checkpoints, and the tokenizer's files beside it."""
    source = _source(context)
    tokenizer = source.tokenizer
    if tokenizer is None:
        remedy = "name one with --tokenizer=FILE"
        raise UserError("the model has no tokenizer.json", where="import_hf.tokenizer", remedy=remedy)
    config = source.config
    total, active = models.count(config), models.count_active(config)
    context.display.line(f"{source.name}: {source.family.architecture}, {total:,} parameters in {config.param_dtype}")
    meta = {
        "model": config.to_dict(),
        "tokenizer": tokenizer.hash,
        "lineage": [{"stage": "import_hf", "identity": context.identity, "huggingface": source.origin()}],
        "identity": context.identity,
    }
    files.write_text(context.folder / "tokenizer.json", tokenizer.serialized())
    for name, text in source.companions.items():
        files.write_text(context.folder / name, text)
    with context.display.megabytes() as show:
        huggingface.save(source, context.folder / "checkpoints", meta=meta, on_progress=show)
    return {
        "params_total": total,
        "params_active": active,
        "tensors": len(source.tensors),
        "vocab_size": tokenizer.vocab_size,
        "padding_rows": config.vocab_size - tokenizer.vocab_size,
    }


def _source(context: Context) -> huggingface.Source:
    section = {**DEFAULTS, **context.section}
    if not section["source"]:
        remedy = "as in --source=SmolLM2-135M: a folder or a GGUF file"
        raise UserError("is required", where="import_hf.source (--source)", remedy=remedy)
    return _open(*(section[name] for name in DEFAULTS))


@functools.lru_cache(maxsize=1)
def _open(source: str, tokenizer: str | None, param_dtype: str, dtype: str) -> huggingface.Source:
    return huggingface.open_model(source, tokenizer=tokenizer, param_dtype=param_dtype, dtype=dtype)


def contents(context: Context) -> dict[str, str]:
    """The source's identity: config, tokenizer, and of the weights every header and some samples."""
    return {"source": _source(context).identity}


STAGE = Stage(
    "import_hf", run, fields=fields.of_class(sections.ImportHf), places=("source", "tokenizer"), contents=contents
)

if __name__ == "__main__":
    main()
