"""Checkpoints of one stage: Orbax steps, each with parameters, training state, and a JSON description.

    FOLDER/checkpoints/STEP/params   the model's parameters, what every other stage reads
    FOLDER/checkpoints/STEP/train    optimizer state and whatever else training needs to go on (absent for transforms)
    FOLDER/checkpoints/STEP/meta     JSON: model config, tokenizer hash, data position, lineage, identity

A step that was cut off by a crash is not listed: Orbax gives a step its name as its last act, and a step that lost a
file afterwards (a copy that was cut off, a deletion that was) is passed over. On an object store, which knows no names to
give, Orbax writes commit_success.txt instead.
"""

import contextlib
import errno
import json
import logging
import os
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath

from kwaicoder_jax import files
from kwaicoder_jax.checkpoints import layout, writing
from kwaicoder_jax.errors import UserError

Tree = Any
META_FIELDS = ("model", "lineage", "identity")
_LAST_FILES = {
    "meta": ("metadata",),
    "params": ("_METADATA", "manifest.ocdbt"),
    "train": ("_METADATA", "manifest.ocdbt"),
}


class SaveFailed(RuntimeError):
    """A checkpoint could not be written, for another reason than the disk; the one before it is whole."""


class CheckpointStore:
    """Saves and restores the checkpoints in one folder; keeps the newest `keep`, and those that they need.

    A checkpoint needs the steps that its description lists under "needs". Where several processes train together, all
    of them call `save` and `restore` with their parts of the arrays; process 0 writes the description. What lies on one
    process's devices alone, as that of a transform does, that process saves and restores by itself.

    Args:
      folder: of all steps; made by the first save.
      keep: how many steps stay.
      asynchronous: `save` returns when the arrays are copied. `check` and `wait` then say whether writing failed.
    """

    def __init__(self, folder: str | os.PathLike[str], *, keep: int = 2, asynchronous: bool = False):
        logging.getLogger("absl").setLevel(logging.CRITICAL)  # Orbax tells of every save, and of failures in many lines
        self.folder = epath.Path(folder)
        if (scheme := os.fspath(self.folder).partition("://"))[1] and scheme[0] != "gs":
            what = f"checkpoints cannot lie on {scheme[0]}://, which Orbax does not write"
            raise UserError(what, where=os.fspath(folder), remedy="use a disk or gs://")
        self._kept, self._asynchronous = _Kept(keep, self.folder), asynchronous
        self._manager: ocp.CheckpointManager | None = None  # made by the first save: a reader changes nothing
        self._unreadable: set[int] = set()
        self._saving = False

    def latest_step(self) -> int | None:
        """The newest complete step, or None."""
        return max(self._complete(), default=None)

    def complete_steps(self) -> list[int]:
        """All complete steps, the newest first."""
        return sorted(self._complete(), reverse=True)

    def save(self, step: int, params: Tree, meta: dict[str, Any], train: Tree | None = None) -> None:
        """Writes one step; it becomes visible whole or not at all. Saving a step again does nothing.

        Raises:
          OSError: the disk is full, or something like it, now or in the save before; `wait` and `check` say so too.
          SaveFailed: any other failure.
        """
        self.wait()
        complete = self._complete()
        if step in complete:
            return
        with _explained(self.folder):
            manager = self._open_manager((params, train))
            for broken in set(manager.all_steps()) - complete:  # Orbax would take it for the newest and save no other
                manager.delete(broken)
            self._unreadable.clear()
            own, alone = writing.apart if self._asynchronous else lambda tree: tree, writing.is_alone((params, train))
            # Of several processes one by itself may hand arrays over only as numpy's.
            own = (lambda tree: jax.tree.map(np.asarray, tree)) if alone else own
            copy, copied_train = own(params), own(train)
            arguments = ocp.args.StandardSave(copy, jax.tree.map_with_path(_chunked, copy if alone else params))
            items: dict[str, Any] = {"params": arguments, "meta": ocp.args.JsonSave(meta)}
            if train is not None:
                items["train"] = ocp.args.StandardSave(copied_train)
            self._kept.needs[step] = meta.get("needs", [])
            manager.save(step, args=ocp.args.Composite(**items))
            self._saving = True
        if not self._asynchronous:
            self.wait()

    def check(self) -> None:
        """Raises what the save that is going on has failed with, if it has; never waits."""
        if self._saving and self._manager is not None:
            with _explained(self.folder):
                self._manager.check_for_errors()
            if not self._manager.is_saving_in_progress():
                self.wait()

    def wait(self) -> None:
        """Waits until the save that is going on is whole; raises what it failed with."""
        if self._saving and self._manager is not None:
            self._saving = False
            with _explained(self.folder):
                self._manager.wait_until_finished()
                self._manager.check_for_errors()

    def _open_manager(self, trees: Tree) -> ocp.CheckpointManager:
        if self._manager is None:
            options = ocp.CheckpointManagerOptions(
                preservation_policy=self._kept,
                enable_async_checkpointing=self._asynchronous,
                cleanup_tmp_directories=True,  # what a kill or a full disk left of a step
                create=not (alone := writing.is_alone(trees)),  # which Orbax does for all processes only
                multiprocessing_options=writing.processes(alone),
            )
            if alone:
                self.folder.mkdir(parents=True, exist_ok=True)
            handlers = writing.registry(trees)
            self._manager = ocp.CheckpointManager(
                files.absolute(self.folder), options=options, handler_registry=handlers
            )
        return self._manager

    def all_steps(self) -> list[int]:
        """Every step that has a folder, complete or not."""
        return _steps(self.folder)

    def pass_over(self, step: int) -> None:
        """Takes a step that cannot be read for an incomplete one from now on; the next save removes it."""
        self._unreadable.add(step)

    def _complete(self) -> set[int]:
        found = {step for step in _steps(self.folder) if _is_complete(self.folder / str(step))}
        return found - self._unreadable

    def meta(self, step: int) -> dict[str, Any]:
        """The JSON description of one step."""
        return json.loads((self.folder / str(step) / "meta" / "metadata").read_text())

    def restore(self, step: int, item: str, abstract: Tree) -> Tree:
        """Reads "params" or "train" of one step into the shapes, dtypes and shardings of `abstract`."""
        who = writing.processes(writing.is_alone(abstract))
        handler = ocp.StandardCheckpointHandler(multiprocessing_options=who)
        with contextlib.closing(ocp.Checkpointer(handler, multiprocessing_options=who)) as reader:
            place = files.absolute(self.folder) / str(step) / item
            return reader.restore(place, args=ocp.args.StandardRestore(abstract))

    def close(self) -> None:
        """Waits for a save that is going on, without a word where it fails, and releases the threads."""
        if self._manager is not None:
            with contextlib.suppress(OSError, SaveFailed):
                self.wait()
            with contextlib.suppress(Exception):  # Orbax says once more what `wait` said
                self._manager.close()
            self._manager = None


class _Kept:
    """Orbax's rule for what stays: the newest few steps, and the steps that they need."""

    def __init__(self, keep: int, folder: epath.Path):
        self._keep, self._folder = keep, folder
        self.needs: dict[int, list[int]] = {}  # of the steps that this process saved

    def should_preserve(self, checkpoints: Any, *, context: Any) -> list[bool]:
        """One answer for each checkpoint; the last one is being written."""
        del context
        steps = [each.step for each in checkpoints]
        newest = sorted(steps)[-self._keep :]
        kept = {*newest, *(step for each in newest for step in self._needs(each))}
        return [step in kept for step in steps]

    def _needs(self, step: int) -> list[int]:
        if step in self.needs:
            return self.needs[step]
        try:
            return json.loads((self._folder / str(step) / "meta" / "metadata").read_text()).get("needs", [])
        except (OSError, ValueError):
            return []


@contextlib.contextmanager
def _explained(folder: epath.Path) -> Iterator[None]:
    """Turns what Orbax and TensorStore raise of a failed save into one error: of the disk, or SaveFailed."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno or errno.EIO, error.strerror or str(error), str(folder)) from error
    except Exception as error:
        text = str(error)
        for number in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EIO):
            if os.strerror(number) in text or errno.errorcode[number] in text:
                raise OSError(number, os.strerror(number), str(folder)) from error
        raise SaveFailed(f"{folder}: a checkpoint could not be written: {text.splitlines()[0]}") from error


def _steps(folder: epath.Path) -> list[int]:
    if not folder.exists():
        return []
    return sorted(int(step.name) for step in folder.iterdir() if step.name.isdigit() and step.is_dir())


def find(place: str | os.PathLike[str]) -> epath.Path:
    """The folder with Orbax steps for a stage folder or for that folder itself; UserError if there is none."""
    folder = epath.Path(place)
    for candidate in (folder / "checkpoints", folder):
        if candidate.is_dir() and any((step / "meta").is_dir() for step in candidate.iterdir() if step.name.isdigit()):
            return candidate
    state = "holds no checkpoint" if folder.exists() else "does not exist"
    raise UserError(f"{place} {state}", remedy="name a stage folder that has checkpoints/STEP inside")


def read_meta(place: str | os.PathLike[str]) -> dict[str, Any]:
    """The description of the newest complete checkpoint in a stage folder; UserError if it is not one of ours."""
    with contextlib.closing(CheckpointStore(find(place))) as store:
        step = _newest(store, place)
        try:
            meta = store.meta(step)
        except (ValueError, FileNotFoundError, KeyError) as error:
            raise UserError(f"{place} holds no readable checkpoint ({type(error).__name__})") from error
    missing = [field for field in META_FIELDS if not isinstance(meta, dict) or field not in meta]
    if missing:
        raise UserError(
            f"{place} is not a checkpoint of this program (no {', '.join(missing)})",
            remedy="name a stage folder, as in runs/demo/distill",
        )
    return meta


def newest_step(place: str | os.PathLike[str]) -> int:
    """The newest complete step in a stage folder; UserError if there is none."""
    with contextlib.closing(CheckpointStore(find(place))) as store:
        return _newest(store, place)


def is_complete(folder: str | os.PathLike[str], step: int) -> bool:
    """Whether a checkpoints folder has this step, with nothing missing."""
    return _is_complete(epath.Path(folder) / str(step))


def _newest(store: CheckpointStore, place: str | os.PathLike[str]) -> int:
    """The step to start another stage from: the newest, which has to be whole (a run that resumes may step back)."""
    step = store.latest_step()
    if step is None:
        raise UserError(f"{place} holds no complete checkpoint", remedy="copy it again, or run its stage again")
    if (newest := max(store.all_steps())) != step:
        raise UserError(f"the newest checkpoint of {place}, step {newest}, is damaged", remedy="copy it again")
    return step


def _is_complete(step: epath.Path) -> bool:
    """Whether every item that the step's own description lists has the files that are written last."""
    try:
        items = json.loads((step / "_CHECKPOINT_METADATA").read_text())["item_handlers"]
    except (FileNotFoundError, ValueError, KeyError):
        return False
    if "://" in os.fspath(step) and not (step / layout.COMMITTED).exists():
        return False
    return all(
        (item == "params" and layout.is_whole(step / item))
        or all((step / item / name).exists() for name in _LAST_FILES.get(item, ()))
        for item in items
    )


def _chunked(path: tuple[Any, ...], leaf: Any) -> ocp.SaveArgs:
    """One layer a chunk, and runs of rows of a large array without layers, so that it can be read in little memory."""
    if leaf.nbytes <= layout.CHUNK_BYTES:
        return ocp.SaveArgs()
    if any(getattr(key, "key", None) in ("layers", "dense_layers") for key in path):
        return ocp.SaveArgs(shard_axes=(0,))
    written = leaf.sharding.shard_shape(leaf.shape) if isinstance(leaf, jax.Array) else leaf.shape
    rows = layout.chunk_shape(layout.Spec(written, leaf.dtype))[0]
    if written[0] % rows or written[0] < max(written):  # Orbax cuts the longest axis, by divisors alone
        return ocp.SaveArgs()
    return ocp.SaveArgs(chunk_byte_size=layout.CHUNK_BYTES)


def on_device(abstract: Tree) -> Tree:
    """`abstract` with every leaf that names no sharding placed on the first device."""
    default = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None) or default), abstract
    )
