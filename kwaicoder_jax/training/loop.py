"""The train loop: restore, step, log, evaluate, save; the same bits whether or not it was interrupted."""

import dataclasses
import math
import time
from collections.abc import Callable
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import Mesh

from kwaicoder_jax.checkpoints import CheckpointStore
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.training.mesh import shard_batch
from kwaicoder_jax.training.metrics import MetricsLog
from kwaicoder_jax.training.state import TrainState
from kwaicoder_jax.training.step import HeldOutLoss, StepFunction


class Preempted(BaseException):
    """The process was asked to stop, and what it had done is saved. Not an error."""


class Diverged(UserError):
    """The validation loss is no number any more."""


class Loader(Protocol):
    """An endless iterator of numpy batches whose position can be saved."""

    def __next__(self) -> dict[str, np.ndarray]: ...
    def get_state(self) -> dict[str, Any]: ...
    def set_state(self, state: dict[str, Any]) -> None: ...


@dataclasses.dataclass(frozen=True)
class LoopConfig:
    """When to log, evaluate and save, in steps; the last step does all three."""

    steps: int
    log_every: int = 10
    eval_every: int = 100
    save_every: int = 100

    def __post_init__(self):
        for name, value in dataclasses.asdict(self).items():
            if value < 1:
                raise UserError(f"{value} is less than 1", where=f"loop.{name}", remedy="use 1 or more steps")


@dataclasses.dataclass
class Progress:
    """Host-side counters that are saved with each checkpoint."""

    step: int = 0
    tokens: int = 0
    train_flops: float = 0.0


@dataclasses.dataclass
class Loop:
    """Everything that a training run needs; `run` goes from the last checkpoint to the last step.

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
      stop_requested: asked at every step border; true means save and raise Preempted.
      on_record: called with each logged record, for progress display.
      on_step: called with each finished step's number.
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
    stop_requested: Callable[[], bool] = lambda: False
    on_record: Callable[[dict[str, Any]], None] = lambda record: None
    on_step: Callable[[int], None] = lambda step: None

    def run(self) -> TrainState:
        """Trains to the last step and returns the final state; Diverged where the validation loss is not finite."""
        state, progress = self._start()
        self._log = MetricsLog(self.folder, progress.step if progress.step else None)
        self._began = time.monotonic()
        self._window = (self._began, progress.tokens)  # since when, and at how many tokens, the rate is measured
        try:
            return self._train(state, progress)
        finally:
            self._log.close()

    def _start(self) -> tuple[TrainState, Progress]:
        # 1. This stage's own newest checkpoint. 2. Otherwise the initial state, which the caller built from another
        # stage's parameters or at random.
        latest = self.store.latest_step()
        if latest is None:
            return self.initial_state(), Progress()
        params = self.store.restore(latest, "params", self.abstract.trainable["model"])
        rest = self.store.restore(latest, "train", self._rest(self.abstract))
        meta = self.store.meta(latest)
        self.loader.set_state(meta["loader"])
        trainable = {"model": params, **rest["extras"]}
        return TrainState(rest["step"], trainable, rest["opt_state"]), Progress(**meta["progress"])

    @staticmethod
    def _rest(state: TrainState) -> dict[str, Any]:
        extras = {name: tree for name, tree in state.trainable.items() if name != "model"}
        return {"step": state.step, "extras": extras, "opt_state": state.opt_state}

    def _train(self, state: TrainState, progress: Progress) -> TrainState:
        if progress.step == 0:
            self._evaluate(state, 0)
        pending: tuple[int, int, Any] | None = None  # (step, sequence length, metrics on device) of the step before
        while progress.step + (pending is not None) < self.config.steps:
            with jax.transfer_guard("disallow"):
                batch = shard_batch(next(self.loader), self.mesh)
                state, metrics = self.step(state, batch, self.frozen)
            if pending is not None:  # read only now: the next step is already on its way
                self._account(progress, *pending)
            step = progress.step + 1
            pending = (step, batch["inputs"].shape[1], metrics)
            stop = self.stop_requested()
            due = [stop, step == self.config.steps, step % self.config.save_every == 0]
            evaluate = step == self.config.steps or step % self.config.eval_every == 0
            if any(due) or evaluate:
                self._account(progress, *pending)
                pending = None
                if evaluate:
                    self._evaluate(state, step)
                if any(due):
                    self._save(state, progress)
                if stop and step < self.config.steps:
                    raise Preempted
        return state

    def _account(self, progress: Progress, step: int, sequence_length: int, metrics: Any) -> None:
        values = jax.device_get(metrics)
        tokens = round(float(values.pop("tokens")))
        progress.step = step
        progress.tokens += tokens
        progress.train_flops += tokens * self.flops_per_token(sequence_length)
        self.on_step(step)
        if step % self.config.log_every == 0 or step in (1, self.config.steps):
            now, (since, before) = time.monotonic(), self._window
            rate, self._window = (progress.tokens - before) / max(now - since, 1e-9), (now, progress.tokens)
            record: dict[str, Any] = {"step": step, "tokens": progress.tokens, "phase": self.phase_of(step - 1)}
            record |= {key: np.asarray(value).tolist() for key, value in values.items()}
            record |= {"seconds": now - self._began, "tokens_per_second": rate}
            self._log.write(record)
            self.on_record(record)

    def _evaluate(self, state: TrainState, step: int) -> None:
        began = time.monotonic()
        record = {"step": step, **self.held_out(state.trainable["model"])}
        self._log.write(record)
        self.on_record(record)
        self._window = (self._window[0] + time.monotonic() - began, self._window[1])  # not the training's time
        if not math.isfinite(record["valid_loss"]):
            remedy = "lower it, or raise the warm-up" if step else "look at the parameters that training starts from"
            what = f"the validation loss is {record['valid_loss']} after step {step}"
            raise Diverged(what, where="phases.*.rate.peak" if step else "init_from", remedy=remedy)

    def _save(self, state: TrainState, progress: Progress) -> None:
        meta = {**self.meta, "progress": dataclasses.asdict(progress), "loader": self.loader.get_state()}
        self.store.save(progress.step, state.trainable["model"], meta, self._rest(state))
