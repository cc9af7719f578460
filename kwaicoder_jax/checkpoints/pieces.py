"""Writes the slices of a partial step by a few threads, as many at once as fit in a number of bytes."""

import concurrent.futures
import contextlib
import dataclasses
import threading
from collections.abc import Callable, Iterator, Sequence

import jax.numpy as jnp
import numpy as np

from kwaicoder_jax.checkpoints.partial import PartialStep

MEMORY_BYTES = 2**30
FINITE = 2**18  # numbers that are looked at together: they stay in a core's cache
WORKERS = 5  # some read and compute, which takes memory, while others wait for the disk

Progress = Callable[[int, int], None]  # bytes that are there, bytes in all


@dataclasses.dataclass(frozen=True)
class Piece:
    """One slice to be written.

    Attributes:
      name: of the tensor.
      layer: of the slice, or None for a tensor without layers.
      size: bytes of the slice.
      memory_bytes: about what making it takes.
      stage: makes it and hands it to `PartialStep.stage` or `stage_rows`.
    """

    name: str
    layer: int | None
    size: int
    memory_bytes: int
    stage: Callable[[], None]


def write_pieces(
    partial: PartialStep,
    pieces: Sequence[Piece],
    *,
    on_progress: Progress | None = None,
    memory_bytes: int = MEMORY_BYTES,
) -> None:
    """Writes every piece that is not there yet; what was written when it fails stays.

    Args:
      partial: the step.
      pieces: of it, in any order.
      on_progress: told bytes written and bytes in all, in this thread; first what was there before.
      memory_bytes: of pieces worked on at once; a single piece may need more, and is then worked on alone.
    """
    todo = [piece for piece in pieces if not partial.is_written(piece.name, piece.layer)]
    total = sum(piece.size for piece in pieces)
    done = total - sum(piece.size for piece in todo)
    told = on_progress or (lambda done, total: None)
    told(done, total)
    memory, stop = Memory(memory_bytes), threading.Event()

    def work(piece: Piece) -> int:
        with memory.held(piece.memory_bytes):
            if stop.is_set():
                return 0
            piece.stage()
        partial.commit(piece.name, piece.layer)
        return piece.size

    with concurrent.futures.ThreadPoolExecutor(WORKERS) as pool:
        try:
            for future in concurrent.futures.as_completed([pool.submit(work, piece) for piece in todo]):
                done += future.result()
                told(done, total)
        except BaseException:
            stop.set()  # what is being written is finished, and nothing else is begun
            pool.shutdown(cancel_futures=True)
            raise


class Memory:
    """Lets as many pieces be worked on as fit in a number of bytes, and at least one."""

    def __init__(self, limit: int):
        self._limit, self._used, self._freed = limit, 0, threading.Condition()

    @contextlib.contextmanager
    def held(self, size: int) -> Iterator[None]:
        """Inside, `size` bytes count as used; waits until there is room for them."""
        with self._freed:
            self._freed.wait_for(lambda: self._used == 0 or self._used + size <= self._limit)
            self._used += size
        try:
            yield
        finally:
            with self._freed:
                self._used -= size
                self._freed.notify_all()


def is_finite(array: np.ndarray) -> bool:
    """Whether no number is NaN or infinite, in no memory to speak of: by the exponents, a piece at a time."""
    bits = {2: np.uint16, 4: np.uint32, 8: np.uint64}.get(array.dtype.itemsize)
    if bits is None or not jnp.issubdtype(array.dtype, jnp.floating):
        return True
    exponent = np.array(np.inf, array.dtype).reshape(1).view(bits)[0]  # all ones: NaN or infinite
    flat = np.ascontiguousarray(array).reshape(-1).view(bits)
    return not any(((flat[at : at + FINITE] & exponent) == exponent).any() for at in range(0, flat.size, FINITE))
