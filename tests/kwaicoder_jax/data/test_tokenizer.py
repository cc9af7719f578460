import pickle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kwaicoder_jax import data
from kwaicoder_jax.data import tokenizer as tokenizers
from kwaicoder_jax.errors import UserError

SPECIALS = data.SpecialTokens().strings()


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizers.train(["def f(x):\n    return x + 12\n", "naïve 😀 text\r\n"] * 20, 300)


def test_specials_come_first(tokenizer):
    t = tokenizer
    assert (t.end_of_text, t.pad, t.fim_prefix, t.fim_suffix, t.fim_middle) == (0, 1, 2, 3, 4)
    assert t.decode([0, 1, 2, 3, 4]) == "".join(SPECIALS)


def test_round_trip_and_no_specials(tokenizer):
    @given(st.lists(st.one_of(st.text(), st.sampled_from([*SPECIALS, "<|", "endoftext", "|>", "\r\n", "😀"]))))
    def check(parts):
        text = "".join(parts)
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert not set(ids) & {0, 1, 2, 3, 4}
        assert b"".join(map(tokenizer.token_bytes, ids)) == text.encode()
        assert tokenizer.encode_batch([text, "x"])[0] == ids
        again, spans = tokenizer.encode_with_spans(text)
        assert again == ids
        for i, (start, stop) in zip(ids, spans, strict=True):
            assert tokenizer.token_bytes(i) in text[start:stop].encode()

    check()


def test_every_byte_has_a_token(tokenizer):
    assert {tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)} >= {bytes([b]) for b in range(256)}
    assert tokenizer.token_bytes(0) == b"<|endoftext|>"
    with pytest.raises(ValueError, match="outside"):
        tokenizer.token_bytes(tokenizer.vocab_size)


def test_digits_stand_alone(tokenizer):
    assert len(tokenizer.encode("1234567890")) == 10


def test_pickle_and_file(tokenizer, tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer.serialized())
    for copy in (pickle.loads(pickle.dumps(tokenizer)), data.Tokenizer.from_file(path)):
        assert copy == tokenizer
        assert copy.hash == tokenizer.hash
        assert copy.encode("a<|endoftext|>b 😀") == tokenizer.encode("a<|endoftext|>b 😀")


def test_agrees_with_transformers(tokenizer, tmp_path):
    """The file is an ordinary one that the reference library reads alike."""
    transformers = pytest.importorskip("transformers")
    path = tmp_path / "tokenizer.json"
    path.write_text(tokenizer.serialized())
    reference = transformers.PreTrainedTokenizerFast(tokenizer_file=str(path))
    text = "def f(x):\n\treturn 12 # naïve 😀\r\n"
    assert reference(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text)
    assert reference.convert_tokens_to_ids("<|fim_middle|>") == tokenizer.fim_middle


def test_renamed_and_new_specials(tokenizer):
    one = tokenizer.renamed({"<|pad|>": "<|other|>", "<|fim_middle|>": "<|pad|>x"})
    assert one.vocab_size == tokenizer.vocab_size
    assert one.decode([1, 4]) == "<|other|><|pad|>x"
    assert one.special_strings() == ("<|endoftext|>", "<|other|>", "<|fim_prefix|>", "<|fim_suffix|>", "<|pad|>x")
    text = "def f(x):\n    return '<|other|>'\n"
    assert one.encode(text) == tokenizer.encode(text)  # and no text becomes a special token
    more = one.with_specials(["<|pad|>", "<|fim_middle|>"])
    assert (more.pad, more.fim_middle, more.vocab_size) == (one.vocab_size, one.vocab_size + 1, one.vocab_size + 2)
    assert more.encode(text) == one.encode(text)
    assert tokenizer.renamed({}) is tokenizer.with_specials([]) is tokenizer
    for wrong in ({"<|nothing|>": "<|x|>"}, {"<|pad|>": "<|fim_suffix|>"}, {"<|pad|>": "q", "<|fim_middle|>": "<|z|>"}):
        with pytest.raises(UserError, match=r"is no special token; they are <\||is there already"):
            tokenizer.renamed(wrong)
    with pytest.raises(UserError, match=r"'<\|pad\|>' is there already"):
        tokenizer.with_specials(["<|pad|>"])


def test_errors(tmp_path, tokenizer):
    with pytest.raises(UserError, match="nothing"):
        data.Tokenizer.from_file(tmp_path / "nothing.json")
    (tmp_path / "bad.json").write_text("{}")
    with pytest.raises(UserError, match=r"bad\.json"):
        data.Tokenizer.from_file(tmp_path / "bad.json")
    with pytest.raises(UserError, match=r"prepare_data\.vocab_size"):
        tokenizers.train(["x"], 100)
    renamed = data.Tokenizer(tokenizer.serialized(), data.SpecialTokens(fim_middle="<MID>"))
    with pytest.raises(UserError, match="<MID>"):
        _ = renamed.fim_middle


def test_the_template_begins_a_text_as_documents_begin(tokenizer, tmp_path):
    """For those who encode with special tokens, as transformers does by default; our own ids have none."""
    import transformers

    assert tokenizer.begin() == (tokenizer.end_of_text,)
    assert tokenizer.end_of_text not in tokenizer.encode("def f")
    (tmp_path / "tokenizer.json").write_text(tokenizer.serialized())
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))
    assert theirs("def f")["input_ids"] == [tokenizer.end_of_text, *tokenizer.encode("def f")]
