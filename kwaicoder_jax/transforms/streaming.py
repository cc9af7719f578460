"""Any transform from checkpoint to checkpoint, a layer of a parameter at a time: for models larger than memory.

The pieces are independent: each is read, computed and written by one of a few threads, as many at once as fit in
`memory_bytes`. What is written stays: the same call goes on after a crash where it was, to the same bytes.
"""

import concurrent.futures
import contextlib
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kwaicoder_jax import checkpoints, files, models
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.transforms import parameterwise
from kwaicoder_jax.transforms.parameterwise import Record, Transform

MEMORY_BYTES = 2**30
PIECE = 2**18  # numbers that are looked at together: they stay in a core's cache
WORKERS = 5  # some read and compute, which takes memory, while others wait for the disk


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
        _write(plan, partial, on_progress or (lambda done, total: None), memory_bytes)
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
            if not _is_finite(array):
                what = f"{source} holds numbers that are not finite"
                raise UserError(what, where="source", remedy="it diverged or is damaged: run its stage again")
        array = np.asarray(self._transform.parameter(self._record, name, arrays, layer))
        return array if arrays else array.astype(self.specs[name].dtype)


def _is_finite(array: np.ndarray) -> bool:
    """Whether no number is NaN or infinite, in no memory to speak of: by the exponents, a piece at a time."""
    bits = {2: np.uint16, 4: np.uint32, 8: np.uint64}.get(array.dtype.itemsize)
    if bits is None or not jnp.issubdtype(array.dtype, jnp.floating):
        return True
    exponent = np.array(np.inf, array.dtype).reshape(1).view(bits)[0]  # all ones: NaN or infinite
    flat = np.ascontiguousarray(array).reshape(-1).view(bits)
    return not any(((flat[at : at + PIECE] & exponent) == exponent).any() for at in range(0, flat.size, PIECE))


def _write(
    plan: _Plan, partial: checkpoints.PartialStep, on_progress: Callable[[int, int], None], memory_bytes: int
) -> None:
    """Writes every piece that is not there yet."""
    todo = [piece for piece in plan.pieces if not partial.is_written(*piece)]
    done = plan.total_bytes - sum(plan.specs[name].slice_bytes for name, _ in todo)
    on_progress(done, plan.total_bytes)
    memory, stop = _Memory(memory_bytes), threading.Event()

    def work(name: str, layer: int | None) -> int:
        with memory.held(plan.memory_bytes(name, layer)):
            if stop.is_set():
                return 0
            partial.stage(name, plan.compute(name, layer), layer)
        partial.commit(name, layer)
        return plan.specs[name].slice_bytes

    with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        try:
            for future in concurrent.futures.as_completed([pool.submit(work, *piece) for piece in todo]):
                done += future.result()
                on_progress(done, plan.total_bytes)
        except BaseException:
            stop.set()  # what is being written is finished, and nothing else is begun
            pool.shutdown(cancel_futures=True)
            raise


class _Memory:
    """Lets as many pieces be worked on as fit in a number of bytes, and at least one."""

    def __init__(self, limit: int):
        self._limit, self._used, self._freed = limit, 0, threading.Condition()

    @contextlib.contextmanager
    def held(self, size: int) -> Iterator[None]:
        with self._freed:
            self._freed.wait_for(lambda: self._used == 0 or self._used + size <= self._limit)
            self._used += size
        try:
            yield
        finally:
            with self._freed:
                self._used -= size
                self._freed.notify_all()
