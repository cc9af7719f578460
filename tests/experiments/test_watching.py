"""The watch over a process and its peers, against notes that are made up."""

import threading
import time

import pytest

from experiments import watching
from experiments.peers import LOST, Alone
from experiments.watching import Watch
from tests.experiments.made_peers import Made


class Ended(BaseException):
    """In place of the end of the process."""


@pytest.fixture
def ends(monkeypatch):
    """The exit statuses; a thread that ends the process ends itself here."""
    found: list[int] = []

    def end(status):
        found.append(status)
        raise Ended

    monkeypatch.setattr(watching, "end", end)
    monkeypatch.setattr(watching, "INTERVAL", 0.01)
    monkeypatch.setattr(watching, "COLLECT_SECONDS", 0.05)
    monkeypatch.setattr(watching, "GRACE_SECONDS", 0.3)
    monkeypatch.setattr(threading, "excepthook", lambda failure: None)
    return found


def until(condition, seconds=20.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def live(peers, *numbers):
    """A thread in which other processes give signs of life, until what it returns is set."""
    stop = threading.Event()

    def beat():
        while not stop.wait(0.01):
            for number in numbers:
                peers.written.setdefault("alive", {})[number] = [time.time(), f"process {number} lives"]

    threading.Thread(target=beat, daemon=True).start()
    return stop


def test_a_step_that_does_not_end_ends_the_process(ends, capfd):
    watch = Watch(seconds=0.6)
    with watch.over(Alone()), watch.armed():
        for step in range(30):  # longer than that in all
            watch.finished(step)
            time.sleep(0.03)
        assert not ends
        watch.at("input")
        until(lambda: ends)
    assert ends == [LOST]
    errors = capfd.readouterr().err
    assert "no step ended within 0.6 s: process 0 of 1" in errors
    assert "in input after step 29" in errors
    assert "test_watching.py" in errors  # the stacks


@pytest.mark.parametrize("sign", [lambda watch: watch.beat(), lambda watch: watch.at("save")])
def test_who_gets_on_and_who_is_not_armed_goes_on(ends, sign):
    watch = Watch(seconds=0.6)
    with watch.over(Alone()):
        time.sleep(0.7)  # before any training
        with watch.armed():
            for _ in range(15):
                sign(watch)
                time.sleep(0.05)
        time.sleep(0.7)
    assert not ends


def test_who_keeps_the_others_waiting_is_named(ends, capfd):
    peers = Made(0, 3)
    stop = live(peers, 1, 2)
    peers.written["hung"] = {1: {"text": "process 1, in save after step 7", "phase": "save", "step": 7}}
    watch = Watch(seconds=0.1)
    watch.at("step")
    with watch.over(peers), watch.armed():
        until(lambda: ends)
    stop.set()
    line = capfd.readouterr().err.splitlines()[-1]
    assert "process 2 does not answer; process 1, in save after step 7" in line
    assert "process 0" not in line  # it waits inside a step
    assert peers.written["left"][0]["status"] == LOST


def test_the_leader_misses_a_peer_and_tells_the_others(ends, capfd):
    peers = Made(0, 3)
    stop = live(peers, 1)
    peers.written["alive"] = {2: [0.0, "process 2 of 3"]}
    watch = Watch(peer_seconds=0.6)
    with watch.over(peers):
        until(lambda: ends)
    stop.set()
    assert ends == [LOST]
    assert peers.written["left"][0]["text"].startswith("process 2 of 3 gave no sign of life for 0.6 s")
    assert "process 2 of 3 gave no sign of life" in capfd.readouterr().err


def test_a_peer_that_gives_signs_is_not_missed(ends):
    peers = Made(0, 2)
    stop = live(peers, 1)
    with Watch(peer_seconds=0.6).over(peers):
        time.sleep(1.2)
        first = peers.written["alive"][0]
        until(lambda: peers.written["alive"][0] != first)  # and gives signs of its own
    stop.set()
    assert not ends


@pytest.mark.parametrize(("said", "status"), [(None, 75), (2, 2), (LOST, LOST)])
def test_when_a_peer_left_this_one_ends_with_its_status(ends, capfd, said, status):
    peers = Made(1, 2)
    peers.written["left"] = {0: {"status": said, "text": "process 0 has had enough"}}
    watch = Watch()
    watch.stop_status = 75
    with watch.over(peers):
        until(lambda: ends)
    assert ends == [status]
    assert peers.written["heard"] == {1: True}
    assert "process 0 has had enough" in capfd.readouterr().err


def test_the_main_thread_may_leave_by_itself_first(ends):
    peers = Made(1, 2)
    peers.written["left"] = {0: {"status": None, "text": ""}}
    with Watch().over(peers):
        time.sleep(0.1)
    time.sleep(0.4)
    assert not ends


def test_what_this_process_said_itself_does_not_end_it(ends):
    peers = Made(1, 2)
    peers.written["left"] = {1: {"status": 2, "text": ""}}
    with Watch().over(peers):
        time.sleep(0.5)
    assert not ends


def test_a_service_that_is_gone_is_a_lost_leader_and_a_short_failure_is_not(ends, capfd):
    down = threading.Event()

    def answer():
        if down.is_set():
            raise RuntimeError("UNAVAILABLE: no route\nto it")

    with Watch(peer_seconds=0.6).over(Made(1, 2, answer)):
        for _ in range(5):  # 1 s in all
            down.set()
            time.sleep(0.1)
            down.clear()
            time.sleep(0.1)
        assert not ends
        down.set()
        until(lambda: ends)
    assert ends == [LOST]
    assert "process 0 does not answer; it was killed? (UNAVAILABLE: no route)" in capfd.readouterr().err


def test_a_leader_that_is_frozen_is_noticed_though_the_question_never_returns(ends, capfd):
    frozen = threading.Event()

    def answer():
        if frozen.is_set():
            time.sleep(1000)

    with Watch(peer_seconds=0.5).over(Made(1, 2, answer)):
        time.sleep(0.8)
        assert not ends
        frozen.set()
        until(lambda: ends)
    assert ends == [LOST]
    assert "process 0 does not answer since 0.5 s; it is frozen?" in capfd.readouterr().err
