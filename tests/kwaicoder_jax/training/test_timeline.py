"""Time by phase over interrupted processes, against a story that was made up."""

import math
import time

import pytest

from kwaicoder_jax import checkpoints, training
from kwaicoder_jax.training import resuming, timeline
from kwaicoder_jax.training.clock import Clock
from kwaicoder_jax.training.timeline import END, MARK, START
from tests.kwaicoder_jax.training import toy


def event(kind, at, step, /, **seconds):
    return {"kind": kind, "at": at, "step": step, "seconds": seconds}


def test_the_parts_of_a_run_without_restarts_add_up():
    events = [
        event(START, 100.0, 0, restore=3.0, compile=7.0),
        event(MARK, 130.0, 10, restore=3.0, compile=7.0, step=28.0, save=2.0),
        event(END, 150.0, 20, restore=3.0, compile=7.0, step=45.0, save=3.0, input=2.0),
    ]  # fmt: skip
    got = timeline.summarise(events)
    assert (got["seconds_total"], got["seconds_lost_to_restarts"], got["restarts"]) == (50.0, 0.0, 0)
    assert (got["seconds_saving"], got["seconds_input"], got["goodput"]) == (3.0, 2.0, 0.9)


def test_work_that_was_done_again_and_time_without_a_process_are_lost():
    events = [
        event(START, 0.0, 0), event(MARK, 10.0, 5, step=10.0), event(MARK, 16.0, 8, step=16.0),  # killed: back to 5
        event(START, 36.0, 5), event(MARK, 44.0, 6, step=2.0, compile=6.0),  # killed before it saved: back to 5
        event(START, 50.0, 5), event(END, 60.0, 10, step=10.0),
    ]  # fmt: skip
    got = timeline.summarise(events)
    assert got["seconds_total"] == 60.0
    assert got["seconds_lost_to_restarts"] == 40.0  # 10 s of steps 1 to 5 and 10 s of steps 6 to 10 remain
    assert got["restarts"] == 2
    assert got["seconds_compiling"] == 0.0  # it was for nothing
    assert got["goodput"] == round(20 / 60, 4)


def test_nothing_is_said_of_a_run_that_nobody_timed():
    assert timeline.summarise([]) == {}


def test_a_line_that_was_cut_off_is_left_out(tmp_path):
    line = timeline.Timeline(tmp_path)
    line.note(START, 0, {"step": 0.0})
    with line.file.open("a") as out:
        out.write('{"kind": "ma\n')
    line.note(END, 3, {"step": 1.5})
    assert [each["kind"] for each in timeline.read(tmp_path)] == [START, END]


def test_phases_inside_one_another_share_the_time_out(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    entered: list[str] = []
    clock = Clock(entered.append)
    now[0] = 1.0
    with clock.phase("save"):
        now[0] = 3.0
        with clock.phase("input"):
            now[0] = 7.0
        now[0] = 7.5
    now[0] = 9.0
    assert clock.read() == {"step": 2.5, "save": 2.5, "input": 4.0}
    assert math.isclose(sum(clock.read().values()), 9.0)
    assert entered == ["save", "input", "save", "step"]


def slowly(function, seconds):
    def slow(*arguments, **named):
        time.sleep(seconds)
        return function(*arguments, **named)

    return slow


class SlowStep:
    """One that takes its time to be compiled."""

    def __init__(self, step):
        self._step = step

    def lower(self, *arguments):
        time.sleep(0.3)
        return self._step.lower(*arguments)


def test_the_loop_notes_each_phase_of_a_run_that_is_stopped_and_rolls_back(tmp_path, monkeypatch):
    step = toy.step()
    monkeypatch.setattr(toy, "step", lambda: SlowStep(step))
    monkeypatch.setattr(toy.Numbers, "__next__", slowly(toy.Numbers.__next__, 0.01))
    monkeypatch.setattr(toy, "held_out", slowly(toy.held_out, 0.1))
    monkeypatch.setattr(checkpoints.CheckpointStore, "save", slowly(checkpoints.CheckpointStore.save, 0.1))
    monkeypatch.setattr(resuming, "read", slowly(resuming.read, 0.4))
    options = {"spike": training.SpikeConfig(3.0, window=4, max_rollbacks=3)}
    asked = iter(range(100))
    with pytest.raises(training.Preempted):
        toy.run(tmp_path, {18: toy.HUGE}, stop_requested=lambda: next(asked) == 11, **options)
    before = time.time()
    toy.run(tmp_path, {18: toy.HUGE}, **options)
    events = timeline.read(tmp_path)
    first, second = (at for at, each in enumerate(events) if each["kind"] == START)
    assert (events[first]["step"], events[second]["step"], events[-1]["step"]) == (0, 12, 24)
    assert events[-1]["kind"] == END
    assert events[second]["at"] < before + 0.3  # before the checkpoint is read
    marks = [(each["step"], each["seconds"]) for each in events[second:] if each["kind"] == MARK]
    assert [step for step, _ in marks] == [13, 14, 15, 15, 16, 17, 18, 18, 19, 20, 20, 21, 22, 23, 24, 24]  # with saves
    found = timeline.summarise(events)
    least = {"input": 0.24, "evaluating": 0.5, "saving": 0.6, "restoring": 0.4, "compiling": 0.6, "rolling_back": 0.4}
    for name, seconds in least.items():
        assert seconds <= found[f"seconds_{name}"] < found["seconds_total"] - 1.0, name
    assert found["restarts"] == 1
    assert 0 < found["goodput"] < 1
