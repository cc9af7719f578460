"""Sizes of tiles of the TPU kernels, chosen by shape and chip."""

from __future__ import annotations

import dataclasses
import functools

import jax
from jax.experimental.pallas import tpu as pltpu

LANES = 128
_MOST_ROWS, _FEWEST_ROWS = 512, 128  # of a window
_BODY = 6 * 2**20  # most of depth x columns in one straight piece of code: it is unrolled, so this bounds its size
_OUTER_WINDOWS = (128, 256, 384, 512, 640)  # rows of a window of drhs; each count of 128 rows has code of its own
_OUTER_BODY = 15 * 2**26  # most of depth x width x rows in one straight piece of code
_SHARE = 0.85  # of VMEM that buffers may take; the rest is the compiler's


@dataclasses.dataclass(frozen=True)
class Chip:
    """What the kernels need to know of a chip.

    Attributes:
      cores: that share a kernel's grid.
      vmem_bytes: of one core.
      mxu: width of a matrix unit.
    """

    cores: int
    vmem_bytes: int
    mxu: int = 128


#: Right on every chip since v4: of a grid of two, one core does both halves.
ANY_CHIP = Chip(2, 64 * 2**20)


def chip() -> Chip:
    """The chip that is compiled for, as far as jax knows it."""
    try:
        info = pltpu.get_tpu_info()
    except ValueError:
        return ANY_CHIP
    return Chip(info.num_cores, info.vmem_capacity_bytes, info.mxu_column_size)


@dataclasses.dataclass(frozen=True)
class ProductTiles:
    """Of forward and dlhs.

    Attributes:
      rows: most rows of a window.
      columns: of the output, whose part of a group's matrix is held at once.
      block_rows: multiplied at once; what remains of a window is multiplied in pieces of multiples of `step_rows`.
      step_rows: see there.
      block_columns: multiplied at once.
      lhs_slots: windows that are held, or on their way.
      out_slots: windows of results that are held, or on their way.
    """

    rows: int
    columns: int
    block_rows: int
    step_rows: int
    block_columns: int
    lhs_slots: int = 3
    out_slots: int = 3

    def moved(self, rows: int, groups: int, depth: int, width: int) -> int:
        """Numbers that go through HBM."""
        return rows * (depth * (width // self.columns) + width) + groups * depth * width


@dataclasses.dataclass(frozen=True)
class OuterTiles:
    """Of drhs.

    Attributes:
      rows: most rows of a window.
      depth: rows of a group's gradient that are held at once.
      columns: of it.
      block_depth: of them multiplied at once, for a whole window.
      slots: windows that are held, or on their way.
    """

    rows: int
    depth: int
    columns: int
    block_depth: int
    slots: int = 3

    def moved(self, rows: int, groups: int, depth: int, width: int) -> int:
        """Numbers that go through HBM."""
        return rows * (depth * (width // self.columns) + width * (depth // self.depth)) + groups * depth * width


def product_tiles(rows: int, groups: int, depth: int, width: int, itemsize: int, here: Chip) -> ProductTiles:
    """The tiles that move fewest bytes of those that fit; depth and width are multiples of LANES.

    Raises:
      ValueError: not even the smallest fit.
    """
    block_rows = here.mxu
    found = []
    for columns in divisors(width):
        blocks = [block for block in divisors(columns) if depth * block <= _BODY] or [LANES]
        for most in windows(here):
            # The compiler holds a block's result in float32.
            held = 3 * most * (depth + columns) + 2 * depth * columns + LANES * width
            if itemsize * held + 4 * block_rows * columns <= _SHARE * here.vmem_bytes:
                tiles = ProductTiles(most, columns, block_rows, block_rows // 4, blocks[0])
                found.append((tiles.moved(rows, groups, depth, width), -most, tiles))
    if not found:
        raise ValueError(f"no tiles of {depth} x {width} fit in {here.vmem_bytes} bytes of VMEM")
    return min(found, key=lambda each: each[:2])[-1]


def outer_tiles(rows: int, groups: int, depth: int, width: int, itemsize: int, here: Chip) -> OuterTiles:
    """The same for drhs, whose depth is divided between the cores.

    Raises:
      ValueError: not even the smallest fit.
    """
    wanted = min(rows // groups + LANES, max(_OUTER_WINDOWS))  # an average group begins anywhere in a tile
    found = []
    for most in _OUTER_WINDOWS:
        for deep in divisors(depth // here.cores):
            for columns in divisors(width):
                blocks = [block for block in divisors(deep) if block * columns * most <= _OUTER_BODY] or [LANES]
                held = 3 * most * (deep + columns) + 2 * deep * columns + LANES * width
                if itemsize * held + 4 * deep * columns <= _SHARE * here.vmem_bytes:
                    tiles = OuterTiles(most, deep, columns, blocks[0])
                    moved = tiles.moved(rows, groups, depth, width)
                    found.append((most < wanted, abs(most - wanted), moved, -deep, tiles))
    if not found:
        raise ValueError(f"no tiles of {depth} x {width} fit in {here.vmem_bytes} bytes of VMEM")
    return min(found, key=lambda each: each[:4])[-1]


def windows(here: Chip) -> list[int]:
    """Rows that a window may have at most, largest first."""
    return [rows for rows in (_MOST_ROWS, _MOST_ROWS // 2, _FEWEST_ROWS) if rows >= here.mxu]


@functools.cache
def divisors(size: int) -> tuple[int, ...]:
    """Multiples of LANES that divide the size, largest first."""
    return tuple(size // parts for parts in range(1, size // LANES + 1) if size % (parts * LANES) == 0)


def padded(size: int, unit: int = LANES) -> int:
    """The size rounded up."""
    return -(-size // unit) * unit


def for_outer(here: Chip, depth: int) -> Chip:
    """The chip with as many cores as divide the depth, a multiple of LANES, into whole tiles."""
    return here if depth % (here.cores * LANES) == 0 else dataclasses.replace(here, cores=1)


def vmem_limit(here: Chip) -> int:
    """What a kernel may ask for, bytes."""
    return int(0.95 * here.vmem_bytes)


def sublanes(dtype: jax.typing.DTypeLike) -> int:
    """Rows of a tile of 4-byte words: 8 of them hold 16 rows of bfloat16."""
    return 8 * 4 // jax.numpy.dtype(dtype).itemsize
