"""Peers without processes: what each of them has noted is a dict."""

from collections.abc import Callable
from typing import Any

from experiments.peers import Alone


class Made(Alone):
    """One of `count` processes; `answer` is called before each look at the notes."""

    def __init__(self, index: int, count: int, answer: Callable[[], None] = lambda: None):
        self.index, self.count, self._answer = index, count, answer
        self.written: dict[str, dict[int, Any]] = {}

    def note(self, kind: str, value: Any) -> None:
        self.written.setdefault(kind, {})[self.index] = value

    def notes(self, kind: str) -> dict[int, Any]:
        self._answer()
        return dict(self.written.get(kind, {}))
