"""Follows a launched program from the outside: reads its pipes without filling memory, and ends it in time."""

import contextlib
import json
import os
import selectors
import signal
import subprocess
import time
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal

START_SECONDS = 300.0  # for a launcher to get going on a machine that is busy with other things
GRACE = 10.0  # seconds for a supervisor to end its processes and report, before everything is killed from here


class Pipe:
    """Both ends of a pipe, closed on exit. Not inherited by any process that is not given them."""

    def __init__(self) -> None:
        self.read, self.write = os.pipe()

    def __enter__(self) -> "Pipe":
        """Itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes what is still open."""
        self.close_write()
        os.close(self.read)

    def close_write(self) -> None:
        """Closes the write end, once."""
        if self.write >= 0:
            os.close(self.write)
            self.write = -1


@dataclass
class Observed:
    """What was seen of one run.

    Attributes:
      reports: the launcher's messages.
      ended_for: "start", "wall" or "output" when the run was ended from here; "start" when it had not begun.
      seconds: on the clock.
      kept: the first bytes of standard output and standard error.
      total: bytes read from both.
    """

    reports: list[dict] = field(default_factory=list)
    ended_for: Literal["", "start", "wall", "output"] = ""
    seconds: float = 0.0
    kept: dict[str, bytearray] = field(default_factory=lambda: {"out": bytearray(), "err": bytearray()})
    total: int = 0


def read_available(descriptor: int, size: int = 65536) -> bytes:
    """What can be read now, at most `size` bytes; empty when nothing can."""
    os.set_blocking(descriptor, False)
    with contextlib.suppress(BlockingIOError):
        return os.read(descriptor, size)
    return b""


@dataclass
class _Watch:
    """Decides when a run has to end."""

    leash: Pipe
    wall_seconds: float
    output_bytes: int
    deadline: float
    running: bool = False

    def look(self, seen: Observed, *, started: bool) -> float | None:
        """Lets the leash go if it is time; seconds until the next look, None when the supervisor had its grace."""
        now = time.monotonic()
        if started and not self.running:
            self.deadline, self.running = now + self.wall_seconds, True
        if now >= self.deadline:
            if seen.ended_for:
                return None
            seen.ended_for = "wall" if self.running else "start"
        elif seen.total > self.output_bytes and not seen.ended_for:
            seen.ended_for = "output"
        if seen.ended_for and self.leash.write >= 0:
            self.leash.close_write()
            self.deadline = now + GRACE
        return min(self.deadline - now, 1.0)


def follow(
    process: "subprocess.Popen[bytes]",
    leash: Pipe,
    streams: dict[str, Pipe],
    wall_seconds: float,
    output_bytes: int,
) -> Observed:
    """Reads until the launcher is gone; lets the leash go when the clock or the output passes its limit.

    Args:
      process: the launcher, leader of its own process group.
      leash: its supervisor ends everything when the write end closes.
      streams: "report", "out" and "err"; the write ends are closed here.
      wall_seconds: the clock's limit, from the command's start.
      output_bytes: the limit on out and err together, and on what is kept of each.
    """
    seen, started, text = Observed(), time.monotonic(), bytearray()
    try:
        with selectors.DefaultSelector() as selector:
            for name, pipe in streams.items():
                pipe.close_write()
                selector.register(pipe.read, selectors.EVENT_READ, name)
            watch = _Watch(leash, wall_seconds, output_bytes, started + START_SECONDS)
            while "report" in {key.data for key in selector.get_map().values()}:
                wait = watch.look(seen, started=bool(text))
                if wait is None:
                    break
                for key, _ in selector.select(wait):
                    _take(key, selector, seen, text, output_bytes)
    finally:
        leash.close_write()
        _end(process)
    for name in ("out", "err"):
        _drain(streams[name], seen, name, output_bytes)
    if seen.total > output_bytes:
        seen.ended_for = seen.ended_for or "output"
    seen.seconds = time.monotonic() - started
    seen.reports = [json.loads(line) for line in text.splitlines()]
    return seen


def _take(
    key: selectors.SelectorKey, selector: selectors.BaseSelector, seen: Observed, text: bytearray, output_bytes: int
) -> None:
    data = os.read(key.fd, 65536)
    if not data:
        selector.unregister(key.fd)
    elif key.data == "report":
        text += data
    else:
        _keep(seen, key.data, data, output_bytes)


def _keep(seen: Observed, name: str, data: bytes, output_bytes: int) -> None:
    seen.total += len(data)
    seen.kept[name] += data[: output_bytes - len(seen.kept[name])]


def _drain(pipe: Pipe, seen: Observed, name: str, output_bytes: int) -> None:
    """What was written before the end and is still in the pipe, which holds 64 KiB unless someone made it larger."""
    for _ in range(64):
        data = read_available(pipe.read)
        if not data:
            return
        _keep(seen, name, data, output_bytes)


def _end(process: "subprocess.Popen[bytes]") -> None:
    """Kills the launcher's whole group if it has not ended by itself; the kernel ends the namespace with it."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(0.0 if process.poll() is not None else 1.0)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
