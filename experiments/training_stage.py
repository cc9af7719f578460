"""What pretrain, distill and cpt share: from a config section to a train loop and its summary."""

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import fields
from experiments.contract import Context, Section
from experiments.driving import drive
from kwaicoder_jax import checkpoints, data, files, inference, models, training
from kwaicoder_jax.errors import UserError

QUANTIZATION = ("quantization", "quantize_gradients")  # fields of a training section that go into its Runtime


def build(cls: type, values: dict[str, Any], where: str) -> Any:
    """A dataclass from a config section; whatever is wrong with a field is a UserError that names it there."""
    known = fields.of_class(cls)
    fields.check_names(known, values, where)
    try:
        result = cls(**values)
    except UserError as error:  # a library names fields by the last part of their name alone
        raise UserError(error.what, where=f"{where}.{error.where.rpartition('.')[2]}", remedy=error.remedy) from error
    except (TypeError, ValueError, AttributeError):  # it takes the types for granted
        fields.check(known, values, where)
        raise
    fields.check(known, values, where)
    return result


def mesh_of(context: Context) -> Any:
    """The device mesh of the recipe; where nothing is trained, of whole rows.

    Of several processes one that works alone has its own devices' share of it.
    """
    config = build(training.MeshConfig, context.config.get("mesh", {}), "mesh")
    if context.stage.together:
        return training.make_mesh(config)
    config = training.without_context(config)
    if jax.process_count() == 1:
        return training.make_mesh(config)
    devices = jax.local_devices()
    return training.make_mesh(training.share_of(config, len(devices)), devices)


def runtime_from(config: Mapping[str, Any]) -> models.Runtime:
    """How a recipe computes its models, from its section `runtime`; for whatever platform that names."""
    values = config.get("runtime", {})
    for name in QUANTIZATION:
        if name in values:  # it would be no part of a stage's identity
            remedy = f"set it for a stage that trains, as in cpt.{name}"
            raise UserError("changes what a stage leaves", where=f"runtime.{name}", remedy=remedy)
    return build(models.Runtime, values, "runtime")


def training_runtime_of(context: Context, mesh: Any) -> models.Runtime:
    """The same for the train step of the context's stage, which may be quantised."""
    values = {name: context.section[name] for name in QUANTIZATION if name in context.section}
    where, exact = context.stage.name, runtime_of(context, mesh)
    return build(models.Runtime, dataclasses.asdict(exact) | values, where) if values else exact


def runtime_of(context: Context, mesh: Any = None) -> models.Runtime:
    """How the recipe computes its models: on the mesh's platform, or the one that is here."""
    runtime = runtime_from(context.config)
    here = jax.default_backend() if mesh is None else training.platform_of(mesh)
    return dataclasses.replace(runtime, platform=runtime.platform or here)


def placement_of(mesh: Any) -> inference.Placement | None:
    """Where an engine's rows and caches lie beside weights on `mesh`: rows as a batch is, heads as the model's are."""
    if mesh.size == 1:
        return None
    return inference.Placement(mesh, training.BATCH_AXES, training.RULES["kv_heads"])


def on_disk(context: Context, why: str) -> None:
    """UserError for a work folder in an object store."""
    if "://" in str(context.folder):
        raise UserError(why, where="--workdir", remedy="use a folder that all hosts see, such as a mounted bucket")


def corpus_of(context: Context) -> data.Corpus:
    """The corpus that prepare_data left in this work folder."""
    return data.Corpus.open(context.inputs["corpus"] / "corpus")


def loader_of(context: Context, corpus: data.Corpus, phases: list[data.PhaseSpec], mesh: Any) -> data.Loader:
    """This process's share of the batches of some phases, from their start."""
    index, count = training.row_share(mesh)
    section = context.config["loader"]
    share: dict[str, Any] = {
        "seed": context.seed, "streams": section["streams"], "process_index": index, "process_count": count,
    }  # fmt: skip
    if workers := section.get("workers", 0):
        return data.WorkerLoader(corpus, phases, workers=workers, **share)
    return data.TrainingLoader(corpus, phases, **share)


def calibration_phase(context: Context) -> data.PhaseSpec:
    """The `steps` batches of a transform's phase `calibration`."""
    name = context.stage.name
    section = Section({**context.section, "phases": {"calibration": context.section["calibration"]}}, name)
    return phases_of(section, name).data[0]


def calibration_of(context: Context, corpus: data.Corpus, mesh: Any) -> Iterator[dict[str, jax.Array]]:
    """Those batches, anew, on the mesh."""
    loader = loader_of(context, corpus, [calibration_phase(context)], mesh)
    return (training.shard_batch(batch, mesh) for batch in loader)


def validation_of(context: Context, corpus: data.Corpus) -> dict[str, list[data.Batch]]:
    """The fixed validation batches of the recipe, by source."""
    section = context.config["validation"]
    names = ("sequence_length", "batch_size", "max_tokens_per_source")
    for name in {*names, *section}:
        if name not in names:
            raise UserError("no such field", where=f"validation.{name}", remedy=f"the fields are {', '.join(names)}")
        if not isinstance(section[name], int) or section[name] < 1:
            raise UserError(f"{section[name]!r} is not a positive integer", where=f"validation.{name}")
    return data.validation_batches(corpus, **section)


def read_model(context: Context, role: str, mesh: Any) -> tuple[Any, models.ModelConfig, dict[str, Any]]:
    """The parameters on the mesh, config and description of an input's newest checkpoint."""
    place = context.inputs[role]
    meta = checkpoints.read_meta(place)
    config = models.ModelConfig.from_dict(meta["model"])
    where, summary = f"{context.stage.name}.{role}", place / "summary.json"
    steps = files.read_json(summary).get("steps") if summary.exists() else None
    if steps is not None and meta.get("progress", {}).get("step") != steps:
        what = f"the newest checkpoint of {place} is not of its last step, {steps}"
        raise UserError(what, where=where, remedy="copy it again, or run its stage again")
    try:
        params = checkpoints.read_params(place, training.abstract_params(config, mesh))
    except UserError as error:
        raise UserError(error.what, where=where, remedy=error.remedy) from error
    check_finite(params, place, where)
    return params, config, meta


def check_finite(params: Any, place: Any, where: str) -> None:
    """Refuses parameters of a run that diverged."""
    if not bool(_all_finite(params)):
        what = f"{place} holds numbers that are not finite"
        raise UserError(what, where=where, remedy="it diverged or is damaged: look at its losses, run its stage again")


@jax.jit
def _all_finite(params: Any) -> jax.Array:
    return jnp.all(jnp.stack([jnp.all(jnp.isfinite(x)) for x in jax.tree.leaves(params)]))


def check_tokenizer(context: Context, role: str, meta: dict[str, Any], corpus: data.Corpus) -> None:
    """Refuses a checkpoint that was trained with another tokenizer, or has no row for some of its tokens."""
    if meta["tokenizer"] != corpus.tokenizer.hash:
        raise UserError(
            "its tokenizer is not the corpus's", where=f"{context.stage.name}.{role}", remedy="train on its own corpus"
        )
    check_vocabulary(models.ModelConfig.from_dict(meta["model"]).vocab_size, corpus, f"{context.stage.name}.{role}")


def check_vocabulary(size: int, corpus: data.Corpus, where: str) -> None:
    """Refuses a model that cannot see some of the corpus's tokens."""
    if size < corpus.tokenizer.vocab_size:
        what = f"a vocabulary of {size} is less than the {corpus.tokenizer.vocab_size} tokens of the tokenizer"
        raise UserError(what, where=where, remedy=f"use {corpus.tokenizer.vocab_size} or more, or leave it out")


@dataclasses.dataclass(frozen=True)
class Phases:
    """A section's phases, as the loader and the schedule see them."""

    data: list[data.PhaseSpec]
    rates: list[training.PhaseRate]

    def phase_of(self, step: int) -> int:
        """The number of the phase that the step (from 0) belongs to, from 1."""
        borders = np.cumsum([phase.steps for phase in self.data])
        return int(np.searchsorted(borders, step, side="right")) + 1

    def shapes_from(self, step: int) -> list[tuple[int, int]]:
        """Rows and places of the batches that come after `step` of them."""
        ends = np.cumsum([phase.steps for phase in self.data])
        return [(phase.batch_size, phase.sequence_length) for phase, end in zip(self.data, ends) if end > step]


def phases_of(section: dict[str, Any], where: str) -> Phases:
    """Cuts `steps` into phases by their shares; borders are rounded to whole steps, each phase has at least one."""
    specs = dict(sorted(section["phases"].items()))
    if section["steps"] < 1:
        raise UserError(f"{section['steps']} is less than 1", where=f"{where}.steps", remedy="use 1 or more")
    shares = np.array([spec["share"] for spec in specs.values()], float)
    if not len(shares) or not np.all((shares > 0) & np.isfinite(shares)) or section["steps"] < len(shares):
        raise UserError(
            f"{section['steps']} steps in phases of shares {shares.tolist()}", where=f"{where}.phases",
            remedy="give positive shares and at least one step a phase",
        )  # fmt: skip
    borders = np.round(np.cumsum(shares) / shares.sum() * section["steps"]).astype(int)
    steps = np.diff(np.concatenate([[0], borders]))
    if steps.min() < 1:
        raise UserError(f"a phase has no step of {section['steps']}", where=f"{where}.steps", remedy="use more steps")
    inputs, rates, last = [], [], 0.0
    for count, (name, spec) in zip(steps, specs.items()):
        here = f"{where}.phases.{name}"
        fim = build(data.FimOptions, spec["fim"], f"{here}.fim")
        shape = {key: spec[key] for key in ("batch_size", "sequence_length", "mixture")}
        inputs.append(build(data.PhaseSpec, {"steps": int(count), "fim": fim, **shape}, here))
        rate = dict(spec["rate"])
        share = rate.pop("warmup_share", 0.0)
        if not 0 <= share <= 1:
            raise UserError(f"{share} is not between 0 and 1", where=f"{here}.rate.warmup_share")
        values = {"steps": int(count), "warmup": round(share * count), "start": last, **rate}
        rates.append(build(training.PhaseRate, values, f"{here}.rate"))
        last = rates[-1].peak if rates[-1].law == "constant" else rates[-1].end
    return Phases(inputs, rates)


@dataclasses.dataclass
class Run:
    """One training run of a stage.

    Attributes:
      folder: where its checkpoints and metrics go.
      model: config of the trained model.
      abstract: the trainable tree as ShapeDtypeStructs.
      load: makes the trainable tree of a fresh start.
      loss: see `training.step.LossFunction`.
      frozen: what the loss sees but does not train.
      flops_per_token: of one training token, by sequence length.
      lineage: of the checkpoints it writes.
      data_position: state of an earlier run's loader, to go on where that ended.
      moments: Adam's m, v and step count, laid out as the model.
      multipliers: learning-rate factor by parameter.
      epsilons: factor on Adam's epsilon by parameter.
      prepare: what is done to each batch of the loader, on the host, in its thread.
      bias_rate: by how much selection biases move in a step.
    """

    folder: Any
    model: models.ModelConfig
    abstract: Any
    load: Callable[[], Any]
    loss: Callable[..., Any]
    frozen: Any
    flops_per_token: Callable[[int], float]
    lineage: list[dict[str, Any]]
    data_position: dict[str, Any] | None = None
    moments: Callable[[], tuple[Any, Any, int]] | None = None
    multipliers: dict[str, float] | None = None
    epsilons: dict[str, float] | None = None
    prepare: Callable[[data.Batch], data.Batch] | None = None
    bias_rate: float = 0.0


def train(context: Context, run: Run, corpus: data.Corpus, mesh: Any, label: str = "") -> dict[str, Any]:
    """Trains to the end, from the run's own last checkpoint if there is one; returns the contract's summary keys."""
    section, name = context.section, context.stage.name
    phases = phases_of(section, name)
    program = program_of(section, name, run, mesh)
    batches = loader_of(context, corpus, phases.data, mesh)
    if run.data_position is not None:
        batches.go_on_from(run.data_position)
    loop_config = loop_config_of(section, name)
    loader = data.prefetch(batches if run.prepare is None else _Prepared(batches, run.prepare))
    loop = training.Loop(
        config=loop_config,
        step=program.step,
        initial_state=lambda: _with_moments(program.initial(run.load()), run),
        abstract=program.state,
        frozen=run.frozen,
        loader=loader,
        held_out=training.HeldOutLoss(run.model, validation_of(context, corpus), mesh, runtime_of(context, mesh)),
        store=checkpoints.CheckpointStore(run.folder / "checkpoints", asynchronous=True),
        folder=run.folder,
        mesh=mesh,
        meta={
            "model": run.model.to_dict(),
            "tokenizer": corpus.tokenizer.hash,
            "lineage": run.lineage,
            "identity": context.identity,
        },
        flops_per_token=run.flops_per_token,
        phase_of=phases.phase_of,
        shapes_from=phases.shapes_from if run.prepare is None else lambda step: (),  # its batches hold more
        merge=data.merge_states,
    )
    try:
        drive(context, loop, label)
    finally:
        loader.close()
        if isinstance(batches, data.WorkerLoader):
            batches.close()
    return summarise(run.folder)


@dataclasses.dataclass(frozen=True)
class Program:
    """A stage's train step.

    Attributes:
      step: (state, batch, frozen) -> (state, metrics), jitted.
      initial: makes its first state of the trainable tree, jitted.
      state: as ShapeDtypeStructs with shardings.
    """

    step: training.StepFunction
    initial: Callable[[Any], training.TrainState]
    state: training.TrainState


def program_of(section: dict[str, Any], name: str, run: Run, mesh: Any) -> Program:
    """The step of a run, on a mesh of devices that need not be here; nothing is compiled."""
    rate = training.join(phases_of(section, name).rates)
    optimizer = training.make_optimizer(
        build(training.OptimizerConfig, section["optimizer"], f"{name}.optimizer"), rate, run.model,
        run.multipliers, run.epsilons,
    )  # fmt: skip
    shardings = training.state_shardings(run.abstract, optimizer, run.model, mesh)
    make_state = functools.partial(training.make_state, optimizer=optimizer)
    parts = section.get("microbatches", 1)
    for phase in phases_of(section, name).data:
        training.check_time(phase.sequence_length, mesh)
        if parts > 1:
            training.check_rows(phase.batch_size, mesh, parts)
    return Program(
        training.make_step(run.loss, optimizer, rate, shardings, training.compiler_options(mesh), parts, run.bias_rate),
        jax.jit(make_state, out_shardings=shardings),
        training.abstract_state(jax.eval_shape(make_state, run.abstract), shardings),
    )


def loop_config_of(section: dict[str, Any], name: str) -> training.LoopConfig:
    """Intervals, and when a run gives up."""
    values = {key: section[key] for key in ("steps", "log_every", "eval_every", "save_every")}
    values["max_skipped_steps"] = section.get("max_skipped_steps", training.LoopConfig.max_skipped_steps)
    if section.get("spike") is not None:
        values["spike"] = build(training.SpikeConfig, section["spike"], f"{name}.spike")
    return build(training.LoopConfig, values, name)


def _with_moments(state: training.TrainState, run: Run) -> training.TrainState:
    """The state of a fresh start, with Adam's moments and count as they were carried along."""
    if run.moments is None:
        return state
    first, second, count = run.moments()
    adam = state.opt_state[1]  # behind clipping
    count = jax.device_put(np.asarray(count, adam.count.dtype), adam.count.sharding)
    adam = adam._replace(count=count, mu={**adam.mu, "model": first}, nu={**adam.nu, "model": second})
    opt_state = (state.opt_state[0], adam, *state.opt_state[2:])
    return training.TrainState(state.step, state.trainable, opt_state)


class _Prepared(data.TrainingLoader):
    """A loader whose batches are prepared further; its position is that of the loader."""

    def __init__(self, loader: data.Loader, prepare: Callable[[data.Batch], data.Batch]):
        self._loader, self._prepare = loader, prepare

    def __next__(self) -> data.Batch:
        return self._prepare(next(self._loader))

    def get_state(self) -> dict[str, Any]:
        return self._loader.get_state()

    def set_state(self, state: Mapping[str, Any]) -> None:
        self._loader.set_state(state)


def summarise(folder: Any) -> dict[str, Any]:
    """The summary of a finished run, from its metrics alone, so that it does not depend on interruptions."""
    records = training.read_metrics(folder / "metrics.jsonl")
    valid = [record for record in records if "valid_loss" in record]
    if not valid or not any("loss" in record for record in records):
        raise UserError("its records are gone", where=str(folder / "metrics.jsonl"), remedy="start over (--restart)")
    last = [record for record in records if "loss" in record][-1]
    store = checkpoints.CheckpointStore(folder / "checkpoints")
    step = store.latest_step()
    assert step is not None
    progress = store.meta(step)["progress"]
    store.close()
    summary = {
        "valid_loss_start": valid[0]["valid_loss"],
        "valid_loss_end": valid[-1]["valid_loss"],
        "train_loss_end": last["loss"],
        "tokens": progress["tokens"],
        "steps": progress["step"],
        "train_flops": progress["train_flops"],
        "skipped_steps": last.get("skipped_steps", 0),
    }
    for key in ("tokens_per_second", "tokens_per_second_per_chip", "mfu"):
        if found := [record[key] for record in records if key in record]:
            summary[key] = float(np.median(found))
    summary |= training.timeline.summarise(training.timeline.read(folder))
    return summary | {f"valid_loss_end_{source}": x for source, x in valid[-1]["valid_loss_by_source"].items()}


def abstract_tree(tree: Any, mesh: Any) -> Any:
    """Arrays as ShapeDtypeStructs that lie on every device."""
    everywhere = training.replicated(mesh)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere), tree)
