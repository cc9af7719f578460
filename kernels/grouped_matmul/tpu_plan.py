"""What a TPU kernel of products of rows computes (`tpu_rows`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax

from kernels.grouped_matmul.tpu_tiles import LANES, ProductTiles


@dataclasses.dataclass(frozen=True)
class Out:
    """An output of a plan.

    Attributes:
      dtype: of it.
      is_packed: rows are `tpu_gather.packed`, [M, 1, N].
      is_row_sum: it has LANES columns for each tile of columns, and is the sum over a tile's blocks of columns.
    """

    dtype: Any
    is_packed: bool = False
    is_row_sum: bool = False

    def columns(self, tiles: ProductTiles) -> int:
        """Of a tile."""
        return LANES if self.is_row_sum else tiles.columns

    def shape(self, call: Call, tiles: ProductTiles) -> jax.ShapeDtypeStruct:
        """Of the whole output."""
        width = tiles.passes(call.width) * self.columns(tiles)
        return jax.ShapeDtypeStruct((call.rows, 1, width) if self.is_packed else (call.rows, width), self.dtype)


Finish = Callable[[Sequence[jax.Array], Sequence[jax.Array], Sequence[jax.Array]], Sequence[jax.Array]]


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is computed of a block of rows and columns.

    Attributes:
      name: of the kernel.
      held: what is held of a group's matrices: (matrix, first column) of each; its width is that of the outputs.
      parts: products, in float32: pairs of an lhs and what it is multiplied with, an index into `held`; these are added.
      outs: the outputs.
      finish: (parts, what is beside them [rows, columns], what is of each row [rows, LANES]) -> outputs, of these rows and
        columns; LANES columns of one that is summed.
      transpose_rhs: matrices are [G, N, K], and read as they lie.
    """

    name: str
    held: tuple[tuple[int, int], ...]
    parts: tuple[tuple[tuple[int, int], ...], ...]
    outs: tuple[Out, ...]
    finish: Finish
    transpose_rhs: bool = False


@dataclasses.dataclass(frozen=True)
class Call:
    """Shapes of one call.

    Attributes:
      rows: M.
      groups: G.
      depth: K.
      width: N, of the outputs.
      lhs, rhs, beside, of_rows: numbers of arrays.
      gathered: whether rows are.
      piece: rows that are gathered together.
      dtype: of rows.
      align: rows of a sublane tile.
      held_dtype: of matrices, if that is another one.
      scaled: whether their columns have scales.
    """

    rows: int
    groups: int
    depth: int
    width: int
    lhs: int
    rhs: int
    beside: int
    of_rows: int
    gathered: bool
    piece: int
    dtype: Any
    align: int
    held_dtype: Any = None
    scaled: bool = False

    @property
    def rhs_dtype(self) -> Any:
        """Of matrices."""
        return self.held_dtype or self.dtype
