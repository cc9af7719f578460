"""How processes join, tell one another and leave, against a coordination service that is a dict."""

import errno
import threading
import time

import jax
import pytest

from experiments import peers
from experiments.peers import LOST, Joined, PeerLeft
from experiments.stopping import Stop, Stopped
from kwaicoder_jax.errors import UserError
from tests.experiments.made_peers import Made, Service

SETTINGS = {"distributed": False, "coordinator": "host:1", "num_processes": 3, "process_id": 0, "join_seconds": 1}
SETTINGS |= {"peer_seconds": 5}
ALONE = {**SETTINGS, "coordinator": None, "num_processes": None, "process_id": None}


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(peers, "GRACE_SECONDS", -2.0)  # the leader waits one second
    monkeypatch.setattr(peers.time, "sleep", lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.05)))


def test_what_is_told_is_heard_however_long_that_takes():
    service = Service()
    leader, other = Joined(service, 0, 2), Joined(service, 1, 2)
    threading.Timer(0.3, lambda: leader.tell("stage/end", {"finished": True})).start()
    assert other.hear("stage/end") == {"finished": True}
    assert len(service.waits) > 3
    assert max(service.waits) <= 2000  # a signal has to be handled in between
    with pytest.raises(RuntimeError, match="ALREADY"):
        leader.tell("stage/end", 1)


def test_who_hears_nothing_because_the_service_is_gone_says_so():
    service = Service()
    service.broken = RuntimeError("UNAVAILABLE: failed to connect")
    with pytest.raises(RuntimeError, match="UNAVAILABLE"):
        Joined(service, 1, 2).hear("stage/end")


def test_notes_are_by_process_and_written_over():
    service = Service()
    first, second = Joined(service, 0, 12), Joined(service, 11, 12)
    first.note("alive", 1)
    first.note("alive", 2)
    second.note("alive", ["x"])
    second.note("left", 3)
    first.note("hung", 4)
    second.note("heard", 5)
    assert first.notes("alive") == {0: 2, 11: ["x"]}
    assert first.notes("hung") == {0: 4}
    assert (first.leads, second.leads) == (True, False)
    assert "process 11 of 12 on " in second.describe()


def test_who_leaves_first_is_heard_and_the_leader_waits_for_that(quick):
    leader = Made(0, 2)
    leader.written["left"] = {1: {"status": 2, "text": "first"}}
    began = time.monotonic()
    peers.leave(leader, LOST, "second")
    assert leader.written["left"] == {1: {"status": 2, "text": "first"}}
    assert 0.9 < time.monotonic() - began < 5.0  # nobody hears
    threading.Timer(0.3, lambda: leader.written["heard"].update({1: True})).start()
    began = time.monotonic()
    peers.leave(leader, LOST, "second")
    assert 0.2 < time.monotonic() - began < 0.9
    other = Made(1, 2)
    began = time.monotonic()
    peers.leave(other, 2, "ends")  # the notes stay where they are
    assert time.monotonic() - began < 0.2
    assert other.written["left"][1]["status"] == 2
    assert other.written["left"][1]["text"].endswith(" ends")


def test_the_leader_does_not_wait_for_the_lost(quick):
    leader = Made(0, 3)
    leader.written["heard"] = {1: True}
    began = time.monotonic()
    peers.leave(leader, LOST, "fails", lost=1)
    assert time.monotonic() - began < 0.5


@pytest.fixture
def made(monkeypatch, quick):
    """The peers that `joined` finds; nothing is left open in JAX."""
    found = Made(1, 2)
    monkeypatch.setattr(peers, "_join", lambda settings: found)
    monkeypatch.setattr(Stop, "install", lambda self: None)
    ended: list[bool] = []
    monkeypatch.setattr(jax.distributed, "shutdown", lambda: ended.append(True))
    return found, ended


def fails(error):
    with peers.joined(SETTINGS, Stop()):
        raise error


@pytest.mark.parametrize(
    ("error", "status", "text"),
    [
        (UserError("is wrong", where="a.b", remedy="mend it"), 2, "ends: a.b: is wrong; mend it"),
        (OSError(errno.ENOSPC, "No space left on device", "/x"), 2, "ends: /x No space left on device"),
        (RuntimeError("Gloo:\n connection reset"), LOST, "failed: RuntimeError: Gloo: connection reset"),
        (Stopped(), None, "was asked to stop"),
    ],
)
def test_the_others_learn_why_a_process_fails(made, error, status, text):
    found, ended = made
    with pytest.raises(type(error)):
        fails(error)
    assert found.written["left"][1]["status"] == status
    assert found.written["left"][1]["text"].endswith(text)
    assert not ended  # leaving in order would wait for the others


def test_who_fails_names_the_silent(made):
    found, _ = made
    found.written["alive"] = {0: [1.0, "process 0 of 2, in step after step 3"], 1: [1.0, "self"]}
    with pytest.raises(RuntimeError):
        fails(RuntimeError("reset"))
    assert found.written["left"][1]["text"].endswith("; process 0 of 2, in step after step 3 gives no sign of life")


@pytest.mark.parametrize(("status", "expected"), [(2, PeerLeft), (None, Stopped)])
def test_what_fails_because_another_has_left_ends_as_that_one(made, status, expected):
    found, _ = made
    found.written["left"] = {0: {"status": status, "text": "process 0 ends"}}
    with pytest.raises(expected) as caught:
        fails(RuntimeError("reset"))
    if expected is PeerLeft:
        assert (caught.value.text, caught.value.status) == ("process 0 ends", 2)
    assert found.written["heard"] == {1: True}
    assert 1 not in found.written["left"]


def test_at_the_end_all_leave_in_order(made):
    found, ended = made
    stop = Stop()
    with peers.joined(SETTINGS, stop) as inside:
        assert inside is found
        assert stop.leave is not None
    assert ended == [True]
    assert stop.leave is None
    assert not found.written


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_processes": 2}, "--num_processes: goes with --coordinator"),
        ({"process_id": 1}, "--process_id: goes with --coordinator"),
        ({"coordinator": "host:1", "num_processes": 2}, "--process_id: is missing"),
        ({"coordinator": "host:1", "process_id": 0}, "--num_processes: is missing"),
    ],
)
def test_settings_that_do_not_go_together(change, words):
    with pytest.raises(UserError, match=words), peers.joined({**ALONE, **change}, Stop()):
        pass


def test_alone_there_is_nobody_to_join():
    with peers.joined(ALONE, Stop()) as found:
        assert (found.leads, found.count, found.notes("alive")) == (True, 1, {})


def test_a_coordinator_that_does_not_answer_is_one_line(monkeypatch):
    def fail(**options):
        raise RuntimeError("DEADLINE_EXCEEDED: Barrier timed out\nand more")

    monkeypatch.setattr(jax.distributed, "initialize", fail)
    with pytest.raises(UserError) as caught, peers.joined(SETTINGS, Stop()):
        pass
    assert str(caught.value) == (
        "--coordinator: the processes do not find one another: DEADLINE_EXCEEDED: Barrier timed out; start all processes "
        "within --join_seconds, each with its own --process_id"
    )
