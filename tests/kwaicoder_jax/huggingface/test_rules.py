"""Every rule is its own inverse's inverse, reads only the rows it needs, and knows the order of rotary pairs."""

import numpy as np
import pytest

from kwaicoder_jax.huggingface.rules import Rule, copy_into

SIZES = {"H": 3, "N": 8, "D": 5, "F": 7, "E": 2, "R": 10, "V": 11, "C": 1}
RULES = [
    Rule("x", "V D -> V D"),
    Rule("x", "D -> D"),
    Rule("x", "(H N) -> H N"),
    Rule("x", "(H N) D -> D H N"),
    Rule("x", "D (H N) -> H N D"),
    Rule("x", "F D -> D F"),
    Rule("x", "E F D -> E D F"),
    Rule("x", "C D -> D C"),
    Rule("x", "(H N) D -> D H N", interleaved=0),
    Rule("x", "(H N) D -> D H N", interleaved=4),
    Rule("x", "(H N) -> H N", interleaved=2),
    Rule("x", "R D -> D R", interleaved=6),
    Rule("x", "R -> R", interleaved=6),
]


def ours_shape(rule):
    return tuple(SIZES[letter] for letter in rule.pattern.split(" -> ")[1].replace(" ", ""))


def theirs(rule):
    shape = rule.their_shape(ours_shape(rule))
    return np.arange(np.prod(shape)).reshape(shape)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_there_and_back(rule):
    array = theirs(rule)
    ours = rule.to_ours(lambda start, stop: array[start:stop], ours_shape(rule))
    assert ours.shape == ours_shape(rule)
    np.testing.assert_array_equal(np.sort(ours, axis=None), np.sort(array, axis=None))
    np.testing.assert_array_equal(rule.to_theirs(ours), array)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_part_is_the_part_of_the_whole_and_needs_few_rows(rule):
    array, shape, asked = theirs(rule), ours_shape(rule), []

    def rows(start, stop):
        asked.append((start, stop))
        return array[start:stop]

    whole = rule.to_ours(rows, shape)
    rng = np.random.default_rng(0)
    for _ in range(20):
        starts = [int(rng.integers(0, size)) for size in shape]
        index = tuple(slice(start, int(rng.integers(start + 1, size + 1))) for start, size in zip(starts, shape))
        asked.clear()
        np.testing.assert_array_equal(rule.to_ours(rows, shape, index), whole[index])
        (start, stop), = asked  # fmt: skip
        letters = rule.pattern.split(" -> ")
        lead, ours = letters[0].lstrip("(")[0], letters[1].replace(" ", "")
        if rule.interleaved is None or lead != ours[-1]:  # the rows of the wanted heads, experts or neurons alone
            wanted = index[ours.index(lead)]
            assert (stop - start) * SIZES[lead] == (wanted.stop - wanted.start) * len(array)
        if rule.keeps_rows:
            run = (index[0], *[slice(None)] * (len(shape) - 1))
            np.testing.assert_array_equal(rule.to_theirs(whole[run]), array[start:stop])


def test_pairs_are_llama_cpps():
    """llama.cpp's convert_hf_to_gguf.py permutes rows of q and k of a head so; ours are Hugging Face's."""
    heads, width, model = 3, 8, 5
    huggingface = np.random.default_rng(0).standard_normal((heads * width, model))
    gguf = huggingface.reshape(heads, 2, width // 2, model).swapaxes(1, 2).reshape(huggingface.shape)
    expected = huggingface.reshape(heads, width, model).transpose(2, 0, 1)
    rule = Rule("attn_q.weight", "(H N) D -> D H N", interleaved=0)
    np.testing.assert_array_equal(rule.to_ours(lambda a, b: gguf[a:b], expected.shape), expected)
    np.testing.assert_array_equal(rule.to_theirs(expected), gguf)


def test_what_turns_together_stays_together():
    """Rotating pairs side by side there is rotating halves here: the same numbers, in our order."""
    nope, width = 4, 10
    rule = Rule("x", "(H N) -> H N", interleaved=nope)
    theirs_HN = np.random.default_rng(1).standard_normal((2, width))
    angle = np.random.default_rng(2).uniform(0, 3, (width - nope) // 2)
    pairs = (theirs_HN[:, nope::2] + 1j * theirs_HN[:, nope + 1 :: 2]) * np.exp(1j * angle)
    rotated = theirs_HN.copy()
    rotated[:, nope::2], rotated[:, nope + 1 :: 2] = pairs.real, pairs.imag

    def ours(array_HN):
        flat = array_HN.reshape(-1)
        return rule.to_ours(lambda a, b: flat[a:b], array_HN.shape)

    first, second = np.split(ours(theirs_HN)[:, nope:], 2, axis=-1)
    halves = np.concatenate(
        [first * np.cos(angle) - second * np.sin(angle), second * np.cos(angle) + first * np.sin(angle)], axis=-1
    )
    np.testing.assert_allclose(ours(rotated)[:, nope:], halves, atol=1e-12)
    np.testing.assert_array_equal(ours(theirs_HN)[:, :nope], theirs_HN[:, :nope])


@pytest.mark.parametrize("axes", [(0, 1, 2), (2, 0, 1), (1, 2, 0), (0, 2, 1), (2, 1, 0)])
@pytest.mark.parametrize("shape", [(150, 33, 140), (3, 200, 2), (0, 4, 5)])
def test_copies_in_blocks_are_copies(shape, axes):
    source = np.arange(np.prod(shape), dtype=np.uint16).reshape(shape).transpose(axes)
    copy_into(out := np.empty(source.shape, np.float32), source)
    np.testing.assert_array_equal(out, source)
