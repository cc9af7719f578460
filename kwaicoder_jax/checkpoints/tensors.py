"""Tensors of a checkpoint: single ones, read when they are asked for, whole or one layer; or all of them at once."""

import contextlib
import json
import math
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import flax.traverse_util
import numpy as np
import tensorstore as ts
from etils import epath

from kwaicoder_jax import files
from kwaicoder_jax.checkpoints import layout
from kwaicoder_jax.checkpoints.store import CheckpointStore, find, newest_step, on_device, read_meta
from kwaicoder_jax.errors import UserError

READ_BYTES = 128 * 2**20  # a longer slice is read in pieces of this size, since tensorstore holds each piece twice
# Small arrays are often one chunk for all layers; kept decoded, such a chunk is not read again for every layer.
_CACHE = {"cache_pool": {"total_bytes_limit": 128 * 2**20}, "file_io_concurrency": {"limit": 8}}


class Tensor:
    """A tensor that is in memory already; also the interface of those on disk."""

    def __init__(self, name: str, array: Any):
        self.name, self._array = name, array

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the whole tensor."""
        return tuple(self._array.shape)

    @property
    def dtype(self) -> np.dtype:
        """As stored."""
        return np.dtype(self._array.dtype)

    def slice_bytes(self, layer: int | None = None) -> int:
        """Bytes of what `read` would return."""
        return math.prod(self.shape if layer is None else self.shape[1:]) * self.dtype.itemsize

    def read(self, layer: int | None = None, rows: tuple[int, int] | None = None) -> np.ndarray:
        """The whole tensor, or [1, ...] of one layer; with `rows` only start:stop of the axis that comes next.

        Args:
          layer: index on the first axis; None for all of it.
          rows: start and stop on the second axis where `layer` is given, else on the first.
        """
        return np.asarray(self._array[_index(layer, rows)])


class StoredTensor(Tensor):
    """A tensor in any checkpoint that Orbax wrote, read through tensorstore."""

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self._array.shape)

    @property
    def dtype(self) -> np.dtype:
        return np.dtype(self._array.dtype.numpy_dtype)

    def read(self, layer: int | None = None, rows: tuple[int, int] | None = None) -> np.ndarray:
        """As `Tensor.read`; UserError if a part of it is gone."""
        store = self._array[_index(layer, rows)]
        try:
            if store.size * self.dtype.itemsize <= READ_BYTES or store.size == 1:
                return store.read().result()
            axis, step = _pieces(store)
            out = np.empty(store.shape, self.dtype)
            for start in range(0, store.shape[axis], step):
                run = (*[slice(None)] * axis, slice(start, min(start + step, store.shape[axis])))
                out[run] = store.translate_to[(0,) * store.rank][run].read().result()
            return out
        except ValueError as error:
            raise UserError(f"{self.name} cannot be read: {str(error).splitlines()[0]}") from error


class PlainTensor(Tensor):
    """A tensor of a streamed checkpoint on a local disk: its files are its memory, so they are read into place."""

    def __init__(self, name: str, folder: epath.Path, spec: layout.Spec, chunks: tuple[int, ...]):
        super().__init__(name, spec)
        self._folder, self._chunks = folder, chunks

    def read(self, layer: int | None = None, rows: tuple[int, int] | None = None) -> np.ndarray:
        """As `Tensor.read`; UserError if a part of it is gone."""
        spec = self._array
        if layer is not None and not spec.layered:
            found = self.read(rows=(layer, layer + 1))
            return found if rows is None else found[:, slice(*rows)]
        wanted: Sequence[int | None] = [layer]
        if spec.layered and layer is None:
            wanted, rows = range(*(rows or (0, spec.shape[0]))), None
        axis = int(spec.layered)
        row, size = math.prod(spec.shape[axis + 1 :]), spec.dtype.itemsize
        shape = spec.shape[axis:] if rows is None else (rows[1] - rows[0], *spec.shape[axis + 1 :])
        first = 0 if rows is None else rows[0] * row
        last = first + math.prod(shape)
        out = np.empty((len(wanted), *shape) if spec.layered else shape, spec.dtype)
        for run, each in zip(np.split(out.reshape(-1).view(np.uint8), len(wanted)), wanted):
            for part in layout.parts(spec, self._chunks, each):
                start, stop = max(part.start, first), min(part.stop, last)
                if start < stop:
                    into = run[(start - first) * size : (stop - first) * size]
                    self._read_part(part, (start - part.start) * size, into)
        return out

    def _read_part(self, part: layout.Part, offset: int, into: np.ndarray) -> None:
        try:
            with open(self._folder / part.file, "rb", buffering=0) as file:
                file.seek(offset)
                whole = _fill(file, into.data)
        except FileNotFoundError:
            whole = False
        if not whole:
            raise UserError(f"{self.name} cannot be read: {part.file} is missing or cut off", where=str(self._folder))


def _index(layer: int | None, rows: tuple[int, int] | None) -> tuple[slice, ...]:
    """Which part of an array `Tensor.read` means."""
    index: tuple[slice, ...] = () if layer is None else (slice(layer, layer + 1),)
    return index if rows is None else (*index, slice(*rows))


def _fill(file: Any, view: memoryview) -> bool:
    """Reads until `view` is full; False if the file ends before."""
    while len(view):
        count = file.readinto(view)
        if not count:
            return False
        view = view[count:]
    return True


def _pieces(store: Any) -> tuple[int, int]:
    """The first axis longer than 1, and how many of its indices to read at once: whole chunks, about READ_BYTES."""
    axis = next(axis for axis, size in enumerate(store.shape) if size > 1)
    row = math.prod(store.shape[axis + 1 :]) * store.dtype.numpy_dtype.itemsize
    chunk = (store.chunk_layout.read_chunk.shape or store.shape)[axis] or 1
    return axis, max(1, READ_BYTES // (row * chunk)) * chunk


class Tensors(Mapping[str, Tensor]):
    """Tensors by name, as in "layers/mlp/gate".

    Attributes:
      identity: equal for equal contents; changes with the checkpoint.
    """

    def __init__(self, tensors: Mapping[str, Tensor], identity: str):
        self._tensors, self.identity = dict(tensors), identity

    def __getitem__(self, name: str) -> Tensor:
        return self._tensors[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def below(self, prefix: str) -> "Tensors":
        """Those whose names begin with `prefix`, without it."""
        found = {name.removeprefix(prefix): x for name, x in self._tensors.items() if name.startswith(prefix)}
        return Tensors(found, files.digest([self.identity, prefix]))


def from_params(params: Any) -> Tensors:
    """The tensors of a params tree of numpy arrays."""
    flat = flax.traverse_util.flatten_dict(params, sep="/")
    sums = {name: zlib.crc32(np.ascontiguousarray(x).reshape(-1).view(np.uint8).data) for name, x in flat.items()}
    return Tensors({name: Tensor(name, x) for name, x in flat.items()}, files.digest(sums))


def open_tensors(place: str | os.PathLike[str], item: str = "params") -> Tensors:
    """The parameters of the newest complete checkpoint in a stage folder, none of them read yet.

    Args:
      place: the stage folder.
      item: "params", or "train" for the optimizer's state and the like, with names as in "opt_state/1/mu/model/...".

    Raises:
      UserError: there is no checkpoint, or one whose tensors cannot be found.
    """
    tensors = _open_all(place, item)
    return Tensors(tensors, files.digest({"step": newest_step(place), "meta": read_meta(place)}))


def _open_all(place: str | os.PathLike[str], item: str) -> dict[str, Tensor]:
    folder = files.absolute(find(place)) / str(newest_step(place)) / item
    try:
        tree = json.loads((folder / "_METADATA").read_text())
        leaves = [x for x in tree["tree_metadata"].values() if not x["value_metadata"].get("skip_deserialize")]
        names = ["/".join(str(key["key"]) for key in leaf["key_metadata"]) for leaf in leaves]
        ocdbt, zarr3 = tree.get("use_ocdbt", True), tree.get("use_zarr3", False)
        context = ts.Context(_CACHE)
        return {name: _open(folder, name, ocdbt, zarr3, context) for name in names}
    except (ValueError, KeyError, OSError) as error:
        raise UserError(f"{place} holds no readable {item}: {str(error).splitlines()[0]}") from error


def read_params(place: str | os.PathLike[str], abstract: Any) -> Any:
    """The parameters of the newest complete checkpoint, in the shapes, dtypes and shardings of `abstract`.

    Raises:
      UserError: there is no checkpoint, one with other names or shapes, or one that cannot be read.
    """
    remedy = "copy it again, or run its stage again"
    # First, since Orbax says it in many lines from many threads.
    problem = _difference(_open_all(place, "params"), abstract)
    if problem:
        raise UserError(f"{place} does not fit its own model config: {problem}", remedy=remedy)
    with contextlib.closing(CheckpointStore(find(place))) as store:
        try:
            return store.restore(newest_step(place), "params", on_device(abstract))
        except Exception as error:  # whatever Orbax and TensorStore say of a file that is damaged
            raise UserError(f"{place} is damaged: {str(error).splitlines()[0]}", remedy=remedy) from error


def _difference(tensors: Mapping[str, Tensor], abstract: Any) -> str:
    """The first name or shape in which a checkpoint is not what is asked of it, or nothing."""
    wanted = flax.traverse_util.flatten_dict(abstract, sep="/")
    for name in sorted({*wanted, *tensors}):
        if name not in tensors:
            return f"{name} is missing"
        if name not in wanted:
            return f"{name} is no parameter of that config"
        if tensors[name].shape != tuple(wanted[name].shape):
            return f"{name} has shape {tensors[name].shape}, the config says {tuple(wanted[name].shape)}"
    return ""


def _open(folder: epath.Path, name: str, ocdbt: bool, zarr3: bool, context: ts.Context) -> Tensor:
    stored = layout.storage_name(name)
    if not ocdbt and not zarr3 and os.path.isdir(folder):
        plain = layout.parse_zarray((folder / stored / ".zarray").read_text())
        if plain is not None:
            return PlainTensor(name, folder / stored, *plain)
    base = f"{folder}/" if "://" in str(folder) else f"file://{folder}/"
    store = {"driver": "ocdbt", "base": base, "path": stored} if ocdbt else f"{base}{stored}"
    spec = {"driver": "zarr3" if zarr3 else "zarr", "kvstore": store, "fill_missing_data_reads": False}
    return StoredTensor(name, ts.open(spec, open=True, read=True, context=context).result())
