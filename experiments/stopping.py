"""SIGTERM and SIGINT: a train loop finishes its step and saves, any other work ends where it is.

Python runs a signal handler between two of its own instructions, which a compiler or a file system may keep waiting.
So a thread hears of the signal too, and ends the process where nothing would be lost and the main thread does not.
"""

import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from types import FrameType

UNWIND_SECONDS = 5.0  # for the main thread to end by itself


class Stopped(BaseException):
    """The process was asked to stop. What was finished is on disk; the same command goes on from there."""


class Stop:
    """Remembers that the process was asked to stop.

    Attributes:
      requested: whether it was.
      number: of the newest signal that asked; None before.
      leave: tells the other processes, where there are any, that this one ends; ending may not wait for them then.
    """

    def __init__(self):
        self.requested = False
        self.number: int | None = None
        self.leave: Callable[[], None] | None = None
        self._handled = 0
        self._deferred = False
        self._idle = False

    def install(self) -> None:
        """Takes over SIGTERM and SIGINT."""
        signal.signal(signal.SIGTERM, self._handle)
        signal.signal(signal.SIGINT, self._handle)

    def watch(self, end: Callable[[], None]) -> None:
        """Has a thread call `end`, which does not return, where the main thread is busy and nothing would be lost."""
        hears, rings = socket.socketpair()
        rings.setblocking(False)
        self._bell = rings
        signal.set_wakeup_fd(rings.fileno(), warn_on_full_buffer=False)
        threading.Thread(target=self._listen, args=(hears, end), name="stop", daemon=True).start()

    def _listen(self, hears: socket.socket, end: Callable[[], None]) -> None:
        while numbers := hears.recv(64):
            asked = [number for number in numbers if number in (signal.SIGTERM, signal.SIGINT)]
            if not asked:
                continue
            self.requested, self.number = True, asked[-1]
            while not (self._idle or not self._deferred):
                threading.Event().wait(0.1)
            threading.Event().wait(UNWIND_SECONDS)
            if self._idle or not self._deferred:
                end()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.requested, self.number, self._handled = True, number, self._handled + 1
        if self._idle or not self._deferred or (self._handled > 1 and number == signal.SIGINT):
            raise Stopped

    def idle(self, idle: bool) -> None:
        """Whether, inside `deferred`, ending at once would lose nothing; raises Stopped if that was asked before."""
        self._idle = idle
        if idle and self.requested:
            raise Stopped

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Inside, a signal only sets `requested`; a second Ctrl-C ends at once."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = self._idle = False
        if self.requested:
            raise Stopped
