"""From places to the documents that are worth training on: read, clean, score, deduplicate, decontaminate, filter.

    store = Store("runs/store")
    places = [reading.from_config("code", {"kind": "archives", "path": "sdists"})]
    curated = curate(places, store, Curation(), runners.chosen("local", workers=8))
    for document in curated.documents(store): ...

Every step is a step of the engine: killed and run again it goes on, and a file that changes is read and cleaned anew, alone.
"""

import dataclasses
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kwaicoder_jax.data import reading
from kwaicoder_jax.data.cleaning import Cleaner
from kwaicoder_jax.data.decontamination import Settings as Decontamination
from kwaicoder_jax.data.decontamination import decontaminate
from kwaicoder_jax.data.deduplication import Settings as Deduplication
from kwaicoder_jax.data.deduplication import deduplicate
from kwaicoder_jax.data.documents import Document
from kwaicoder_jax.data.engine import shards as stored
from kwaicoder_jax.data.engine import tally
from kwaicoder_jax.data.engine.apply import Apply
from kwaicoder_jax.data.engine.runners import InProcess, Progress, Runner, run
from kwaicoder_jax.data.engine.steps import Task
from kwaicoder_jax.data.engine.store import Result, Store
from kwaicoder_jax.data.quality import Scorer, steps
from kwaicoder_jax.data.sources import Source
from kwaicoder_jax.errors import UserError

_EXCERPT = 1000  # characters


@dataclasses.dataclass(frozen=True, kw_only=True)
class Curation:
    """What is taken, and what is done to it.

    Attributes:
      options: of languages, licences and sizes that are read.
      cleaner: rules and redaction; None leaves texts as they are.
      deduplication: None keeps duplicates.
      benchmarks: a folder whose texts no document may contain; None asks for nothing.
      decontamination: how these are sought.
      quality: a scorer, and which share of its lowest scores goes; None asks for nothing.
    """

    options: reading.Options = dataclasses.field(default_factory=reading.Options)
    cleaner: Cleaner | None = dataclasses.field(default_factory=Cleaner)
    deduplication: Deduplication | None = dataclasses.field(default_factory=Deduplication)
    benchmarks: Path | None = None
    decontamination: Decontamination = dataclasses.field(default_factory=Decontamination)
    quality: "Quality | None" = None


@dataclasses.dataclass(frozen=True)
class Quality:
    """What a scorer is used for: of duplicates the one with the highest score stays, and low scores go.

    Attributes:
      scorer: trained, see `quality`.
      drop: share of each language's documents that goes, those with the lowest scores.
      of: the class whose probability is the score.
    """

    scorer: Scorer
    drop: float = 0.1
    of: str = "good"

    def __post_init__(self) -> None:
        if self.of not in self.scorer.classes:
            raise UserError(
                f"{self.of!r} is no class", where="prepare_data.quality.of", remedy=f"{self.scorer.classes}"
            )
        if not 0 <= self.drop < 1:
            raise UserError(
                f"{self.drop} is no share", where="prepare_data.quality.drop", remedy="use 0 or more, below 1"
            )


class Curated(NamedTuple):
    """What `curate` made.

    Attributes:
      shards: objects of documents.
      places: of which place each shard is.
      stages: what each stage did, by name, in their order: facts for a report.
    """

    shards: list[str]
    places: list[str]
    stages: dict[str, dict[str, Any]]

    def documents(self, store: Store) -> Iterator[Document]:
        """Yields all of them."""
        for shard in self.shards:
            yield from stored.read(store.path(shard))

    def sources(self, store: Store) -> dict[str, Source]:
        """What is left of each place, as a source of `data.prepare`."""
        return {
            place: Shards(
                store=store, shards=tuple(shard for shard, each in zip(self.shards, self.places) if each == place)
            )
            for place in sorted(set(self.places))
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Shards(Source):
    """Documents that a store has.

    Attributes:
      store: it.
      shards: objects of documents.
    """

    section = "places"

    store: Store
    shards: tuple[str, ...]
    max_bytes: int = 2**63 - 1
    max_document_bytes: int = 2**63 - 1

    def documents(self, name: str, skipped: Counter[str]) -> Iterator[Document]:
        """Yields all of them."""
        for shard in self.shards:
            yield from stored.read(self.store.path(shard))


def curate(
    places: Sequence[reading.Place], store: Store, curation: Curation, runner: Runner | None = None,
    progress: Progress | None = None,
) -> Curated:  # fmt: skip
    """Reads places and keeps what the stages keep.

    Args:
      places: where documents are.
      store: for what the stages make; what is there already is not made again.
      curation: the stages.
      runner: who does the work; this process if None.
      progress: see `engine.runners.run`.

    Raises:
      UserError: a place that is not there, or a setting that makes no sense.
    """
    runner = runner or InProcess()
    units = [unit for place in places for unit in place.units()]
    if not units:
        where = f"prepare_data.places: {', '.join(place.name for place in places)}"
        raise UserError("there is nothing to read", where=where, remedy="see what their paths hold")
    tasks = [Task(Read(unit, curation.options), (unit.fingerprint(),), unit.identifier) for unit in units]
    shards, facts = _of(run(store, tasks, runner, progress))
    stages = {"read": facts}
    if curation.cleaner is not None:
        clean = Apply(curation.cleaner, "clean")
        shards, stages["clean"] = _of(run(store, [Task(clean, (shard,)) for shard in shards], runner, progress))
    if curation.quality is not None:
        shards, stages["score"] = _scored(store, shards, curation.quality, runner, progress)
    if curation.deduplication is not None:
        unique = deduplicate(store, shards, curation.deduplication, runner, progress)
        stages["deduplicate"] = _shown(store, shards, unique.facts) | _summed(unique.dropped)
        shards = unique.shards
    if curation.benchmarks is not None:
        clear = decontaminate(store, shards, curation.benchmarks, curation.decontamination, runner, progress)
        stages["decontaminate"] = _shown(store, shards, clear.facts) | _summed(clear.dropped)
        shards = clear.shards
    if curation.quality is not None and curation.quality.drop:
        lowest = steps.thresholds(steps.added([stages["score"]["histograms"]]), curation.quality.drop)
        judge = Apply(steps.AtLeast("quality", lowest), "filter")
        shards, stages["filter"] = _of(run(store, [Task(judge, (shard,)) for shard in shards], runner, progress))
        stages["filter"]["thresholds"] = lowest
    return Curated(shards, [unit.place.name for unit in units], stages)


def _scored(
    store: Store, shards: Sequence[str], quality: Quality, runner: Runner, progress: Progress | None
) -> tuple[list[str], dict[str, Any]]:
    scorer = store.add(quality.scorer.encoded())
    tasks = [Task(steps.Score(of=quality.of), (shard, scorer)) for shard in shards]
    results = run(store, tasks, runner, progress)
    found, facts = _of(results)
    histograms = steps.added(each.facts["histograms"] for each in results)
    sparse = {
        language: {str(place): int(bins[place]) for place in np.flatnonzero(bins)}
        for language, bins in histograms.items()
    }
    return found, facts | {"histograms": dict(sorted(sparse.items()))}


def _of(results: Sequence[Result]) -> tuple[list[str], dict[str, Any]]:
    return [each.outputs["shard"] for each in results], tally.merged(each.facts for each in results)


def _shown(store: Store, shards: Sequence[str], facts: dict[str, Any]) -> dict[str, Any]:
    """Facts whose examples name documents, and how they begin, where they had [shard, row] and more."""
    examples = facts.get("examples", [])
    clusters = [each["members"] if isinstance(each, dict) else [each] for each in examples]
    wanted: dict[int, dict[int, Document | None]] = {}
    for shard, row, *_ in (member for members in clusters for member in members):
        wanted.setdefault(shard, {})[row] = None
    for shard, rows in wanted.items():
        for row, document in enumerate(stored.read(store.path(shards[shard]))):
            if row in rows:
                rows[row] = document
    named = []
    for example, members in zip(examples, clusters):
        found = [(wanted[shard][row], rest) for shard, row, *rest in members]
        documents = [
            {"source": each.source, "identifier": each.identifier, "text": each.text[:_EXCERPT], "hits": rest}
            for each, rest in found if each is not None
        ]  # fmt: skip
        named.append({"size": example["size"] if isinstance(example, dict) else 1, "documents": documents})
    return facts | {"examples": named}


def _summed(dropped: Sequence[dict[str, list[int]]]) -> dict[str, Any]:
    """Documents and bytes by kind, of all shards."""
    kinds = sorted({kind for each in dropped for kind in each})
    return {"dropped": {kind: [sum(each[kind][place] for each in dropped) for place in (0, 1)] for kind in kinds}}


@dataclasses.dataclass(frozen=True)
class Read:
    """The documents of a unit. Its input is the unit's fingerprint.

    Attributes:
      unit: what is read; where it lies does not count.
      options: what is taken.
    """

    unit: reading.Unit = dataclasses.field(metadata={"place": True})
    options: reading.Options = dataclasses.field(default_factory=reading.Options)
    name: str = "read"

    def run(self, store: Store, inputs: Sequence[str]) -> Result:
        """See Step; facts are those of a `Tally`: "out", and "skipped REASON"."""
        counts = tally.Tally()
        shard = stored.write(store, self._documents(counts))
        return Result({"shard": shard}, counts.facts())

    def _documents(self, counts: tally.Tally) -> Iterator[Document]:
        for found in reading.read(self.unit, self.options):
            if isinstance(found, Document):
                counts.add("out", found)
                yield found
            else:
                named = Document(self.unit.place.name, found.identifier, "")
                counts.add(f"skipped {found.reason}", named, example=True)
