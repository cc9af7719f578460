"""Special tokens given on import: a token renamed keeps its row, a new one gets the mean of all."""

import json

import numpy as np
import pytest

from kwaicoder_jax import huggingface, models
from kwaicoder_jax.data import tokenizer as tokenizers
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.huggingface import specials
from tests.kwaicoder_jax.huggingface import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An untied Llama of 300 rows whose tokenizer has all of its 300 tokens, and none for infilling."""
    place = tmp_path_factory.mktemp("specials") / "llama"
    config = tiny.transformers.LlamaConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    tiny.torch.manual_seed(0)
    tiny.transformers.LlamaForCausalLM(config).save_pretrained(place)
    trained = tokenizers.train(["def f(x):\n    return x + 1\n", "for i in range(10):\n    print(i)\n"], 290)
    names = {"<|fim_prefix|>": "<u1>", "<|fim_suffix|>": "<u2>", "<|fim_middle|>": "<u3>"}
    own = trained.renamed(names)
    own = own.with_specials([f"<more{i}>" for i in range(300 - own.vocab_size)])
    (place / "tokenizer.json").write_text(own.serialized())
    (place / "tokenizer_config.json").write_text(json.dumps({"extra_special_tokens": ["<u1>"]}))
    return place


def test_renamed_tokens_keep_their_rows(folder):
    plain = huggingface.open_model(folder)
    given = huggingface.open_model(folder, specials={"fim_prefix": "<u1>", "fim_suffix": "<u2>"})
    assert given.config == plain.config
    assert (given.tokenizer.fim_prefix, given.tokenizer.fim_suffix) == (2, 3)
    assert json.loads(given.companions["tokenizer_config.json"]) == {"extra_special_tokens": ["<|fim_prefix|>"]}
    for one, other in zip(*(models.flatten(huggingface.load(each)).values() for each in (plain, given))):
        np.testing.assert_array_equal(one, other)
    assert given.identity != plain.identity


def test_new_tokens_have_the_mean_row(folder):
    plain, given = (
        huggingface.open_model(folder, specials=roles) for roles in (None, {"fim_middle": "new", "fim_prefix": "<u1>"})
    )
    assert given.tokenizer.fim_middle == 300
    assert given.config == plain.config.replace(vocab_size=301)
    before, after = huggingface.load(plain), huggingface.load(given)
    for name in ("embedding", "head"):
        table = np.asarray(before[name])
        np.testing.assert_array_equal(after[name][:300], table)
        np.testing.assert_allclose(after[name][300], table.astype(np.float64).mean(0), atol=1e-8)
    ids = np.arange(12)[None]
    logits = [
        np.asarray(models.logits(
            models.forward(params, source.config, ids, ids, np.ones_like(ids)).hidden_BTD, models.projection(params)
        ))
        for params, source in ((before, plain), (after, given))
    ]  # fmt: skip
    np.testing.assert_allclose(logits[1][..., :300], logits[0], atol=1e-6)
    np.testing.assert_allclose(logits[1][..., 300], logits[0].mean(-1), atol=1e-5)


def test_a_longer_table_by_rows(folder):
    weight = huggingface.open_model(folder).tensors["lm_head.weight"]
    longer = specials._longer(weight, 307)
    whole = longer.rows(0, 307)
    for start, stop in ((0, 300), (298, 303), (300, 307), (303, 305), (0, 307)):
        np.testing.assert_array_equal(longer.rows(start, stop), whole[start:stop])


def test_bad_roles(folder):
    for roles, words in (
        ({"prefix": "new"}, r"^specials.prefix: no such role; the roles are end_of_text, pad, fim_prefix"),
        ({"fim_prefix": "<u9>"}, r"^specials: '<u9>' is no special token; they are "),
        ({"fim_prefix": "def"}, r"^specials: 'def' is no special token"),
        ({"pad": "<u1>"}, r"^specials: '<\|pad\|>' is there already"),
        ({"fim_prefix": "<u1>", "fim_suffix": "<u1>"}, r"^specials: '<u1>' cannot take two roles; name another"),
    ):
        with pytest.raises(UserError, match=words):
            huggingface.open_model(folder, specials=roles)


def test_a_file_inside_a_package(tmp_path, monkeypatch, folder):
    inside = tmp_path / "some_weights"
    inside.mkdir()
    (inside / "__init__.py").write_text("raise RuntimeError('nobody imports this')\n")
    (inside / "model").symlink_to(folder)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert huggingface.open_model("package:some_weights/model").config.vocab_size == 300
    with pytest.raises(UserError, match=r"^package:other_weights/model: no package 'other_weights' is installed"):
        huggingface.open_model("package:other_weights/model")
    with pytest.raises(UserError, match=r"^package:some_weights/nothing: does not exist"):
        huggingface.open_model("package:some_weights/nothing")
