"""What a person sees while a command runs: bars on a terminal, plain lines elsewhere. All of it on standard error."""

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_SECONDS = 10.0  # at most one plain progress line in this time


class Display:
    """Writes lines and progress for one process."""

    def __init__(self):
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self._prefix = ""

    def stage(self, name: str) -> None:
        """Sets the stage that the following lines belong to."""
        self._prefix = f"{name}: "

    def line(self, text: str) -> None:
        """One line."""
        self.console.print(f"{self._prefix}{text}", markup=False)

    @contextlib.contextmanager
    def progress(self, total: int, unit: str, done: int = 0) -> Iterator[Callable[..., None]]:
        """Yields `update(done, note="")`; shows rate and time left."""
        if not self.console.is_terminal:
            yield _PlainProgress(self, total, unit, done).update
            return
        rate = TextColumn("{task.fields[rate]:.1f} {task.fields[unit]}/s {task.fields[note]}")
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn())
        began, first = time.monotonic(), done
        with Progress(*columns, console=self.console, transient=True) as bars:
            task = bars.add_task(self._prefix.rstrip(": "), total=total, completed=done, rate=0.0, unit=unit, note="")

            def update(now: int, note: str = "") -> None:
                rate = (now - first) / max(time.monotonic() - began, 1e-9)
                bars.update(task, completed=now, rate=rate)
                if note:
                    bars.update(task, note=note)

            yield update


class _PlainProgress:
    def __init__(self, display: Display, total: int, unit: str, done: int):
        self._display, self._total, self._unit, self._first = display, total, unit, done
        self._began = self._last = time.monotonic()
        self._note = ""

    def update(self, done: int, note: str = "") -> None:
        now = time.monotonic()
        self._note = note or self._note
        if now - self._last < LINE_SECONDS and done < self._total:
            return
        self._last = now
        rate = (done - self._first) / max(now - self._began, 1e-9)
        left = (self._total - done) / rate if rate > 0 else 0.0
        text = f"{done}/{self._total} {self._unit}, {rate:.1f}/s, {left:.0f} s left"
        self._display.line(f"{text}; {self._note}" if self._note else text)
