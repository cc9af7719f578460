"""Copies in time, against closed forms."""

import pytest

from kwaicoder_jax.hardware.schedule.machine import Event
from kwaicoder_jax.hardware.schedule.timeline import DeadlockError, Memory, SemaphoreError, replay

MEMORY = Memory(latency=100.0, bytes_per_cycle=10.0)


def copy(cycle, semaphore, nbytes):
    return Event(cycle, "start", semaphore, 1, nbytes)


def awaited(cycle, semaphore, amount=1):
    return [Event(cycle, "wait", semaphore, amount), Event(cycle, "signal", semaphore, -amount)]


def test_a_copy_takes_latency_and_bandwidth():
    assert replay([[copy(7, 1, 5000), *awaited(8, 1)]], MEMORY) == [100 + 500 - 1]


def test_arithmetic_hides_a_copy():
    assert replay([[copy(0, 1, 5000), *awaited(400, 1)]], MEMORY) == [200]
    assert replay([[copy(0, 1, 5000), *awaited(601, 1)]], MEMORY) == [0]


def test_copies_queue_for_bandwidth_and_share_the_latency():
    events = [copy(0, 1, 5000), copy(0, 2, 5000), *awaited(10, 2), *awaited(10, 1)]
    assert replay([events], MEMORY) == [100 + 1000 - 10]


def test_a_stall_delays_what_follows_it():
    events = [copy(0, 1, 1000), *awaited(0, 1), copy(0, 1, 1000), *awaited(0, 1)]
    assert replay([events], MEMORY) == [2 * (100 + 100)]


def test_copies_inside_of_a_core_take_the_latency_only():
    events = [copy(0, 1, 5000), copy(0, 2, 0), *awaited(0, 2), *awaited(600, 1)]
    assert replay([events], MEMORY) == [100]


def test_a_wait_for_several_copies_ends_with_the_last():
    events = [copy(0, 1, 1000), copy(0, 1, 1000), *awaited(0, 1, 2)]
    assert replay([events], MEMORY) == [100 + 200]


def test_waits_without_copies_are_deadlocks():
    with pytest.raises(DeadlockError, match=r"at cycle 3 .* stands at 2"):
        replay([[copy(0, 1, 10), *awaited(3, 1, 2)]], MEMORY)
    with pytest.raises(DeadlockError):
        replay([[copy(0, 1, 10), *awaited(3, 2)]], MEMORY)


def test_copies_that_nothing_waits_for_are_an_error():
    with pytest.raises(SemaphoreError, match="does not wait for each"):
        replay([[copy(0, 1, 10)]], MEMORY)
    replay([[copy(0, 1, 10), Event(1, "reset", 1, 0), *awaited(2, 1), Event(3, "reset", 1, 1)]], MEMORY)


def test_cores_wait_for_each_other():
    ready = Event(500, "remote", 9, 1, core=0)
    assert replay([awaited(20, 9), [ready]], MEMORY) == [500 + 100 - 20, 0]
    answer = Event(20, "remote", 9, 1, core=1)
    with pytest.raises(DeadlockError):
        replay([[*awaited(20, 9), answer], [*awaited(20, 9), ready]], MEMORY)
    assert replay([[answer, *awaited(20, 9)], [*awaited(20, 9), ready]], MEMORY) == [500 + 100 + 100 - 20, 100]
