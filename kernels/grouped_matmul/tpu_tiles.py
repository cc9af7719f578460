"""Sizes of tiles of the TPU kernels, chosen by shape and chip: from the table of tuned tiles, or else by a rule."""

from __future__ import annotations

import dataclasses
import functools
from typing import TypeVar

import jax
from jax.experimental.pallas import tpu as pltpu

from kernels.grouped_matmul import tpu_tuned

LANES = 128
_MOST_ROWS, _FEWEST_ROWS = 512, 128  # of a window
BODY = 6 * 2**20  # most of depth x columns in one straight piece of code: it is unrolled, so this bounds its size
_OUTER_ROWS, _OUTER_ROWS_FOR_ALL = 640, 1152  # most rows of a window of drhs; where that is a whole average group
OUTER_BODY = 19 * 2**26  # most of depth x columns x rows in one straight piece of code
_VISIT_CYCLES, _PIECE_CYCLES = 400, 450  # beside the products: of a window, and of a straight piece of code
MACS_PER_CYCLE, BYTES_PER_CYCLE = 2**16, 545  # of a core: bfloat16, HBM of v5e
_SHARE = 0.85  # of VMEM that buffers may take; the rest is the compiler's


@dataclasses.dataclass(frozen=True)
class Chip:
    """What the kernels need to know of a chip.

    Attributes:
      cores: that share a kernel's grid.
      vmem_bytes: of one core.
      mxu: width of a matrix unit.
      name: its generation, as in the table of tuned tiles; nothing is looked up there without one.
    """

    cores: int
    vmem_bytes: int
    mxu: int = 128
    name: str = ""


#: Right on every chip since v4: of a grid of two, one core does both halves.
ANY_CHIP = Chip(2, 64 * 2**20)


def chip() -> Chip:
    """The chip that is compiled for, as far as jax knows it."""
    try:
        info = pltpu.get_tpu_info()
    except ValueError:
        return ANY_CHIP
    return _of(info)


def chip_called(name: str) -> Chip:
    """A chip that is not here, as in "v5p", with all of its cores; ValueError if jax knows none of that name."""
    version = pltpu.ChipVersion(name)
    return _of(pltpu.get_tpu_info_for_chip(version, version.num_physical_tensor_cores_per_chip))


def _of(info: pltpu.TpuInfo) -> Chip:
    return Chip(info.num_cores, info.vmem_capacity_bytes, info.mxu_column_size, str(info.chip_version))


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

    def passes(self, width: int) -> int:
        """Over the rows: tiles of columns."""
        return width // self.columns

    def moved(self, rows: int, groups: int, depth: int, width: int) -> int:
        """Numbers that go through HBM."""
        return rows * (depth * (width // self.columns) + width) + groups * depth * width

    def vmem_bytes(self, depth: int, width: int, itemsize: int) -> int:
        """What is held on a core; the compiler holds a block's result in float32."""
        lhs, out = self.lhs_slots * self.rows * depth, self.out_slots * self.rows * self.columns
        held = lhs + out + 2 * depth * self.columns + LANES * width
        return itemsize * held + 4 * self.block_rows * self.columns

    def problem(self, depth: int, width: int, itemsize: int, here: Chip) -> str | None:
        """What is wrong with them for this shape; None if nothing is."""
        return _first_problem(
            [
                ("columns", self.columns, width),
                ("block_columns", self.block_columns, self.columns),
                ("block_rows", self.block_rows, self.rows),
                ("step_rows", self.step_rows, self.block_rows),
            ],
            [
                ("block_columns", self.block_columns, LANES),
                ("step_rows", self.step_rows, 32 // itemsize),
                ("block_rows", self.block_rows, 1 << (self.block_rows.bit_length() - 1)),
            ],
            [("lhs_slots", self.lhs_slots, 2), ("out_slots", self.out_slots, 2)],
            self.vmem_bytes(depth, width, itemsize),
            here,
        )


@dataclasses.dataclass(frozen=True)
class OuterTiles:
    """Of drhs.

    Attributes:
      rows: most rows of a window.
      depth: rows of a group's gradient that are held at once.
      columns: of it.
      block_depth: of them multiplied at once, for a whole window.
      depth_parts: into which cores divide the rows of every gradient.
      column_parts: into which they divide its columns.
      slots: windows that are held, or on their way.
    """

    rows: int
    depth: int
    columns: int
    block_depth: int
    depth_parts: int = 1
    column_parts: int = 1
    slots: int = 3

    def moved(self, rows: int, groups: int, depth: int, width: int) -> int:
        """Numbers that go through HBM."""
        return rows * (depth * (width // self.columns) + width * (depth // self.depth)) + groups * depth * width

    def vmem_bytes(self, depth: int, width: int, itemsize: int) -> int:
        """What is held on a core."""
        held = self.slots * self.rows * (self.depth + self.columns) + 2 * self.depth * self.columns
        return itemsize * (held + LANES * width // self.column_parts) + 4 * self.depth * self.columns

    def problem(self, depth: int, width: int, itemsize: int, here: Chip) -> str | None:
        """What is wrong with them for this shape; None if nothing is."""
        parts = self.depth_parts * self.column_parts
        return _first_problem(
            [
                ("depth x depth_parts", self.depth * self.depth_parts, depth),
                ("columns x column_parts", self.columns * self.column_parts, width),
                ("block_depth", self.block_depth, self.depth),
                ("depth_parts x column_parts", parts, here.cores),
            ],
            [
                ("rows", self.rows, LANES),
                ("block_depth", self.block_depth, LANES),
                ("columns", self.columns, LANES),
            ],
            [("slots", self.slots, 2)],
            self.vmem_bytes(depth, width, itemsize),
            here,
        )

    def time(self, rows: int, groups: int, depth: int, width: int, itemsize: int) -> float:
        """Cycles of a core, roughly: without what rounding costs; half of the groups are larger than the average."""
        parts = self.depth_parts * self.column_parts
        windows = groups * -(-(rows // groups + LANES) // self.rows)
        visits = windows * (depth * width // (self.depth * self.columns * parts))
        pieces = visits * (self.depth // self.block_depth)
        products = rows * depth * width / (parts * MACS_PER_CYCLE)
        copies = itemsize * self.moved(rows, groups, depth, width) / (parts * BYTES_PER_CYCLE)
        return max(products + _VISIT_CYCLES * visits + _PIECE_CYCLES * pieces, copies)


T = TypeVar("T", ProductTiles, OuterTiles)


def product_tiles(
    rows: int, groups: int, depth: int, width: int, itemsize: int, here: Chip, product: str = "forward"
) -> ProductTiles:  # fmt: skip
    """The tuned tiles of forward or "dlhs", or else the rule's; depth and width are multiples of LANES.

    Raises:
      ValueError: the tuned ones do not fit; or not even the smallest do.
    """
    tuned = _tuned(ProductTiles, product, rows, groups, depth, width, itemsize, here)
    return tuned or product_rule(rows, groups, depth, width, itemsize, here)


def outer_tiles(rows: int, groups: int, depth: int, width: int, itemsize: int, here: Chip) -> OuterTiles:
    """The same of drhs."""
    tuned = _tuned(OuterTiles, "drhs", rows, groups, depth, width, itemsize, here)
    return tuned or outer_rule(rows, groups, depth, width, itemsize, here)


def product_rule(rows: int, groups: int, depth: int, width: int, itemsize: int, here: Chip) -> ProductTiles:
    """The tiles that move fewest bytes of those that fit; depth and width are multiples of LANES.

    Raises:
      ValueError: not even the smallest fit.
    """
    block_rows = here.mxu
    found = []
    for columns in divisors(width):
        blocks = [block for block in divisors(columns) if depth * block <= BODY] or [LANES]
        for most in windows(here):
            tiles = ProductTiles(most, columns, block_rows, block_rows // 4, blocks[0])
            if fits(tiles.vmem_bytes(depth, width, itemsize), here):
                found.append((tiles.moved(rows, groups, depth, width), -most, tiles))
    if not found:
        raise ValueError(f"no tiles of {depth} x {width} fit in {here.vmem_bytes} bytes of VMEM")
    return min(found, key=lambda each: each[:2])[-1]


def outer_rule(rows: int, groups: int, depth: int, width: int, itemsize: int, here: Chip) -> OuterTiles:
    """The tiles of drhs that take the least time of those that fit, in windows that hold an average group.

    Raises:
      ValueError: not even the smallest fit.
    """
    # Each count of 128 rows has code of its own, so larger windows have to be worth it.
    wanted = padded(rows // groups + LANES)
    most_rows = wanted if wanted <= _OUTER_ROWS_FOR_ALL else _OUTER_ROWS
    found = []
    for most in range(most_rows, 0, -LANES):
        for down, across in _outer_parts(depth, width, here.cores):
            for deep in divisors(depth // down):
                for columns in divisors(width // across):
                    blocks = [block for block in divisors(deep) if block * columns * most <= OUTER_BODY] or [LANES]
                    tiles = OuterTiles(most, deep, columns, blocks[0], down, across)
                    if fits(tiles.vmem_bytes(depth, width, itemsize), here):
                        time = tiles.time(rows, groups, depth, width, itemsize)
                        found.append((-most, time, tiles.moved(rows, groups, depth, width), tiles))
    if not found:
        raise ValueError(f"no tiles of {depth} x {width} fit in {here.vmem_bytes} bytes of VMEM")
    return min(found, key=lambda each: each[:3])[-1]


def _tuned(
    kind: type[T], product: str, rows: int, groups: int, depth: int, width: int, itemsize: int, here: Chip
) -> T | None:
    """What the table has; ValueError if that does not fit."""
    if not here.name:
        return None
    entry = tpu_tuned.table().get(tpu_tuned.key_of(here.name, product, itemsize, groups, depth, width, rows))
    if entry is None:
        return None
    try:
        tiles = kind(**entry.tiles)
        problem = tiles.problem(depth, width, itemsize, here)
    except TypeError as error:
        problem = str(error)
    if problem:
        raise ValueError(f"tuned_tiles.json: {entry.key}: {problem}; {tpu_tuned.REMEDY}")
    return tiles


def _first_problem(
    divide: list[tuple[str, int, int]], multiples: list[tuple[str, int, int]], least: list[tuple[str, int, int]],
    nbytes: int, here: Chip,
) -> str | None:  # fmt: skip
    """Of fields (name, value, of what): that do not divide it, are no multiple of it, or below it; then of VMEM."""
    for name, value, whole in divide:
        if whole % value:
            return f"{name} is {value}, which does not divide {whole}"
    for name, value, unit in multiples:
        if value % unit:
            return f"{name} is {value}, which is no multiple of {unit}"
    for name, value, bound in least:
        if value < bound:
            return f"{name} is {value}, which is less than {bound}"
    if not fits(nbytes, here):
        return f"{nbytes} bytes of VMEM are more than {_SHARE} of the {here.vmem_bytes} that there are"
    return None


def fits(nbytes: int, here: Chip) -> bool:
    """Whether a kernel may have so many bytes of buffers."""
    return nbytes <= _SHARE * here.vmem_bytes


def _outer_parts(depth: int, width: int, cores: int) -> list[tuple[int, int]]:
    """Into how many parts of whole lanes cores can divide rows and columns of a gradient; one core does it all if none."""
    parts = [(cores, 1)] * (depth % (cores * LANES) == 0) + [(1, cores)] * (width % (cores * LANES) == 0)
    return parts or [(1, 1)]


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


def vmem_limit(here: Chip) -> int:
    """What a kernel may ask for, bytes."""
    return int(0.95 * here.vmem_bytes)


def sublanes(dtype: jax.typing.DTypeLike) -> int:
    """Rows of a tile of 4-byte words: 8 of them hold 16 rows of bfloat16."""
    return 8 * 4 // jax.numpy.dtype(dtype).itemsize
