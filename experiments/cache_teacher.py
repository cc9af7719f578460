"""Writes the teacher's top-K logits for the examples that distill will see, so that it trains without the teacher.

python -m experiments.cache_teacher --config=configs/demo.py --workdir=runs/demo
python -m experiments.distill --config=configs/demo.py --workdir=runs/demo --config.distill.cache=cache_teacher \
    --config.distill.loss.hidden=False

The data are distill's: its phases, seed, and place to go on. What is stored is found by the tokens of an example, so the
cache also serves other batch sizes, orders and numbers of processes, and other runs whose examples are the same.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from experiments import distill, fields, guides, sections
from experiments.command import main
from experiments.contract import Context, Stage, previous_checkpoint
from experiments.stopping import Stopped
from experiments.training_stage import (
    build,
    check_tokenizer,
    corpus_of,
    loader_of,
    mesh_of,
    on_disk,
    phases_of,
    read_model,
    runtime_of,
)
from kwaicoder_jax import checkpoints, data, distillation, files, models, training
from kwaicoder_jax.errors import UserError

Rows = Callable[[data.Batch], distillation.TopK]


def run(context: Context) -> dict[str, Any]:
    """Writes cache_teacher/cache."""
    mesh, corpus, distilling = mesh_of(context), corpus_of(context), as_distill(context)
    on_disk(context, "the shards of a cache are read from a disk")
    if training.row_share(mesh)[1] != jax.process_count():
        what, remedy = "processes that share rows would write them twice", "give each rows of its own (context, tensor)"
        raise UserError(what, where="mesh", remedy=remedy)
    phases = phases_of(distilling.section, "distill").data
    params, config, meta = read_model(context, "teacher", mesh)
    check_tokenizer(context, "teacher", meta, corpus)
    options = _options(context)
    header = distillation.Header(
        meta["identity"], corpus.tokenizer.hash, corpus.hash, config.vocab_size, options.top_k, options.dtype,
        _temperature(distilling),
    )  # fmt: skip
    batches = loader_of(distilling, corpus, phases, mesh)
    position = distill.data_position(distilling, checkpoints.read_meta(context.inputs["init_from"]))
    if position is not None:
        batches.go_on_from(position)
    writer = _writer(context.folder / "cache", header)
    if writer.position is not None:
        batches.set_state(writer.position)
    rows = _rows(context, config, params, header, mesh)
    _write(context, writer, batches, rows, options.shard_steps)
    training.processes.gather(None)  # every shard stands before the manifest lists them
    if not training.processes.is_writer():
        return {}
    return _summary(distillation.finish(context.folder / "cache"), header)


def _writer(folder: Any, header: distillation.Header) -> distillation.CacheWriter:
    """This process's writer; all of them go on at one place, behind the shards that each of them has.

    A cache that another number of processes began is begun anew: their shards are of other rows.
    """
    leads = training.processes.is_writer()
    if not leads:
        training.processes.gather(None)  # until the first one has begun the folder
    writer = distillation.CacheWriter(folder, header, process=jax.process_index())
    if leads:
        training.processes.gather(None)
    count = jax.process_count()
    reached = training.processes.gather(0 if writer.foreign(count) else writer.shards)
    writer.go_back(min(reached))
    training.processes.gather(None)
    for path in writer.foreign(count) if leads else ():  # last: while there are any, everybody starts over
        path.unlink()
    return writer


def as_distill(context: Context) -> Context:
    """The context of the stage that the cache is for."""
    return dataclasses.replace(context, stage=distill.STAGE, inputs={})


def _options(context: Context) -> sections.CacheTeacher:
    return build(sections.CacheTeacher, context.section, "cache_teacher")


def _temperature(distilling: Context) -> float:
    return float(build(distillation.DistillConfig, distilling.section["loss"], "distill.loss").temperature)


def _rows(
    context: Context, config: models.ModelConfig, params: Any, header: distillation.Header, mesh: Any
) -> Callable[[data.Batch], Any]:
    """What the teacher says about this process's rows of a batch, on the devices."""
    settings = distillation.LogitsSettings(
        temperature=header.temperature, top_k=header.top_k, shards=distill.row_shards(mesh)
    )
    runtime = runtime_of(context)

    @functools.partial(jax.jit, out_shardings=training.row_sharding(mesh))
    def top_k(params: Any, batch: Any) -> distillation.TopK:
        output = training.run_model(params, config, batch, runtime)
        return distillation.teacher_top_k(settings, output.hidden_BTD, models.projection(params))

    return lambda batch: top_k(params, training.shard_batch(batch, mesh))


def _write(context: Context, writer: distillation.CacheWriter, batches: data.Loader, rows: Rows, every: int):
    """All batches, a shard each `every` steps; a step is written while the next one is computed."""
    pending: tuple[data.Batch, distillation.TopK] | None = None
    with context.stop.deferred(), context.display.progress(batches.steps, "steps") as update:
        for batch in batches:
            found = rows(batch)
            if pending is not None:
                _add(writer, *pending)
            pending = (batch, found)
            if batches.step % every == 0 or batches.step == batches.steps:
                _add(writer, *pending)
                pending = None
                writer.commit(batches.get_state())
            update(batches.step)
            if context.stop.requested and batches.step < batches.steps:
                writer.close()
                raise Stopped


def _add(writer: distillation.CacheWriter, batch: data.Batch, found: distillation.TopK) -> None:
    writer.add(batch, jax.tree.map(_own_rows, found))


def _own_rows(array: jax.Array) -> np.ndarray:
    """This process's rows of an array that is split by rows, each once."""
    parts = {shard.index[0].start or 0: shard.data for shard in array.addressable_shards}
    return np.concatenate([np.asarray(parts[start]) for start in sorted(parts)])


def _summary(manifest: dict[str, Any], header: distillation.Header) -> dict[str, Any]:
    return {
        "examples": manifest["records"],
        "tokens": manifest["tokens"],
        "tail_mass": manifest["tail_mass"] / max(manifest["tokens"], 1),
        "cache_bytes": sum(shard["bytes"] + shard["index_bytes"] for shard in manifest["shards"]),
        "top_k": header.top_k,
    }


def inputs(context: Context) -> dict[str, str]:
    """The corpus, the teacher, and the student, for where its data ended."""
    teacher = context.section.get("teacher") or guides.name_of(context)
    return {"corpus": "prepare_data", "teacher": teacher, "init_from": previous_checkpoint(as_distill(context))}


def contents(context: Context) -> dict[str, str]:
    """What of distill's section counts: its data, and the temperature."""
    distilling = as_distill(context)
    specs = phases_of(distilling.section, "distill").data
    phases = [dataclasses.asdict(dataclasses.replace(spec, mixture=dict(spec.mixture))) for spec in specs]
    more = {"seed": distilling.seed, "continue_data": distilling.section["continue_data"]}
    return {"data": files.digest({"phases": phases, **more}), "temperature": str(_temperature(distilling))}


STAGE = Stage(
    "cache_teacher", run, ("loader",), inputs, fields=fields.of_class(sections.CacheTeacher), contents=contents,
    together=True,
)  # fmt: skip

if __name__ == "__main__":
    main(STAGE)
