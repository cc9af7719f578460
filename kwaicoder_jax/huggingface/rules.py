"""How one of our parameters lies in somebody else's file: said once, used in both directions.

A weight moves between the two layouts by transposing, reshaping and reordering alone, so that a round trip gives the
same bits. The pattern reads from their axes to ours, with the letters of `models.config`:

    Rule("self_attn.q_proj.weight", "(H N) D -> D H N")     their [H*N, D] is our [D, H, N]
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence

import numpy as np

Rows = Callable[[int, int], np.ndarray]  # rows start:stop of their tensor, on its first axis


@dataclasses.dataclass(frozen=True)
class Rule:
    """One tensor of a layer (or of the whole model), or one of each expert.

    Attributes:
      theirs: its name; with {expert} there is one of each expert, and our parameter has an axis of experts more.
      pattern: see above; every axis of ours is one letter.
      interleaved: from which index of our last axis on they keep the two of a rotary pair side by side (0, 1), (2, 3);
        we keep them half a width apart. None if they do not.
    """

    theirs: str
    pattern: str
    interleaved: int | None = None

    @property
    def each_expert(self) -> bool:
        """Whether every expert has a tensor of its own."""
        return "{expert}" in self.theirs

    @functools.cached_property
    def _axes(self) -> tuple[list[str], str]:
        """Letters of each of their axes, and ours in order: (["HN", "D"], "DHN")."""
        left, right = self.pattern.split(" -> ")
        groups, inside = [], False
        for word in left.replace("(", "( ").replace(")", " )").split():
            if word in "()":
                inside = word == "("
                groups += [""] if inside else []
            elif inside:
                groups[-1] += word
            else:
                groups.append(word)
        return groups, right.replace(" ", "")

    def their_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """Shape of their tensor, given that of ours (without layers and experts)."""
        groups, ours = self._axes
        sizes = dict(zip(ours, shape, strict=True))
        return tuple(math.prod(sizes[letter] for letter in group) for group in groups)

    @property
    def keeps_rows(self) -> bool:
        """Whether a run on our first axis is a run of rows of theirs, so that either can be read a piece at a time."""
        groups, ours = self._axes
        return groups[0][0] == ours[0] and not (self.interleaved is not None and len(ours) == 1)

    def to_ours(self, rows: Rows, shape: Sequence[int], index: Sequence[slice] | None = None) -> np.ndarray:
        """Our parameter, or a part of it.

        Args:
          rows: reads their tensor; only the rows that are needed are asked for. What it returns is not copied here, so
            of a memory map only the parts that are needed are touched.
          shape: of ours, without layers and experts.
          index: a slice of each axis of ours, with step 1; all of it if None.

        Returns:
          An array or a view of their dtype.
        """
        groups, ours = self._axes
        sizes = dict(zip(ours, shape, strict=True))
        wanted = dict(zip(ours, index or [slice(None)] * len(ours), strict=True))
        lead = groups[0][0]
        reordered = ours[-1] if self.interleaved is not None else ""
        start, stop, _ = (slice(None) if lead == reordered else wanted[lead]).indices(sizes[lead])
        row = math.prod(sizes[letter] for letter in groups[0][1:])
        sizes[lead] = stop - start
        letters = "".join(groups)
        array = rows(start * row, stop * row).reshape([sizes[letter] for letter in letters])
        array = array.transpose([letters.index(letter) for letter in ours])
        cut = [slice(None) if letter in (lead, reordered) else wanted[letter] for letter in ours]
        array = array[tuple(cut)]
        return array[..., self._order(array.shape[-1])[wanted[reordered]]] if reordered else array

    def to_theirs(self, array: np.ndarray) -> np.ndarray:
        """Their tensor from ours, or a run of its rows from a run of our first axis where `keeps_rows`."""
        groups, ours = self._axes
        if self.interleaved is not None:
            array = array[..., np.argsort(self._order(array.shape[-1]))]
        sizes = dict(zip(ours, array.shape, strict=True))
        letters = "".join(groups)
        moved = array.transpose([ours.index(letter) for letter in letters])
        if not moved.flags.c_contiguous:
            copy_into(out := np.empty(moved.shape, moved.dtype), moved)
            moved = out
        return moved.reshape([math.prod(sizes[letter] for letter in group) for group in groups])

    def _order(self, width: int) -> np.ndarray:
        """Where each index of our last axis is in theirs."""
        assert self.interleaved is not None
        first = np.arange(self.interleaved, width, 2)
        return np.concatenate([np.arange(self.interleaved), first, first + 1])


_BLOCK, _SMALLEST = 128, 32  # elements a side: both sides of a block stay in the cache


def copy_into(out: np.ndarray, source: np.ndarray) -> None:
    """`out[...] = source` in blocks, for a transposed source: numpy's own loop strides through one of the two sides."""
    near, last = min(range(source.ndim), key=lambda axis: abs(source.strides[axis]), default=0), source.ndim - 1
    if near == last or not source.size or min(source.shape[near], source.shape[last]) < _SMALLEST:
        out[...] = source
        return
    others = [1 if axis in (near, last) else size for axis, size in enumerate(source.shape)]
    for at in np.ndindex(*others):
        block = [slice(i, i + 1) for i in at]
        for i in range(0, source.shape[near], _BLOCK):
            for j in range(0, source.shape[last], _BLOCK):
                block[near], block[last] = slice(i, i + _BLOCK), slice(j, j + _BLOCK)
                out[tuple(block)] = source[tuple(block)]
