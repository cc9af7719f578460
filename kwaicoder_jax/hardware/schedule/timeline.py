"""Replays a core's copies in time: how long the core waits for them."""

import collections
import dataclasses
from collections.abc import Iterable

from kwaicoder_jax.hardware.schedule.machine import Event


@dataclasses.dataclass(frozen=True)
class Replay:
    """What came of it, in cycles.

    Attributes:
      cycles: until the last bundle was issued.
      stalled: of these, waiting for copies.
    """

    cycles: float
    stalled: float


def replay(events: Iterable[Event], issued: int, latency: float, bytes_per_cycle: float) -> Replay:
    """Serves copies in the order in which they were started, each no sooner than `latency` after its start.

    A copy between VMEM and SMEM takes the latency only. One from HBM to HBM reads and writes there, and takes twice as long.

    Args:
      events: of a core, in order.
      issued: cycles that its bundles take.
      latency: cycles from a start until the first bytes arrive.
      bytes_per_cycle: of HBM.
    """
    stalled, free = 0.0, 0.0
    arriving: dict[int, collections.deque[tuple[float, int]]] = collections.defaultdict(collections.deque)
    values: dict[int, int] = collections.defaultdict(int)
    for event in events:
        now = event.cycle + stalled
        if event.kind == "start":
            end = now + latency
            if event.hbm_bytes:
                free = end = max(free, end) + event.hbm_bytes / bytes_per_cycle
            arriving[event.semaphore].append((end, event.amount))
        elif event.kind == "wait":
            queue = arriving[event.semaphore]
            while values[event.semaphore] < event.amount:
                end, amount = queue.popleft()
                values[event.semaphore] += amount
                stalled, now = stalled + max(end - now, 0.0), max(end, now)
        elif event.kind == "signal":
            values[event.semaphore] += event.amount
        else:
            values[event.semaphore] = event.amount
    return Replay(issued + stalled, stalled)
