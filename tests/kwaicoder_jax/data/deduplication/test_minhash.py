"""Shingles against a loop over tokens, signatures against exact Jaccard indices, bands against datasketch."""

import itertools
import re
import sysconfig
from pathlib import Path

import datasketch
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kwaicoder_jax.data.deduplication import minhash
from kwaicoder_jax.data.shingles import shingles, tokens

TOKEN = re.compile(rb"[A-Za-z0-9_\x80-\xff]+|[^\s\x00A-Za-z0-9_\x80-\xff]")
STANDARD_LIBRARY = Path(sysconfig.get_paths()["stdlib"])


def split(text):
    return TOKEN.findall(text)


def sets(texts, width):
    return [set(itertools.zip_longest(*(split(text)[place:] for place in range(width)))) for text in texts]


@settings(max_examples=200, deadline=None)
@given(st.lists(st.text(st.sampled_from("ab_1 \n\t(+é\0"), max_size=30), min_size=1, max_size=5), st.integers(1, 6))
def test_tokens_and_shingles_are_those_of_a_loop(texts, width):
    texts = [text.encode() for text in texts]
    token_T, text_T = tokens(texts)
    expected = [(token, number) for number, text in enumerate(texts) for token in split(text)]
    assert len(token_T) == len(expected)
    assert text_T.tolist() == [number for _, number in expected]
    assert len({(token, hashed) for (token, _), hashed in zip(expected, token_T.tolist())}) == len(
        {token for token, _ in expected}
    ), "equal tokens have equal hashes"
    assert len(set(token_T.tolist())) == len({token for token, _ in expected}), "others have others"

    hash_S, offsets = shingles(texts, width)
    assert np.diff(offsets).tolist() == [max(len(split(text)) - width + 1, 0) for text in texts]
    expected = [tuple(split(text)[i : i + width]) for text in texts for i in range(len(split(text)) - width + 1)]
    assert len(set(hash_S.tolist())) == len(set(expected)) == len(set(zip(expected, hash_S.tolist())))


def test_case_punctuation_numbers_and_order_count():
    texts = [b"f(a, b)[1]", b"F(a, b)[1]", b"f(a; b)[1]", b"f(a, b)[0]", b"f(b, a)[1]", b"f( a,b )\n[1]"]
    first, *others, spaced = (set(shingles([text], 5)[0].tolist()) for text in texts)
    assert all(first != other for other in others)
    assert first == spaced, "white space does not"


def test_signatures_estimate_the_jaccard_index():
    """Of pairs of real files and edited copies: unbiased, and with the spread of a binomial."""
    rng = np.random.default_rng(0)
    texts = [path.read_bytes() for path in sorted(STANDARD_LIBRARY.glob("*.py"))[:60]]
    edited = []
    for text in texts:
        lines = text.splitlines(keepends=True)
        kept = rng.random(len(lines)) > rng.random() * 0.5
        edited.append(b"".join(line for line, keep in zip(lines, kept) if keep))
    signature_MP, counts = minhash.signatures(texts + edited, 256, 5)
    left, right = (
        [
            set(map(tuple, zip(*(split(text)[place : len(split(text)) - 4 + place] for place in range(5)))))
            for text in each
        ]
        for each in (texts, edited)
    )
    exact = np.array([len(a & b) / len(a | b) for a, b in zip(left, right)])
    found = (signature_MP[: len(texts)] == signature_MP[len(texts) :]).mean(1)
    assert exact.min() < 0.5 < 0.9 < exact.max()
    spread = np.sqrt(exact * (1 - exact) / 256)
    assert (np.abs(found - exact) < 4.5 * spread + 0.01).all()
    assert abs((found - exact).mean()) < 4 * spread.mean() / len(texts) ** 0.5
    assert counts[0] == len(split(texts[0])) - 4


def test_batches_change_nothing(monkeypatch):
    texts = [path.read_bytes() for path in sorted(STANDARD_LIBRARY.glob("a*.py"))] + [b"", b"x"]
    whole = minhash.signatures(texts, 64, 5)
    monkeypatch.setattr(minhash, "_BATCH", 1000)
    for one, other in zip(whole, minhash.signatures(texts, 64, 5)):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(("threshold", "permutations"), [(0.7, 256), (0.85, 128), (0.5, 64), (0.75, 2048)])
def test_bands_are_datasketchs(threshold, permutations):
    count, rows = minhash.bands(threshold, permutations)
    theirs = datasketch.lsh._optimal_param(threshold, permutations, 0.5, 0.5)
    assert (count, rows) == theirs
    assert count * rows <= permutations


def test_keys_of_bands_differ_between_bands_and_agree_where_rows_do():
    rng = np.random.default_rng(0)
    one = rng.integers(0, 2**32, (1, 40), dtype=np.uint32)
    other = one.copy()
    other[0, 7] += 1
    keys = minhash.band_keys(np.concatenate([one, other, np.zeros_like(one)]), 8, 5)
    assert (keys[0] == keys[1]).tolist() == [True, False, *[True] * 6]
    assert len(set(keys[2].tolist())) == 8
