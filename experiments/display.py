"""What a person sees while a command runs: bars on a terminal, plain lines elsewhere. All of it on standard error."""

import contextlib
import time
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

MEGABYTE = 1_000_000
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
    def progress(self, total: int, unit: str, *, says_end: bool = True) -> Iterator[Callable[..., None]]:
        """Yields `update(done, note="")`; shows rate and time left, measured from the first update on.

        Where there is no terminal, `says_end` writes a line at the end, however short the work was.
        """
        pace = _Pace(total)
        if not self.console.is_terminal:
            yield _PlainProgress(self, pace, unit, says_end).update
            return
        rate = TextColumn("{task.fields[rate]:.1f} {task.fields[unit]}/s {task.fields[note]}")
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), rate, TimeRemainingColumn())
        with Progress(*columns, console=self.console, transient=True) as bars:
            task = bars.add_task(self._prefix.rstrip(": "), total=total, rate=0.0, unit=unit, note="")

            def update(now: int, note: str = "") -> None:
                bars.update(task, completed=now, rate=pace.rate(now))
                if note:
                    bars.update(task, note=note)

            yield update

    @contextlib.contextmanager
    def megabytes(self) -> Iterator[Callable[[int, int], None]]:
        """Yields `update(bytes done, bytes in all)`; the bar appears with the first of them."""
        with contextlib.ExitStack() as stack:
            bar: Callable[..., None] | None = None

            def update(done: int, total: int) -> None:
                nonlocal bar
                if bar is None:
                    bar = stack.enter_context(self.progress(-(-total // MEGABYTE), "MB"))
                bar(-(-done // MEGABYTE))

            yield update


class _Pace:
    """Units per second since the first update: work that was resumed or compiled before does not count."""

    def __init__(self, total: int):
        self.total = total
        self._first: tuple[float, int] | None = None

    def rate(self, done: int) -> float:
        now = time.monotonic()
        if self._first is None:
            self._first = (now, done)
        began, first = self._first
        return (done - first) / max(now - began, 1e-9)


class _PlainProgress:
    def __init__(self, display: Display, pace: _Pace, unit: str, says_end: bool):
        self._display, self._pace, self._unit = display, pace, unit
        self._last, self._note = time.monotonic(), ""
        self._says_end = says_end

    def update(self, done: int, note: str = "") -> None:
        self._note = note or self._note
        rate, total, now = self._pace.rate(done), self._pace.total, time.monotonic()
        ends = self._says_end and done >= total
        if now - self._last < LINE_SECONDS and not ends:
            return
        self._last, self._says_end = now, self._says_end and not ends
        left = f", {rate:.1f}/s, {(total - done) / rate:.0f} s left" if rate > 0 else ""
        text = f"{done}/{total} {self._unit}{left}"
        self._display.line(f"{text}; {self._note}" if self._note else text)
