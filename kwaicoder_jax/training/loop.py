"""The train loop: restore, step, log, evaluate, save; the same bits whether or not it was interrupted."""

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from kwaicoder_jax.checkpoints import CheckpointStore
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.training import processes, resuming, timeline
from kwaicoder_jax.training.clock import Clock
from kwaicoder_jax.training.guard import Diverged, Guard, SpikeConfig
from kwaicoder_jax.training.mesh import batch_sharding, shard_batch
from kwaicoder_jax.training.metrics import MetricsLog
from kwaicoder_jax.training.resuming import Progress
from kwaicoder_jax.training.state import TrainState
from kwaicoder_jax.training.step import HeldOutLoss, Interrupted, StepFunction


class Preempted(BaseException):
    """The process was asked to stop, and what it had done is saved. Not an error."""


class Loader(Protocol):
    """An endless iterator of numpy batches whose position can be saved."""

    def __next__(self) -> dict[str, np.ndarray]: ...
    def get_state(self) -> dict[str, Any]: ...
    def set_state(self, state: dict[str, Any]) -> None: ...


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """When to log, evaluate and save, in steps (the last step does all three); and when to give up."""

    steps: int
    log_every: int = 10
    eval_every: int = 100
    save_every: int = 100
    max_skipped_steps: int = 10
    spike: SpikeConfig | None = None

    def __post_init__(self):
        for name in ("steps", "log_every", "eval_every", "save_every", "max_skipped_steps"):
            if getattr(self, name) < 1:
                what = f"{getattr(self, name)} is less than 1"
                raise UserError(what, where=f"loop.{name}", remedy="use 1 or more steps")


@dataclasses.dataclass
class Loop:
    """Everything that a training run needs; `run` goes from the last checkpoint to the last step.

    Where several processes train together, each has its own Loop, and all of them do the same.

    Attributes:
      config: intervals.
      step: the compiled step.
      initial_state: makes the state of a fresh start, already sharded.
      abstract: that state as ShapeDtypeStructs with shardings: what a checkpoint is read into.
      frozen: what the loss sees but does not train.
      loader: training batches.
      held_out: validation loss of the trained model.
      store: the stage's checkpoints.
      folder: the stage folder, for metrics.
      mesh: for placing batches.
      meta: the constant part of a checkpoint's description.
      flops_per_token: of training, by sequence length.
      phase_of: phase number by step, for the log.
      shapes_from: rows and places of all batches after a step; they are compiled before the first step, when a stop
        loses nothing. A shape that is not named is compiled when it comes.
      merge: one loader state of those of all processes.
      stop_requested: asked at every step border and between batches of an evaluation; true means save and raise
        Preempted.
      peak_flops: of all devices together, per second; for the share of it that is used (MFU).
      profile: first and last step that the profiler sees; its files go to `folder`/profile.
      on_record: called with each logged record, for progress display.
      on_step: called with each finished step's number.
      on_phase: called with the name of what the loop goes over to, and with whether steps would be lost now.
      on_warning: called with a line about what went wrong and was mended.
    """

    config: LoopConfig
    step: StepFunction
    initial_state: Callable[[], TrainState]
    abstract: TrainState
    frozen: Any
    loader: Loader
    held_out: HeldOutLoss
    store: CheckpointStore
    folder: Any
    mesh: Mesh
    meta: dict[str, Any]
    flops_per_token: Callable[[int], float]
    phase_of: Callable[[int], int] = lambda step: 0
    shapes_from: Callable[[int], Sequence[tuple[int, int]]] = lambda step: ()
    merge: Callable[[list[dict[str, Any]]], dict[str, Any]] = lambda states: states[0]
    stop_requested: Callable[[], bool] = lambda: False
    peak_flops: float | None = None
    profile: tuple[int, int] | None = None
    on_record: Callable[[dict[str, Any]], None] = lambda record: None
    on_step: Callable[[int], None] = lambda step: None
    on_phase: Callable[[str, bool], None] = lambda name, unsaved: None
    on_warning: Callable[[str], None] = lambda text: None

    def run(self) -> TrainState:
        """Trains to the last step and returns the final state.

        Raises:
          Diverged: the validation loss is not finite, or too many steps went wrong.
          Preempted: it was asked to stop, and has saved.
        """
        self._unsaved = self._profiling = False
        self._log: MetricsLog | None = None
        self._timeline, began = timeline.Timeline(self.folder), time.time()
        self.clock = Clock(lambda name: self.on_phase(name, self._unsaved))
        self._programs: dict[Any, Any] = {}
        self._vote = processes.make_vote(self.mesh)
        try:
            with self.clock.phase("restore"):
                state, progress = self._start()
            self._began = time.monotonic()
            # Since when, and at how many tokens and FLOPs, the rates are measured.
            self._window = (self._began, progress.tokens, progress.train_flops)
            if processes.is_writer():
                self._timeline.note(timeline.START, progress.step, {}, began)
            state = self._train(state, progress)
            with self.clock.phase("save"):
                self.store.wait()
            self._note(timeline.END, self.config.steps)  # a roll-back has begun another count than `progress`
            return state
        finally:
            if self._profiling:
                jax.profiler.stop_trace()
            if self._log is not None:
                self._log.close()

    def _note(self, kind: str, step: int) -> None:
        if processes.is_writer():
            self._timeline.note(kind, step, self.clock.read())

    def _start(self) -> tuple[TrainState, Progress]:
        # 1. This stage's own newest checkpoint. 2. Otherwise the initial state, which the caller built from another
        # stage's parameters or at random.
        self._guard = Guard(self.config.max_skipped_steps, self.config.spike)
        self._first_position = self.loader.get_state() if self.config.spike else None
        self._fresh_guard = self._guard.saved()
        found = resuming.newest(self.store, self.abstract, self.on_warning)
        if processes.is_writer():
            # `evaluated` is the step of the last evaluation before the save.
            steps = (found.progress.step, found.evaluated) if found else (None, None)
            self._log = MetricsLog(self.folder, *steps)
        if found is None:
            self._evaluated: int | None = None
            return self.initial_state(), Progress()
        self._guard = Guard(self.config.max_skipped_steps, self.config.spike, **found.guard)
        self._evaluated = found.evaluated
        self.loader.set_state(found.loader)
        return found.state, found.progress

    def _train(self, state: TrainState, progress: Progress) -> TrainState:
        self._compile(state, progress.step)
        if self._evaluation_is_due(progress.step):
            self._evaluate(state, progress.step)
        pending: tuple[int, int, Any] | None = None  # (step, sequence length, metrics on device) of the step before
        while progress.step + (pending is not None) < self.config.steps:
            with self.clock.phase("input"):
                arrays = next(self.loader)
                batch = shard_batch(arrays, self.mesh)
            program = self._program(state, batch)
            self._profile(progress.step + (pending is not None) + 1)
            with jax.transfer_guard("disallow"):
                self._unsaved = True
                state, metrics = program(state, batch, self.frozen)
            step = progress.step + (pending is not None) + 1
            jumped = pending is not None and self._account(progress, *pending)  # the next step is already on its way
            pending = None if jumped else (step, arrays["inputs"].shape[1], metrics)
            stop = self._vote(self.stop_requested())
            self.store.check()
            if pending is not None and (stop or self._is_regular(step) or self._evaluation_is_due(step)):
                jumped = self._account(progress, *pending)
                pending = None
            if jumped:
                state, progress = self._roll_back(state, progress)
            if pending is None:
                self._border(state, progress, stop)
        return state

    def _profile(self, step: int) -> None:
        """Starts the profiler before its first step is sent off, and stops it after its last one."""
        if self.profile is None or not processes.is_writer():
            return
        first, last = self.profile
        if step == first:
            jax.profiler.start_trace(str(self.folder / "profile"))
            self._profiling = True
        elif step > last and self._profiling:
            jax.profiler.stop_trace()
            self._profiling = False

    def _border(self, state: TrainState, progress: Progress, stop: bool) -> None:
        """What is due between two steps, when nothing is on its way."""
        step = progress.step
        last = step == self.config.steps
        if stop:  # without evaluating: that is done on resumption
            self._save(state, progress)
            if not last:
                self._leave()
        if self._evaluation_is_due(step):
            try:
                self._evaluate(state, step, lambda: not stop and self._vote(self.stop_requested()))
            except Interrupted:
                self._save(state, progress)
                if not last:
                    self._leave()
                self._evaluate(state, step)
        if self._is_regular(step):
            self._save(state, progress)

    def _leave(self) -> None:
        with self.clock.phase("save"):
            self.store.wait()
        self._unsaved = False
        raise Preempted

    def _is_regular(self, step: int) -> bool:
        return step == self.config.steps or step % self.config.save_every == 0

    def _evaluation_is_due(self, step: int) -> bool:
        due = step in (0, self.config.steps) or step % self.config.eval_every == 0
        return due and self._evaluated != step

    def _compile(self, state: TrainState, step: int) -> None:
        """Compiles what lies ahead, while nothing is there to be lost."""
        with self.clock.phase("compile"):
            if isinstance(self.held_out, HeldOutLoss):
                self.held_out.compile(state.trainable["model"])
            for rows, places in dict.fromkeys(self.shapes_from(step)):
                self._program(state, resuming.abstract_batch((rows, places), batch_sharding(self.mesh)))

    def _program(self, state: TrainState, batch: Any) -> Any:
        """The step for batches of this shape."""
        key = tuple(sorted((name, x.shape, str(x.dtype)) for name, x in batch.items()))
        if key not in self._programs:
            with self.clock.phase("compile"):
                lowered: Any = self.step.lower(state, batch, self.frozen)  # type: ignore[attr-defined]
                self._programs[key] = lowered.compile()
        return self._programs[key]

    def _account(self, progress: Progress, step: int, sequence_length: int, metrics: Any) -> bool:
        """Waits for a step's metrics and counts it; whether its loss is a spike."""
        values = jax.device_get(metrics)
        tokens, skipped = round(float(values.pop("tokens"))), bool(values.pop("skipped", False))
        progress.step = step
        if not skipped:
            progress.tokens += tokens
            progress.train_flops += tokens * self.flops_per_token(sequence_length)
        self.on_step(step)
        jumped, failure = False, None
        try:
            jumped = self._guard.is_spike(step, float(values["loss"]), skipped)
        except Diverged as error:
            failure = error
        if step % self.config.log_every == 0 or step in (1, self.config.steps) or jumped or failure:
            rates = self._rates(progress)
            record: dict[str, Any] = {"step": step, "tokens": progress.tokens, "phase": self.phase_of(step - 1)}
            record |= {key: np.asarray(value).tolist() for key, value in values.items()}
            record |= {"skipped_steps": self._guard.skipped, "seconds": time.monotonic() - self._began, **rates}
            self._write(record)
            self._note(timeline.MARK, step)
        if failure:
            raise failure
        self._loss = float(values["loss"])
        return jumped

    def _rates(self, progress: Progress) -> dict[str, float]:
        """Of the steps since the last record."""
        now, (since, tokens, flops) = time.monotonic(), self._window
        self._window = (now, progress.tokens, progress.train_flops)
        seconds = max(now - since, 1e-9)
        rate = (progress.tokens - tokens) / seconds
        rates = {"tokens_per_second": rate, "tokens_per_second_per_chip": rate / self.mesh.size}
        if self.peak_flops:
            rates["mfu"] = (progress.train_flops - flops) / seconds / self.peak_flops
        return rates

    def _write(self, record: dict[str, Any]) -> None:
        if self._log is not None:
            self._log.write(record)
        self.on_record(record)

    def _evaluate(self, state: TrainState, step: int, interrupted: Callable[[], bool] = lambda: False) -> None:
        with self._outside("evaluate"):
            record = {"step": step, **self.held_out(state.trainable["model"], interrupted)}
            self._write(record)
        if not math.isfinite(record["valid_loss"]):
            remedy = "lower it, or raise the warm-up" if step else "look at the parameters that training starts from"
            what = f"the validation loss is {record['valid_loss']} after step {step}"
            raise Diverged(what, where="phases.*.rate.peak" if step else "init_from", remedy=remedy)
        self._evaluated = step

    @contextlib.contextmanager
    def _outside(self, phase: str) -> Iterator[None]:
        """Around what is not the training's own time: its rate leaves it out."""
        began = time.monotonic()
        with self.clock.phase(phase):
            yield
        self._window = (self._window[0] + time.monotonic() - began, *self._window[1:])

    def _save(self, state: TrainState, progress: Progress) -> None:
        if self._is_regular(progress.step):
            self._guard.anchor = progress.step
        meta = {**self.meta, "progress": dataclasses.asdict(progress), "guard": self._guard.saved()}
        meta |= {"evaluated": self._evaluated}
        if self.config.spike is not None and 0 < self._guard.anchor < progress.step:
            meta["needs"] = [self._guard.anchor]
        self._note(timeline.MARK, progress.step)
        with self._outside("save"):
            meta["loader"] = self.merge(processes.gather(self.loader.get_state()))
            self.store.save(progress.step, state.trainable["model"], meta, resuming.rest(state))

    def _roll_back(self, state: TrainState, progress: Progress) -> tuple[TrainState, Progress]:
        """The state of the newest regular checkpoint, as if the steps since then had all been skipped; it is saved."""
        step, anchor = progress.step, self._guard.anchor
        with self.clock.phase("rollback"):
            self.store.wait()
            jax.tree.map(lambda x: x.delete(), state)
            if anchor:
                found = resuming.read(self.store, anchor, self.abstract)
                state, progress, position, before = found.state, found.progress, found.loader, found.guard
            else:
                assert self._first_position is not None
                state, progress, position, before = (
                    self.initial_state(),
                    Progress(),
                    self._first_position,
                    self._fresh_guard,
                )
            self._guard.roll_back(before, step, self._loss)
            self.on_warning(
                f"the loss jumped to {self._loss:.4g} in step {step}: back to step {anchor}, without the data since"
            )
            self.loader.set_state(position)
            for _ in range(step - anchor):
                next(self.loader)
            self._write({"step": step, "rolled_back_to": anchor})
            progress.step = step
            self._guard.anchor = step
            self._window = (time.monotonic(), progress.tokens, progress.train_flops)
            self._save(state, progress)
        return state, progress
