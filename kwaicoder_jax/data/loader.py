"""Batches for training: phases, mixtures and exact resumption, the same for any number of processes.

A fixed number of logical streams each mix, cut, fill in the middle and pack on their own (`mixing.py`, `packing.py`).
A process owns whole streams, and a global batch takes its rows from the streams in order; so the global batches do not
depend on how many processes there are, and a checkpoint of one number of processes is read by another.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import grain
from grain.experimental import ThreadPrefetchDatasetIterator

from kwaicoder_jax import files
from kwaicoder_jax.data import mixing, packing, pieces
from kwaicoder_jax.data.corpus import Corpus
from kwaicoder_jax.data.fill_in_the_middle import FimOptions
from kwaicoder_jax.errors import UserError

# Rows that a stream packs together. More rows waste fewer places; fewer are quicker to rebuild after a restart.
_PACKED_ROWS = 16
_ORDER = 2  # changes when the same settings come to give other batches


@dataclasses.dataclass(frozen=True)
class PhaseSpec:
    """One phase of training.

    Attributes:
      steps: batches in this phase.
      batch_size: rows of a global batch.
      sequence_length: places of a row, in tokens.
      mixture: by source, its share of the target tokens, on any scale; sources that are not named are left alone.
      fim: fill-in-the-middle options.
    """

    steps: int
    batch_size: int
    sequence_length: int
    mixture: Mapping[str, float]
    fim: FimOptions = dataclasses.field(default_factory=FimOptions)

    def __post_init__(self) -> None:
        for field, least in (("steps", 1), ("batch_size", 1), ("sequence_length", pieces.SMALLEST_WINDOW)):
            if getattr(self, field) < least:
                raise UserError(f"{getattr(self, field)} is less than {least}", where=f"phase.{field}")
        weights = self.mixture.values()
        if not all(0.0 <= weight < float("inf") for weight in weights) or not sum(weights) > 0:
            what = f"{dict(self.mixture)} are not shares"
            raise UserError(what, where="phase.mixture", remedy="give numbers from 0 up, one of them above 0")


class _Run(NamedTuple):
    """`rows` rows of one phase, packed `bins` at a time; `bins` divides `rows`, so nothing is left over at its end."""

    phase: int
    bins: int
    rows: int


def runs_of(phases: Sequence[PhaseSpec], streams: int, stream: int) -> list[_Run]:
    """A stream's rows, phase by phase, in packings that no phase leaves unfinished.

    The first packing of a phase is shorter in some streams than in others. They would all pack in the same step
    otherwise, and the loader, fast enough on average, would be waited for there.
    """
    runs = []
    for number, phase in enumerate(phases):
        share = phase.batch_size // streams
        rows = phase.steps * share
        bins = min(rows, max(_PACKED_ROWS, share))
        first = min(rows, share * (1 + stream % max(1, bins // share)))
        rest = (rows - first) % bins
        parts = [(first, first), (bins, rows - first - rest), (rest, rest)]
        runs += [_Run(number, each, total) for each, total in parts if total]
    return runs


class _StreamRows:
    """The packed rows of one stream through all phases."""

    def __init__(self, loader: "TrainingLoader", sources: Mapping[str, grain.MapDataset], stream: int):
        self._loader, self._sources, self._stream = loader, sources, stream
        self._unused: dict[str, Any] = {}  # cursors of sources that an earlier run read and this one does not
        self._run, self._row = 0, 0
        self._runs = runs_of(loader.phases, loader.streams, stream)
        self._enter(mixing.start_state(len(sources)))

    def _enter(self, mix_state: dict[str, Any]) -> None:
        """Makes the packer of the present run, over examples that start at `mix_state`."""
        loader, run = self._loader, self._runs[self._run]
        phase = loader.phases[run.phase]
        total = sum(phase.mixture.values())
        weights = tuple(phase.mixture.get(name, 0.0) / total for name in self._sources)
        settings = mixing.StreamSettings(
            weights, phase.fim, phase.sequence_length, loader.seed, self._stream, loader.streams
        )
        tokenizer = loader.corpus.tokenizer
        examples = mixing.Stream(self._sources, tokenizer, settings)
        seed = mixing.seed_of(loader.seed, self._stream, self._run, "rows")
        self._packer = iter(packing.pack(examples, phase.sequence_length, run.bins, tokenizer.pad, seed=seed))
        self._packer.set_state({"parent": mix_state, "next_row": 0, "counter": 0})
        self._examples = iter(examples)

    def __next__(self) -> dict[str, Any]:
        runs = self._runs
        run = runs[self._run]
        if self._row == run.rows:
            # The packer has given all rows it packed; its parent state is just before the example that did not fit.
            state = self._packer.get_state()["parent"]
            self._run, self._row = self._run + 1, 0
            if runs[self._run].phase != run.phase:
                self._examples.set_state(state)
                state = self._examples.carried_over()
            self._enter(state)
        self._row += 1
        return next(self._packer)

    def get_state(self) -> dict[str, Any]:
        state = {"run": self._run, "row": self._row, "packer": self._packer.get_state(), "unused": self._unused}
        if self._run == len(self._runs) - 1 and self._row == self._runs[-1].rows:
            self._examples.set_state(state["packer"]["parent"])
            state["after"] = self._unused | dict(zip(self._sources, self._examples.carried_over()["cursors"]))
        return state

    def start_from(self, cursors: Mapping[str, Any]) -> None:
        """Begins where another run's stream ended; a source that it did not have begins at its first document."""
        self._unused = {name: cursor for name, cursor in cursors.items() if name not in self._sources}
        start = mixing.start_state(len(self._sources))
        start["cursors"] = [cursors.get(name, cursor) for name, cursor in zip(self._sources, start["cursors"])]
        self._enter(start)

    def set_state(self, state: Mapping[str, Any]) -> None:
        self._run, self._row, self._unused = state["run"], state["row"], dict(state["unused"])
        self._enter(state["packer"]["parent"])
        self._packer.set_state(state["packer"])


class TrainingLoader(Iterator[packing.Batch]):
    """Iterates over this process's rows of each global batch, all phases in turn, then stops.

    Batches are dicts of [batch_size / process_count, sequence_length] arrays (see `packing.batch`); process p's rows
    are the p-th contiguous part of the global batch. Mixture weights are shares of target tokens, counted from each
    phase's start, kept by each stream to within one example. At a phase border a source goes on where it was: nothing
    is repeated, skipped or dropped; a document that is open is cut for the new window from its next character on.

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
        process_index: int = 0,
        process_count: int = 1,
    ):
        """Starts before the first batch.

        Args:
          corpus: where the documents are.
          phases: in order, at least one.
          seed: of the order of documents and of fill-in-the-middle.
          streams: logical streams; divides each batch size, is a multiple of the process count, never changes in a run.
          process_index: this process.
          process_count: of how many.
        """
        self.corpus, self.phases, self.seed, self.streams = corpus, tuple(phases), seed, streams
        self._check(process_count, process_index)
        self.steps = sum(phase.steps for phase in self.phases)
        self.step = 0
        names = sorted({name for phase in self.phases for name in phase.mixture})
        sources = {name: mixing.endless(corpus, name, seed) for name in names}
        own = streams // process_count
        numbers = range(process_index * own, (process_index + 1) * own)
        self._rows = {number: _StreamRows(self, sources, number) for number in numbers}

    def _check(self, process_count: int, process_index: int) -> None:
        check_streams(self.phases, self.streams, process_count)
        if not 0 <= process_index < process_count:
            raise ValueError(f"process {process_index} of {process_count}")
        for number, phase in enumerate(self.phases):
            if unknown := sorted(set(phase.mixture) - set(self.corpus.sources)):
                what = f"the corpus has no source {unknown[0]!r}"
                raise UserError(what, where=f"phases[{number}].mixture", remedy=f"it has {self.corpus.sources}")

    def __next__(self) -> packing.Batch:
        if self.step == self.steps:
            raise StopIteration
        step, phase = self.step, 0
        while step >= self.phases[phase].steps:
            step, phase = step - self.phases[phase].steps, phase + 1
        share = self.phases[phase].batch_size // self.streams
        rows = [next(stream) for stream in self._rows.values() for _ in range(share)]
        self.step += 1
        return packing.batch(rows)

    def _identity(self) -> dict[str, Any]:
        phases = [dataclasses.asdict(dataclasses.replace(phase, mixture=dict(phase.mixture))) for phase in self.phases]
        return {
            "seed": self.seed, "streams": self.streams, "phases": files.digest(phases), "corpus": self.corpus.hash,
            "order": _ORDER,
        }  # fmt: skip

    def get_state(self) -> dict[str, Any]:
        """Returns the position as JSON: the run's identity, the step, and this process's streams by number.

        After the last batch each stream also has "after": by source, where another run would go on; see `go_on_from`.
        """
        streams = {str(number): rows.get_state() for number, rows in self._rows.items()}
        return {"identity": self._identity(), "step": self.step, "streams": streams}

    def set_state(self, state: Mapping[str, Any]) -> None:
        """Goes to a position; the batches that follow are those that followed it, to the bit.

        Args:
          state: what `get_state` gave, or `merge_states` of what all processes gave, whatever their number.

        Raises:
          UserError: a state of another seed, number of streams, list of phases or corpus; a stream that is missing.
        """
        for field, value in self._identity().items():
            saved = state.get("identity", {}).get(field)
            if saved != value:
                what = f"the saved data position has {field} {saved}, this run has {value}"
                raise UserError(
                    what, where=f"loader.{field}", remedy="restore the setting or start over with --restart"
                )
        if missing := [number for number in self._rows if str(number) not in state["streams"]]:
            what = f"the saved data position lacks stream {missing[0]}"
            raise UserError(what, where="loader.streams", remedy="merge the states of all processes")
        for number, rows in self._rows.items():
            rows.set_state(state["streams"][str(number)])
        self.step = state["step"]

    def go_on_from(self, state: Mapping[str, Any]) -> None:
        """Starts this run where the data of another one ended: no document comes again, none is left out.

        Args:
          state: what the other run's `get_state` gave after its last batch; its phases may have been others.

        Raises:
          UserError: a run that was not at its end, or one of another seed, number of streams or corpus.
        """
        mine = self._identity()
        for field in ("seed", "streams", "corpus"):  # and not "order": cursors by source mean the same
            if (saved := state["identity"][field]) != mine[field]:
                what = f"the earlier run's data had {field} {saved}, this run has {mine[field]}"
                raise UserError(what, where=f"loader.{field}", remedy="use the same, or do not continue its data")
        for number, rows in self._rows.items():
            cursors = state["streams"].get(str(number), {}).get("after")
            if cursors is None:
                raise UserError("the earlier run is not at its end", where="loader", remedy="finish it")
            rows.start_from(cursors)


def check_streams(phases: Sequence[PhaseSpec], streams: int, process_count: int = 1) -> None:
    """UserError for streams that the processes, or the rows of some phase, cannot be shared among evenly."""
    if not phases:
        raise UserError("there is no phase", where="phases")
    if streams < 1 or process_count < 1 or streams % process_count:
        what = f"{streams} is not a multiple of the {process_count} processes"
        raise UserError(what, where="loader.streams", remedy="use a multiple of every process count to be used")
    for number, phase in enumerate(phases):
        if phase.batch_size % streams:
            what = f"{streams} does not divide phase {number}'s batch of {phase.batch_size}"
            raise UserError(what, where="loader.streams", remedy="use a divisor of every batch size")


def merge_states(states: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the states of all processes at one step as one; UserError when they are of different steps or runs."""
    first = states[0]
    if any(state["step"] != first["step"] or state["identity"] != first["identity"] for state in states):
        raise UserError("the processes' data positions are of different steps or runs", where="data")
    streams = {number: rows for state in states for number, rows in state["streams"].items()}
    return {**first, "streams": dict(sorted(streams.items(), key=lambda item: int(item[0])))}


def prefetch(loader: Any, batches: int = 2) -> ThreadPrefetchDatasetIterator:
    """Returns an iterator whose background thread keeps up to `batches` batches of a loader ready; leave it to that.

    Its `get_state` is the position after the batch that was given last, not that of the thread; `set_state` takes what
    the loader's does; `close` ends the thread.
    """
    return ThreadPrefetchDatasetIterator(loader, batches)
