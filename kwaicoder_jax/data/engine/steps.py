"""Steps and tasks: what is done to which inputs, once."""

import dataclasses
import traceback
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from kwaicoder_jax.data.engine.store import Result, Store, action_of
from kwaicoder_jax.errors import UserError


class Step(Protocol):
    """Something that is done to objects; a frozen dataclass, whose fields are its settings, and which can be pickled.

    Attributes:
      name: of the step.
      version: raised by whoever changes what it makes of the same inputs.
    """

    @property
    def name(self) -> str: ...
    @property
    def version(self) -> int: ...

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
        """Its name in the store."""
        return action_of(self.step.name, self.step.version, settings_of(self.step), self.inputs)


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
      was_there: whether it had been done before.
    """

    result: Result | None
    error: str = ""
    was_there: bool = False


def perform(store: Store, task: Task) -> Done:
    """Does a task, unless it was done; an error is told, so that the other tasks of a step can end."""
    if (found := store.find(task.action)) is not None:
        return Done(found, was_there=True)
    try:
        result = task.step.run(store, task.inputs)
    except UserError as error:
        return Done(None, str(error))
    except MemoryError:
        return Done(None, f"{task.step.name}: {task.label}: out of memory; use smaller shards or fewer workers")
    except Exception:
        return Done(None, f"{task.step.name}: {task.label}: {traceback.format_exc()}")
    store.record(task.action, result)
    return Done(result)
