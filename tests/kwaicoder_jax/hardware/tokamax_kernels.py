"""The published timings of tokamax's grouped matmul, and its kernel as it was timed.

The records are in tokamax_timings.json, with their source. Group sizes that a record does not list are those that tokamax
draws for its benchmarks: rows put into groups by numpy's generator, seed 0.
"""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from kwaicoder_jax.hardware import schedule


@dataclasses.dataclass(frozen=True)
class Timing:
    """A record: a product of grouped rows, its tiles, and how long it took on the chip."""

    chip: str
    product: str
    groups: int
    rows: int
    k: int
    n: int
    tile_m: int
    tile_k: int
    tile_n: int
    input_buffers: int
    sizes: tuple[int, ...]
    seconds: float

    @property
    def flops(self) -> float:
        return 2.0 * self.rows * self.k * self.n

    def predict(self) -> schedule.Prediction:
        kernel = schedule.compile_kernel(self._call, self._arguments(), chip=self.chip, kernel="gmm", flags=_FLAGS)
        return kernel.predict(self._scalars(), useful_flops=self.flops)

    def _call(self, lhs, rhs, sizes):
        from tokamax._src.ops.ragged_dot import pallas_mosaic_tpu_kernel as tokamax

        tiles = (self.tile_m, self.tile_k, self.tile_n)
        precision = (jax.lax.Precision.DEFAULT, jax.lax.Precision.DEFAULT)
        common = {"precision": precision, "out_dtype": jnp.bfloat16, "input_buffer_count": self.input_buffers}
        if self.product == "drhs":
            return tokamax.tgmm(lhs.T, rhs, sizes, tiling=tiles, **common)
        return tokamax.gmm(lhs, rhs, sizes, tiling=tiles, transpose_rhs=self.product == "dlhs", **common)

    def _arguments(self):
        rhs = {
            "forward": (self.groups, self.k, self.n),
            "dlhs": (self.groups, self.n, self.k),
            "drhs": (self.rows, self.n),
        }[self.product]
        arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in ((self.rows, self.k), rhs)]
        return [*arrays, jax.ShapeDtypeStruct((self.groups,), jnp.int32)]

    def _scalars(self):
        """What the kernel's grid and its index maps read: the number of visited tiles, and of each its group and its rows."""
        ends = np.cumsum(self.sizes)
        starts = ends - self.sizes
        first, last = starts // self.tile_m, -(-ends // self.tile_m)
        visits = np.where(np.asarray(self.sizes) > 0, last - first, int(self.product == "drhs"))
        length = self.rows // self.tile_m + self.groups - 1
        groups = np.repeat(np.arange(self.groups), visits)
        within = np.arange(visits.sum()) - np.repeat(np.cumsum(visits) - visits, visits)
        tiles = np.minimum(first[groups] + within, self.rows // self.tile_m - 1)
        padded = [np.pad(each, (0, length - len(each)), mode="edge") for each in (groups, tiles)]
        return {0: int(visits.sum()), 1: np.concatenate([[0], ends]), 2: padded[0], 3: padded[1], 4: 0}


_FLAGS = ("--xla_tpu_scoped_vmem_limit_kib=65536",)


def timings():
    """All records."""
    table = json.loads(Path(__file__).with_name("tokamax_timings.json").read_text())
    found = []
    for *head, name, milliseconds in table["records"]:
        groups, rows = head[2:4]
        drawn = np.random.default_rng(0).choice(groups, (rows,)) if name is None else None
        sizes = table["group_sizes"][name] if drawn is None else np.bincount(drawn, minlength=groups)
        found.append(Timing(*head, tuple(int(size) for size in sizes), milliseconds / 1e3))
    return found
