"""Training documents that contain what a benchmark asks or answers are dropped."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kwaicoder_jax.data.decontamination.index import Finder, Index, build
from kwaicoder_jax.data.engine import shards as stored
from kwaicoder_jax.data.engine.runners import Progress, Runner, run
from kwaicoder_jax.data.engine.steps import Task
from kwaicoder_jax.data.engine.store import Result, Store

__all__ = ["Decontaminated", "Finder", "Index", "Settings", "build", "decontaminate"]

MATCHES = np.dtype([("row", "<u4"), ("hash", "<u8")])
_EXAMPLES = 20


@dataclasses.dataclass(frozen=True)
class Settings:
    """What counts as contaminated.

    Attributes:
      width: words of a run that a document may not share with a benchmark.
      shortest: words of the shortest benchmark text that counts as a whole.
      generic_above: runs that more documents have are what everybody writes, and count for nothing. GPT-3's 10 (Brown et al.
        2020, appendix C) was for runs of 13 words.
      allowed: texts that count for nothing.
    """

    width: int = 10
    shortest: int = 8
    generic_above: int = 20
    allowed: tuple[str, ...] = ()


class Decontaminated(NamedTuple):
    """What `decontaminate` made.

    Attributes:
      shards: without what was hit, as many as there were.
      dropped: for each, {"kept": [documents, bytes], "hit": [documents, bytes]}.
      facts: "benchmarks" (documents that each hit), "tasks" (those hit most), "generic" (runs that count for nothing),
        "examples" ([shard, row, task] of some).
    """

    shards: list[str]
    dropped: list[dict[str, Any]]
    facts: dict[str, Any]


def decontaminate(
    store: Store,
    shards: Sequence[str],
    folder: Path,
    settings: Settings,
    runner: Runner,
    progress: Progress | None = None,
) -> Decontaminated:
    """Drops the documents that have a run of words of a benchmark.

    Args:
      store: where shards are.
      shards: of documents.
      folder: of benchmark files, all of them.
      settings: what counts.
      runner: who does the work.
      progress: see `engine.runners.run`.

    Raises:
      UserError: see `index.build`.
    """
    index = build(folder, settings.width, settings.shortest, settings.allowed)
    entries = stored.write_array(store, index.entries)
    match = Match(tuple(index.widths))
    found = run(
        store, [Task(match, (shard, entries), f"shard {n}") for n, shard in enumerate(shards)], runner, progress
    )
    hashes = [stored.read_array(store, each.outputs["matches"])["hash"] for each in found]
    value, count = np.unique(np.concatenate([np.zeros(0, np.uint64), *hashes]), return_counts=True)
    generic = stored.write_array(store, value[count > settings.generic_above])
    tasks = [
        Task(Remove(), (shard, each.outputs["matches"], generic)) for shard, each in zip(shards, found, strict=True)
    ]
    left = run(store, tasks, runner, progress)
    facts = _facts(index, [stored.read_array(store, each.outputs["hits"]) for each in left]) | {
        "generic": int((count > settings.generic_above).sum())
    }
    return Decontaminated([each.outputs["shard"] for each in left], [dict(each.facts) for each in left], facts)


def _facts(index: Index, hits: Sequence[np.ndarray]) -> dict[str, Any]:
    benchmarks: Counter[str] = Counter()
    tasks: Counter[str] = Counter()
    examples = []
    for shard, matches in enumerate(hits):
        task_M = index.entries["task"][np.searchsorted(index.entries["hash"], matches["hash"])]
        pairs = sorted(set(zip(matches["row"].tolist(), task_M.tolist(), strict=True)))
        tasks.update(index.tasks[task] for _, task in pairs)
        benchmarks.update(name for _, name in {(row, index.tasks[task].split(": ")[0]) for row, task in pairs})
        examples += [[shard, row, index.tasks[task]] for row, task in dict(reversed(pairs)).items()]
    examples.sort()
    step = max(len(examples) // _EXAMPLES, 1)
    return {
        "benchmarks": dict(sorted(benchmarks.items())), "tasks": dict(tasks.most_common(50)),
        "examples": examples[::step][:_EXAMPLES],
    }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Match:
    """Which row of a shard has which run of the benchmarks. Inputs are the shard and the index's entries."""

    widths: tuple[int, ...]
    name: str = "match"

    def run(self, store: Store, inputs: Sequence[str]) -> Result:
        """See Step."""
        finder = Finder(stored.read_array(store, inputs[1])["hash"], self.widths)
        parts, first = [np.zeros(0, MATCHES)], 0
        for documents in stored.batches(stored.read(store.path(inputs[0]))):
            row, hashes = finder.find([document.text.encode() for document in documents])
            matches = np.zeros(len(row), MATCHES)
            matches["row"], matches["hash"] = row + first, hashes
            parts.append(matches)
            first += len(documents)
        return Result({"matches": stored.write_array(store, np.concatenate(parts))}, {"documents": first})


@dataclasses.dataclass(frozen=True)
class Remove:
    """A shard without what was hit. Inputs are the shard, its matches, and the runs that count for nothing."""

    name: str = "remove"

    def run(self, store: Store, inputs: Sequence[str]) -> Result:
        """See Step; "hits" are the matches that count, facts "kept" and "hit" [documents, bytes]."""
        matches = stored.read_array(store, inputs[1])
        matches = matches[~np.isin(matches["hash"], stored.read_array(store, inputs[2]))]
        left = stored.without(store, inputs[0], dict.fromkeys(matches["row"].tolist(), "hit"), ("hit",))
        return left._replace(outputs={**left.outputs, "hits": stored.write_array(store, matches)})
