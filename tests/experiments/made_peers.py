"""Peers without processes: what each of them has noted is a dict."""

import time
from collections.abc import Callable
from typing import Any

from experiments.peers import Alone, Joined


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


class Service:
    """What of JAX's client is used; a get waits as long as it is told, then raises."""

    def __init__(self) -> None:
        self.values: dict[str, str] = {}
        self.broken: Exception | None = None
        self.waits: list[int] = []

    def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
        if key in self.values and not allow_overwrite:
            raise RuntimeError("ALREADY_EXISTS")
        self.values[key] = value

    def blocking_key_value_get(self, key: str, milliseconds: int) -> str:
        self.waits.append(milliseconds)
        if len(self.waits) > 1000:
            raise SystemExit("it asks for ever")
        if self.broken:
            raise self.broken
        if key not in self.values:
            time.sleep(0.01)
            raise RuntimeError("DEADLINE_EXCEEDED: GetKeyValue() timed out")
        return self.values[key]

    def key_value_dir_get(self, prefix: str) -> list[tuple[str, str]]:
        return [(key, value) for key, value in self.values.items() if key.startswith(prefix)]


def crowd(count: int) -> list[Joined]:
    """So many processes with one service."""
    service = Service()
    return [Joined(service, number, count) for number in range(count)]
