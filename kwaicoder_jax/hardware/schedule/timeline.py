"""Replays the copies and signals of a chip's cores in time: how long each core waits."""

import collections
import dataclasses
import heapq
from collections.abc import Sequence

from kwaicoder_jax.hardware.schedule.machine import Event


class SemaphoreError(ValueError):
    """A kernel that ends without having waited for each of its copies and signals."""


class DeadlockError(SemaphoreError):
    """A wait for copies or signals that do not come."""


@dataclasses.dataclass(frozen=True)
class Memory:
    """How fast copies are.

    Attributes:
      latency: cycles from the start of a copy to its first bytes; a signal takes as long to the other core.
      bytes_per_cycle: of HBM, for each core.
    """

    latency: float
    bytes_per_cycle: float


class _Core:
    """One core's place in its events, and its semaphores."""

    def __init__(self, events: Sequence[Event]):
        self.events = events
        self.place = 0
        self.stalled = 0.0
        self.free = 0.0  # when HBM has served all that was asked for
        self.values: dict[int, int] = collections.defaultdict(int)
        self.rests: dict[int, int] = collections.defaultdict(int)
        self.arriving: dict[int, list[tuple[float, int]]] = collections.defaultdict(list)

    def wait(self, event: Event) -> bool:
        """Moves on to when the semaphore stands as high as it has to; False if nothing is on its way that would raise it."""
        queue = self.arriving[event.semaphore]
        while self.values[event.semaphore] < event.amount:
            if not queue:
                return False
            end, amount = heapq.heappop(queue)
            self.values[event.semaphore] += amount
            self.stalled += max(end - event.cycle - self.stalled, 0.0)
        return True

    def left(self) -> list[int]:
        """Semaphores that do not end where they were set to, or else at zero."""
        ends = {
            each: self.values[each] + sum(amount for _, amount in self.arriving[each])
            for each in self.arriving | self.values
        }
        return [semaphore for semaphore, value in ends.items() if value != self.rests[semaphore]]


def replay(cores: Sequence[Sequence[Event]], memory: Memory) -> list[float]:
    """Serves each core's copies in the order in which they were started, each no sooner than the latency after its start.

    A copy between VMEM and SMEM takes the latency only. One from HBM to HBM reads and writes there, and takes twice as long.

    Args:
      cores: what each did, in order.
      memory: of the chip.

    Returns:
      Cycles that each core waits.

    Raises:
      DeadlockError, SemaphoreError: see there.
    """
    states = [_Core(events) for events in cores]
    while any(state.place < len(state.events) for state in states):
        if not any([_advance(state, states, memory) for state in states]):
            stuck = next(state.events[state.place] for state in states if state.place < len(state.events))
            what = f"at cycle {stuck.cycle} the kernel waits until a semaphore stands at {stuck.amount}"
            raise DeadlockError(f"{what}, but no copy or signal is on its way that would raise it")
    if any(state.left() for state in states):
        raise SemaphoreError(
            "the kernel ends with semaphores that are not zero: it does not wait for each copy and signal"
        )
    return [state.stalled for state in states]


def _advance(core: _Core, cores: Sequence[_Core], memory: Memory) -> bool:
    """As far as the core gets without the others; whether it got anywhere."""
    began = core.place
    for event in core.events[began:]:
        now = event.cycle + core.stalled
        if event.kind == "wait":
            if not core.wait(event):
                break
        elif event.kind == "start":
            end = now + memory.latency
            if event.hbm_bytes:
                core.free = end = max(core.free, end) + event.hbm_bytes / memory.bytes_per_cycle
            heapq.heappush(core.arriving[event.semaphore], (end, event.amount))
        elif event.kind == "signal":
            core.values[event.semaphore] += event.amount
        elif event.kind == "remote":
            heapq.heappush(cores[event.core].arriving[event.semaphore], (now + memory.latency, event.amount))
        else:
            core.values[event.semaphore] = core.rests[event.semaphore] = event.amount
        core.place += 1
    return core.place > began
