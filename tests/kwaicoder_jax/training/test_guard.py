"""Steps that go wrong: against plain steps without their batches, to the bit, also when the run is interrupted."""

import itertools
import random
import time

import jax.numpy as jnp
import numpy as np
import pytest

from kwaicoder_jax import checkpoints, training
from kwaicoder_jax.checkpoints import writing
from kwaicoder_jax.errors import UserError
from tests.kwaicoder_jax.training import toy

POISON = {6: toy.NAN, 7: toy.INF, 13: -toy.INF}
SPIKE = training.SpikeConfig(factor=3.0, window=4, max_rollbacks=3)
# The median is of 4 losses. Step 12 jumps: back to 10, without 11 and 12. Step 14 jumps: back to 12, without 13, 14.
JUMPS = {12: toy.HUGE, 14: -toy.HUGE}
KEPT = [number for number in range(1, toy.STEPS + 1) if number not in (11, 12, 13, 14)]


class Killed(BaseException):
    """As SIGKILL: nothing is saved."""


def records(folder):
    lines = training.read_metrics(folder / "metrics.jsonl")
    return [{key: value for key, value in line.items() if key not in training.TIME_KEYS} for line in lines]


def test_a_step_without_a_finite_gradient_changes_nothing(tmp_path):
    state, meta, _ = toy.run(tmp_path, POISON)
    kept = [number for number in range(1, toy.STEPS + 1) if number not in POISON]
    toy.assert_same_bits(state, toy.plain(kept))
    assert int(state.step) == toy.STEPS - 3
    assert meta["progress"]["step"] == toy.STEPS
    assert meta["progress"]["tokens"] == 20 * len(kept)
    counts = {line["step"]: line["skipped_steps"] for line in records(tmp_path) if "loss" in line}
    assert [counts[number] for number in (5, 6, 7, 12, 13, 24)] == [0, 1, 2, 2, 3, 3]


def test_a_gradient_that_is_not_finite_behind_a_finite_loss_counts_too():
    """d sqrt(x) / dx at 0."""

    def loss(trainable, batch, frozen):
        value = jnp.sqrt(jnp.sum(trainable["model"] * batch["x"]))
        return value, {"loss": value}

    optimizer = toy.OPTIMIZER
    state = training.make_state({"model": jnp.zeros(3)}, optimizer)
    after, metrics = training.make_step(loss, optimizer, lambda step: step * 0.0)(state, {"x": jnp.ones(3)}, None)
    assert np.isfinite(metrics["loss"])
    assert metrics["skipped"]
    toy.assert_same_bits(after, training.make_state({"model": jnp.zeros(3)}, optimizer))


def test_too_many_in_a_row_end_the_run_and_leave_the_last_checkpoint(tmp_path):
    poison = {3: toy.NAN, 4: toy.NAN, 11: toy.NAN, 12: toy.NAN, 13: toy.NAN}
    for _ in range(2):  # the second time from the checkpoint
        with pytest.raises(training.Diverged, match="3 steps in a row, the last one step 13, had no finite") as caught:
            toy.run(tmp_path, poison, max_skipped_steps=3)
        assert "\n" not in str(caught.value)
        assert checkpoints.newest_step(tmp_path) == 10


def test_the_row_is_counted_across_interruptions(tmp_path):
    poison = {11: toy.NAN, 12: toy.NAN, 13: toy.NAN}
    asked = iter(range(100))
    with pytest.raises(training.Preempted):
        toy.run(tmp_path, poison, max_skipped_steps=3, stop_requested=lambda: next(asked) == 11)
    assert checkpoints.newest_step(tmp_path) == 12
    with pytest.raises(training.Diverged, match="the last one step 13"):
        toy.run(tmp_path, poison, max_skipped_steps=3)


def test_a_jump_rolls_back_and_leaves_out_the_data_in_between(tmp_path):
    warnings: list[str] = []
    state, meta, loop = toy.run(tmp_path, JUMPS, spike=SPIKE, on_warning=warnings.append)
    toy.assert_same_bits(state, toy.plain(KEPT))
    assert meta["guard"]["windows"] == [[11, 12], [13, 14]]
    assert [text.split(": ")[1] for text in warnings] == [
        "back to step 10, without the data since", "back to step 12, without the data since"
    ]  # fmt: skip
    assert meta["progress"] == {"step": toy.STEPS, "tokens": 20 * len(KEPT), "train_flops": 20 * len(KEPT) * 10.0}
    assert loop.loader.get_state() == {"number": toy.STEPS}


def test_before_the_first_checkpoint_it_rolls_back_to_the_start(tmp_path):
    state, meta, _ = toy.run(tmp_path, {4: toy.HUGE}, spike=training.SpikeConfig(3.0, window=2, max_rollbacks=1))
    toy.assert_same_bits(state, toy.plain(range(5, toy.STEPS + 1)))
    assert meta["guard"]["windows"] == [[1, 4]]


def test_jumps_without_end_end_the_run(tmp_path):
    with pytest.raises(training.Diverged, match=r"jumped to .* in step 18, after 1 roll-backs"):
        toy.run(tmp_path, {9: toy.HUGE, 18: toy.HUGE}, spike=training.SpikeConfig(3.0, window=4, max_rollbacks=1))
    assert checkpoints.newest_step(tmp_path) == 15


@pytest.mark.parametrize("seed", range(4))
def test_interrupted_at_random_steps_a_run_that_rolls_back_ends_in_the_same_bits(tmp_path, seed):
    """Stopped (which saves steps that are not regular) and killed, at the jumps as well."""
    rng = random.Random(seed)

    def kill(step):
        if rng.random() < 0.08:
            raise Killed

    for _stopped in range(100):
        try:
            state, meta, _ = toy.run(
                tmp_path, JUMPS | {3: toy.NAN}, spike=SPIKE, on_step=kill, stop_requested=lambda: rng.random() < 0.15
            )
            break
        except (training.Preempted, Killed):
            pass
    toy.assert_same_bits(state, toy.plain([number for number in KEPT if number != 3]))
    assert meta["guard"]["windows"] == [[11, 12], [13, 14]]
    lines = records(tmp_path)
    trained = [line["step"] for line in lines if "loss" in line]
    assert trained == sorted(trained)
    assert trained == list(range(1, toy.STEPS + 1))
    assert [line["step"] for line in lines if "valid_loss" in line] == [0, 7, 14, 21, 24]


def test_a_newest_checkpoint_with_damaged_data_is_passed_over_with_a_warning(tmp_path):
    asked = iter(range(100))
    with pytest.raises(training.Preempted):
        toy.run(tmp_path, stop_requested=lambda: next(asked) == 11)
    for file in (tmp_path / "checkpoints/12").rglob("d/*"):
        file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    warnings: list[str] = []
    state, _, _ = toy.run(tmp_path, on_warning=warnings.append)
    assert warnings
    assert warnings[0].startswith("the checkpoint of step 12 cannot be read, and is passed over")
    toy.assert_same_bits(state, toy.plain(range(1, toy.STEPS + 1)))


def test_a_newest_checkpoint_that_lost_files_is_passed_over_with_a_warning(tmp_path):
    asked = iter(range(100))
    with pytest.raises(training.Preempted):
        toy.run(tmp_path, stop_requested=lambda: next(asked) == 11)
    (tmp_path / "checkpoints/12/train/_METADATA").unlink()
    warnings: list[str] = []
    state, _, _ = toy.run(tmp_path, on_warning=warnings.append)
    assert warnings == ["the checkpoint of step 12 is not whole, and passed over"]
    toy.assert_same_bits(state, toy.plain(range(1, toy.STEPS + 1)))


def test_stops_in_between_do_not_cost_the_checkpoint_to_go_back_to(tmp_path):
    """Two checkpoints are kept, and the regular one that a jump would go back to."""
    for asks in (11, 1, 1):
        asked = itertools.count(1)
        with pytest.raises(training.Preempted):
            toy.run(tmp_path, spike=SPIKE, stop_requested=lambda asked=asked, asks=asks: next(asked) == asks)
    store = checkpoints.CheckpointStore(tmp_path / "checkpoints")
    assert store.complete_steps() == [13, 12, 10]
    assert [store.meta(step).get("needs") for step in (13, 12, 10)] == [[10], [10], None]
    state, meta, _ = toy.run(tmp_path, {14: toy.HUGE}, spike=SPIKE)
    assert meta["guard"]["windows"] == [[11, 14]]
    toy.assert_same_bits(state, toy.plain([number for number in range(1, toy.STEPS + 1) if not 11 <= number <= 14]))


def test_where_nothing_is_gone_back_to_no_more_than_two_are_kept(tmp_path):
    for asks in (11, 1, 1):
        asked = itertools.count(1)
        with pytest.raises(training.Preempted):
            toy.run(tmp_path, stop_requested=lambda asked=asked, asks=asks: next(asked) == asks)
    assert checkpoints.CheckpointStore(tmp_path / "checkpoints").complete_steps() == [13, 12]


class _Fails:
    """A piece of a save that is written behind the next steps, or not."""

    def result(self, timeout=None):
        raise ValueError("the network is down\nand more")


def test_a_save_that_fails_behind_the_next_steps_is_told_before_the_next_save(tmp_path, monkeypatch):
    saves, steps = itertools.count(1), []
    original = writing.Handler.async_save

    async def failing(self, directory, *arguments, **named):
        found = await original(self, directory, *arguments, **named)
        return [*(found or ()), _Fails()] if next(saves) > 2 else found  # two items a save: the second one fails

    def on_step(step):
        steps.append(step)
        time.sleep(0.1)  # for the writing

    with monkeypatch.context() as patched:
        patched.setattr(writing.Handler, "async_save", failing)
        with pytest.raises(checkpoints.SaveFailed, match=r"a checkpoint could not be written: the network is down$"):
            toy.run(tmp_path, on_step=on_step)
    assert 10 <= steps[-1] < 15
    assert checkpoints.newest_step(tmp_path) == 5
    toy.assert_same_bits(toy.run(tmp_path)[0], toy.plain(range(1, toy.STEPS + 1)))


def test_where_none_can_be_read_the_run_does_not_start_over(tmp_path):
    asked = iter(range(100))
    with pytest.raises(training.Preempted):
        toy.run(tmp_path, stop_requested=lambda: next(asked) == 3)
    for file in (tmp_path / "checkpoints/4").rglob("d/*"):
        file.write_bytes(b"")
    with pytest.raises(UserError, match="no checkpoint of this run can be read"):
        toy.run(tmp_path)


@pytest.mark.parametrize("values", [{"factor": 1.0}, {"window": 0}, {"max_rollbacks": -1}])
def test_a_rule_for_jumps_that_makes_no_sense_is_refused(values):
    with pytest.raises(UserError, match=next(iter(values))):
        training.SpikeConfig(**values)
