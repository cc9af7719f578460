"""Frameworks that are measured side by side, each in a process of its own that works when it is asked to."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any


class Worker:
    """A subprocess that builds one framework's model, and then answers requests one at a time.

    Attributes:
      description: what it said when it was ready.
    """

    def __init__(self, module: str, *flags: str) -> None:
        """Starts `python -m module flags`, which calls `answer`, and waits until it is ready."""
        command = [sys.executable, "-m", module, *flags]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.description: dict[str, Any] = self._read()

    def ask(self, number: int) -> dict[str, Any]:
        """The answer to one request."""
        assert self._process.stdin
        print(number, file=self._process.stdin, flush=True)
        return self._read()

    def close(self) -> None:
        """Ends the subprocess."""
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout
        for line in self._process.stdout:
            if line.startswith("{"):
                return json.loads(line)
        raise RuntimeError("the worker ended; its error is above")


def answer(description: dict[str, Any], work: Callable[[int], dict[str, Any]]) -> None:
    """The worker's side: one JSON line when ready, then one for each line that asks for a number."""
    print(json.dumps(description), flush=True)
    for line in sys.stdin:
        print(json.dumps(work(int(line))), flush=True)
