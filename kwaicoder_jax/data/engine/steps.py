"""Steps and tasks: what is done to which inputs, once."""

import dataclasses
import functools
import hashlib
import importlib.metadata
import re
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from kwaicoder_jax.data.engine.store import Result, Store, action_of
from kwaicoder_jax.errors import UserError

# Whose presence and version decide how a text is read, judged, signed or written.
_LIBRARIES = re.compile(r"detect[-_]secrets|ftfy|magika|numpy|pyarrow|rensa|tree[-_]sitter.*|zstandard")


class Step(Protocol):
    """Something that is done to objects; a frozen dataclass, whose fields are its settings, and which can be pickled.

    Attributes:
      name: of the step.
    """

    @property
    def name(self) -> str: ...

    def run(self, store: Store, inputs: Sequence[str]) -> Result:
        """Reads the inputs' objects and writes outputs; nothing else may decide what these are."""


class Task(NamedTuple):
    """A step and its inputs: objects, or what stands for files outside of the store.

    Attributes:
      step: what is done.
      inputs: names of objects.
      label: for messages.
    """

    step: Step
    inputs: tuple[str, ...]
    label: str = ""

    @property
    def action(self) -> str:
        """Its name in the store: another one if its settings, its inputs or the code of the data engine are others.

        A step of somebody else's has a field of its settings for a version, if its code changes.
        """
        return action_of(code(), self.step.name, settings_of(self.step), self.inputs)


@functools.cache
def code() -> str:
    """A digest of this package's sources, and of the libraries that decide what they make."""
    digest, root = hashlib.blake2b(digest_size=16), Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root).as_posix()} {len(content)} ".encode() + content)
    found = {str(each.name).lower(): each.version for each in importlib.metadata.distributions()}
    digest.update(repr(sorted(item for item in found.items() if _LIBRARIES.fullmatch(item[0]))).encode())
    return digest.hexdigest()


def settings_of(step: Any) -> Any:
    """A step's settings as JSON: of a dataclass its fields, but those with {"metadata": {"place": True}}."""
    if dataclasses.is_dataclass(step) and not isinstance(step, type):
        fields = [field for field in dataclasses.fields(step) if not field.metadata.get("place")]
        return {"": type(step).__name__} | {field.name: settings_of(getattr(step, field.name)) for field in fields}
    if isinstance(step, Mapping):
        return {str(key): settings_of(value) for key, value in step.items()}
    if isinstance(step, list | tuple | set | frozenset):
        values = [settings_of(value) for value in step]
        return sorted(values, key=repr) if isinstance(step, set | frozenset) else values
    return step if step is None or isinstance(step, str | int | float | bool) else str(step)


class Done(NamedTuple):
    """What came of a task.

    Attributes:
      result: None where it failed.
      error: in that case, what is wrong.
      is_defect: whether that is an error of the program, told with its traceback, and not of what it was given.
    """

    result: Result | None
    error: str = ""
    is_defect: bool = False


def perform(store: Store, task: Task) -> Done:
    """Does a task, unless it was done; an error is told, so that the other tasks of a step can end."""
    if (found := store.find(task.action)) is not None:
        return Done(found)
    try:
        result = task.step.run(store, task.inputs)
    except UserError as error:
        return Done(None, str(error))
    except MemoryError:
        return Done(None, f"{task.step.name}: {task.label}: out of memory; use smaller shards or fewer workers")
    except Exception:  # it is raised again where all tasks are done, see `runners.run`
        return Done(None, f"{task.step.name}: {task.label}: {traceback.format_exc()}", is_defect=True)
    store.record(task.action, result)
    return Done(result)
