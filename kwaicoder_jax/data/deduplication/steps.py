"""Deduplication as steps of the engine: sign every shard, meet in buckets, connect, drop.

    shard  --Sign-->  table, keys (sorted), signatures            for each shard
    keys of all shards in a range  --Meet-->  pairs               for each range of keys
    tables, pairs  --Choose-->  rows to drop, for each shard      once
    shard, its rows  --Drop-->  shard                             for each shard

Documents are numbered through all shards. Nothing depends on how they are spread over shards, or on their order: whoever
meets is compared in the order of 64-bit identifiers, and the best of a cluster has the highest score, then most bytes, then
the lowest identifier.
"""

import dataclasses
import hashlib
import itertools
import tempfile
from collections.abc import Sequence

import numpy as np

from kwaicoder_jax.data.deduplication import minhash, selection
from kwaicoder_jax.data.documents import Document
from kwaicoder_jax.data.engine import shards
from kwaicoder_jax.data.engine.store import Result, Store
from kwaicoder_jax.errors import UserError

TABLE = np.dtype([("id", "<u8"), ("exact", "<u8"), ("score", "<f8"), ("bytes", "<u4"), ("shingles", "<u4")])
KEYS = np.dtype([("key", "<u8"), ("id", "<u8"), ("row", "<u4")])
DROPS = np.dtype([("row", "<u4"), ("near", "?")])

_COMPARED = 2**16  # pairs whose signatures are compared at once
_ROUNDS = 64  # of comparing, in a bucket whose members are not alike


@dataclasses.dataclass(frozen=True)
class Settings:
    """What counts as a near duplicate.

    Attributes:
      threshold: Jaccard index of the shingles of two texts, as estimated from their signatures.
      permutations: numbers of a signature; the estimate's standard deviation is sqrt(J (1 - J) / permutations).
      width: tokens of a shingle. Shorter texts are duplicates only of texts that are equal.
      best_by: the score whose highest is kept.
      near: whether near duplicates are sought at all, or equal texts alone.
    """

    threshold: float = 0.7
    permutations: int = 256
    width: int = 5
    best_by: str = "quality"
    near: bool = True

    def __post_init__(self) -> None:
        for name, least, most in (("threshold", 0.05, 1.0), ("permutations", 2, 4096), ("width", 1, 64)):
            if not least <= (value := getattr(self, name)) <= most:
                where = f"prepare_data.deduplication.{name}"
                raise UserError(f"{value} is out of range", where=where, remedy=f"use {least} to {most}")


def identifier(document: Document) -> int:
    """64 bits of a document's source and identifier."""
    return _hash64(f"{document.source}\0{document.identifier}".encode())


def _hash64(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


@dataclasses.dataclass(frozen=True)
class Sign:
    """A shard's table, keys and signatures."""

    settings: Settings
    name: str = "sign"

    def run(self, store: Store, inputs: Sequence[str]) -> Result:
        """See Step."""
        (shard,) = inputs
        tables, keys, signatures, first = [np.zeros(0, TABLE)], [np.zeros(0, KEYS)], [], 0
        for documents in shards.batches(shards.read(store.path(shard))):
            table, signature_MP = self._signed(documents)
            tables.append(table)
            keys.append(self._keys(table, signature_MP, first))
            signatures.append(signature_MP)
            first += len(documents)
        found = np.concatenate(keys)
        outputs = {
            "table": shards.write_array(store, np.concatenate(tables)),
            "keys": shards.write_array(store, found[np.lexsort((found["id"], found["key"]))]),
            "signatures": shards.write_array(
                store, np.concatenate([np.zeros((0, self.settings.permutations), np.uint32), *signatures])
            ),
        }
        return Result(outputs, {"documents": first})

    def _signed(self, documents: Sequence[Document]) -> tuple[np.ndarray, np.ndarray]:
        texts = [document.text.encode() for document in documents]
        table = np.zeros(len(texts), TABLE)
        table["id"] = [identifier(document) for document in documents]
        table["exact"] = [_hash64(text) for text in texts]
        table["score"] = [document.scores.get(self.settings.best_by, 0.0) for document in documents]
        table["bytes"] = [min(len(text), 2**32 - 1) for text in texts]
        if not self.settings.near:
            return table, np.zeros((len(texts), self.settings.permutations), np.uint32)
        signature_MP, table["shingles"] = minhash.signatures(texts, self.settings.permutations, self.settings.width)
        return table, signature_MP

    def _keys(self, table: np.ndarray, signature_MP: np.ndarray, first: int) -> np.ndarray:
        row_M = np.arange(first, first + len(table), dtype=np.uint32)
        parts = [(table["exact"], table["id"], row_M)]
        if self.settings.near:
            there = table["shingles"] > 0
            key_MB = minhash.band_keys(
                signature_MP[there], *minhash.bands(self.settings.threshold, self.settings.permutations)
            )
            for key_M in key_MB.T:
                parts.append((key_M, table["id"][there], row_M[there]))
        keys = np.zeros(sum(len(key) for key, _, _ in parts), KEYS)
        for place, name in enumerate(KEYS.names or ()):
            keys[name] = np.concatenate([part[place] for part in parts])
        return keys


@dataclasses.dataclass(frozen=True)
class Meet:
    """Pairs of documents that share a key of a range and whose signatures agree.

    Inputs are keys and signatures of each shard, in turn.

    Attributes:
      settings: see there.
      part: of the keys, this one.
      parts: into which all keys are divided.
    """

    settings: Settings
    part: int
    parts: int
    name: str = "meet"

    def run(self, store: Store, inputs: Sequence[str]) -> Result:
        """See Step."""
        signatures = [shards.read_array(store, each, mapped=True) for each in inputs[1::2]]
        offsets = np.concatenate([[0], np.cumsum([len(each) for each in signatures])])
        key_N, id_N, number_N = self._members(store, inputs[::2], offsets)
        order = np.lexsort((number_N, id_N, key_N))
        key_N, number_N = key_N[order], number_N[order]
        pairs = [np.zeros((0, 2), np.int64)]
        for _ in range(_ROUNDS):  # the first of each bucket against the others; what is not alike meets again
            begins = np.flatnonzero(selection.begins(key_N))
            first_N = np.repeat(number_N[begins], np.diff(np.append(begins, len(key_N))))
            others = np.ones(len(key_N), bool)
            others[begins] = False
            if not others.any():
                break
            pair_P2 = np.stack([first_N[others], number_N[others]], axis=1)
            alike = _agree(pair_P2, signatures, offsets, self.settings.threshold)
            pairs.append(pair_P2[alike])
            left = np.flatnonzero(others)[~alike]
            key_N, number_N = key_N[left], number_N[left]
        found = np.unique(np.concatenate(pairs), axis=0)
        return Result({"pairs": shards.write_array(store, found)}, {"pairs": len(found)})

    def _members(
        self, store: Store, keys: Sequence[str], offsets: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of the range, those whose key is there twice."""
        lowest = np.uint64(self.part * 2**64 // self.parts)
        highest = np.uint64((self.part + 1) * 2**64 // self.parts - 1)
        parts = []
        for digest, offset in zip(keys, offsets[:-1], strict=True):
            table = shards.read_array(store, digest, mapped=True)
            first, last = np.searchsorted(table["key"], lowest), np.searchsorted(table["key"], highest, side="right")
            here = np.array(table[first:last])
            parts.append((here["key"], here["id"], here["row"].astype(np.int64) + offset))
        key_N, id_N, number_N = (np.concatenate(each) for each in zip(*parts, strict=True))
        order = np.argsort(key_N, kind="stable")
        same = np.zeros(len(order) + 1, bool)
        same[1:-1] = key_N[order][1:] == key_N[order][:-1]
        shared = order[same[1:] | same[:-1]]
        return key_N[shared], id_N[shared], number_N[shared]


def _agree(pair_P2: np.ndarray, signatures: Sequence[np.ndarray], offsets: np.ndarray, threshold: float) -> np.ndarray:
    """Whether the signatures of each pair agree in at least that share of their numbers."""
    parts = [np.zeros(0, bool)]
    for first in range(0, len(pair_P2), _COMPARED):
        left, right = (_rows(pair_P2[first : first + _COMPARED, side], signatures, offsets) for side in (0, 1))
        parts.append(np.mean(left == right, axis=1) >= threshold)
    return np.concatenate(parts)


def _rows(number_P: np.ndarray, signatures: Sequence[np.ndarray], offsets: np.ndarray) -> np.ndarray:
    found = np.zeros((len(number_P), signatures[0].shape[1]), np.uint32)
    shard_P = np.searchsorted(offsets, number_P, side="right") - 1
    for shard in np.unique(shard_P):
        here = shard_P == shard
        found[here] = signatures[shard][number_P[here] - offsets[shard]]
    return found


@dataclasses.dataclass(frozen=True)
class Choose:
    """Which rows of each shard are dropped. Inputs are as many tables as there are shards, then pairs."""

    shards: int
    name: str = "choose"

    def run(self, store: Store, inputs: Sequence[str]) -> Result:
        """See Step."""
        tables = [shards.read_array(store, each, mapped=True) for each in inputs[: self.shards]]
        offsets = np.concatenate([[0], np.cumsum([len(each) for each in tables])]).astype(np.int64)
        pairs = (shards.read_array(store, each) for each in inputs[self.shards :])
        with tempfile.TemporaryDirectory(dir=store.root) as folder:
            choice = selection.choose(tables, offsets, pairs, folder)
            outputs = {}
            for place, (first, last) in enumerate(itertools.pairwise(offsets)):
                here = np.array(choice.reason_N[first:last])
                drops = np.zeros(np.count_nonzero(here), DROPS)
                drops["row"] = np.flatnonzero(here)
                drops["near"] = here[drops["row"]] == selection.NEAR
                outputs[f"drops-{place:06d}"] = shards.write_array(store, drops)
        return Result(outputs, choice.facts)


@dataclasses.dataclass(frozen=True)
class Drop:
    """A shard without some rows. Inputs are the shard and its drops."""

    name: str = "drop"

    def run(self, store: Store, inputs: Sequence[str]) -> Result:
        """See Step."""
        drops = shards.read_array(store, inputs[1])
        reasons = {int(row): "near" if near else "exact" for row, near in drops.tolist()}
        return shards.without(store, inputs[0], reasons, ("exact", "near"))
