"""A toy model through the real loop: however often it is interrupted, it ends in the same bits."""

import contextlib
import functools
import random
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kwaicoder_jax import checkpoints, training
from kwaicoder_jax.training import LoopConfig, MetricsLog, Preempted, TrainState

MESH = training.make_mesh(training.MeshConfig(), jax.devices()[:1])
CONFIG = LoopConfig(steps=23, log_every=3, eval_every=7, save_every=5)  # none divides the steps
META = {"model": {"toy": 1}, "lineage": [], "identity": "x"}
FLOPS = 0.1  # not a binary fraction: its sums round, and must round in the same order


class Killed(BaseException):
    """As SIGKILL: nothing is saved."""


class Numbers:
    """Batches that depend on their number alone, of 5 rows of 4 or, from the tenth on, of 6 places."""

    def __init__(self):
        self.number = 0

    def __next__(self):
        rng = np.random.default_rng(self.number)
        shape = (5, 4 if self.number < 10 else 6)
        self.number += 1
        mask = (rng.random(shape) < 0.8).astype(np.float32)
        return {"inputs": rng.integers(0, 9, shape, dtype=np.int32), "loss_mask": mask}

    def get_state(self):
        return {"number": self.number}

    def set_state(self, state):
        self.number = state["number"]


OPTIMIZER = optax.adamw(0.1)


def loss(trainable, batch, frozen):
    guess = trainable["model"]["table"][batch["inputs"]] * trainable["extra"][0]
    tokens = jnp.sum(batch["loss_mask"])
    value = jnp.sum(batch["loss_mask"] * jnp.square(guess - frozen)) / tokens
    return value, {"loss": value, "tokens": tokens}


@functools.cache
def compiled():
    return training.make_step(loss, OPTIMIZER, lambda step: 0.1 * jnp.ones(()))


def initial_state():
    table = np.random.default_rng(0).standard_normal(9).astype(np.float32)
    return training.make_state({"model": {"table": jnp.asarray(table)}, "extra": jnp.ones(1)}, OPTIMIZER)


def abstract():
    shapes = jax.eval_shape(initial_state)
    return training.abstract_state(shapes, jax.tree.map(lambda _: training.replicated(MESH), shapes))


def held_out(params, interrupted=lambda: False):
    return {"valid_loss": float(np.sum(np.asarray(params["table"])))}


def run(folder, config=CONFIG, **options):
    """One process: a fresh Loop on the folder. Returns the final state, the loader and what the store holds."""
    with contextlib.closing(checkpoints.CheckpointStore(folder / "checkpoints")) as store:
        toy: Any = held_out
        loop = training.Loop(
            config=config, step=compiled(), initial_state=initial_state, abstract=abstract(), frozen=jnp.asarray(0.5),
            loader=Numbers(), held_out=toy, store=store, folder=folder, mesh=MESH, meta=META,
            flops_per_token=lambda length: FLOPS * length, **options,
        )  # fmt: skip
        state = loop.run()
        return state, loop.loader, store.meta(store.latest_step() or 0)


def records(folder):
    lines = training.read_metrics(folder / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key not in training.TIME_KEYS} for line in lines]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    return folder, *run(folder)


def assert_same_end(folder, result, whole):
    (state, loader, meta), (other_folder, other_state, other_loader, other_meta) = result, whole
    assert isinstance(state, TrainState)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(other_state), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert loader.get_state() == other_loader.get_state()
    # A stop at the last step saves first, and evaluates then.
    assert {**meta, "evaluated": None} == {**other_meta, "evaluated": None}
    assert records(folder) == records(other_folder)


def until_done(folder, **options):
    """Starts processes until one reaches the end; returns its result and how many were stopped."""
    for stopped in range(60):
        try:
            return run(folder, **options), stopped
        except (Preempted, Killed):
            pass
    raise AssertionError("it does not get on")


@pytest.mark.parametrize("seed", range(1, 3))
def test_stopped_at_random_steps_it_ends_in_the_same_bits(tmp_path, whole, seed):
    rng = random.Random(seed)
    result, stopped = until_done(tmp_path, stop_requested=lambda: rng.random() < 0.3)
    assert stopped > 1
    assert_same_end(tmp_path, result, whole)


@pytest.mark.parametrize("seed", range(1, 5))
def test_killed_at_random_steps_it_ends_in_the_same_bits(tmp_path, whole, seed):
    rng = random.Random(seed)

    def kill(step):
        if rng.random() < 0.15:
            with (tmp_path / "metrics.jsonl").open("a") as out:
                out.write('{"step": 9999, "lo')
            raise Killed

    result, stopped = until_done(tmp_path, on_step=kill)
    assert stopped > 1
    assert_same_end(tmp_path, result, whole)


def test_stopped_at_every_step_it_ends_in_the_same_bits(tmp_path, whole):
    result, stopped = until_done(tmp_path, stop_requested=lambda: True)
    assert stopped == CONFIG.steps - 1
    assert_same_end(tmp_path, result, whole)


def test_lines_beyond_the_checkpoint_are_dropped(tmp_path, whole):
    counter = iter(range(100))
    with pytest.raises(Preempted):
        run(tmp_path, stop_requested=lambda: next(counter) == 8)
    log = MetricsLog(tmp_path, 9)
    for step in (10, 12, 14):  # as of a process that went on from step 9 and was killed before it saved
        log.write({"step": step, "loss": -1.0})
    log.close()
    assert_same_end(tmp_path, run(tmp_path), whole)


def test_a_finished_run_does_nothing_more(tmp_path, whole):
    run(tmp_path)
    assert_same_end(tmp_path, run(tmp_path, on_step=lambda step: pytest.fail(f"step {step}")), whole)


def test_what_is_logged_evaluated_and_saved_and_when(tmp_path, monkeypatch):
    saved: list[int] = []
    steps: list[int] = []
    original = checkpoints.CheckpointStore.save

    def save(self, step, *arguments):
        saved.append(step)
        original(self, step, *arguments)

    monkeypatch.setattr(checkpoints.CheckpointStore, "save", save)
    seen: list[dict[str, Any]] = []
    run(tmp_path, on_record=seen.append, on_step=steps.append, phase_of=lambda step: 1 + (step >= 9))
    lines = records(tmp_path)
    assert [line["step"] for line in lines if "valid_loss" in line] == [0, 7, 14, 21, 23]
    assert [line["step"] for line in lines if "loss" in line] == [1, 3, 6, 9, 12, 15, 18, 21, 23]
    assert [line["step"] for line in lines] == sorted(line["step"] for line in lines)
    assert {line["step"]: line["phase"] for line in lines if "loss" in line}[9] == 1  # the step from 8 to 9
    assert {line["step"]: line["phase"] for line in lines if "loss" in line}[12] == 2
    assert saved == [5, 10, 15, 20, 23]
    assert steps == list(range(1, 24))
    assert [record["step"] for record in seen] == [line["step"] for line in lines]


def test_intervals_that_divide_the_steps_do_nothing_twice(tmp_path):
    run(tmp_path, LoopConfig(steps=4, log_every=2, eval_every=2, save_every=2))
    found = [(line["step"], "loss" in line) for line in records(tmp_path)]
    assert found == [(0, False), (1, True), (2, True), (2, False), (4, True), (4, False)]


def test_progress_counts_unmasked_tokens_and_flops_exactly(whole):
    _, _, _, meta = whole
    loader, tokens, flops = Numbers(), 0, 0.0
    for _ in range(CONFIG.steps):
        batch = next(loader)
        tokens += int(batch["loss_mask"].sum())
        flops += int(batch["loss_mask"].sum()) * (FLOPS * batch["inputs"].shape[1])
    assert meta["progress"] == {"step": 23, "tokens": tokens, "train_flops": flops}
    assert {key: meta[key] for key in META} == META
    assert meta["loader"] == {"number": 23}


def test_stopping_saves_the_step_that_was_done(tmp_path):
    with pytest.raises(Preempted):
        run(tmp_path, stop_requested=lambda: True)
    meta = checkpoints.read_meta(tmp_path)
    assert (meta["progress"]["step"], meta["loader"]["number"]) == (1, 1)
    assert [line["step"] for line in records(tmp_path)] == [0, 1]


@pytest.mark.parametrize(
    ("losses", "step", "where"), [([np.nan], 0, "init_from"), ([1.0, np.inf], 7, "phases.*.rate.peak")]
)
def test_a_validation_loss_that_is_no_number_ends_the_run(tmp_path, monkeypatch, losses, step, where):
    """It is in the metrics, and nothing is saved after it."""
    left = iter(losses)
    monkeypatch.setattr(sys.modules[__name__], "held_out", lambda params, interrupted: {"valid_loss": next(left)})
    with pytest.raises(training.Diverged, match=f"after step {step}") as error:
        run(tmp_path)
    assert error.value.where == where
    assert error.value.remedy
    valid = [record for record in training.read_metrics(tmp_path / "metrics.jsonl") if "valid_loss" in record]
    assert (valid[-1]["step"], valid[-1]["valid_loss"]) == (step, None)
    with contextlib.closing(checkpoints.CheckpointStore(tmp_path / "checkpoints")) as store:
        assert (store.latest_step() or 0) <= step
