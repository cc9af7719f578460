"""Files of labels, and a scorer that is learned from them."""

import json

import numpy as np
import pytest

from kwaicoder_jax.data import quality
from kwaicoder_jax.errors import UserError
from tests.kwaicoder_jax.data.quality.test_scorer import labelled


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_numbers_are_shares_of_good(tmp_path):
    rows = [{"text": f"x = {number}", "label": number / 30} for number in range(31)]
    found = quality.read(written(tmp_path / "labels.jsonl", rows))
    assert found.classes == ("bad", "good")
    np.testing.assert_allclose(found.labels[:, 1], np.arange(31) / 30, rtol=1e-6)
    np.testing.assert_allclose(found.labels.sum(1), 1, rtol=1e-6)
    assert found.texts[7] == b"x = 7"


def test_names_are_classes(tmp_path):
    rows = [{"text": f"x = {number}", "label": ("code", "mathematics", "other")[number % 3]} for number in range(30)]
    found = quality.read(written(tmp_path / "labels.jsonl", rows))
    assert found.classes == ("code", "mathematics", "other")
    assert found.labels[4].tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        ([{"text": "a", "label": 1}], "has 1 texts; label 20 at least"),
        ([{"text": "a", "label": 2}] * 20, "label 2 is neither a number from 0 to 1 nor a name"),
        ([{"text": "a", "label": True}] * 20, "label True is neither"),
        ([{"text": "a"}] * 20, r"labels.jsonl:1: is no row"),
        ([{"text": "a", "label": 1}] * 19 + [{"text": "b", "label": "good"}], "numbers and names"),
        ([{"text": "a", "label": "good"}] * 20, "has one class, 'good'"),
        (["a"] * 20, "is no row"),
    ],
)
def test_rows_that_are_none(tmp_path, rows, what):
    with pytest.raises(UserError, match=what):
        quality.read(written(tmp_path / "labels.jsonl", rows))


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        quality.read(tmp_path / "nowhere.jsonl")


def test_it_is_measured_on_what_it_did_not_see():
    texts, labels = labelled()
    scorer, found = quality.fit(quality.Labelled(texts, labels, ("bad", "good")), buckets=2**14, epochs=8)
    assert found["texts"] == len(texts)
    assert 0.1 * len(texts) < found["held_out"] < 0.3 * len(texts)
    assert found["accuracy"] > 0.95
    assert found["auc"] > 0.98
    shuffled = np.random.default_rng(0).permutation(labels)
    _, noise = quality.fit(quality.Labelled(texts, shuffled, ("bad", "good")), buckets=2**14, epochs=8)
    assert noise["accuracy"] < 0.75, "labels that mean nothing cannot be learned"
    assert scorer.classes == ("bad", "good")


def test_equal_texts_cannot_be_held_out():
    with pytest.raises(UserError, match="too much alike"):
        quality.fit(quality.Labelled([b"a"] * 30, np.tile([1.0, 0.0], (30, 1)), ("bad", "good")))
