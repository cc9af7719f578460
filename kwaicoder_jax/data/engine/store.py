"""Objects by the hash of their contents, and what was made of which: the memory of the data engine.

    STORE/objects/3f/3f9a...        bytes, named by their BLAKE2b-160
    STORE/actions/81/81c0....json   {"outputs": {name: object}, "facts": ...}: what a step and its settings made of inputs

An object is there whole or not at all, and so is an action, which is written after its outputs. A killed process leaves
temporary files; two that do the same write the same bytes. An action is found by its step's settings and by the contents of
its inputs: what did not change is not done again, even behind a step that was done again and made the same.
"""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from kwaicoder_jax.errors import UserError

_BYTES = 20  # of a digest


class Result(NamedTuple):
    """What an action made.

    Attributes:
      outputs: objects by name.
      facts: JSON: what a report wants to know of it.
    """

    outputs: Mapping[str, str]
    facts: Mapping[str, Any]


class Output:
    """An object that is being written."""

    def __init__(self, file: BinaryIO):
        """Writes to `file`."""
        self._file, self._hash = file, hashlib.blake2b(digest_size=_BYTES)

    def write(self, content: bytes | memoryview) -> int:
        """Appends."""
        self._hash.update(content)
        return self._file.write(content)

    @property
    def digest(self) -> str:
        """Of what was written so far."""
        return self._hash.hexdigest()


class Store:
    """A folder that all workers see."""

    def __init__(self, root: str | os.PathLike[str]):
        """Makes the folder with the first object."""
        self.root = Path(root)

    def path(self, digest: str) -> Path:
        """Where an object lies."""
        return self.root / "objects" / digest[:2] / digest

    def read(self, digest: str) -> bytes:
        """An object's bytes; UserError if it was removed."""
        try:
            return self.path(digest).read_bytes()
        except FileNotFoundError:
            raise UserError("an object is missing", where=str(self.path(digest)), remedy=_REMEDY) from None

    def add(self, content: bytes) -> str:
        """Writes an object; returns its name."""
        with self.writing() as (output, names):
            output.write(content)
        return names[0]

    @contextlib.contextmanager
    def writing(self) -> Iterator[tuple[Output, list[str]]]:
        """Gives an output, and a list that has the object's name once the context is left without an error."""
        names: list[str] = []
        with self._temporary("objects") as (file, temporary):
            output = Output(file)
            yield output, names
            file.flush()
            target = self.path(output.digest)
            target.parent.mkdir(parents=True, exist_ok=True)
            if target.exists():
                temporary.unlink()
            else:
                temporary.replace(target)
            names.append(output.digest)

    def find(self, action: str) -> Result | None:
        """What an action made, if it was done and its outputs are still there."""
        try:
            found = json.loads(self._action(action).read_bytes())
        except (FileNotFoundError, ValueError):
            return None
        result = Result(found["outputs"], found["facts"])
        return result if all(self.path(each).exists() for each in result.outputs.values()) else None

    def record(self, action: str, result: Result) -> None:
        """Writes down what an action made."""
        with self._temporary("actions") as (file, temporary):
            file.write(json.dumps(result._asdict(), sort_keys=True, separators=(",", ":")).encode())
            file.flush()
            target = self._action(action)
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary.replace(target)

    def _action(self, action: str) -> Path:
        return self.root / "actions" / action[:2] / f"{action}.json"

    @contextlib.contextmanager
    def _temporary(self, kind: str) -> Iterator[tuple[BinaryIO, Path]]:
        folder = self.root / kind
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".", suffix=".tmp", delete=False) as file:
            temporary = Path(file.name)
            try:
                yield file, temporary  # type: ignore[misc]
            except BaseException:
                temporary.unlink(missing_ok=True)
                raise


_REMEDY = "run again: what made it is done anew"


def action_of(*parts: Any) -> str:
    """The name of an action, from JSON values."""
    canonical = json.dumps(parts, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(canonical.encode(), digest_size=_BYTES).hexdigest()
