"""The table of tuned tiles, `tuned_tiles.json`, which `python -m benchmarks.tune_kernels --write` refills.

An entry is for one chip, product, dtype, number of groups, depth and width, and for any number of rows that is nearest to
its `rows_per_group`, a power of two. `source` says whether its times were measured ("timed") or come from the compiled
schedule ("predicted").
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Iterable, Mapping
from importlib import resources
from typing import Any

PRODUCTS = ("forward", "dlhs", "drhs")
DTYPES = {2: "bfloat16", 4: "float32"}  # by bytes
SOURCES = ("timed", "predicted")
REMEDY = "remove the entry, or tune it again: python -m benchmarks.tune_kernels --write"


@dataclasses.dataclass(frozen=True)
class Key:
    """What an entry is for.

    Attributes:
      chip: generation, as in "v5p".
      product: of PRODUCTS.
      dtype: of operands and output.
      groups: number of them.
      depth: of the product: K of lhs @ rhs, also for dlhs, where it is rhs's last axis; rows of a gradient for drhs.
      width: of the output.
      rows_per_group: on average, to the nearest power of two.
    """

    chip: str
    product: str
    dtype: str
    groups: int
    depth: int
    width: int
    rows_per_group: int

    def __str__(self) -> str:
        return (
            f"{self.product} on {self.chip}, {self.dtype}, {self.groups} groups of {self.rows_per_group} rows, "
            f"{self.depth} x {self.width}"
        )


@dataclasses.dataclass(frozen=True)
class Entry:
    """Tiles that were found.

    Attributes:
      key: what they are for.
      tiles: fields of `ProductTiles`, or of `OuterTiles` for drhs.
      source: of SOURCES.
      seconds: of one product with them.
      rule_seconds: with the rule's tiles.
    """

    key: Key
    tiles: Mapping[str, int]
    source: str
    seconds: float
    rule_seconds: float

    def to_dict(self) -> dict[str, Any]:
        """As in the file."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "key"}
        return {**dataclasses.asdict(self.key), **fields, "tiles": dict(self.tiles)}


def key_of(chip: str, product: str, itemsize: int, groups: int, depth: int, width: int, rows: int) -> Key:
    """The key of a product of `rows` rows in all."""
    return Key(chip, product, DTYPES[itemsize], groups, depth, width, 2 ** round(math.log2(max(rows / groups, 1))))


def parse(text: str) -> dict[Key, Entry]:
    """The entries of a file; ValueError names one that is not as it should be."""
    entries = {}
    for number, each in enumerate(json.loads(text)):
        try:
            entry = _entry(each)
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise ValueError(f"tuned_tiles.json: entry {number} ({each}): {error}; {REMEDY}") from error
        if entry.key in entries:
            raise ValueError(f"tuned_tiles.json: entry {number}: {entry.key} is there twice; {REMEDY}")
        entries[entry.key] = entry
    return entries


def to_text(entries: Iterable[Entry]) -> str:
    """A file of entries, one a line, in order."""
    ordered = sorted(entries, key=lambda entry: dataclasses.astuple(entry.key))
    lines = ",\n".join(" " + json.dumps(entry.to_dict()) for entry in ordered)
    return f"[\n{lines}\n]\n" if lines else "[]\n"


def path() -> Any:
    """Where the table is."""
    return resources.files("kernels.grouped_matmul") / "tuned_tiles.json"


@functools.cache
def table() -> Mapping[Key, Entry]:
    """The table, read once."""
    return parse(path().read_text())


def _entry(each: dict[str, Any]) -> Entry:
    names = [field.name for field in dataclasses.fields(Key)]
    key = Key(**{name: each[name] for name in names})
    entry = Entry(key, **{name: value for name, value in each.items() if name not in names})
    for name, value, allowed in (
        ("product", key.product, PRODUCTS),
        ("dtype", key.dtype, DTYPES.values()),
        ("source", entry.source, SOURCES),
    ):
        if value not in allowed:
            raise ValueError(f"{name} is {value!r}, not one of {', '.join(allowed)}")
    for name, value in {**dataclasses.asdict(key), **entry.tiles}.items():
        if name not in ("chip", "product", "dtype") and not (type(value) is int and value > 0):
            raise ValueError(f"{name} is {value!r}, not a positive integer")
    if key.rows_per_group & (key.rows_per_group - 1):
        raise ValueError(f"rows_per_group is {key.rows_per_group}, not a power of two")
    return entry
