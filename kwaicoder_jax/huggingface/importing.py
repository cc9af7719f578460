"""From somebody else's files into our parameters: streamed to a checkpoint, or straight onto the devices of a mesh."""

import os
from typing import Any

import jax
import numpy as np

from kwaicoder_jax import checkpoints, files, models
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.huggingface.source import Source


def save(
    source: Source,
    target: str | os.PathLike[str],
    *,
    meta: dict[str, Any],
    step: int = 0,
    on_progress: checkpoints.Progress | None = None,
    memory_bytes: int = checkpoints.MEMORY_BYTES,
) -> None:
    """Writes one step of a checkpoint folder, a layer of a parameter at a time; goes on where a killed call was.

    Args:
      source: from `open_model`.
      target: the checkpoints folder that gets the step, as CheckpointStore takes it.
      meta: description of the checkpoint.
      step: its number.
      on_progress: told bytes written and bytes in all, in this thread.
      memory_bytes: of tensors held at once; a single one may need more, and is then worked on alone. Embeddings and
        stacks of experts are never held whole.

    Raises:
      UserError: a number that does not fit its dtype, a full disk, or a folder where other work was begun.
    """
    if checkpoints.is_complete(target, step):
        return
    layout = source.layout
    specs = {
        name: checkpoints.Spec(declared.shape, source.dtype(name), layout.is_layered(name))
        for name, declared in layout.declared.items()
    }
    identity = files.digest({"source": source.identity, "model": source.config.to_dict()})
    total = sum(spec.slice_bytes * len(spec.slices) for spec in specs.values())
    try:
        partial = checkpoints.PartialStep(target, step, specs, identity)
        pieces = [_piece(source, partial, name, spec, layer) for name, spec in specs.items() for layer in spec.slices]
        try:
            checkpoints.write_pieces(partial, pieces, on_progress=on_progress, memory_bytes=memory_bytes)
        except UserError:  # it would fail again: nothing stays half-written
            partial.folder.rmtree()
            raise
        partial.finish(meta)
    except OSError as error:
        what = f"{error.strerror or error}, with {total / 1e9:.1f} GB to write in all"
        remedy = "make room, and the same command goes on from there"
        raise UserError(what, where=str(target), remedy=remedy) from error


def _piece(
    source: Source, partial: checkpoints.PartialStep, name: str, spec: checkpoints.Spec, layer: int | None
) -> checkpoints.Piece:
    """One layer of a parameter; by rows where theirs are rows of ours, or every expert has a tensor of its own."""
    rule, first = source.layout.rule(name), (slice(layer, layer + 1),) if layer is not None else ()
    by_rows = rule.each_expert or rule.keeps_rows

    def read(start: int = 0, stop: int | None = None) -> np.ndarray:
        rest = len(spec.shape) - len(first)
        index = (*first, slice(start, stop), *[slice(None)] * (rest - 1)) if rest else first
        with np.errstate(over="ignore"):  # it is an error below
            array = source.layout.gather(source.tensors, name, index, spec.dtype)
        if not checkpoints.is_finite(array):
            beyond = spec.dtype == np.float16
            what = f"{name} holds a number beyond float16" if beyond else f"{name} holds numbers that are not finite"
            remedy = "use another param_dtype" if beyond else "the files are damaged: fetch them again"
            raise UserError(what, where=source.name, remedy=remedy)
        return array

    def stage() -> None:
        if by_rows:
            partial.write_rows(name, read, layer)
        else:
            partial.stage(name, read(), layer)

    held = min(spec.slice_bytes, 2 * _chunk(spec)) if by_rows else spec.slice_bytes
    return checkpoints.Piece(name, layer, spec.slice_bytes, 2 * held, stage)


def _chunk(spec: checkpoints.Spec) -> int:
    """Bytes of the largest run of rows that is asked for."""
    return int(np.prod(checkpoints.chunk_shape(spec), dtype=np.int64)) * spec.dtype.itemsize


def load(source: Source, shardings: Any = None) -> models.Params:
    """The parameters on devices. Each device's part is read on its own: no host holds a whole parameter that is split.

    Args:
      source: from `open_model`.
      shardings: the parameters' tree with a sharding for each, as `training.param_shardings` gives it for a mesh; the
        first device if None.

    Raises:
      UserError: a number that does not fit its dtype.
    """
    single = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    placed = models.flatten(shardings) if shardings is not None else {}
    flat = {}
    for name, declared in source.layout.declared.items():
        dtype = source.dtype(name)

        def read(index: tuple[slice, ...] | None, name: str = name, dtype: np.dtype = dtype) -> np.ndarray:
            return source.layout.gather(source.tensors, name, index or (), dtype)

        flat[name] = jax.make_array_from_callback(declared.shape, placed.get(name, single), read)
    return models.unflatten(flat)
