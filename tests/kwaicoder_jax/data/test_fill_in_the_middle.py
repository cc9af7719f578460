import collections
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kwaicoder_jax import data
from kwaicoder_jax.data import fill_in_the_middle as fim
from kwaicoder_jax.data import pieces
from kwaicoder_jax.errors import UserError

TEXTS = st.text(
    alphabet=st.one_of(st.sampled_from("\n\r \tab😀é日👩‍👧"), st.characters(codec="utf-8")), min_size=1, max_size=80
)
ALWAYS = data.FimOptions(rate=1.0)


@pytest.mark.parametrize("unit", ["character", "line", "mixed"])
def test_parts_joined_are_the_text(unit):
    @given(TEXTS, st.integers(0, 2**32))
    def check(text, seed):
        split = fim.apply(text, fim.generator(seed, "s", 0, 0, 0), data.FimOptions(1.0, 0.5, unit))
        assert split.prefix + split.middle + split.suffix == text
        assert (split.prefix + split.middle + split.suffix).encode() == text.encode()
        assert split.middle
        if unit == "line" and "\n" in text[:-1]:
            for border in (split.prefix, split.prefix + split.middle):
                assert border in ("", text) or border.endswith("\n")

    check()


def undo(tokenizer, tokens):
    """Reads a sample back from the ids alone, by the published layout of the two orders."""
    assert [tokens.count(i) for i in (2, 3, 4)] == [1, 1, 1]
    assert tokens[0] == 2
    assert tokens[-1] == 0
    assert tokens.count(0) == 1
    a, b = tokens.index(3), tokens.index(4)
    if a == 1:  # <prefix><suffix>S<middle>PM: where P ends is not in the tokens, but joined they are enough
        return tokenizer.decode(tokens[b + 1 : -1]) + tokenizer.decode(tokens[a + 1 : b])
    parts = tokens[1:a], tokens[b + 1 : -1], tokens[a + 1 : b]
    return "".join(map(tokenizer.decode, parts))


def test_samples_can_be_read_back(corpus):
    @given(TEXTS, st.integers(0, 2**32))
    def check(text, seed):
        split = fim.apply(text, fim.generator(seed, "s", 0, 0, 0), ALWAYS)
        tokens = fim.assemble(corpus.tokenizer, split)
        assert undo(corpus.tokenizer, tokens) == text
        prompt = data.infilling_prompt(corpus.tokenizer, split.prefix, split.suffix, split.order)
        assert prompt + corpus.tokenizer.encode(split.middle) + [0] == [0, *tokens], "a prompt is how a sample begins"

    check()


def test_rates_are_binomial():
    """Five standard deviations either side; the seeds are fixed, so this is not a gamble."""
    count, options = 20_000, data.FimOptions(0.3, 0.4, "character")
    orders = collections.Counter()
    firsts, lasts = [], []
    for i in range(count):
        split = fim.apply("0123456789", fim.generator(0, "s", i, 0, 0), options)
        orders[split and split.order] += 1
        if split:
            firsts.append(len(split.prefix))
            lasts.append(len(split.suffix))
    total = orders["psm"] + orders["spm"]
    assert abs(total - 0.3 * count) < 5 * math.sqrt(count * 0.3 * 0.7)
    assert abs(orders["spm"] - 0.4 * total) < 5 * math.sqrt(total * 0.4 * 0.6)
    # Two different cuts out of 0..10: the smaller one's mean is 3, and by symmetry the suffix's length is too.
    assert np.mean(firsts) == pytest.approx(3.0, abs=0.15)
    assert np.mean(lasts) == pytest.approx(3.0, abs=0.15)
    assert {0, 9} <= set(firsts)


def test_rate_zero_and_empty_text():
    rng = fim.generator(0, "s", 0, 0, 0)
    assert fim.apply("abc", rng, data.FimOptions(rate=0.0)) is None
    assert fim.apply("", rng, ALWAYS) is None


def test_generator_depends_on_all_coordinates():
    coordinates = [(0, "a", 0, 0, 0), (1, "a", 0, 0, 0), (0, "b", 0, 0, 0), (0, "a", 1, 0, 0), (0, "a", 0, 1, 0)]
    coordinates += [(0, "a", 0, 0, 1), (0, "a", 11, 1, 1), (0, "a", 1, 11, 1)]
    draws = [fim.generator(*c).random() for c in coordinates]
    assert len(set(draws)) == len(draws)
    assert draws == [fim.generator(*c).random() for c in coordinates]


@pytest.mark.parametrize("bad", [{"rate": 1.5}, {"spm_rate": -0.1}, {"unit": "word"}, {"rate": float("nan")}])
def test_bad_options(bad):
    with pytest.raises(UserError, match=next(iter(bad))):
        data.FimOptions(**bad)


def test_bad_order(corpus):
    with pytest.raises(UserError, match="order"):
        data.infilling_prompt(corpus.tokenizer, "a", "b", "mps")


LINES = st.lists(st.text(alphabet="ab 😀日\t", max_size=60), max_size=40).map("\n".join)


@pytest.mark.parametrize("limit", [7, 30])
def test_pieces_joined_are_the_document(corpus, limit):
    @given(st.one_of(LINES, LINES.map(lambda t: t.replace("\n", "\r\n")), TEXTS), st.integers(0, 3))
    def check(text, repeats):
        text *= repeats
        cut = pieces.cut(text, corpus.tokenizer, limit)
        assert "".join(text[p.start : p.stop] for p in cut) == text
        assert [p.last for p in cut] == [False] * (len(cut) - 1) + [True]
        for p in cut:
            assert len(p.ids) <= limit
            assert corpus.tokenizer.decode(p.ids) == text[p.start : p.stop]

    check()


def test_cuts_lie_at_line_borders(corpus):
    for source in corpus.sources:
        for text in corpus.documents(source, "train"):
            for p in pieces.cut(text, corpus.tokenizer, 120)[:-1]:
                assert text[p.stop - 1] == "\n" or text[p.stop] == "\n"


def test_cuts_prefer_lines_that_are_not_indented(corpus):
    text = "".join(f"def f{i}():\n    return {i}\n" for i in range(40))
    stops = [p.stop for p in pieces.cut(text, corpus.tokenizer, 64)[:-1]]
    assert stops
    assert all(text[stop:].startswith("def ") for stop in stops)


def test_a_sample_that_does_not_fit_stays_plain(corpus):
    text = "value == 12345\n" * 30
    ids = corpus.tokenizer.encode(text)
    piece = pieces.Piece(0, len(text), ids, True)
    for window in (len(ids) + 1, len(ids) + 40):
        sampled = pieces.sample(piece, text, corpus.tokenizer, fim.generator(0, "s", 0, 0, 0), ALWAYS, window)
        assert (2 in sampled) == (window > len(ids) + 1)
        assert sampled[0] == sampled[-1] == 0
        assert len(sampled) <= window + 1


def test_only_the_last_plain_piece_ends(corpus):
    text = "value == 12345\n" * 60
    cut = pieces.cut(text, corpus.tokenizer, 50)
    plain = [pieces.plain(p, corpus.tokenizer) for p in cut]
    assert all(p[0] == 0 for p in plain)
    assert [p[-1] == 0 for p in plain] == [False] * (len(cut) - 1) + [True]
