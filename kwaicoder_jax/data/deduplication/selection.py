"""Which documents of each cluster go: all but the best. Blocks at a time, on arrays that lie in files."""

import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from kwaicoder_jax.data.deduplication import clusters

KEPT, EXACT, NEAR = 0, 1, 2
_BLOCK = 2**21  # documents
_EXAMPLES, _MEMBERS = 20, 5  # clusters and members of each that a report shows


class Choice(NamedTuple):
    """What `choose` found.

    Attributes:
      reason_N: for each document KEPT, EXACT (equal to a better one of its cluster) or NEAR; uint8.
      facts: "documents", "clusters", "exact" and "near" (documents that go), "sizes" (clusters by size), "examples" (the
        largest clusters: "size" and "members", [shard, row] of some, the best first).
    """

    reason_N: np.ndarray
    facts: dict[str, Any]


def choose(
    tables: Sequence[np.ndarray], offsets: np.ndarray, pairs: Iterable[np.ndarray], folder: str | os.PathLike[str]
) -> Choice:
    """The best of a cluster has the highest score, then most bytes, then the lowest identifier.

    Args:
      tables: "id", "exact", "score", "bytes" of each shard's documents.
      offsets: number of each shard's first document, and of all; int64.
      pairs: arrays [P, 2] of numbers of documents that are alike.
      folder: for 10 bytes a document, which the choice needs as long as it is used.
    """
    count = int(offsets[-1])
    reason_N = _mapped(folder, "reason", np.uint8, count)
    parent_N = clusters.components(count, pairs, _mapped(folder, "parent", np.int64, count))
    sizes: dict[int, int] = {}
    largest: list[tuple[int, int, list[int]]] = []
    for member_C in _clusters(parent_N, _in_clusters(parent_N, _mapped(folder, "shared", np.bool_, count))):
        table, root_C = _rows(tables, offsets, member_C), parent_N[member_C]
        order = np.lexsort((table["id"], -table["bytes"].astype(np.int64), -table["score"], root_C))
        member_C, root_C, table = member_C[order], np.asarray(root_C[order]), table[order]
        is_best = begins(root_C)
        reason_N[member_C] = np.where(is_best, KEPT, np.where(_again(root_C, table["exact"]), EXACT, NEAR))
        first_K = np.flatnonzero(is_best)
        size_K = np.diff(np.append(first_K, len(root_C)))
        for size, number in zip(*np.unique(size_K, return_counts=True), strict=True):
            sizes[int(size)] = sizes.get(int(size), 0) + int(number)
        for place in np.lexsort((table["id"][first_K], -size_K))[:_EXAMPLES]:
            some = member_C[first_K[place] : first_K[place] + min(int(size_K[place]), _MEMBERS)]
            largest.append((-int(size_K[place]), int(table["id"][first_K[place]]), some.tolist()))
        largest = sorted(largest)[:_EXAMPLES]
    return Choice(reason_N, _facts(reason_N, offsets, sizes, largest))


def _mapped(folder: str | os.PathLike[str], name: str, dtype: Any, count: int) -> np.ndarray:
    """Zeros that the system may write out."""
    with (Path(folder) / name).open("w+b") as file:
        file.truncate(max(count, 1) * np.dtype(dtype).itemsize)
        return np.memmap(file, dtype, "r+", shape=(max(count, 1),))[:count]


def _blocks(count: int) -> Iterator[np.ndarray]:
    for first in range(0, count, _BLOCK):
        yield np.arange(first, min(first + _BLOCK, count))


def _in_clusters(parent_N: np.ndarray, shared_N: np.ndarray) -> np.ndarray:
    """Whether a document is in a cluster with another one."""
    for number in _blocks(len(parent_N)):
        root = parent_N[number]
        apart = root != number
        shared_N[number[apart]] = True
        shared_N[root[apart]] = True
    return shared_N


def _clusters(parent_N: np.ndarray, shared_N: np.ndarray) -> Iterator[np.ndarray]:
    """Members of whole clusters, those whose roots are in one block after the other."""
    for roots in _blocks(len(parent_N)):
        if not shared_N[roots].any():
            continue
        parts = []
        for number in _blocks(len(parent_N)):
            root = parent_N[number]
            parts.append(number[shared_N[number] & (root >= roots[0]) & (root <= roots[-1])])
        members = np.concatenate(parts)
        if len(members):
            yield members


def _rows(tables: Sequence[np.ndarray], offsets: np.ndarray, number_C: np.ndarray) -> np.ndarray:
    """Of the tables, of ascending numbers."""
    borders = np.searchsorted(number_C, offsets)
    found = [
        table[number_C[first:last] - offset]
        for table, offset, first, last in zip(tables, offsets[:-1], borders[:-1], borders[1:], strict=True)
        if last > first
    ]
    return np.concatenate(found)


def begins(sorted_N: np.ndarray) -> np.ndarray:
    """Where another value begins."""
    return np.concatenate([[True], sorted_N[1:] != sorted_N[:-1]])[: len(sorted_N)]


def _again(root_C: np.ndarray, exact_C: np.ndarray) -> np.ndarray:
    """Whether a better document of the cluster, one further in front, has the same text."""
    order = np.lexsort((np.arange(len(root_C)), exact_C, root_C))
    first = begins(root_C[order]) | begins(exact_C[order])
    again = np.zeros(len(root_C), bool)
    again[order] = ~first
    return again


def _facts(
    reason_N: np.ndarray, offsets: np.ndarray, sizes: dict[int, int], largest: list[tuple[int, int, list[int]]]
) -> dict[str, Any]:
    counts = np.zeros(3, np.int64)
    for number in _blocks(len(reason_N)):
        counts += np.bincount(reason_N[number], minlength=3)
    examples = []
    for negative, _, members in largest:
        shard = np.searchsorted(offsets, members, side="right") - 1
        examples.append({"size": -negative, "members": np.stack([shard, members - offsets[shard]], axis=1).tolist()})
    return {
        "documents": len(reason_N), "clusters": sum(sizes.values()), "exact": int(counts[EXACT]), "near": int(counts[NEAR]),
        "sizes": {str(size): sizes[size] for size in sorted(sizes)}, "examples": examples,
    }  # fmt: skip
