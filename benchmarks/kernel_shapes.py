"""Products and group sizes that `benchmarks.kernels` compares kernels on."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

PRODUCTS = ("forward", "dlhs", "drhs")
ROWS = (32_768, 131_072, 8192)  # the most telling first: a run may be stopped
CHIPS = ("v5e", "v5p", "v6e")  # that kernels are predicted for
SIZES = ("multinomial", "aligned", "zipf", "real")


@dataclasses.dataclass(frozen=True)
class Shape:
    """Experts: as many matrices of depth x width."""

    groups: int
    depth: int
    width: int

    @property
    def matrix(self) -> str:
        """As in a table."""
        return f"{self.depth}x{self.width}"


#: By name: groups x depth x width.
SHAPES = {
    f"{shape.groups}x{shape.matrix}": shape
    for shape in (
        Shape(64, 2048, 1408), Shape(64, 3072, 2560), Shape(128, 2048, 768), Shape(256, 7168, 2048),
        Shape(8, 4096, 14_336),
    )
}  # fmt: skip


def parsed(text: str) -> Shape:
    """A shape by GROUPSxDEPTHxWIDTH, of `SHAPES` or not; SystemExit if it is none."""
    sides = text.split("x")
    if len(sides) != 3 or not all(each.isdigit() and int(each) > 0 for each in sides):
        raise SystemExit(f"--shapes: {text!r}: use GROUPSxDEPTHxWIDTH, as in 64x2048x1408")
    return Shape(*map(int, sides))


def chosen(text: str, allowed: Sequence[Any], flag: str) -> list[Any]:
    """Those of `allowed` that are named in a list with commas; SystemExit if there is another name."""
    names = {str(each): each for each in allowed}
    wanted = text.split(",")
    if unknown := [name for name in wanted if name not in names]:
        raise SystemExit(f"{flag}: no {', '.join(unknown)}: use {', '.join(names)}")
    return [names[name] for name in wanted]


@dataclasses.dataclass(frozen=True)
class Case:
    """One product of one shape: rows [rows, depth or width], matrices [groups, depth, width]; bfloat16."""

    shape: Shape
    rows: int
    product: str

    @property
    def useful_flops(self) -> float:
        """Twice the multiply-adds that were asked for."""
        return 2.0 * self.rows * self.shape.depth * self.shape.width

    @property
    def inner(self) -> tuple[int, int]:
        """Of forward and dlhs the contracted and the output width, of drhs both axes of a gradient."""
        sizes = (self.shape.depth, self.shape.width)
        return (sizes[1], sizes[0]) if self.product == "dlhs" else sizes


def sizes(kind: str, groups: int, rows: int) -> np.ndarray:
    """Rows of each group, which sum to `rows`: int32 [groups].

    aligned: all equal: multiples of 128 rows, but for 64 of 8,192 rows in 128 groups and 32 in 256.
    multinomial: every row goes to a group of its own choice, all alike; seed 0.
    zipf: proportional to 1/1, 1/2, 1/3 and so on, in an order drawn with seed 0.
    real: proportional to the tokens of each expert in a validation batch (routed_batch.json).
    """
    if kind == "aligned":
        return np.full(groups, rows // groups, np.int32)
    rng = np.random.default_rng(0)
    if kind == "multinomial":
        return rng.multinomial(rows, [1 / groups] * groups).astype(np.int32)
    if kind == "zipf":
        return apportioned(rng.permutation(1 / np.arange(1, groups + 1)), rows)
    counts = json.loads(Path(__file__).with_name("routed_batch.json").read_text())["tokens_per_expert"]
    return apportioned(np.asarray(counts[str(groups)], np.float64), rows)


def apportioned(weights: np.ndarray, rows: int) -> np.ndarray:
    """Whole numbers in proportion to the weights that sum to `rows`: the largest remainders are rounded up."""
    shares = weights / weights.sum() * rows
    found = np.floor(shares).astype(np.int32)
    order = np.argsort(found - shares, kind="stable")
    found[order[: rows - found.sum()]] += 1
    return found
