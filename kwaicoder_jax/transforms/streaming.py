"""Any transform from checkpoint to checkpoint, a layer of a parameter at a time: for models larger than memory.

The pieces are independent: each is read, computed and written by one of a few threads, as many at once as fit in
`memory_bytes`. What is written stays: the same call goes on after a crash where it was, to the same bytes.
"""

import os
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from kwaicoder_jax import checkpoints, files, models
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.transforms import parameterwise
from kwaicoder_jax.transforms.parameterwise import Record, Transform

MEMORY_BYTES = checkpoints.MEMORY_BYTES


def run(
    transform: Transform,
    source: checkpoints.Tensors | str | os.PathLike[str],
    target: str | os.PathLike[str],
    record: Record,
    *,
    meta: dict[str, Any],
    step: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
    memory_bytes: int = MEMORY_BYTES,
) -> None:
    """Writes one step of a checkpoint folder, as CheckpointStore would hold it; does nothing if it is there already.

    Args:
      transform: the module that made the record.
      source: tensors of the model before, or the place of its checkpoint.
      target: the checkpoints folder that gets the step, as CheckpointStore takes it.
      record: what the transform decided, also one read back from JSON; see `record_of`.
      meta: description of the new checkpoint.
      step: its number.
      on_progress: told bytes written and bytes in all, in this thread; first what was there before.
      memory_bytes: of arrays held at once; a single piece may need more, and is then worked on alone.

    Raises:
      UserError: a record of another model, tensors that are missing, of another shape or not finite, a full disk, or a
        folder where other work was begun.
    """
    tensors = source if isinstance(source, checkpoints.Tensors) else checkpoints.open_tensors(source)
    plan = _Plan(transform, record, tensors)
    if checkpoints.is_complete(target, step):
        return
    of = getattr(transform, "__name__", type(transform).__name__)
    identity = files.digest({"source": tensors.identity, "transform": of, "record": record})
    try:
        partial = checkpoints.PartialStep(target, step, plan.specs, identity)
        pieces = [plan.piece(partial, name, layer) for name, layer in plan.pieces]
        checkpoints.write_pieces(partial, pieces, on_progress=on_progress, memory_bytes=memory_bytes)
        partial.finish(meta)
    except OSError as error:
        what = f"{error.strerror or error}, with {plan.total_bytes / 1e9:.1f} GB to write in all"
        remedy = "make room, and the same command goes on from there"
        raise UserError(what, where=str(target), remedy=remedy) from error


def record_of(apply: Callable[[models.Params], tuple[Any, Any, Record]], config: models.ModelConfig) -> Record:
    """The record of a transform that decides from shapes alone, without its parameters.

    Args:
      apply: calls the transform, as in `lambda params: upcycle.apply(params, config, granularity=4, replicas=2)`.
      config: the model before.
    """
    records = []

    def traced(params: models.Params) -> models.Params:
        result, _, record = apply(params)
        records.append(record)
        return result

    jax.eval_shape(traced, models.abstract(config))
    return records[0]


class _Plan:
    """What there is to do: the tensors of the result, and how to make one slice of one of them."""

    def __init__(self, transform: Transform, record: Record, tensors: checkpoints.Tensors):
        before, after = parameterwise.configs(record)
        models.check(models.unflatten(tensors), before, where="source")
        self._transform, self._record, self._tensors = transform, record, tensors
        kept_dtype = tensors[next(iter(models.declarations(before)))].dtype
        self.specs = {}
        for name, d in models.declarations(after).items():
            source = next(iter(transform.sources(record, name)), None)
            made = kept_dtype if d.dtype == np.dtype(after.param_dtype) else np.dtype(d.dtype)
            dtype = made if source is None else tensors[source].dtype
            self.specs[name] = checkpoints.Spec(d.shape, dtype, d.axes[:1] == ("layers",))
        self.pieces = [(name, layer) for name, spec in self.specs.items() for layer in spec.slices]
        self.total_bytes = sum(self.specs[name].slice_bytes for name, _ in self.pieces)

    def memory_bytes(self, name: str, layer: int | None) -> int:
        """About what computing the slice takes: a source as read, wide, multiplied and narrow again, and the result."""
        sources = self._transform.sources(self._record, name, layer).items()
        return 4 * sum(self._tensors[n].slice_bytes(each) for n, each in sources) + 2 * self.specs[name].slice_bytes

    def compute(self, name: str, layer: int | None) -> np.ndarray:
        """The slice, [1, ...] for a layer."""
        sources = self._transform.sources(self._record, name, layer)
        arrays = {source: self._tensors[source].read(each) for source, each in sources.items()}
        for source, array in arrays.items():
            if not checkpoints.is_finite(array):
                what = f"{source} holds numbers that are not finite"
                raise UserError(what, where="source", remedy="it diverged or is damaged: run its stage again")
        array = np.asarray(self._transform.parameter(self._record, name, arrays, layer))
        return array if arrays else array.astype(self.specs[name].dtype)

    def piece(self, partial: checkpoints.PartialStep, name: str, layer: int | None) -> checkpoints.Piece:
        """The slice as something to be written."""

        def stage() -> None:
            partial.stage(name, self.compute(name, layer), layer)

        size = self.specs[name].slice_bytes
        return checkpoints.Piece(name, layer, size, self.memory_bytes(name, layer), stage)
