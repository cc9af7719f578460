"""Writes safetensors files of a bounded size, each tensor as it comes, and each file with its name only when it is whole."""

import dataclasses
import json
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from kwaicoder_jax.huggingface.weights import DTYPES, INDEX, SINGLE

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_TEMPORARY = ".tmp"  # ends the name of a file that is being written


@dataclasses.dataclass(frozen=True)
class Entry:
    """One tensor of the result."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return math.prod(self.shape) * self.dtype.itemsize


@dataclasses.dataclass(frozen=True)
class Shard:
    """One file: its name and what is in it, in order."""

    name: str
    entries: tuple[Entry, ...]

    @property
    def header(self) -> bytes:
        """What comes before the data."""
        fields: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        place = 0
        for entry in self.entries:
            places = [place, place + entry.nbytes]
            fields[entry.name] = {"dtype": _NAMES[entry.dtype], "shape": entry.shape, "data_offsets": places}
            place = places[1]
        text = json.dumps(fields, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text


def plan(entries: Iterable[Entry], max_bytes: int) -> list[Shard]:
    """Cuts tensors into files of at most `max_bytes`; a single larger one has a file of its own."""
    runs: list[list[Entry]] = [[]]
    used = 0
    for entry in entries:
        if runs[-1] and used + entry.nbytes > max_bytes:
            runs.append([])
            used = 0
        runs[-1].append(entry)
        used += entry.nbytes
    if len(runs) == 1:
        return [Shard(SINGLE, tuple(runs[0]))]
    return [Shard(f"model-{n:05}-of-{len(runs):05}.safetensors", tuple(run)) for n, run in enumerate(runs, 1)]


def index(shards: Sequence[Shard]) -> dict[str, str]:
    """The text of the index, by its file's name; empty for a single file."""
    if len(shards) == 1:
        return {}
    by_tensor = {entry.name: shard.name for shard in shards for entry in shard.entries}
    size = sum(entry.nbytes for shard in shards for entry in shard.entries)
    values = {"metadata": {"total_size": size}, "weight_map": dict(sorted(by_tensor.items()))}
    return {INDEX: json.dumps(values, indent=2) + "\n"}


def write(folder: pathlib.Path, shard: Shard, data: Iterator[np.ndarray], written: Callable[[int], None]) -> None:
    """Writes one file; it has its name, and is on the disk, when this returns.

    Args:
      folder: where.
      shard: the file.
      data: the tensors' elements in order, in runs of any length.
      written: told the bytes of each run.

    Raises:
      ValueError: more or fewer bytes than the tensors have.
      OSError: the disk is full, for one.
    """
    temporary = folder / f"{shard.name}{_TEMPORARY}"
    total = 0
    with open(temporary, "wb") as stream:
        stream.write(shard.header)
        for run in data:
            stream.write(np.ascontiguousarray(run).reshape(-1).view(np.uint8).data)
            total += run.nbytes
            written(run.nbytes)
        stream.flush()
        os.fsync(stream.fileno())
    if total != sum(entry.nbytes for entry in shard.entries):
        raise ValueError(f"{shard.name}: {total} bytes of data")
    temporary.replace(folder / shard.name)
