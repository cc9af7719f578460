"""SIGTERM and SIGINT: a train loop finishes its step and saves, any other work ends where it is."""

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType


class Stopped(BaseException):
    """The process was asked to stop. What was finished is on disk; the same command goes on from there."""


class Stop:
    """Remembers that the process was asked to stop.

    Attributes:
      requested: whether it was.
      number: of the newest signal that asked; None before.
    """

    def __init__(self):
        self.requested = False
        self.number: int | None = None
        self._deferred = False

    def install(self) -> None:
        """Takes over SIGTERM and SIGINT."""
        signal.signal(signal.SIGTERM, self._handle)
        signal.signal(signal.SIGINT, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        again, self.requested, self.number = self.requested, True, number
        if not self._deferred or (again and number == signal.SIGINT):
            raise Stopped

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, a signal only sets `requested`; a second Ctrl-C ends at once."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        if self.requested:
            raise Stopped
