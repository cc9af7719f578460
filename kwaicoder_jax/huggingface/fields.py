"""A config.json, read field by field; whatever is wrong with one is a UserError that names it."""

from collections.abc import Mapping
from typing import Any

from kwaicoder_jax.errors import UserError


class Fields:
    """The fields of one JSON object. A field that is null counts as one that is not there, as transformers has it."""

    def __init__(self, values: Mapping[str, Any], where: str):
        """`where` is the file, and goes before the field's name in errors."""
        self.values, self.where = values, where

    def error(self, name: str, what: str, remedy: str = "") -> UserError:
        """What is wrong with a field."""
        return UserError(what, where=f"{self.where}: {name}", remedy=remedy)

    def get(self, name: str, default: Any = None) -> Any:
        """The value, unchecked."""
        value = self.values.get(name)
        return default if value is None else value

    def _need(self, name: str, default: Any) -> Any:
        value = self.get(name, default)
        if value is None:
            raise self.error(name, "is missing", "add it, or fetch the file again")
        return value

    def size(self, name: str, default: int | None = None, *, least: int = 1) -> int:
        """An integer, `least` or more; without a default it has to be there."""
        value = self._need(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise self.error(name, f"{value!r} is not an integer of {least} or more")
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A positive number; without a default it has to be there."""
        value = self._need(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
            raise self.error(name, f"{value!r} is not a positive number")
        return float(value)

    def optional(self, name: str) -> float | None:
        """A positive number, or None if it is not there."""
        return self.number(name) if self.get(name) is not None else None

    def flag(self, name: str, default: bool = False) -> bool:
        """True or false."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self.error(name, f"{value!r} is neither true nor false")
        return value

    def only(self, name: str, *allowed: Any, why: str) -> None:
        """Refuses any value but those; a field that is not there is fine."""
        value = self.get(name)
        if value is not None and value not in allowed:
            shown = ", ".join(repr(each) for each in allowed) or "nothing"
            raise self.error(name, f"{value!r}: {why}", f"only {shown} can be imported")

    def part(self, name: str) -> "Fields":
        """A nested object, empty if it is not there."""
        value = self.get(name, {})
        if not isinstance(value, dict):
            raise self.error(name, f"{value!r} is no object")
        return Fields(value, f"{self.where}: {name}")
