"""Spans are parts of their documents; scores equal those counted by hand."""

import random

import pytest

from kwaicoder_jax import errors
from kwaicoder_jax.evaluation import infilling

DOCUMENTS = [
    "import os\n\n\ndef area(width, height):\n    # a long comment\n    result = width * height\n    return result\n",
    "class Point:\n    def __init__(self, x, y):\n        self.x = x\n        self.y = y   \n\n    def norm(self):\n"
    "        return (self.x ** 2 + self.y ** 2) ** 0.5\n",
    "",
    "})\n",
]


def test_spans_are_parts_of_single_lines():
    spans = infilling.cut_spans(DOCUMENTS, 100, seed=1)
    assert len(spans) == 8  # usable lines, counted by hand: 3 in the first, 5 in the second
    for span in spans:
        text = DOCUMENTS[span.document]
        assert span.prefix + span.middle + span.suffix == text  # the window is larger than these
        assert "\n" not in span.middle
        assert span.middle == span.middle.strip()
        assert 4 <= len(span.middle) <= 80
        assert span.suffix.lstrip(" ").startswith("\n")
        assert "comment" not in span.middle
    assert len({(s.document, s.prefix) for s in spans}) == len(spans)


def test_draws_are_repeatable_and_even():
    one = infilling.cut_spans(DOCUMENTS, 4, seed=5)
    assert one == infilling.cut_spans(DOCUMENTS, 4, seed=5)
    assert len({tuple(infilling.cut_spans(DOCUMENTS, 4, seed=s)) for s in range(8)}) > 4
    assert sorted(span.document for span in one) == [0, 0, 1, 1]
    assert infilling.cut_spans(DOCUMENTS, 0, seed=5) == []


def test_rates_and_windows():
    text = "\n".join(f"    value_{i} = compute({i}, other_{i})" for i in range(400))
    whole = infilling.cut_spans([text], 300, seed=0, whole_line_rate=1.0)
    assert all(span.middle.startswith("value_") for span in whole)
    parts = infilling.cut_spans([text], 300, seed=0, whole_line_rate=0.0, window=50)
    assert not any(span.middle.startswith("value_") for span in parts)
    assert all(len(span.prefix) <= 50 >= len(span.suffix) for span in parts)
    assert all(span.prefix + span.middle + span.suffix in text for span in parts)
    mixed = infilling.cut_spans([text], 300, seed=0)
    share = sum(span.middle.startswith("value_") for span in mixed) / 300
    assert abs(share - 0.5) < 0.12  # four standard deviations of a fair coin


def test_nothing_to_cut():
    with pytest.raises(errors.UserError, match="no code line"):
        infilling.cut_spans(["", "}\n"], 3, seed=0)


@pytest.mark.parametrize(
    ("one", "other", "wanted"),
    [("", "", 1), ("a", "", 0), ("kitten", "sitting", 1 - 3 / 7), ("abc", "abc", 1), ("flaw", "lawn", 0.5)],
)
def test_edit_similarity_of_known_pairs(one, other, wanted):
    assert infilling.edit_similarity(one, other) == pytest.approx(wanted)
    assert infilling.edit_similarity(other, one) == pytest.approx(wanted)


def test_edit_similarity_equals_the_recursive_definition():
    def distance(a, b):
        if not a or not b:
            return len(a) + len(b)
        return min(distance(a[1:], b) + 1, distance(a, b[1:]) + 1, distance(a[1:], b[1:]) + (a[0] != b[0]))

    draw = random.Random(0)
    for _ in range(60):
        one, other = ("".join(draw.choices("ab(", k=draw.randint(0, 6))) for _ in range(2))
        if one or other:
            wanted = 1 - distance(one, other) / max(len(one), len(other))
            assert infilling.edit_similarity(one, other) == pytest.approx(wanted)


def test_score():
    spans = [infilling.Span(0, "x = ", "abcd", "\n"), infilling.Span(0, "y = ", "f(1)", "\n")]
    scores = infilling.score(spans, ["abcd  \nmore", "f(2)"])
    assert (scores.count, scores.exact_match, scores.edit_similarity) == (2, 0.5, pytest.approx((1 + 0.75) / 2))
    assert infilling.score(spans, [" abcd", ""]).exact_match == 0
    assert (
        infilling.evaluate(spans, lambda pairs: ["abcd" if p == "x = " else "f(1)" for p, _ in pairs]).exact_match == 1
    )
    with pytest.raises(errors.UserError, match="1 completions for 2"):
        infilling.score(spans, ["a"])
