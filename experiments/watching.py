"""A thread that watches over a command: steps that do not end, and peers that leave or are lost.

The main thread may be inside a compiler, a collective operation or a file system that does not answer; so the watch
speaks and ends the process itself.
"""

import contextlib
import faulthandler
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from experiments.peers import GRACE_SECONDS, LOST, Alone, end

INTERVAL = 0.5  # seconds between two looks
COLLECT_SECONDS = 3.0  # for all processes to say where they are


class Watch:
    """What the main thread is at, as it says itself; `start` begins to watch.

    Attributes:
      seconds: without a finished step, evaluation or save after which all processes are ended; 0 for never.
      peer_seconds: without a sign of life after which a peer counts as lost.
    """

    def __init__(self, seconds: float = 0.0, peer_seconds: float = 60.0, line: Callable[[str], None] = print):
        self.seconds, self.peer_seconds, self._line = seconds, peer_seconds, line
        self.peers = Alone()
        self.stop_status = 0
        self._phase, self._step, self._since = "start", 0, time.monotonic()
        self._armed = False
        self._ended = threading.Event()
        self._signs: dict[int, tuple[Any, float]] = {}
        self._silent_since: float | None = None
        self._asking: float | None = None  # since when this process waits for an answer of process 0

    def at(self, phase: str) -> None:
        """The main thread goes over to something else."""
        self._phase, self._since = phase, time.monotonic()

    def beat(self) -> None:
        """The main thread gets on with what it is at."""
        self._since = time.monotonic()

    def finished(self, step: int) -> None:
        """A step ended."""
        self._step, self._since = step, time.monotonic()

    @contextlib.contextmanager
    def armed(self) -> Iterator[None]:
        """Inside, steps have to end."""
        self._armed, self._since = True, time.monotonic()
        try:
            yield
        finally:
            self._armed = False

    @contextlib.contextmanager
    def over(self, peers: Alone) -> Iterator[None]:
        """Inside, the thread watches."""
        self.peers = peers
        if self.seconds <= 0 and peers.count == 1:
            yield
            return
        threading.Thread(target=self._run, name="watch", daemon=True).start()
        if not peers.leads:
            threading.Thread(target=self._run_beside, name="watch over the leader", daemon=True).start()
        try:
            yield
        finally:
            self._ended.set()
            faulthandler.cancel_dump_traceback_later()

    def _run(self) -> None:
        while not self._ended.wait(INTERVAL):
            self._asking = time.monotonic()
            try:
                if self._armed and self.seconds > 0:
                    # Where even this thread gets no turn, C code ends the process.
                    faulthandler.dump_traceback_later(self.seconds + 4 * GRACE_SECONDS, exit=True)
                    if time.monotonic() - self._since > self.seconds:
                        self._hung()
                else:
                    faulthandler.cancel_dump_traceback_later()
                if self.peers.count > 1:
                    self._look_at_peers()
            except Exception as error:
                self._no_service(error)

    def _run_beside(self) -> None:
        """A leader that is frozen leaves its sockets open: who asks it waits, and another thread has to see that."""
        while not self._ended.wait(INTERVAL):
            since = self._asking
            if since is not None and time.monotonic() - since > self.peer_seconds:
                self._say(f"process 0 does not answer since {self.peer_seconds:g} s; it is frozen?")
                end(LOST)

    def _where(self) -> str:
        return f"{self.peers.describe()}, in {self._phase} after step {self._step}"

    def _hung(self) -> None:
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        self.peers.note("hung", {"text": self._where(), "phase": self._phase, "step": self._step})
        if self.peers.count > 1:
            time.sleep(COLLECT_SECONDS)
            self._asking = time.monotonic()
        found = self.peers.notes("hung") or {self.peers.index: {"text": self._where(), "phase": self._phase}}
        silent = [f"process {number} does not answer" for number in range(self.peers.count) if number not in found]
        # Who waits inside a step waits for the others.
        suspects = [note["text"] for note in found.values() if note["phase"] != "step"]
        names = "; ".join(silent + suspects or [note["text"] for note in found.values()])
        self._leave(LOST, f"no step ended within {self.seconds:g} s: {names}")

    def _look_at_peers(self) -> None:
        left = {number: note for number, note in self.peers.notes("left").items() if number != self.peers.index}
        if left:
            note = next(iter(left.values()))
            self._end_after(self.stop_status if note["status"] is None else note["status"], note["text"])
        now = time.monotonic()
        self.peers.note("alive", [time.time(), self._where()])
        if self.peers.leads:
            for number, sign in self.peers.notes("alive").items():
                if number not in self._signs or self._signs[number][0] != sign:
                    self._signs[number] = (sign, now)
                elif now - self._signs[number][1] > self.peer_seconds:
                    self._leave(LOST, f"{sign[1]} gave no sign of life for {self.peer_seconds:g} s; it was killed?")
        self._silent_since = None

    def _no_service(self, error: Exception) -> None:
        """The notes cannot be read: process 0 is gone, or the network is."""
        now = time.monotonic()
        self._silent_since = self._silent_since or now
        if now - self._silent_since > min(5.0, self.peer_seconds) and not self._ended.is_set():
            what = str(error).splitlines()[0] if str(error) else type(error).__name__
            self._leave(LOST, f"process 0 does not answer; it was killed? ({what})")

    def _leave(self, status: int, text: str) -> None:
        """Tells the others, and ends."""
        with contextlib.suppress(Exception):
            if self.peers.count > 1 and not self.peers.notes("left"):
                self.peers.note("left", {"status": status, "text": text})
            if self.peers.leads and self.peers.count > 1:
                time.sleep(COLLECT_SECONDS)
        self._say(text)
        end(status)

    def _end_after(self, status: int, text: str) -> None:
        """Lets the main thread leave by itself, and ends the process if it does not."""
        self._asking = None
        if not self._ended.wait(GRACE_SECONDS if status == self.stop_status else 1.0):
            self._say(text)
            with contextlib.suppress(Exception):
                self.peers.note("heard", True)
            end(status)

    def _say(self, text: str) -> None:
        print(f"error: {' '.join(text.split())}", file=sys.stderr, flush=True)
