"""Where tasks are performed: in this process, in some on this machine, or by Apache Beam.

A step's tasks do not depend on each other, and each writes what depends on its inputs alone. So runners differ in where they
work and in which order, and in nothing that is written.
"""

import concurrent.futures
import dataclasses
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

from kwaicoder_jax.data.engine.steps import Done, Task, perform
from kwaicoder_jax.data.engine.store import Result, Store
from kwaicoder_jax.errors import UserError

Progress = Callable[[str, int, int], None]


class Runner(Protocol):
    """Performs tasks."""

    def perform(self, store: Store, tasks: Sequence[Task]) -> Iterator[tuple[int, Done]]:
        """Yields the place of each task and what came of it, in any order."""


def run(store: Store, tasks: Sequence[Task], runner: Runner, progress: Progress | None = None) -> list[Result]:
    """Performs all tasks, and returns what they made, in their order.

    Args:
      store: where everything is.
      tasks: of one step.
      runner: who performs them.
      progress: called with (the step's name, tasks done, tasks in all).

    Raises:
      UserError: one failed; the others were performed.
      RuntimeError: one failed by a defect of its code, whose traceback this tells.
    """
    done: list[Done | None] = [None] * len(tasks)
    for count, (place, each) in enumerate(runner.perform(store, tasks), 1):
        done[place] = each
        if progress is not None:
            progress(tasks[place].step.name, count, len(tasks))
    results = [each.result for each in done if each is not None and each.result is not None]
    if len(results) < len(tasks):
        failed = sorted((each for each in done if each and each.result is None), key=lambda each: not each.is_defect)
        where = f"{len(tasks) - len(results)} of {len(tasks)} tasks of {tasks[0].step.name} failed"
        if failed and failed[0].is_defect:
            raise RuntimeError(f"{where}: {failed[0].error}")
        raise UserError(failed[0].error if failed else "they were not performed", where=where)
    return results


@dataclasses.dataclass(frozen=True)
class InProcess:
    """One after the other, here."""

    def perform(self, store: Store, tasks: Sequence[Task]) -> Iterator[tuple[int, Done]]:
        """See Runner."""
        for place, task in enumerate(tasks):
            yield place, perform(store, task)


class Processes:
    """In processes of this machine, fresh interpreters that stay for the next step.

    Attributes:
      workers: how many.
    """

    def __init__(self, workers: int):
        """Starts them with the first task."""
        self.workers = workers
        self._pool: concurrent.futures.ProcessPoolExecutor | None = None

    def perform(self, store: Store, tasks: Sequence[Task]) -> Iterator[tuple[int, Done]]:
        """See Runner."""
        waiting = {}
        for place, task in enumerate(tasks):
            if (found := store.find(task.action)) is not None:
                yield place, Done(found)
            else:
                waiting[self._started().submit(perform, store, task)] = place
        try:
            for future in concurrent.futures.as_completed(waiting):
                yield waiting[future], future.result()
        except concurrent.futures.process.BrokenProcessPool:
            what = "a worker was killed, for want of memory perhaps"
            self.close()
            raise UserError(what, where="prepare_data.engine", remedy="run again with fewer workers") from None
        except GeneratorExit:  # whoever asked has had enough
            self.close()
            raise

    def _started(self) -> concurrent.futures.ProcessPoolExecutor:
        if self._pool is None:
            context = multiprocessing.get_context("spawn")
            self._pool = concurrent.futures.ProcessPoolExecutor(
                self.workers, mp_context=context, initializer=_end_with_the_parent
            )
        return self._pool

    def close(self) -> None:
        """Ends them after what they are at; the next task starts others."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None


def _end_with_the_parent() -> None:
    """A worker whose parent was killed would wait for work for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@dataclasses.dataclass(frozen=True)
class Beam:
    """By an Apache Beam runner, of which every worker sees the store.

    Attributes:
      options: of the pipeline, as on a command line: ("--runner=FlinkRunner", ...); the Direct runner if there are none.
    """

    options: tuple[str, ...] = ()

    def perform(self, store: Store, tasks: Sequence[Task]) -> Iterator[tuple[int, Done]]:
        """See Runner; what was made is found in the store, errors come in a file of their own."""
        beam = _beam()
        left = [task for task in tasks if store.find(task.action) is None]
        failures = _Failures(store)
        if left:
            try:
                options = beam.options.pipeline_options.PipelineOptions(list(self.options))
                made = beam.Pipeline(options=options)
            except ValueError as error:
                what = f"Apache Beam refuses {list(self.options)} ({str(error).splitlines()[0]})"
                raise UserError(what, where="prepare_data.engine.options") from error
            with made as pipeline:
                _ = (
                    pipeline
                    | beam.Create(left)
                    | beam.Reshuffle()  # a task is not fused with the making of the list: each may go to another worker
                    | beam.Map(failures.perform)
                )
        for place, task in enumerate(tasks):
            result = store.find(task.action)
            yield place, failures.of(task) if result is None else Done(result)


@dataclasses.dataclass(frozen=True)
class _Failures:
    """Errors of tasks that another machine performed: objects of the store, under the action's name."""

    store: Store

    def perform(self, task: Task) -> str:
        done = perform(self.store, task)
        if done.result is None:
            self.store.record(f"failed-{task.action}", Result({}, {"error": done.error, "is_defect": done.is_defect}))
        return task.action

    def of(self, task: Task) -> Done:
        found = self.store.find(f"failed-{task.action}")
        return (
            Done(None, **found.facts) if found else Done(None, "was not performed: do its workers run the same code?")
        )


def _beam() -> Any:
    try:
        import apache_beam as beam
        import apache_beam.options.pipeline_options
    except ImportError:
        what, remedy = "Apache Beam is not installed", "pip install apache-beam, or choose another engine"
        raise UserError(what, where="prepare_data.engine", remedy=remedy) from None
    return beam


def chosen(engine: str, workers: int, options: Sequence[str] = ()) -> Runner:
    """The runner by name: "local", with as many processes or in this one with 0, or "beam"; UserError for another."""
    if engine == "beam":
        return Beam(tuple(options))
    if engine != "local":
        raise UserError(f"{engine!r} is no engine", where="prepare_data.engine", remedy="local or beam")
    if workers < 0:
        raise UserError(f"{workers} is negative", where="prepare_data.workers", remedy="0 works in this process")
    return Processes(workers) if workers else InProcess()
