"""A checkpoint that is written slice by slice, survives a kill at any moment, and is seen only when it is whole.

    FOLDER/.STEP.partial/   what is there so far; becomes FOLDER/STEP as the last act
        begun.json          what it is made from, so that only the same work goes on with it

A chunk gets its name once it is on the disk, so the names say what need not be done again.
"""

import json
import math
import os
import time
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from etils import epath

from kwaicoder_jax import files
from kwaicoder_jax.checkpoints import layout
from kwaicoder_jax.checkpoints.layout import Spec
from kwaicoder_jax.errors import UserError

_BEGUN = "begun.json"


class PartialStep:
    """One step of a checkpoint folder while it is being written; `write` may be called from many threads."""

    def __init__(self, folder: str | os.PathLike[str], step: int, specs: Mapping[str, Spec], identity: str):
        """Begins the step, or goes on with it.

        Args:
          folder: the checkpoints folder, as CheckpointStore takes it.
          step: its number.
          specs: every tensor that the step will have, by name.
          identity: of the work; one that was begun with another identity is not gone on with.

        Raises:
          UserError: other work was begun here.
        """
        self._target = files.absolute(folder) / str(step)
        self._folder = self._target.parent / f".{step}.partial"
        self._specs = dict(specs)
        self._begin({"identity": identity, "contents": layout.contents(specs)})
        self._present = {name: layout.present(self._place(name)) for name in specs}

    def _begin(self, work: dict[str, Any]) -> None:
        file = self._folder / _BEGUN
        if file.exists() and files.read_json(file) != work:
            raise UserError(
                "it was begun from another source, or with another result in mind", where=str(self._folder),
                remedy="remove that folder to start over",
            )  # fmt: skip
        if not file.exists():
            if self._folder.exists():
                self._folder.rmtree()
            self._folder.mkdir(parents=True)
            _write_text(file, json.dumps(work, indent=1))
        for name, spec in self._specs.items():
            self._place(name).mkdir(parents=True, exist_ok=True)
            if not (self._place(name) / ".zarray").exists():
                _write_text(self._place(name) / ".zarray", layout.zarray(spec))

    def _place(self, name: str) -> epath.Path:
        return self._folder / "params" / layout.storage_name(name)

    def _parts(self, name: str, layer: int | None) -> list[layout.Part]:
        spec = self._specs[name]
        return list(layout.parts(spec, layout.chunk_shape(spec), layer))

    @property
    def folder(self) -> epath.Path:
        """Where it is while it is partial."""
        return self._folder

    def is_written(self, name: str, layer: int | None = None) -> bool:
        """Whether the tensor, or one layer of it, is there already."""
        return all(part.file in self._present[name] for part in self._parts(name, layer))

    def write(self, name: str, array: np.ndarray, layer: int | None = None) -> None:
        """Writes a tensor, or [1, ...] of one layer of it; on return it is on the disk and has its name.

        Raises:
          ValueError: another shape or dtype than the step was begun with.
          OSError: the disk is full, for one; what was written before stays.
        """
        self.stage(name, array, layer)
        self.commit(name, layer)

    def stage(self, name: str, array: np.ndarray, layer: int | None = None) -> None:
        """The first half of `write`, which needs the array: hands its bytes to the system."""
        spec = self._specs[name]
        if array.shape != spec.slice_shape or array.dtype != spec.dtype:
            raise ValueError(f"{name}: {array.dtype}{array.shape} instead of {spec.dtype}{spec.slice_shape}")
        bytes_ = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        size = spec.dtype.itemsize
        for part in self._missing(name, layer):
            run = bytes_[part.start * size : part.stop * size].data
            _stage(self._place(name) / part.file, run, bytes(part.padding * size))

    def write_rows(self, name: str, rows: Callable[[int, int], np.ndarray], layer: int | None = None) -> None:
        """`write` for a slice that is never whole in memory: one chunk at a time is asked for, written and dropped.

        Args:
          name: of the tensor.
          rows: given start and stop on the slice's first axis behind the layers (0 and 1 of a scalar), that run of it:
            [stop - start, ...], or [1, stop - start, ...] of a layer.
          layer: which slice.

        Raises:
          ValueError: a run of another shape or dtype.
          OSError: the disk is full, for one; what was written before stays.
        """
        spec = self._specs[name]
        axis = int(spec.layered)
        row = math.prod(spec.shape[axis + 1 :])
        for part in self._missing(name, layer):
            start, stop = part.start // row, part.stop // row
            run = rows(start, stop)
            shape = (*spec.slice_shape[:axis], stop - start, *spec.shape[axis + 1 :])[: len(spec.shape)]
            if run.shape != shape or run.dtype != spec.dtype:
                raise ValueError(f"{name}: {run.dtype}{run.shape} instead of {spec.dtype}{shape}")
            bytes_ = np.ascontiguousarray(run).reshape(-1).view(np.uint8)
            _stage(self._place(name) / part.file, bytes_.data, bytes(part.padding * spec.dtype.itemsize))
            _commit(self._place(name) / part.file)
            self._present[name].add(part.file)

    def commit(self, name: str, layer: int | None = None) -> None:
        """The second half of `write`, which waits for the disk."""
        for part in self._missing(name, layer):
            _commit(self._place(name) / part.file)
            self._present[name].add(part.file)

    def _missing(self, name: str, layer: int | None) -> list[layout.Part]:
        return [part for part in self._parts(name, layer) if part.file not in self._present[name]]

    def finish(self, meta: dict[str, Any]) -> None:
        """Describes the step and makes it visible; `meta` as in CheckpointStore.save."""
        missing = [name for name, s in self._specs.items() if not all(self.is_written(name, x) for x in s.slices)]
        if missing:
            raise ValueError(f"{missing[0]} is not written yet")
        params, description = self._folder / "params", self._folder / "meta"
        description.mkdir(exist_ok=True)
        _write_text(params / "_METADATA", layout.tree_metadata(self._specs))
        _write_text(params / layout.CONTENTS, json.dumps(layout.contents(self._specs)))
        _write_text(description / "metadata", json.dumps(meta))
        _write_text(self._folder / "_CHECKPOINT_METADATA", layout.step_metadata(time.time_ns()))
        for folder in (*map(self._place, self._specs), params, description, self._folder):
            _sync(folder)
        if self._target.exists():  # a step that lost a piece: CheckpointStore passes it over as well
            self._target.rmtree()
        self._folder.rename(self._target)
        _sync(self._target.parent)
        (self._target / _BEGUN).unlink()
        if "://" in os.fspath(self._target):  # there a folder gets its name file by file
            _write_text(self._target / layout.COMMITTED, "")


def _write_text(file: epath.Path, text: str) -> None:
    _stage(file, text.encode())
    _commit(file)


def _temporary(file: epath.Path) -> epath.Path:
    return file.parent / f"{file.name}{layout.TEMPORARY}"


def _stage(file: epath.Path, *data: bytes | memoryview) -> None:
    with _temporary(file).open("wb") as stream:
        for run in data:
            stream.write(run)


def _commit(file: epath.Path) -> None:
    """The file gets its name when it is on the disk."""
    _sync(_temporary(file))
    _temporary(file).replace(file)


def _sync(place: epath.Path) -> None:
    """Makes a file's contents or a folder's names durable, where there are such things (an object store has none)."""
    if os.path.exists(place):
        descriptor = os.open(place, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
