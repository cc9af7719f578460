"""Copies between HBM and VMEM that run ahead of the arithmetic, or behind it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl


def next_slot(slot: Any, slots: int) -> Any:
    """The one behind `slot` of a ring."""
    return jnp.where(slot == slots - 1, 0, slot + 1)


def rows_at(start: Any, size: Any, align: int) -> Any:
    """A slice of whole tiles of `align` rows."""
    return pl.ds(pl.multiple_of(start, align), pl.multiple_of(size, align))


class Together(tuple):
    """Copies that are started and awaited together."""

    def start(self) -> None:
        """Starts them."""
        for copy in self:
            copy.start()

    def wait(self) -> None:
        """Until all are done."""
        for copy in self:
            copy.wait()


class Outgoing:
    """Copies out of a ring of buffers, each awaited before its buffer is filled again.

    Args:
      sizes_S: SMEM, int32: what each slot last copied, 0 for nothing.
      copy: (slot, size) -> a copy of that many rows, from anywhere to anywhere, whose wait is that of the slot.
    """

    def __init__(self, sizes_S: Any, copy: Callable[[Any, Any], Any]) -> None:
        self._sizes_S, self._copy = sizes_S, copy
        for slot in range(sizes_S.shape[0]):
            sizes_S[slot] = 0

    def wait(self, slot: Any) -> None:
        """Until the slot's buffer is free."""
        size = self._sizes_S[slot]

        @pl.when(size > 0)
        def _() -> None:
            self._copy(slot, size).wait()

    def started(self, slot: Any, size: Any) -> None:
        """That a copy of this size was started from the slot."""
        self._sizes_S[slot] = size

    def drain(self) -> None:
        """Until all copies are done."""
        for slot in range(self._sizes_S.shape[0]):
            self.wait(slot)
