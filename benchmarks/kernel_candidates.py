"""The kernels that `benchmarks.kernels` compares, each with a few sizes of tiles."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.kernel_shapes import Case
from kernels.grouped_matmul import Backend, api, megablox, tokamax
from kwaicoder_jax.hardware import schedule

Tiles = tuple[int, int, int]  # of rows, depth and width
UPSTREAM = (Backend.MEGABLOX, Backend.TOKAMAX)
_MODULES: Mapping[Backend, Any] = {Backend.MEGABLOX: megablox, Backend.TOKAMAX: tokamax}
_NAMES = {Backend.TPU: "grouped_", Backend.MEGABLOX: "gmm", Backend.TOKAMAX: "gmm"}
_LIMIT_KIB = 57_344  # of VMEM for upstream's kernels, which do not ask for more than the compiler's default themselves
_FLAGS = (f"--xla_tpu_scoped_vmem_limit_kib={_LIMIT_KIB}",)
_MOST_PARTS = 16


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A kernel for one product, with sizes of tiles.

    Attributes:
      backend: whose.
      case: what it computes.
      tiles: of upstream's kernels; None for those that a back end chooses itself.
    """

    backend: Backend
    case: Case
    tiles: Tiles | None = None

    @property
    def arguments(self) -> Sequence[jax.ShapeDtypeStruct]:
        """Two arrays and the group sizes, as `function` takes them."""
        shape, rows = self.case.shape, self.case.rows
        made = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
        lhs, dout = made((rows, shape.depth)), made((rows, shape.width))
        rhs, sizes = made((shape.groups, shape.depth, shape.width)), jax.ShapeDtypeStruct((shape.groups,), jnp.int32)
        return {"forward": (lhs, rhs, sizes), "dlhs": (dout, rhs, sizes), "drhs": (lhs, dout, sizes)}[self.case.product]

    @property
    def function(self) -> Callable[..., jax.Array]:
        """The product."""
        module = api if self.tiles is None else _MODULES[self.backend]
        how: dict[str, Any] = {} if self.tiles is None else {"tiles": self.tiles}
        if self.case.product != "drhs":
            how["transpose_rhs"] = self.case.product == "dlhs"
        made = module.outer if self.case.product == "drhs" else module.product
        return functools.partial(made, *([self.backend] if self.tiles is None else []), **how)

    def compile(self, chip: str) -> schedule.Kernel:
        """Its schedule; UserError or ValueError if the compiler refuses it, as it does with tiles that do not fit."""
        flags = _FLAGS if self.backend in UPSTREAM else ()
        name = _NAMES[self.backend]
        return schedule.compile_kernel(self.function, self.arguments, chip=chip, kernel=name, flags=flags)

    def scalars(self, sizes: np.ndarray) -> Mapping[int, Any]:
        """What the kernel's control flow depends on, for `schedule.Kernel.predict`."""
        if self.tiles is None:
            return {0: sizes}
        return visits(sizes, self.case.rows, self.tiles[0], with_empty=self.case.product == "drhs")


def visits(sizes: np.ndarray, rows: int, tile: int, *, with_empty: bool) -> Mapping[int, Any]:
    """Scalars of upstream's kernels, as their `make_group_metadata` computes them.

    The number of visited tiles, where each group begins, of each visit its group and its tile, and the first group.

    Args:
      sizes: of the groups, [G].
      rows: in all.
      tile: of rows, which divides them.
      with_empty: whether groups without rows are visited too, as in drhs.
    """
    groups, ends = len(sizes), np.cumsum(sizes)
    first, last = (ends - sizes) // tile, -(-ends // tile)
    count = np.where(sizes > 0, last - first, int(with_empty))
    length = rows // tile + groups - 1
    group = np.repeat(np.arange(groups), count)
    within = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    tiles = np.minimum(first[group] + within, rows // tile - 1)
    padded = [np.pad(each, (0, length - len(each)), mode="edge") for each in (group, tiles)]
    return {0: int(count.sum()), 1: np.concatenate([[0], ends]), 2: padded[0], 3: padded[1], 4: 0}


def row_tiles(case: Case) -> Sequence[int]:
    """Worth a try: small ones for small groups."""
    average = case.rows // case.shape.groups
    if average <= 64:
        return 64, 128
    return (128, 256) if average < 512 else (128, 256, 512) if average < 8192 else (256, 512, 1024)


def inner_tiles(case: Case, tile: int, cores: int) -> Sequence[tuple[int, int]]:
    """The tiles of depth and width that move fewest bytes of those that fit in VMEM.

    For two cores a second choice with an even number of columns: upstream divides columns between cores, so that with one
    or three of them one core has nothing to do for a while.
    """
    depth, width = case.inner
    outer = case.product == "drhs"
    found = []
    for parts in ((deep, wide) for deep in range(1, _MOST_PARTS + 1) for wide in range(1, _MOST_PARTS + 1)):
        deep, wide = (_part(size, count) for size, count in zip((depth, width), parts, strict=True))
        # Two buffers of each operand and result, and the float32 sum with what is added to it.
        held = 4 * (tile * deep + deep * wide + tile * wide) + 8 * wide * (deep if outer else tile)
        in_vain = any(count > 2 and size % count for size, count in zip((depth, width), parts, strict=True))
        if in_vain or held > 0.95 * 1024 * _LIMIT_KIB:
            continue
        again = not outer and parts[0] > 1  # a matrix is read again for each tile of rows
        reads = case.shape.groups + (case.rows // tile - 1 if again else 0)
        padded = [size * count for size, count in zip((deep, wide), parts, strict=True)]
        moved = (
            case.rows * (padded[0] * parts[1] + padded[1] * (parts[0] if outer else 1)) + reads * padded[0] * padded[1]
        )
        found.append((moved, parts[0] * parts[1], parts, (deep, wide)))
    best = min(found)
    even = [each for each in found if each[3] != best[3] and each[2][1] % cores == 0]
    return [best[3], *([min(even)[3]] if even and cores > 1 else [])]


def _part(size: int, parts: int) -> int:
    return -(-size // parts // 128) * 128
