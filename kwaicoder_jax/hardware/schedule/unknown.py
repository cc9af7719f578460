"""A value that is not followed: what the vector unit computes, or memory that nobody has written."""

from typing import Any, NoReturn


class UnknownValueError(ValueError):
    """The time of the kernel depends on a value that is not known."""


class Unknown:
    """Stands for such a value in the emulated core. Whatever is computed from it is unknown too.

    A schedule may hold as many of them as it likes; it is an error only to decide by one: to branch, to copy so many bytes.

    Args:
      origin: where it comes from.
    """

    __slots__ = ("origin",)

    def __init__(self, origin: str):
        self.origin = origin

    def _unknown(self, *_: Any) -> "Unknown":
        return self

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = _unknown
    __lshift__ = __rlshift__ = __rshift__ = __rrshift__ = __or__ = __ror__ = __xor__ = __rxor__ = _unknown
    __lt__ = __le__ = __gt__ = __ge__ = __eq__ = __ne__ = _unknown  # type: ignore[assignment]
    __hash__ = object.__hash__

    def __and__(self, other: Any) -> Any:
        return False if other is False else self

    __rand__ = __and__

    def __divmod__(self, _: Any) -> "tuple[Unknown, Unknown]":
        return self, self

    __rdivmod__ = __divmod__

    def _fail(self) -> NoReturn:
        raise UnknownValueError(f"the kernel decides by what is not known: {self.origin}")

    __bool__ = __index__ = _fail


def least(left: Any, right: Any) -> Any:
    """The smaller one; unknown if one of them is."""
    return left + right if Unknown in (type(left), type(right)) else min(left, right)


def most(left: Any, right: Any) -> Any:
    """The larger one; unknown if one of them is."""
    return left + right if Unknown in (type(left), type(right)) else max(left, right)


def chosen(condition: Any, yes: Any, no: Any) -> Any:
    """One of two values; unknown if the condition is: programs choose before they know whether they need either."""
    return condition if type(condition) is Unknown else yes if condition else no
