"""Searches tiles for the TPU kernels of the grouped matmul, and refills the table that they look them up in.

    python -m benchmarks.tune_kernels --chip=v5p [--shapes=64x2048x1408,...] [--rows=32768,...]
        [--products=forward,dlhs,drhs] [--dtype=bfloat16] [--most=16] [--write] [--json=FILE]

From the rule's tiles one field after the other goes a step up or down, and on from what was fastest, until nothing is faster
or `--most` tiles were tried. Where the chip is in this machine they are timed (the median of several runs), elsewhere
predicted from the compiled schedule (docs/schedule.md); the table says which of the two. Group sizes are multinomial.
`--write` puts what is more than 1 % faster than the rule into kernels/grouped_matmul/tuned_tiles.json, and takes out what
was there for a shape where nothing is.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import kernel_shapes, kernel_timing
from kernels.grouped_matmul import tpu, tpu_tiles, tpu_tuned
from kernels.grouped_matmul.tpu_tiles import LANES, Chip, OuterTiles, ProductTiles
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.hardware import chip_of, schedule

Tiles = ProductTiles | OuterTiles
GAIN = 1.01  # of the rule's time over the best: what is worth an entry


@dataclasses.dataclass(frozen=True)
class Case:
    """One product to tune.

    Attributes:
      product: of `tpu_tuned.PRODUCTS`.
      groups: experts.
      sides: of an expert's matrix, K and N of forward.
      rows: of all groups.
      dtype: of operands and output.
    """

    product: str
    groups: int
    sides: tuple[int, int]
    rows: int
    dtype: str = "bfloat16"

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """Rows, groups, depth, width and itemsize, as `tpu_tiles` takes them."""
        depth, width = (tpu_tiles.padded(side) for side in (self.sides[::-1] if self.product == "dlhs" else self.sides))
        return self.rows, self.groups, depth, width, jnp.dtype(self.dtype).itemsize

    @property
    def sizes(self) -> np.ndarray:
        """Multinomial, the same each time."""
        return kernel_shapes.sizes("multinomial", self.groups, self.rows)

    def key(self, chip: str) -> tpu_tuned.Key:
        """Of the table."""
        rows, groups, depth, width, itemsize = self.shape
        return tpu_tuned.key_of(chip, self.product, itemsize, groups, depth, width, rows)

    def rule(self, here: Chip) -> Tiles:
        """The tiles that are taken where the table has none."""
        return (tpu_tiles.outer_rule if self.product == "drhs" else tpu_tiles.product_rule)(*self.shape, here)

    def function(self, tiles: Tiles) -> Callable[..., jax.Array]:
        """The product with these tiles."""
        if isinstance(tiles, OuterTiles):
            return lambda lhs, dout, sizes: tpu.outer(lhs, dout, sizes, tiles=tiles)
        back = self.product == "dlhs"
        return lambda lhs, rhs, sizes: tpu.product(lhs, rhs, sizes, transpose_rhs=back, tiles=tiles)

    def arguments(self) -> tuple[jax.ShapeDtypeStruct, ...]:
        """Of `function`."""
        (depth, width), rows = self.sides, self.rows
        lhs, dout, rhs = (rows, depth), (rows, width), (self.groups, depth, width)
        operands = {"forward": (lhs, rhs), "dlhs": (dout, rhs), "drhs": (lhs, dout)}[self.product]
        arrays = (jax.ShapeDtypeStruct(shape, self.dtype) for shape in operands)
        return *arrays, jax.ShapeDtypeStruct((self.groups,), jnp.int32)


def neighbours(case: Case, tiles: Tiles, here: Chip) -> Iterator[Tiles]:
    """One field a step up or down, and what has to follow it; only what fits, in code that is not larger than the rule's."""
    _, _, depth, width, itemsize = case.shape
    for name, values in _steps(tiles, depth, width).items():
        for value in values:
            field: dict[str, Any] = {name: value}
            changed = dataclasses.replace(tiles, **field)
            if isinstance(changed, OuterTiles):
                most = max(tpu_tiles.OUTER_BODY // (changed.rows * changed.columns), LANES)
                changed = dataclasses.replace(changed, block_depth=_below(changed.depth, changed.block_depth, most))
            else:
                most = max(tpu_tiles.BODY // depth, LANES)
                block = _below(changed.columns, changed.block_columns, most)
                changed = dataclasses.replace(changed, block_columns=block)
            if changed != tiles and changed.problem(depth, width, itemsize, here) is None:
                yield changed


def _steps(tiles: Tiles, depth: int, width: int) -> dict[str, list[int]]:
    """By field, the values next to what it has."""
    rows = [tiles.rows - LANES, tiles.rows + LANES]
    if isinstance(tiles, OuterTiles):
        return {
            "block_depth": _beside(tiles.depth, tiles.block_depth),
            "rows": [each for each in rows if each > 0],
            "depth": _beside(depth // tiles.depth_parts, tiles.depth),
            "columns": _beside(width // tiles.column_parts, tiles.columns),
            "slots": [tiles.slots - 1, tiles.slots + 1],
        }
    return {
        "block_columns": _beside(tiles.columns, tiles.block_columns),
        "columns": _beside(width, tiles.columns),
        "rows": [each for each in rows if each >= tiles.block_rows],
        "step_rows": [tiles.step_rows // 2, tiles.step_rows * 2],
        "lhs_slots": [tiles.lhs_slots - 1, tiles.lhs_slots + 1],
        "out_slots": [tiles.out_slots - 1, tiles.out_slots + 1],
    }


def _beside(size: int, value: int) -> list[int]:
    """The divisors of `size` next to one of them."""
    all_of_them = tpu_tiles.divisors(size)
    place = all_of_them.index(value)
    return [*all_of_them[max(place - 1, 0) : place], *all_of_them[place + 1 : place + 2]]


def _below(size: int, wanted: int, most: int) -> int:
    """The largest divisor of `size` that is not above either."""
    return next((each for each in tpu_tiles.divisors(size) if each <= min(wanted, most)), LANES)


def search(case: Case, here: Chip, score: Callable[[Tiles], float], most: int) -> dict[Tiles, float]:
    """Seconds of all tiles that were tried, the rule's first."""
    best = case.rule(here)
    tried = {best: score(best)}
    while True:
        new = [tiles for tiles in neighbours(case, best, here) if tiles not in tried]
        for tiles in list(dict.fromkeys(new))[: most - len(tried)]:
            tried[tiles] = score(tiles)
        leader = min(tried, key=tried.__getitem__)
        if leader == best or len(tried) >= most:
            return tried
        best = leader


def predicted(case: Case, chip: str, tiles: Tiles) -> float:
    """Seconds of the kernel, from its schedule; infinite where the compiler refuses it."""
    try:
        kernel = schedule.compile_kernel(case.function(tiles), case.arguments(), chip=chip, kernel="grouped_")
    except UserError:
        return math.inf
    return kernel.predict({0: case.sizes}).seconds


def timed(case: Case, tiles: Tiles) -> float:
    """Seconds on this machine's chip, the median of several runs; infinite where the compiler refuses it."""
    try:
        return kernel_timing.seconds(case.function(tiles), case.arguments(), case.sizes)
    except jax.errors.JaxRuntimeError:
        return math.inf


def tune(case: Case, chip: str, most: int) -> tpu_tuned.Entry:
    """The best tiles that were found, which may be the rule's."""
    here, is_here = tpu_tiles.chip_called(chip), _chip_here() == chip
    tried = search(case, here, lambda tiles: timed(case, tiles) if is_here else predicted(case, chip, tiles), most)
    best = min(tried, key=tried.__getitem__)
    source = "timed" if is_here else "predicted"
    return tpu_tuned.Entry(case.key(chip), dataclasses.asdict(best), source, tried[best], next(iter(tried.values())))


def merged(table: dict[tpu_tuned.Key, tpu_tuned.Entry], found: Sequence[tpu_tuned.Entry]) -> list[tpu_tuned.Entry]:
    """The table with what is worth an entry, and without what was there for the other keys; a time beats a prediction."""
    table = dict(table)
    for entry in found:
        there = table.get(entry.key)
        if there and (there.source, entry.source) == ("timed", "predicted"):
            continue
        table.pop(entry.key, None)
        if entry.rule_seconds > GAIN * entry.seconds:
            table[entry.key] = entry
    return list(table.values())


def _chip_here() -> str | None:
    found = chip_of(jax.devices()[0].device_kind) if jax.default_backend() == "tpu" else None
    return found.name if found else None


def _cases(flags: argparse.Namespace) -> Iterator[Case]:
    products = kernel_shapes.chosen(flags.products, tpu_tuned.PRODUCTS, "--products")
    for shape in map(kernel_shapes.parsed, flags.shapes.split(",")):
        for rows in flags.rows.split(","):
            if not rows.isdigit() or rows == "0":
                raise SystemExit(f"--rows: {rows!r}: use numbers separated by commas")
            for product in products:
                yield Case(product, shape.groups, (shape.depth, shape.width), int(rows), flags.dtype)


def main(arguments: Sequence[str] | None = None) -> None:
    """Searches, prints a line for each case, and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--chip", default=_chip_here() or "v5e", help="v5e, v5p or v6e")
    parser.add_argument("--shapes", default=",".join(kernel_shapes.SHAPES), help="groups x K x N, separated by commas")
    parser.add_argument("--rows", default="32768", help="of all groups, separated by commas")
    parser.add_argument("--products", default=",".join(tpu_tuned.PRODUCTS))
    parser.add_argument("--dtype", default="bfloat16", choices=list(tpu_tuned.DTYPES.values()))
    parser.add_argument("--most", type=int, default=16, help="tiles to try for each case")
    parser.add_argument("--write", action="store_true", help="refill the table")
    parser.add_argument("--table", type=Path, default=Path(str(tpu_tuned.path())), help="file of the table")
    parser.add_argument("--json", type=Path, help="file to write the rows to, as a JSON list")
    flags = parser.parse_args(arguments)
    kernel_shapes.chosen(flags.chip, kernel_shapes.CHIPS, "--chip")
    found = []
    for case in list(_cases(flags)):
        found.append(entry := tune(case, flags.chip, flags.most))
        gain = entry.rule_seconds / entry.seconds - 1
        times = (
            f"{entry.source} {entry.seconds * 1e3:.3f} ms, the rule's {entry.rule_seconds * 1e3:.3f} ms ({gain:+.1%})"
        )
        print(f"{entry.key}: {times}: {' '.join(f'{name}={value}' for name, value in entry.tiles.items())}", flush=True)
        if flags.write:  # after each case, so that nothing is lost
            table = tpu_tuned.parse(flags.table.read_text())
            flags.table.write_text(tpu_tuned.to_text(merged(table, [entry])))
    if flags.json:
        flags.json.write_text(json.dumps([entry.to_dict() for entry in found], indent=1))


if __name__ == "__main__":
    main()
