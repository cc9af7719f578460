"""Counts and examples of what a step did, which add up over shards in any order."""

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from kwaicoder_jax.data.documents import Document

EXAMPLES = 12  # of each kind that are kept
_EXCERPT = 2000  # characters

Counts = dict[str, list[int]]  # by source, language and kind, with tabs between: documents and bytes


class Tally:
    """Documents and bytes of UTF-8 by source, language and kind, and a few documents of each kind.

    Which are kept as examples depends on their identifiers alone: those with the lowest hashes, so that shards and their
    order make no difference.
    """

    def __init__(self) -> None:
        """Starts with nothing."""
        self._counts: Counts = {}
        self._examples: dict[str, list[list[str]]] = {}

    def add(self, kind: str, document: Document, count: int = 1, *, example: bool = False) -> None:
        """Counts a document, `count` times, and may keep its beginning."""
        key = f"{document.source}\t{document.language}\t{kind}"
        found = self._counts.setdefault(key, [0, 0])
        found[0] += count
        found[1] += len(document.text.encode())
        if example:
            self._keep(kind, document)

    def _keep(self, kind: str, document: Document) -> None:
        kept = self._examples.setdefault(kind, [])
        place = hashlib.blake2b(f"{document.source}\0{document.identifier}".encode(), digest_size=8).hexdigest()
        if len(kept) < EXAMPLES or place < kept[-1][0]:
            kept.append([place, document.source, document.identifier, document.language, document.text[:_EXCERPT]])
            kept.sort()
            del kept[EXAMPLES:]

    def facts(self) -> dict[str, Any]:
        """As JSON: "counts" and "examples"."""
        return {"counts": self._counts, "examples": self._examples}


def merged(facts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The facts of several tallies as of one."""
    counts: Counts = {}
    examples: dict[str, list[list[str]]] = {}
    for each in facts:
        for key, (documents, size) in each["counts"].items():
            found = counts.setdefault(key, [0, 0])
            found[0] += documents
            found[1] += size
        for kind, some in each["examples"].items():
            examples[kind] = sorted([*examples.get(kind, []), *some])[:EXAMPLES]
    return {"counts": dict(sorted(counts.items())), "examples": dict(sorted(examples.items()))}


def totals(counts: Mapping[str, Any], *, by: str = "") -> dict[str, Counts]:
    """Counts by kind, for each "source" or "language", or for "" of all."""
    found: dict[str, Counts] = {}
    for (source, language, kind), (documents, size) in _keys(counts):
        group = {"source": source, "language": language, "": ""}[by]
        total = found.setdefault(group, {}).setdefault(kind, [0, 0])
        total[0] += documents
        total[1] += size
    return found


def _keys(counts: Mapping[str, Any]) -> Iterator[tuple[tuple[str, str, str], list[int]]]:
    for key, value in counts.items():
        source, language, kind = key.split("\t", 2)
        yield (source, language, kind), value
