"""Special tokens of other families, found by their spelling; what only looks like one is not."""

import pytest
from tokenizers import AddedToken, processors
from tokenizers import Tokenizer as Backend

from kwaicoder_jax import data
from kwaicoder_jax.data import tokenizer as training


def foreign(*specials, words=("x",), template=None):
    """A byte-level tokenizer without specials of ours, with these instead."""
    import json

    values = json.loads(training.train([*words], 261).serialized())
    values["added_tokens"], values["post_processor"] = [], None
    names = {
        f"<|{name}|>": f"unused{i}"
        for i, name in enumerate(("endoftext", "pad", "fim_prefix", "fim_suffix", "fim_middle"))
    }
    values["model"]["vocab"] = {names.get(word, word): i for word, i in values["model"]["vocab"].items()}
    backend = Backend.from_str(json.dumps(values))
    backend.add_special_tokens([AddedToken(name, special=True) for name in specials])
    if template:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{template} $A", special_tokens=[(template, backend.token_to_id(template))]
        )
    return data.Tokenizer(backend.to_str())


@pytest.mark.parametrize(
    ("sentinels", "end"),
    [
        (("<fim_prefix>", "<fim_suffix>", "<fim_middle>"), "<|endoftext|>"),  # StarCoder2's tokenizer.json
        (("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"), "<｜end▁of▁sentence｜>"),  # DeepSeek-Coder's
        (("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"), "<|endoftext|>"),  # Qwen2.5-Coder's
    ],
)
def test_a_family_is_known_by_its_spelling(sentinels, end):
    tokenizer = foreign(*sentinels, end, "<|fim_pad|>")
    prefix, suffix, middle, ending, pad = (tokenizer.special_id(name) for name in (*sentinels, end, "<|fim_pad|>"))
    assert data.can_infill(tokenizer)
    assert data.stop_tokens(tokenizer) == {prefix, suffix, middle, ending, pad}
    one, other = tokenizer.encode("a"), tokenizer.encode("b")
    assert data.infilling_prompt(tokenizer, "a", "b") == [ending, prefix, *one, suffix, *other, middle]


def test_ours_stays_as_it_is():
    tokenizer = training.train(["x"], 261)
    assert tokenizer.specials == data.SpecialTokens()
    assert data.stop_tokens(tokenizer) == {0, 1, 2, 3, 4}


def test_without_sentinels_there_is_no_infilling():
    tokenizer = foreign("</s>")
    assert not data.can_infill(tokenizer)
    assert data.stop_tokens(tokenizer) == {tokenizer.special_id("</s>")}


def test_the_end_that_a_config_names_counts():
    tokenizer = foreign("</s>", "<|im_end|>")
    end = tokenizer.special_id("<|im_end|>")
    assert data.with_end(tokenizer, end).end_of_text == end
    assert data.with_end(tokenizer, 10**6).specials.end_of_text == "</s>"


def test_a_word_of_the_text_is_no_special_token():
    backend = Backend.from_str(foreign("<s>").serialized())
    word = next(iter(backend.get_vocab()))
    assert foreign("<s>").special_id("a") is None
    assert foreign("<s>").special_id(word) in (None, backend.token_to_id("<s>"))
    assert foreign("<s>").spelling(-1) is None


def test_what_a_template_puts_before_a_text():
    tokenizer = foreign("<s>", template="<s>")
    assert tokenizer.begin() == (tokenizer.special_id("<s>"),)
    assert foreign("<s>").begin() == ()
    assert tokenizer.encode("a") == foreign("<s>").encode("a"), "only when it is asked for"
