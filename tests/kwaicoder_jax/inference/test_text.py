"""Text in pieces against the whole text, for tokens that end inside characters and stop strings that span tokens."""

import itertools
import string

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from kwaicoder_jax.data import Tokenizer
from kwaicoder_jax.data import tokenizer as training
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.inference.text import Detokenizer, StopStrings, TextStream

SAMPLE = "def naïve(x):\n    return '€', \"𝄞 日本語\", 'ok'\n" * 3


def byte_level() -> Tokenizer:
    return training.train([SAMPLE], 300)


def sentence_piece() -> Tokenizer:
    """As Llama 2's: words begin with U+2581, the first word's is stripped, unknown characters are tokens of one byte."""
    vocab = {"<unk>": 0} | {f"<0x{byte:02X}>": byte + 1 for byte in range(256)}
    for piece in ["▁", *string.ascii_lowercase, "▁d", "▁de", "▁def", "re", "▁re"]:
        vocab[piece] = len(vocab)
    merges = [("▁", "d"), ("▁d", "e"), ("▁de", "f"), ("r", "e"), ("▁", "re")]
    backend = tokenizers.Tokenizer(models.BPE(vocab, merges, unk_token="<unk>", byte_fallback=True))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return Tokenizer(backend.to_str())


TOKENIZERS = {"byte_level": byte_level(), "sentence_piece": sentence_piece()}


def pieces(tokenizer, ids):
    stream = Detokenizer(tokenizer)
    return [*(stream.push(token) for token in ids), stream.finish()]


@pytest.mark.parametrize("name", TOKENIZERS)
def test_characters_are_whole_and_come_at_once(name):
    tokenizer = TOKENIZERS[name]
    text = "def re '€' 𝄞x" if name == "sentence_piece" else SAMPLE
    ids = tokenizer.encode(text)
    got = pieces(tokenizer, ids)
    assert "".join(got) == text
    assert got[-1] == "", "nothing is left where the last character is whole"
    assert "" in got, "the text has characters of several tokens"
    for count in range(len(ids)):
        known, whole = "".join(got[: count + 1]), tokenizer.decode(ids[: count + 1])
        if not whole.endswith("\N{REPLACEMENT CHARACTER}"):
            assert known == whole, "held back only inside a character"


@given(st.lists(st.integers(0, 299), max_size=20))
@settings(max_examples=150, deadline=None)
def test_any_tokens_give_their_text(ids):
    """Broken UTF-8 and special tokens too."""
    check_pieces(TOKENIZERS["byte_level"], [token % TOKENIZERS["byte_level"].vocab_size for token in ids])


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=st.text(max_size=15))
@settings(max_examples=150, deadline=None)
def test_any_text_comes_back(name, text):
    check_pieces(TOKENIZERS[name], TOKENIZERS[name].encode(text))


def check_pieces(tokenizer, ids):
    got, whole = pieces(tokenizer, ids), tokenizer.decode(ids)
    assert "".join(got) == whole
    for count in range(len(got)):
        assert whole.startswith("".join(got[:count]))


def naive_cut(text, stops):
    """One character at a time: the first end of a stop string."""
    for end in range(len(text) + 1):
        found = [end - len(stop) for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: min(found)], True
    return text, False


@given(
    st.text("ab\n", max_size=30),
    st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 30), max_size=8),
)
@settings(max_examples=500, deadline=None)
def test_stop_strings_do_not_depend_on_the_pieces(text, stops, cuts):
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    stream = StopStrings(stops)
    got = [stream.push(text[a:b]) for a, b in itertools.pairwise(borders)]
    expected, found = naive_cut(text, stops)
    for count in range(len(got)):
        assert expected.startswith("".join(got[:count])), "given out, and then cut away"
    assert ("".join(got) + stream.finish(), stream.found) == (expected, found)


def test_a_stop_string_across_tokens():
    tokenizer = TOKENIZERS["byte_level"]
    ids = tokenizer.encode("return '€', 'ok'\nnext")
    stream = TextStream(tokenizer, ["€', 'o"])
    given_out = [stream.push(token) for token in ids]
    assert stream.stopped
    assert "".join(given_out) + stream.finish() == stream.text == "return '"


def test_what_might_have_been_a_stop_string_is_given_out_at_the_end():
    tokenizer = TOKENIZERS["byte_level"]
    stream = TextStream(tokenizer, ["\n\n\n"])
    for token in tokenizer.encode("x\n\n"):
        stream.push(token)
    assert stream.text == "x"
    assert (stream.finish(), stream.text, stream.stopped) == ("\n\n", "x\n\n", False)


def test_refused_stop_strings():
    with pytest.raises(UserError, match=r"stop: a stop string is empty"):
        StopStrings(["a", ""])
    with pytest.raises(UserError, match=r"stop: 17 stop strings; give at most 16"):
        StopStrings(["a"] * 17)
