"""Which fields a config section has, of which type and in which range: read off a dataclass or a function.

A type is what the annotation says, except that every float is finite and takes an integer too; a range is an annotation
as in `Annotated[int, Range(1)]`. Nested dataclasses and mappings are looked into.
"""

import collections.abc
import dataclasses
import enum
import inspect
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any

from kwaicoder_jax.errors import UserError


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from `least` to `most`, or above `least` where that is `open`."""

    least: float
    most: float = math.inf
    open: bool = False

    def __contains__(self, value: float) -> bool:
        return (value > self.least if self.open else value >= self.least) and value <= self.most

    def __str__(self) -> str:
        low = f"more than {self.least}" if self.open else f"{self.least} or more"
        if math.isinf(self.most):
            return low
        return f"more than {self.least}, at most {self.most}" if self.open else f"{self.least} to {self.most}"


Count = Annotated[int, Range(1)]
Natural = Annotated[int, Range(0)]
NotNegative = Annotated[float, Range(0)]
Positive = Annotated[float, Range(0, open=True)]
Share = Annotated[float, Range(0, 1, open=True)]
Seed = Annotated[int, Range(0, 2**32 - 1)]  # what numpy and jax both tell apart


@dataclasses.dataclass(frozen=True)
class Field:
    """The annotation of a field, and whether it has to be there."""

    hint: Any
    required: bool


Fields = Mapping[str, Field]


def of_class(cls: type) -> dict[str, Field]:
    """The fields of a dataclass."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {
        f.name: Field(hints[f.name], f.default is f.default_factory is dataclasses.MISSING)
        for f in dataclasses.fields(cls)
    }


def of_function(function: Callable[..., Any], given: Sequence[str] = ()) -> dict[str, Field]:
    """The arguments of a function but for those that it is `given` from elsewhere."""
    hints, empty = typing.get_type_hints(function, include_extras=True), inspect.Parameter.empty
    parameters = {n: p for n, p in inspect.signature(function).parameters.items() if n not in given}
    return {n: Field(hints.get(n, Any), p.default is empty) for n, p in parameters.items()}


def check_names(fields: Fields, values: Any, where: str) -> None:
    """UserError for a field that there is not, or one that lacks."""
    if not isinstance(values, Mapping):
        raise UserError(f"{values!r} is no section", where=where, remedy=f"the fields are {sorted(fields)}")
    for name in values:
        if name not in fields:
            raise UserError("no such field", where=f"{where}.{name}", remedy=f"the fields are {sorted(fields)}")
    for name, field in fields.items():
        if field.required and name not in values:
            raise UserError("is missing", where=f"{where}.{name}", remedy="add it to the config")


def check(fields: Fields, values: Any, where: str) -> None:
    """The same, and UserError for a value of another type or out of range; names the field."""
    check_names(fields, values, where)
    for name, value in values.items():
        _check(fields[name].hint, value, f"{where}.{name}".lstrip("."))


def _check(hint: Any, value: Any, where: str) -> None:
    """One value against its annotation."""
    kinds = _alternatives(hint)
    if value is None and (type(None) in kinds or Any in kinds):
        return
    for kind in kinds:
        if isinstance(kind, type) and dataclasses.is_dataclass(kind) and not isinstance(value, kind):
            check(of_class(kind), value, where)
            return
        if typing.get_origin(kind) is collections.abc.Mapping and isinstance(value, Mapping):
            inner = typing.get_args(kind)[1]
            for key, each in value.items():
                _check(inner, each, f"{where}.{key}")
            return
    fitting = [kind for kind in kinds if _fits(kind, value)]
    if not fitting:
        raise UserError(f"{value!r} is not of type {' or '.join(map(_name, kinds))}", where=where)
    for part in _numbers(value):
        if isinstance(part, float) and not math.isfinite(part):
            raise UserError(f"{part} is not a finite number", where=where)
    for limits in [each for kind in fitting for each in getattr(kind, "__metadata__", ())]:
        if value not in limits:
            raise UserError(f"{value} is out of range", where=where, remedy=f"use {limits}")


def _alternatives(hint: Any) -> list[Any]:
    """The members of a union, or the hint itself."""
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [kind for each in typing.get_args(hint) for kind in _alternatives(each)]
    return [hint]


def _fits(kind: Any, value: Any) -> bool:
    """Whether the value is of one alternative's type, ranges aside."""
    if kind is Any:
        return True
    if typing.get_origin(kind) is Annotated:
        return _fits(typing.get_args(kind)[0], value)
    if typing.get_origin(kind) in (collections.abc.Sequence, tuple, list):
        inner = typing.get_args(kind)[0]
        return isinstance(value, list | tuple) and all(_fits(inner, each) for each in value)
    if kind in (int, float):  # True is an int to Python
        return isinstance(value, int | float if kind is float else int) and not isinstance(value, bool)
    outer = typing.get_origin(kind) or kind
    if isinstance(outer, type) and issubclass(outer, enum.StrEnum):
        outer = str  # whoever parses it names the choices
    return isinstance(value, outer) if isinstance(outer, type) else True


def _numbers(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _name(kind: Any) -> str:
    if typing.get_origin(kind) is Annotated:
        return _name(typing.get_args(kind)[0])
    if kind is type(None):
        return "None"
    inner = [x for x in typing.get_args(kind) if x is not ...]
    if typing.get_origin(kind) is collections.abc.Mapping:
        return "section"
    return f"list of {_name(inner[0])}" if inner else getattr(kind, "__name__", str(kind))
