"""Tensors by their names in somebody else's files, read by rows when they are asked for: safetensors, one file or many.

A safetensors file is 8 bytes (length of the header), the header (JSON: name to dtype, shape and place) and the data.
Reading maps the part of the file that a tensor takes and nothing else, so what is not asked for is not read, and what was
read does not count as this process's memory afterwards.
"""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np
import safetensors

from kwaicoder_jax.errors import UserError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
DTYPES = {"F32": np.dtype(np.float32), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype(np.float16)}
_SAMPLE = 2**16  # bytes of each place of a file that its identity is made from


@dataclasses.dataclass(frozen=True)
class Weight:
    """One tensor: shape, dtype (as it comes out of `rows`), the file's name for that dtype, and how to read it."""

    shape: tuple[int, ...]
    dtype: np.dtype
    stored: str
    rows: Callable[[int, int], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Bytes of all of it, as it comes out of `rows`."""
        return math.prod(self.shape) * self.dtype.itemsize


class Weights(Mapping[str, Weight]):
    """All tensors of a model.

    Attributes:
      where: the place, for errors.
      identity: equal for equal files wherever they lie. Of the data some samples count, not every byte.
    """

    def __init__(self, weights: Mapping[str, Weight], where: str, identity: str):
        self._weights, self.where, self.identity = dict(weights), where, identity

    def __getitem__(self, name: str) -> Weight:
        return self._weights[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._weights)

    def __len__(self) -> int:
        return len(self._weights)

    def file_of(self, name: str) -> str:
        """Where a tensor is, for errors."""
        return f"{self.where}: {name}"


def open_folder(folder: str | os.PathLike[str]) -> Weights:
    """The tensors of a folder: model.safetensors, or those that model.safetensors.index.json lists.

    Raises:
      UserError: there are none, a file is missing or cut off, or a file does not hold what the index says.
    """
    root = pathlib.Path(folder)
    weights: dict[str, Weight] = {}
    digest = hashlib.sha256()
    if (root / INDEX).exists():
        listed = _index(root / INDEX)
    elif (root / SINGLE).exists():
        listed = {SINGLE: None}
    else:
        others = sorted(file.name for file in root.iterdir() if re.search(r"\.(bin|pth?|h5|msgpack|gguf)$", file.name))
        remedy = (
            f"name {others[0]} itself" if others and others[0].endswith("gguf") else "save the model as safetensors"
        )
        has = f", only {others[0]}" if others else ""
        raise UserError(f"holds no {SINGLE} and no {INDEX}{has}", where=str(root), remedy=remedy)
    for name, expected in listed.items():
        if not (root / name).exists():
            raise UserError("is missing, though the index lists it", where=str(root / name), remedy="fetch it again")
        found = open_file(root / name, digest)
        if expected is not None and (lacking := sorted(set(expected) - set(found))):
            raise UserError(f"does not hold {lacking[0]}, though the index says so", where=str(root / name))
        if twice := sorted(set(found) & set(weights)):
            raise UserError(f"holds {twice[0]}, which another file of the model holds as well", where=str(root / name))
        weights |= found
    return Weights(weights, str(root), digest.hexdigest()[:16])


def _index(file: pathlib.Path) -> dict[str, list[str] | None]:
    """Tensors by file."""
    try:
        entries = json.loads(file.read_text())["weight_map"].items()
        by_file: dict[str, list[str] | None] = {name: [] for name in sorted({name for _, name in entries})}
        for tensor, name in entries:
            by_file[name].append(tensor)  # type: ignore[union-attr]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"is no index of tensors ({error})", where=str(file), remedy="fetch it again") from error
    for name in by_file:
        if os.path.basename(name) != name:
            raise UserError(f"names {name!r}, which is not a file beside it", where=str(file))
    return by_file


def open_file(file: pathlib.Path, digest: Any) -> dict[str, Weight]:
    """The tensors of one safetensors file; `digest` is fed its header and samples of its data."""
    try:
        with safetensors.safe_open(file, "np"):  # checks that every place is inside the file and none overlap
            pass
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            raw = stream.read(length)
            _sample(stream, 8 + length, digest)
    except (safetensors.SafetensorError, OSError) as error:
        what = f"cannot be read as safetensors, it may be cut off ({error})"
        raise UserError(what, where=str(file), remedy="fetch it again") from error
    digest.update(raw)
    header: dict[str, Any] = json.loads(raw)
    header.pop("__metadata__", None)
    return {name: _weight(file, 8 + length, entry) for name, entry in sorted(header.items())}


def _sample(stream: Any, start: int, digest: Any) -> None:
    """Feeds the first, middle and last bytes of the data, and the size."""
    size = stream.seek(0, os.SEEK_END)
    digest.update(str(size - start).encode())
    for place in (start, (start + size) // 2, max(start, size - _SAMPLE)):
        stream.seek(place)
        digest.update(stream.read(_SAMPLE))


def _weight(file: pathlib.Path, base: int, entry: dict[str, Any]) -> Weight:
    shape, stored = tuple(entry["shape"]), entry["dtype"]
    dtype = DTYPES.get(stored, np.dtype(np.uint8))
    begin = base + entry["data_offsets"][0]

    def rows(start: int, stop: int) -> np.ndarray:
        count = stop - start if shape else 1
        wanted = (count, *shape[1:]) if shape else ()
        if not math.prod(wanted):
            return np.empty(wanted, dtype)
        offset = begin + start * math.prod(shape[1:]) * dtype.itemsize
        size = math.prod(wanted) * dtype.itemsize
        # Mapped anew each time: what was touched is given back together with the array.
        return np.memmap(file, np.uint8, "r", offset, (size,)).view(dtype).reshape(wanted)

    return Weight(shape, dtype, stored, rows)
