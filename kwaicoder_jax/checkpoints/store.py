"""Checkpoints of one stage: Orbax steps, each with parameters, training state, and a JSON description.

    FOLDER/checkpoints/STEP/params   the model's parameters, what every other stage reads
    FOLDER/checkpoints/STEP/train    optimizer state and whatever else training needs to go on (absent for transforms)
    FOLDER/checkpoints/STEP/meta     JSON: model config, tokenizer hash, data position, lineage, identity

A step that was cut off by a crash is not listed: Orbax gives a step its name as its last act, and a step that lost a
file afterwards (a copy that was cut off, a deletion that was) is passed over.
"""

import contextlib
import json
import logging
import os
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from kwaicoder_jax.checkpoints import layout
from kwaicoder_jax.errors import UserError

Tree = Any
META_FIELDS = ("model", "lineage", "identity")
_LAST_FILES = {
    "meta": ("metadata",),
    "params": ("_METADATA", "manifest.ocdbt"),
    "train": ("_METADATA", "manifest.ocdbt"),
}


class CheckpointStore:
    """Saves and restores the checkpoints in one folder; keeps the newest `keep`."""

    def __init__(self, folder: str | os.PathLike[str], *, keep: int = 2):
        logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax logs every save at INFO and warns about local disks
        self.folder = epath.Path(folder)
        # Synchronous: on CPU, an array that is being written may share its buffer with one that the next step donates.
        options = ocp.CheckpointManagerOptions(max_to_keep=keep, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(self.folder.absolute(), options=options)

    def latest_step(self) -> int | None:
        """The newest complete step, or None."""
        return max(self._complete(), default=None)

    def save(self, step: int, params: Tree, meta: dict[str, Any], train: Tree | None = None) -> None:
        """Writes one step; it becomes visible whole or not at all. Saving a step again does nothing."""
        complete = self._complete()
        if step in complete:
            return
        for broken in set(self._manager.all_steps()) - complete:  # Orbax would take it for the newest and save no other
            self._manager.delete(broken)
        params_args = ocp.args.StandardSave(params, jax.tree.map_with_path(_chunked, params))
        items: dict[str, Any] = {"params": params_args, "meta": ocp.args.JsonSave(meta)}
        if train is not None:
            items["train"] = ocp.args.StandardSave(train)
        self._manager.save(step, args=ocp.args.Composite(**items))
        self._manager.wait_until_finished()

    def all_steps(self) -> list[int]:
        """Every step that has a folder, complete or not."""
        return list(self._manager.all_steps())

    def _complete(self) -> set[int]:
        return {step for step in self._manager.all_steps() if _is_complete(self.folder / str(step))}

    def meta(self, step: int) -> dict[str, Any]:
        """The JSON description of one step."""
        return self._manager.restore(step, args=ocp.args.Composite(meta=ocp.args.JsonRestore()))["meta"]

    def restore(self, step: int, item: str, abstract: Tree) -> Tree:
        """Reads "params" or "train" of one step into the shapes, dtypes and shardings of `abstract`."""
        arguments = ocp.args.Composite(**{item: ocp.args.StandardRestore(abstract)})
        return self._manager.restore(step, args=arguments)[item]

    def close(self) -> None:
        """Releases the manager's threads."""
        self._manager.close()


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
