"""From places to the documents that are worth training on: read, clean, deduplicate, decontaminate.

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
from kwaicoder_jax.data.sources import Source

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
    """

    options: reading.Options = dataclasses.field(default_factory=reading.Options)
    cleaner: Cleaner | None = dataclasses.field(default_factory=Cleaner)
    deduplication: Deduplication | None = dataclasses.field(default_factory=Deduplication)
    benchmarks: Path | None = None
    decontamination: Decontamination = dataclasses.field(default_factory=Decontamination)


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
    tasks = [Task(Read(unit, curation.options), (unit.fingerprint(),), unit.identifier) for unit in units]
    shards, facts = _of(run(store, tasks, runner, progress))
    stages = {"read": facts}
    if curation.cleaner is not None:
        clean = Apply(curation.cleaner, "clean")
        shards, stages["clean"] = _of(run(store, [Task(clean, (shard,)) for shard in shards], runner, progress))
    if curation.deduplication is not None:
        unique = deduplicate(store, shards, curation.deduplication, runner, progress)
        stages["deduplicate"] = _shown(store, shards, unique.facts) | _summed(unique.dropped)
        shards = unique.shards
    if curation.benchmarks is not None:
        clear = decontaminate(store, shards, curation.benchmarks, curation.decontamination, runner, progress)
        stages["decontaminate"] = _shown(store, shards, clear.facts) | _summed(clear.dropped)
        shards = clear.shards
    return Curated(shards, [unit.place.name for unit in units], stages)


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
    version: int = 1

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
