"""Time by phase over interrupted processes, against a story that was made up."""

import math

from kwaicoder_jax.training import timeline
from kwaicoder_jax.training.clock import Clock
from kwaicoder_jax.training.timeline import END, MARK, START


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
