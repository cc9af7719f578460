"""Deduplication over shards against brute force, whatever the order, the shards and the runner."""

import itertools
import re

import numpy as np
import pytest

from kwaicoder_jax.data import deduplication
from kwaicoder_jax.data.deduplication import clusters, selection
from kwaicoder_jax.data.documents import Document
from kwaicoder_jax.data.engine import runners, shards
from kwaicoder_jax.data.engine.store import Store

WIDTH, THRESHOLD = 5, 0.7


def family(rng, number):
    """A text and copies of it of which some words were replaced."""
    words = [f"w{word}" for word in rng.integers(0, 10**6, int(rng.integers(120, 400)))]
    copies = [words]
    for _ in range(int(rng.integers(0, 4))):
        copy, count = list(words), int(rng.choice([0, 1, len(words) // 3]))
        for place in rng.integers(0, len(copy), count):
            copy[place] = f"x{rng.integers(0, 10**6)}"
        copies.append(copy)
    return [
        Document("code", f"{number}/{place}", " ".join(copy), scores={"quality": float(rng.integers(0, 3))})
        for place, copy in enumerate(copies)
    ]


@pytest.fixture(scope="module")
def documents():
    rng = np.random.default_rng(0)
    found = [document for number in range(120) for document in family(rng, number)]
    return [
        *found,
        Document("code", "short/0", "a b"),
        Document("code", "short/1", "a b"),
        Document("code", "short/2", "a"),
    ]


def brute_force(documents):
    """Kept identifiers: clusters by exact Jaccard indices, which are far from the threshold here."""
    sets = []
    for document in documents:
        words = re.findall(r"\w+", document.text)
        shingled = {tuple(words[i : i + WIDTH]) for i in range(len(words) - WIDTH + 1)}
        sets.append(shingled or {document.text})
    parent = list(range(len(documents)))
    near = []
    for a, b in itertools.combinations(range(len(documents)), 2):
        index = len(sets[a] & sets[b]) / len(sets[a] | sets[b])
        near.append(index)
        if index >= THRESHOLD:
            root, other = (parent[each] for each in (a, b))
            parent = [root if each == other else each for each in parent]
    assert not any(0.6 < index < 0.8 for index in near), "the estimate could go either way"
    kept = set()
    for root in set(parent):
        members = [document for document, each in zip(documents, parent) if each == root]
        best = max((d.scores.get("quality", 0.0), len(d.text.encode())) for d in members)
        kept.add(
            frozenset(d.identifier for d in members if (d.scores.get("quality", 0.0), len(d.text.encode())) == best)
        )
    return kept


def kept(store, documents, sizes, **settings):
    borders = np.cumsum([0, *sizes])
    made = [shards.write(store, documents[first:last]) for first, last in itertools.pairwise(borders)]
    found = deduplication.deduplicate(store, made, deduplication.Settings(**settings), runners.InProcess())
    left = [document for each in found.shards for document in shards.read(store.path(each))]
    assert len(found.shards) == len(sizes)
    assert sum(each["kept"][0] for each in found.dropped) == len(left)
    assert found.facts["exact"] + found.facts["near"] + len(left) == len(documents)
    return left, found


def test_what_is_kept_is_the_best_of_each_cluster(tmp_path, documents):
    left, found = kept(Store(tmp_path), documents, [len(documents)])
    wanted = brute_force(documents)
    assert len(left) == len(wanted)
    assert {document.identifier for document in left} <= set().union(*wanted)
    assert all(len(ties & {document.identifier for document in left}) == 1 for ties in wanted)
    sizes = {int(size): count for size, count in found.facts["sizes"].items()}
    assert sum(size * count for size, count in sizes.items()) == len(documents) - len(left) + found.facts["clusters"]
    assert found.facts["exact"] > 10
    assert found.facts["near"] > 10
    example = found.facts["examples"][0]
    assert example["size"] == max(sizes)


def test_the_same_are_kept_in_any_order_and_in_any_shards(tmp_path, documents):
    first, _ = kept(Store(tmp_path / "0"), documents, [len(documents)])
    wanted = sorted(document.identifier for document in first)
    rng = np.random.default_rng(1)
    for trial in range(3):
        shuffled = [documents[place] for place in rng.permutation(len(documents))]
        cut = sorted(rng.integers(0, len(documents), 3))
        sizes = np.diff([0, *cut, len(documents)]).tolist()
        left, _ = kept(Store(tmp_path / f"{trial + 1}"), shuffled, [*sizes, 0])
        assert sorted(document.identifier for document in left) == wanted


def test_ranges_of_keys_and_blocks_change_nothing(tmp_path, documents, monkeypatch):
    _, whole = kept(Store(tmp_path / "0"), documents, [200, len(documents) - 200])
    monkeypatch.setattr(deduplication, "_PART", 2**14)
    monkeypatch.setattr(selection, "_BLOCK", 17)
    monkeypatch.setattr(shards, "batches", lambda documents: ([each] for each in documents))
    monkeypatch.setattr(deduplication.steps, "_COMPARED", 5)
    _, parts = kept(Store(tmp_path / "1"), documents, [200, len(documents) - 200])
    assert parts.shards == whole.shards
    assert parts.facts == whole.facts


def test_equal_texts_alone(tmp_path, documents):
    left, found = kept(Store(tmp_path), documents, [len(documents)], near=False)
    assert len(left) == len({document.text for document in documents})
    assert found.facts["near"] == 0


def test_buckets_of_what_is_not_alike(tmp_path):
    """A key that everybody has: each is compared with the first that it is like, not with the first alone."""
    settings = deduplication.Settings(permutations=4, threshold=0.7, width=1)
    signature = np.array([[1, 1, 1, 1], [2, 2, 2, 2], [1, 1, 1, 9], [2, 2, 2, 7], [3, 3, 3, 3]], np.uint32)
    keys = np.zeros(5, deduplication.steps.KEYS)
    keys["key"], keys["id"], keys["row"] = 7, [10, 20, 30, 40, 50], np.arange(5)
    store = Store(tmp_path)
    inputs = [shards.write_array(store, each) for each in (keys, signature)]
    met = deduplication.steps.Meet(settings, 0, 1).run(store, inputs)
    assert shards.read_array(store, met.outputs["pairs"]).tolist() == [[0, 2], [1, 3]]


def test_components_are_the_smallest_members():
    rng = np.random.default_rng(0)
    for count, edges in ((1, 0), (50, 30), (2000, 1500), (2000, 5000)):
        pairs = rng.integers(0, count, (edges, 2))
        parent = list(range(count))
        changed = True
        while changed:
            changed = False
            for a, b in pairs.tolist():
                low = min(parent[a], parent[b])
                changed |= parent[a] != low or parent[b] != low
                parent[a] = parent[b] = low
        parts = np.array_split(pairs[rng.permutation(edges)], 3)
        assert clusters.components(count, parts).tolist() == parent
    chain = np.stack([np.arange(9999), np.arange(1, 10_000)], axis=1)
    assert not clusters.components(10_000, [rng.permutation(chain)]).any()


def test_no_documents(tmp_path):
    store, runner = Store(tmp_path), runners.InProcess()
    assert deduplication.deduplicate(store, [], deduplication.Settings(), runner).shards == []
    left, _ = kept(store, [], [0, 0])
    assert left == []
