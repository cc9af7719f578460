"""A training loader whose streams are read by processes of their own, for hosts that train faster than one thread reads.

The batches are those of `TrainingLoader`, to the bit, for any number of workers, and so are the positions: a run may go
on with another number. A worker is to a process what a process is to a run: an equal part of its streams.
"""

import contextlib
import os
import pickle
import signal
import subprocess
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from kwaicoder_jax.data import packing
from kwaicoder_jax.data.corpus import Corpus
from kwaicoder_jax.data.loader import PhaseSpec, TrainingLoader, check_streams, merge_states, prefetch
from kwaicoder_jax.errors import UserError

_COMMAND = "from kwaicoder_jax.data import workers; workers.serve()"


class WorkerLoader(Iterator[packing.Batch]):
    """Iterates as a `TrainingLoader` does; `close` ends the workers, and so does the end of this process.

    Attributes:
      step: batches given so far.
      steps: batches in all.
    """

    def __init__(
        self,
        corpus: Corpus,
        phases: Sequence[PhaseSpec],
        *,
        seed: int,
        streams: int,
        workers: int,
        process_index: int = 0,
        process_count: int = 1,
    ):
        """Starts before the first batch; workers start when they are first asked.

        Args:
          corpus: as in `TrainingLoader`, like the rest.
          phases: as there.
          seed: as there.
          streams: as there, and a multiple of the workers of all processes.
          workers: processes of this one, at least 1.
          process_index: as there.
          process_count: as there.
        """
        if workers < 1:
            raise UserError(f"{workers} is less than 1", where="loader.workers", remedy="use 0 for none at all")
        if streams % (workers * process_count):
            what = f"{streams} streams cannot be shared by {workers} workers of each of {process_count} processes"
            raise UserError(what, where="loader.workers", remedy="let their product divide loader.streams")
        check_streams(phases, streams, process_count)
        self._template = TrainingLoader(
            corpus, phases, seed=seed, streams=streams, process_index=process_index, process_count=process_count
        )
        self._arguments = {"path": corpus.path, "phases": tuple(phases), "seed": seed, "streams": streams}
        self._shares = [(process_index * workers + worker, process_count * workers) for worker in range(workers)]
        self._processes: list[subprocess.Popen[bytes]] = []
        self._state = self._template.get_state()

    @property
    def step(self) -> int:
        return self._state["step"]

    @property
    def steps(self) -> int:
        return self._template.steps

    def __next__(self) -> packing.Batch:
        if self.step == self.steps:
            self.close()
            raise StopIteration
        if not self._processes:
            self._processes = [self._start(*share) for share in self._shares]
        answers = [self._read(worker) for worker in self._processes]
        self._state = merge_states([state for _, state in answers])
        parts = [part for part, _ in answers]
        return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}

    def _start(self, index: int, count: int) -> "subprocess.Popen[bytes]":
        worker = subprocess.Popen(
            [sys.executable, "-c", _COMMAND], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},  # grain imports jax; the accelerator is the parent's
        )  # fmt: skip
        assert worker.stdin
        start = {**self._arguments, "process_index": index, "process_count": count, "position": self._state}
        with contextlib.suppress(BrokenPipeError):  # its end is noticed when it is asked
            pickle.dump(start, worker.stdin)
            worker.stdin.flush()
        return worker

    def _read(self, worker: "subprocess.Popen[bytes]") -> tuple[packing.Batch, dict[str, Any]]:
        assert worker.stdout
        try:
            answer = pickle.load(worker.stdout)
        except (EOFError, pickle.UnpicklingError):
            self.close()
            what = f"a worker of the loader ended, with status {worker.wait()}"
            raise UserError(what, where="loader.workers", remedy="start again, with fewer if memory is short") from None
        if isinstance(answer, Exception):
            self.close()
            raise answer
        return answer

    def get_state(self) -> dict[str, Any]:
        """As that of `TrainingLoader` after the same batches."""
        return self._state

    def set_state(self, state: Mapping[str, Any]) -> None:
        """As that of `TrainingLoader`."""
        self.close()
        self._template.set_state(state)
        self._state = self._template.get_state()

    def go_on_from(self, state: Mapping[str, Any]) -> None:
        """As that of `TrainingLoader`."""
        self.close()
        self._template.go_on_from(state)
        self._state = self._template.get_state()

    def close(self) -> None:
        """Ends the workers; the next batch would start them again."""
        for worker in self._processes:
            worker.kill()
        for worker in self._processes:
            worker.communicate()
        self._processes = []


Loader = TrainingLoader | WorkerLoader


def serve() -> None:
    """The body of a worker: reads its part of the run from standard input, and writes batches and positions."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the parent still has to save, and its end is ours
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever else prints
    start = pickle.load(sys.stdin.buffer)
    position, path = start.pop("position"), start.pop("path")
    try:
        loader = TrainingLoader(Corpus.open(path), start.pop("phases"), **start)
        loader.set_state(position)
        ready = prefetch(loader)
        for batch in ready:
            pickle.dump((batch, ready.get_state()), out, protocol=5)
            out.flush()
    except BrokenPipeError:
        os._exit(0)  # the parent is gone
    except UserError as error:
        pickle.dump(error, out)
    except Exception:
        pickle.dump(RuntimeError(f"a worker of the loader failed:\n{traceback.format_exc()}"), out)
    out.flush()
