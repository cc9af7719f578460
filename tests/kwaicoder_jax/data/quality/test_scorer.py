"""The scorer against loops, a closed form and texts that are known to be one thing or another."""

import re
import sysconfig
from pathlib import Path

import numpy as np
import pytest

from kwaicoder_jax.data.documents import Document
from kwaicoder_jax.data.engine import shards, tally
from kwaicoder_jax.data.engine.apply import Apply
from kwaicoder_jax.data.engine.runners import InProcess, run
from kwaicoder_jax.data.engine.steps import Task
from kwaicoder_jax.data.engine.store import Store
from kwaicoder_jax.data.quality import Scorer, calibrated, features, measures, steps, train
from kwaicoder_jax.data.quality.calibration import area, cross_entropy
from kwaicoder_jax.errors import UserError

STANDARD_LIBRARY = Path(sysconfig.get_paths()["stdlib"])
CLASSES = ("bad", "good")


def test_features_are_tokens_and_pairs_once_each():
    texts = [b"a b a b", b"", b"b", b"a, b"]
    found = features(texts, 2**20)
    sets = [set(found.bucket_N[first:last].tolist()) for first, last in zip(found.offsets[:-1], found.offsets[1:])]
    assert list(map(len, sets)) == [4, 0, 1, 5]  # a, b, ab, ba; nothing; b; a, "," b and two pairs
    assert sets[2] < sets[0]
    assert len(sets[0] & sets[3]) == 2
    assert len(found.bucket_N) == sum(map(len, sets)), "once each"
    few = features(texts, 4)
    assert few.bucket_N.max() < 4


def test_probabilities_are_the_softmax_of_scaled_sums():
    rng = np.random.default_rng(0)
    scorer = Scorer(rng.normal(size=(64, 3)).astype(np.float32), rng.normal(size=3).astype(np.float32), ("a", "b", "c"))
    texts = [b"one two three", b"", b"x = 1\n" * 50]
    found = features(texts, 64)
    for text, row in zip(texts, scorer.probabilities(texts)):
        buckets = features([text], 64).bucket_N
        logits = scorer.weight_BC[buckets].sum(0) / max(len(buckets), 1) ** 0.5 + scorer.bias_C
        np.testing.assert_allclose(row, np.exp(logits) / np.exp(logits).sum(), rtol=1e-5)
    assert len(found.offsets) == 4


def labelled(count=240):
    """Files as they are, and with their names made short, their comments and their layout removed."""
    texts, labels = [], []
    for path in sorted(STANDARD_LIBRARY.glob("*.py"))[:count]:
        text = path.read_text(encoding="utf-8", errors="replace")[:8000]
        names = {name: f"v{number}" for number, name in enumerate(sorted(set(re.findall(r"[A-Za-z_]{5,}", text))))}
        bare = re.sub(r"[A-Za-z_]{5,}", lambda found, names=names: names[found[0]], re.sub(r"#.*", "", text))
        for each, label in ((text, 1), (re.sub(r"\s+", " ", bare), 0)):
            texts.append(each.encode())
            labels.append((1 - label, label))
    return texts, np.array(labels, np.float32)


def test_it_learns_and_its_probabilities_can_be_believed():
    texts, labels = labelled()
    held = np.arange(len(texts)) // 2 % 4 == 0  # both texts of a file are on one side
    learned = [text for text, out in zip(texts, held) if not out]
    scorer = train(learned, labels[~held], CLASSES, buckets=2**14, epochs=8)
    again = train(learned, labels[~held], CLASSES, buckets=2**14, epochs=8)
    np.testing.assert_array_equal(scorer.weight_BC, again.weight_BC)
    judged = [text for text, out in zip(texts, held) if out]
    found = features(judged, 2**14)
    better, temperature = calibrated(scorer, scorer.logits(found), labels[held])
    before, after = (measures(each.probabilities(judged), labels[held]) for each in (scorer, better))
    assert after["accuracy"] == before["accuracy"] > 0.95
    assert after["auc"] > 0.98
    assert cross_entropy(better.logits(found), labels[held]) <= cross_entropy(scorer.logits(found), labels[held]) + 1e-9
    assert temperature > 0
    decoded = Scorer.decoded(better.encoded())
    np.testing.assert_array_equal(decoded.probabilities(judged), better.probabilities(judged))
    assert decoded.classes == CLASSES


def test_the_temperature_is_the_one_that_made_the_labels():
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(20_000, 2)) * 3
    truth = np.exp(logits / 2.5)
    positive = rng.random(len(logits)) < (truth / truth.sum(1, keepdims=True))[:, 1]
    labels = np.stack([~positive, positive], axis=1).astype(float)
    scorer = Scorer(np.ones((2, 2), np.float32), np.zeros(2, np.float32), CLASSES)
    _, temperature = calibrated(scorer, logits, labels)
    assert abs(temperature - 2.5) < 0.1
    scaled = np.exp(logits / temperature)
    assert measures(scaled / scaled.sum(1, keepdims=True), labels)["calibration_error"] < 0.02


def test_the_area_is_a_count_of_pairs():
    rng = np.random.default_rng(0)
    score, positive = rng.integers(0, 5, 60) / 5, rng.random(60) < 0.4
    pairs = [(a > b) + (a == b) / 2 for a in score[positive] for b in score[~positive]]
    assert area(score, positive) == pytest.approx(np.mean(pairs))
    assert np.isnan(area(score, np.zeros(60, bool)))


def test_soft_labels_are_matched():
    texts = [b"alpha beta"] * 300 + [b"gamma"] * 300
    labels = np.array([[0.25, 0.75]] * 300 + [[0.9, 0.1]] * 300)
    scorer = train(texts, labels, CLASSES, buckets=2**8, epochs=60, decay=0.0)
    np.testing.assert_allclose(scorer.probabilities(texts)[[0, -1]], labels[[0, -1]], atol=0.03)


@pytest.mark.parametrize(
    ("labels", "how", "what"),
    [
        (np.ones((2, 2)), {}, "do not add up to 1"),
        (np.array([[1.0, 0.0]]), {}, r"2 texts with labels \(1, 2\)"),
        (np.array([[1.0, 0.0]] * 2), {"buckets": 1000}, "1000 is no power of two"),
    ],
)
def test_what_cannot_be_learned(labels, how, what):
    with pytest.raises(UserError, match=what):
        train([b"a", b"b"], labels, CLASSES, **how)
    with pytest.raises(UserError, match="is not a scorer"):
        Scorer.decoded(b"something else")


def test_scores_and_thresholds_over_shards(tmp_path):
    texts, labels = labelled(120)
    scorer = train(texts, labels, CLASSES, buckets=2**12, epochs=4)
    store = Store(tmp_path)
    documents = [Document("code", str(n), text.decode(), language="python") for n, text in enumerate(texts)]
    documents += [Document("code", f"c{n}", "int x;", language="c") for n in range(5)]
    parts = [shards.write(store, documents[:100]), shards.write(store, documents[100:])]
    model = store.add(scorer.encoded())
    scored = run(store, [Task(steps.Score(), (part, model)) for part in parts], InProcess())
    found = [document for each in scored for document in shards.read(store.path(each.outputs["shard"]))]
    np.testing.assert_allclose(
        [document.scores["quality"] for document in found[: len(texts)]], scorer.probabilities(texts)[:, 1], atol=2e-6
    )
    histograms = steps.added(each.facts["histograms"] for each in scored)
    assert {language: int(bins.sum()) for language, bins in histograms.items()} == {"python": len(texts), "c": 5}
    at_least = steps.thresholds(histograms, 0.25)
    assert at_least["c"] == 0.0, "too few to tell"
    judge = Apply(steps.AtLeast("quality", at_least), "filter")
    left = run(store, [Task(judge, (each.outputs["shard"],)) for each in scored], InProcess())
    (total,) = tally.totals(tally.merged(each.facts for each in left)["counts"]).values()
    dropped = total["rule low_quality"][0]
    assert 0.15 * len(texts) < dropped <= 0.25 * len(texts)
    kept = [d for each in left for d in shards.read(store.path(each.outputs["shard"])) if d.language == "python"]
    lowest_kept = min(document.scores["quality"] for document in kept)
    assert lowest_kept >= at_least["python"]
    assert sum(document.scores["quality"] < at_least["python"] for document in found[: len(texts)]) == dropped


def test_the_share_is_never_passed():
    bins = np.zeros(steps.BINS, np.int64)
    bins[[0, 400, 999]] = 30, 40, 30
    assert steps.thresholds({"a": bins}, 0.29) == {"a": 0.0}
    assert 0 < steps.thresholds({"a": bins}, 0.3)["a"] <= 0.4
    assert 0.4 < steps.thresholds({"a": bins}, 0.75)["a"] <= 0.999
