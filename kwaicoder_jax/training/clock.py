"""Where the time of a run goes."""

import contextlib
import time
from collections.abc import Callable, Iterator


class Clock:
    """Adds up seconds by phase; phases may lie in one another, and time counts for the inner one. Outside: "step".

    Attributes:
      now: the phase that the run is in.
      seconds: by phase, so far.
    """

    def __init__(self, on_enter: Callable[[str], None] = lambda phase: None):
        self.now = "step"
        self.seconds: dict[str, float] = {}
        self._since = time.monotonic()
        self._on_enter = on_enter

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Inside, the time is `name`'s."""
        before = self.now
        self._enter(name)
        try:
            yield
        finally:
            self._enter(before)

    def read(self) -> dict[str, float]:
        """Seconds by phase up to this moment."""
        self._enter(self.now, tell=False)
        return dict(self.seconds)

    def _enter(self, name: str, tell: bool = True) -> None:
        now = time.monotonic()
        self.seconds[self.now] = self.seconds.get(self.now, 0.0) + now - self._since
        self.now, self._since = name, now
        if tell:
            self._on_enter(name)
