"""Rows that a TPU kernel gathers by itself, some pieces ahead: copies of single rows, started between matrix instructions.

A copy moves whole 32-bit words, so that rows of bfloat16 are words of two numbers, one of each half of the row (`packed`),
and taken apart in VMEM.

    index      7 2 9 4 ...                       rows of the source, in the order in which they are wanted, in pieces
    arriving   [piece | piece | piece | piece]   one copy a row; a piece is awaited as a whole
    held       [piece | piece | piece | piece | the first rows again]      taken apart, for products

The held pieces are a ring. Its first rows stand behind the last ones too, so that a block of rows that begins anywhere in
the ring is one slice.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels.grouped_matmul.tpu_walk import Visit, floor_to

# Numbers of pieces, powers of two.
ARRIVING = 4
HELD = 4  # more than a window touches
_INDICES = 8  # whose indices are here: they are needed before a piece's copies are started
_TOGETHER = 16  # rows whose copies are started in one turn of a loop
SCRATCHES = 5  # of `Gather`


def packed(x_MD: jax.Array) -> jax.Array:
    """Rows of 16 bits as uint32 [M, 1, D / 2]: number d in the lower half of word d, number D / 2 + d in the upper one.

    Rows of 32 bits stay as they are, [M, 1, D]. With that axis of one, a row is contiguous in HBM.
    """
    if x_MD.dtype.itemsize == 4:
        return x_MD[:, None]
    lower, upper = (
        lax.bitcast_convert_type(half, jnp.uint16).astype(jnp.uint32) for half in jnp.split(x_MD, 2, axis=1)
    )
    return (lower | (upper << 16))[:, None]


def pack(halves: list[jax.Array], dtype: Any) -> jax.Array:
    """The same of float32 [rows, D / 2] each, in a kernel; the whole row of 32 bits is one half."""
    if jnp.dtype(dtype).itemsize == 4:
        return halves[0]
    lower, upper = (lax.bitcast_convert_type(half.astype(dtype).astype(jnp.float32), jnp.uint32) for half in halves)
    return (lower >> 16) | upper


def unpack(words_MW: jax.Array, dtype: Any) -> list[jax.Array]:
    """The inverse: float32."""
    if jnp.dtype(dtype).itemsize == 4:
        return [words_MW]
    upper = words_MW & jnp.uint32(0xFFFF0000)
    return [lax.bitcast_convert_type(bits, jnp.float32) for bits in (words_MW << 16, upper)]


def words_dtype(dtype: Any) -> Any:
    """Of packed rows."""
    return jnp.uint32 if jnp.dtype(dtype).itemsize == 2 else jnp.dtype(dtype)


def scratch_shapes(piece: int, words: int, dtype: Any) -> list[Any]:
    """What a kernel hands to `Gather`, for pieces of so many rows."""
    copies = pltpu.SemaphoreType.DMA
    return [
        pltpu.SMEM((2,), jnp.int32),
        pltpu.SMEM((_INDICES, piece), jnp.int32),
        pltpu.VMEM((ARRIVING, piece, words), words_dtype(dtype)),
        copies((_INDICES,)),
        copies((ARRIVING,)),
    ]


class Gather:
    """The pieces of a core, one after the other, in passes over the same ones.

    Args:
      source: HBM, rows [rows, 1, words].
      index_QP: HBM, int32: which of them, a piece in each row.
      first: piece with which a pass begins.
      count: pieces of a pass.
      passes: how many.
      scratch: of `scratch_shapes`.
    """

    def __init__(self, source: Any, index_QP: Any, first: Any, count: Any, passes: int, scratch: Any) -> None:
        self._state, self._index, self._arriving, self._index_done, self._done = scratch
        self._source, self._index_QP, self._first, self._count, self._passes = source, index_QP, first, count, passes
        self._total, self.piece = count * passes, self._index.shape[1]

    def begin(self) -> None:
        """Starts the first copies."""
        self._state[0] = 0  # pieces whose copies were started
        self._state[1] = 0  # pieces that were taken
        for number in range(_INDICES):
            copy = self._index_copy(jnp.int32(number))
            pl.when(number < self._total)(copy.start)
        for number in range(ARRIVING):
            pl.when(number < self._total)(self.start)

    def has_room(self) -> Any:
        """Whether there is a piece to start copies of, and a place for it."""
        started, taken = self._state[0], self._state[1]
        return (started < self._total) & (started < taken + ARRIVING)

    def start(self) -> None:
        """Starts the copies of the next piece, in a loop of its own."""
        coming = self.next()
        pl.loop(0, self.piece, step=_TOGETHER)(lambda first: coming.start(first, _TOGETHER))
        coming.done()

    def next(self) -> Coming:
        """The next piece to start copies of; waits for its indices."""
        number = self._state[0]
        self._index_copy(number).wait()
        return Coming(self, number)

    @property
    def taken(self) -> Any:
        """How many pieces were taken."""
        return self._state[1]

    def take(self) -> Any:
        """Waits for the next piece: its rows in VMEM, until `release`."""
        number = self._state[1]
        pl.when(self._state[0] == number)(self.start)
        rows_PW = self._arriving.at[number & (ARRIVING - 1)]
        pltpu.make_async_copy(rows_PW, rows_PW, self._done.at[number & (ARRIVING - 1)]).wait()
        return rows_PW

    def release(self) -> None:
        """That the piece was read."""
        self._state[1] = self._state[1] + 1

    def _index_copy(self, number: Any) -> Any:
        slot, piece = number & (_INDICES - 1), number
        if self._passes > 1:  # a scalar core has no division
            piece = lax.while_loop(lambda each: each >= self._count, lambda each: each - self._count, number)
        source = self._index_QP.at[pl.ds(self._first + piece, 1)]
        return pltpu.make_async_copy(source, self._index.at[pl.ds(slot, 1)], self._index_done.at[slot])


class Coming:
    """A piece whose rows' copies are started some at a time."""

    def __init__(self, gather: Gather, number: Any) -> None:
        self._gather, self._number, self.piece = gather, number, gather.piece
        self._slot, self._place = number & (_INDICES - 1), number & (ARRIVING - 1)

    def start(self, first: Any, count: int) -> None:
        """Starts the copies of `count` rows from `first` on."""
        g = self._gather
        for row in range(count):
            source = g._source.at[g._index[self._slot, first + row]]
            target = g._arriving.at[self._place, pl.ds(first + row, 1)]
            pltpu.make_async_copy(source, target, g._done.at[self._place]).start()

    def done(self) -> None:
        """That all of them were started, once each."""
        g, ahead = self._gather, self._number + _INDICES
        g._state[0] = self._number + 1
        pl.when(ahead < g._total)(lambda: g._index_copy(ahead).start())


class HeldRows:
    """Gathered rows in the order of a walk, taken apart for products.

    Args:
      gather: of the rows of this core, a pass for each tile of columns.
      first: its first piece.
      count: pieces of a pass.
      held_RD: VMEM, HELD pieces and as many rows as are read at once.
    """

    def __init__(self, gather: Gather, first: Any, count: Any, held_RD: Any) -> None:
        self.gather, self._first, self._count, self.held_RD = gather, first, count, held_RD
        self._shift = gather.piece.bit_length() - 1
        self._again = held_RD.shape[0] - HELD * gather.piece

    def hold(self, visit: Visit, end: Any) -> None:
        """Until the rows of a visit are held: those before `end`."""
        wanted = self._number(visit.column, end - 1) + 1

        def take(taken: Any) -> Any:
            rows_PW, place = self.gather.take(), taken & (HELD - 1)
            self._unpack(rows_PW, place * self.gather.piece, self.gather.piece)
            pl.when(place == 0)(lambda: self._unpack(rows_PW, jnp.int32(HELD * self.gather.piece), self._again))
            self.gather.release()
            return taken + 1

        lax.while_loop(lambda taken: taken < wanted, take, self.gather.taken)

    def place(self, visit: Visit, row: Any) -> Any:
        """Where the row is held, with those that follow."""
        inside = row - floor_to(row, self.gather.piece)
        return (self._number(visit.column, row) & (HELD - 1)) * self.gather.piece + inside

    def _number(self, column: Any, row: Any) -> Any:
        return column * self._count + lax.shift_right_logical(row, self._shift) - self._first

    def _unpack(self, rows_PW: Any, first: Any, count: int) -> None:
        dtype = self.held_RD.dtype

        @pl.loop(0, count, step=16)
        def _(row: Any) -> None:
            here = pl.ds(pl.multiple_of(first + row, 16), 16)
            for number, part in enumerate(unpack(rows_PW[pl.ds(pl.multiple_of(row, 16), 16)], dtype)):
                wide = part.shape[1]
                self.held_RD[here, pl.ds(number * wide, wide)] = part.astype(dtype)
