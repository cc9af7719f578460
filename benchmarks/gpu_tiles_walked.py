"""What the kernels for Hopper execute for given sizes of groups: FLOPs, bytes copied into shared memory, bytes of HBM.

Tiles are listed in the order in which the kernels walk them. 132 of them are worked on at a time, and in step along the
contracted axis; bytes of HBM are the misses of a cache of 50 MB that evicts what was used longest ago. No such machine has
been measured: an H100's cache is two halves, and its blocks do not stay in step.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Iterator, Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from kernels.grouped_matmul import gpu, gpu_tiles

CACHE = 50 * 2**20
_ITEM = 2  # bytes of a number
_CHUNK = 1024  # of the contracted axis, between which blocks are in step


class Tile(NamedTuple):
    """One output tile: what it reads, by name, and its sizes."""

    lhs: Hashable
    rhs: Hashable
    rows: int
    columns: int
    depth: int


class Work(NamedTuple):
    """Of one call: executed FLOPs, bytes copied into shared memory, bytes of HBM, read and written."""

    flops: float
    copied_bytes: float
    hbm_bytes: float


def product(sizes: np.ndarray, depth: int, width: int) -> Work:
    """Of our `gpu.product`; columns are those of the output."""
    rows, groups = int(sizes.sum()), len(sizes)
    tile, wide = gpu.product_tile(rows, groups, width)
    visits = gpu_tiles.visits(jnp.asarray(sizes, jnp.int32), rows, tile)
    busy = [(int(g), int(b)) for g, b, own in zip(visits.group, visits.block, np.asarray(visits.rows)) if own]
    strip = gpu_tiles.strip_of(width // wide)
    tiles = (
        Tile(block, (group, column), tile, wide, depth)
        for first in range(0, width // wide, strip)
        for group, block in busy
        for column in range(first, first + strip)
    )
    return _work(tiles, written=_ITEM * rows * width)


def upstream_product(sizes: np.ndarray, depth: int, width: int, tile: int = 128, wide: int = 128) -> Work:
    """Of jax's `ragged_dot_mgpu`, whose tiles begin at multiples of the tile, and which visits rows / tile + groups - 1."""
    rows, ends = int(sizes.sum()), np.cumsum(sizes)
    firsts = (ends - sizes) // tile
    counts = np.where(sizes > 0, (ends - 1) // tile - firsts + 1, 0)
    busy = [(g, int(firsts[g]) + index) for g in range(len(sizes)) for index in range(counts[g])]
    busy += [(0, 0)] * (-(-rows // tile) + len(sizes) - 1 - len(busy))  # visits of no group are computed all the same
    columns = width // wide
    strip = gpu_tiles.strip_of(columns)
    tiles = (
        Tile(block, (group, column), tile, wide, depth)
        for first in range(0, columns, strip)
        for group, block in busy
        for column in range(first, first + strip)
    )
    return _work(tiles, written=_ITEM * rows * width)


def outer(sizes: np.ndarray, depth: int, width: int, tile: int | None = None) -> Work:
    """Of our `gpu.outer`, and of jax's `transposed_ragged_dot_mgpu` with its `tile`: both walk groups in steps of 64 rows."""
    ends = np.cumsum(sizes)
    steps = np.where(sizes > 0, -(-ends // gpu_tiles.DEPTH) - (ends - sizes) // gpu_tiles.DEPTH, 0)
    deep, wide = tile or gpu.outer_tile(depth), tile or gpu.outer_tile(width)
    strip = gpu_tiles.strip_of(width // wide)
    tiles = (
        Tile((group, "lhs", row), (group, "dout", column), deep, wide, int(steps[group]) * gpu_tiles.DEPTH)
        for group in np.flatnonzero(steps)
        for first in range(0, width // wide, strip)
        for row in range(depth // deep)
        for column in range(first, first + strip)
    )
    return _work(tiles, written=_ITEM * len(sizes) * depth * width)


def _work(tiles: Iterator[Tile], written: int) -> Work:
    flops, copied, missed, cache = 0.0, 0.0, 0.0, _Cache(CACHE)
    wave: list[Tile] = []
    for tile in tiles:
        flops += 2.0 * tile.rows * tile.columns * tile.depth
        copied += _ITEM * float(tile.rows + tile.columns) * tile.depth
        wave.append(tile)
        if len(wave) == gpu_tiles.SMS:
            missed += _read(wave, cache)
            wave = []
    return Work(flops, copied, missed + _read(wave, cache) + written)


def _read(wave: Sequence[Tile], cache: _Cache) -> float:
    """Bytes that tiles which are worked on together miss in the cache."""
    missed = 0.0
    for start in range(0, max((tile.depth for tile in wave), default=0), _CHUNK):
        asked: dict[Hashable, int] = {}
        for tile in wave:
            length = min(_CHUNK, tile.depth - start)
            if length > 0:
                asked[tile.lhs, "lhs", start] = _ITEM * length * tile.rows
                asked[tile.rhs, "rhs", start] = _ITEM * length * tile.columns
        missed += sum(cache.read(name, size) for name, size in asked.items())
    return missed


class _Cache:
    """Evicts what was used longest ago."""

    def __init__(self, capacity: int) -> None:
        self.free, self.held = capacity, OrderedDict[Hashable, int]()

    def read(self, name: Hashable, size: int) -> int:
        """Bytes that come from memory."""
        if name in self.held:
            self.held.move_to_end(name)
            return 0
        self.held[name] = size
        self.free -= size
        while self.free < 0:
            self.free += self.held.popitem(last=False)[1]
        return size
