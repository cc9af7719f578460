"""Exact and near duplicates of documents, over any number of shards."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from kwaicoder_jax.data.deduplication.steps import KEYS, Choose, Drop, Meet, Settings, Sign
from kwaicoder_jax.data.engine.runners import Progress, Runner, run
from kwaicoder_jax.data.engine.steps import Task
from kwaicoder_jax.data.engine.store import Result, Store

__all__ = ["Deduplicated", "Settings", "deduplicate"]

_PART = 2**26  # bytes of keys that meet at once


class Deduplicated(NamedTuple):
    """What `deduplicate` made.

    Attributes:
      shards: without duplicates, as many as there were.
      dropped: for each, {"exact": [documents, bytes], "near": ..., "kept": ...}.
      facts: of all: see `steps.Choose`.
    """

    shards: list[str]
    dropped: list[dict[str, Any]]
    facts: dict[str, Any]


def deduplicate(
    store: Store, shards: Sequence[str], settings: Settings, runner: Runner, progress: Progress | None = None
) -> Deduplicated:
    """Keeps the best document of each cluster of duplicates.

    Args:
      store: where shards are.
      shards: of documents.
      settings: what a duplicate is.
      runner: who does the work.
      progress: see `engine.runners.run`.
    """

    def done(tasks: list[Task]) -> list[Result]:
        return run(store, tasks, runner, progress)

    if not shards:
        return Deduplicated([], [], {})
    signed = done([Task(Sign(settings), (shard,), f"shard {place}") for place, shard in enumerate(shards)])
    documents = sum(each.facts["documents"] for each in signed)
    bands = 1 + (minhash_bands(settings) if settings.near else 0)
    parts = -(-documents * bands * KEYS.itemsize // _PART) or 1
    keys = tuple(each.outputs[name] for each in signed for name in ("keys", "signatures"))
    met = done([Task(Meet(settings, part, parts), keys, f"part {part}") for part in range(parts)])
    tables = tuple(each.outputs["table"] for each in signed)
    (chosen,) = done([Task(Choose(len(shards)), (*tables, *(each.outputs["pairs"] for each in met)))])
    drops = [chosen.outputs[f"drops-{place:06d}"] for place in range(len(shards))]
    left = done([Task(Drop(), pair, f"shard {place}") for place, pair in enumerate(zip(shards, drops, strict=True))])
    return Deduplicated(
        [each.outputs["shard"] for each in left], [dict(each.facts) for each in left], dict(chosen.facts)
    )


def minhash_bands(settings: Settings) -> int:
    """Keys that each document with shingles has."""
    from kwaicoder_jax.data.deduplication.minhash import bands

    return bands(settings.threshold, settings.permutations)[0]
