"""What is wrong with somebody else's files: one line that says which file, which tensor or field, and what would be right."""

import json
import pathlib
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from kwaicoder_jax import checkpoints, huggingface
from kwaicoder_jax.errors import UserError
from tests.kwaicoder_jax.huggingface import tiny

FIRST = "model.layers.0.self_attn.q_proj.weight"
META = {"model": {}, "lineage": [], "identity": "x"}


@pytest.fixture
def place(saved, tmp_path):
    """A copy of a saved Llama, to be damaged."""
    return pathlib.Path(shutil.copytree(saved("llama")[0], tmp_path / "llama"))


@pytest.fixture
def sharded(saved, tmp_path):
    """The same in several files."""
    saved("llama")[1].save_pretrained(tmp_path / "llama", max_shard_size="5KB")
    return tmp_path / "llama"


def change(place, **fields):
    file = place / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def rewrite(place, edit):
    tensors = load_file(place / "model.safetensors")
    edit(tensors)
    save_file(tensors, place / "model.safetensors")


def refused(place, words, **options):
    with pytest.raises(UserError, match=words) as error:
        huggingface.open_model(place, **options)
    assert "\n" not in str(error.value)


def test_a_place_that_is_no_model(tmp_path):
    refused(tmp_path / "x", "x: does not exist; name a folder with config.json and safetensors, or a GGUF file")
    refused(tmp_path, "config.json: is missing; name the folder of a model")
    (tmp_path / "config.json").write_text("{")
    refused(tmp_path, "config.json: is not JSON")
    (tmp_path / "config.json").write_text("[]")
    refused(tmp_path, "config.json: is no object")
    (tmp_path / "x.txt").write_text("")
    refused(tmp_path / "x.txt", "x.txt: is neither a folder nor a .gguf file")


def test_weights_in_another_format(place):
    (place / "model.safetensors").rename(place / "pytorch_model.bin")
    refused(place, "llama: holds no model.safetensors and no .*index.json, only pytorch_model.bin; save the model as")
    (place / "pytorch_model.bin").unlink()
    refused(
        place, "llama: holds no model.safetensors and no model.safetensors.index.json; save the model as safetensors"
    )


@pytest.mark.parametrize("size", [0, 5, 100, -1])
def test_a_file_that_is_cut_off(place, size):
    file = place / "model.safetensors"
    file.write_bytes(file.read_bytes()[:size])
    refused(place, "model.safetensors: cannot be read as safetensors, it may be cut off .*; fetch it again")


def test_a_file_of_an_index_that_is_gone_or_another(sharded):
    index = json.loads((sharded / "model.safetensors.index.json").read_text())
    one, other = sorted(set(index["weight_map"].values()))[:2]
    (sharded / one).rename(sharded / "aside")
    refused(sharded, f"{one}: is missing, though the index lists it; fetch it again")
    shutil.copy(sharded / other, sharded / one)
    refused(sharded, f"{one}: does not hold .*, though the index says so")
    (sharded / "aside").replace(sharded / one)
    huggingface.open_model(sharded)
    file = sharded / "model.safetensors.index.json"
    file.write_text(json.dumps({"weight_map": index["weight_map"] | {"x": "../x"}}))
    refused(sharded, "index.json: names '../x', which is not a file beside it")
    file.write_text("{}")
    refused(sharded, "index.json: is no index of tensors")


def test_tensors_that_disagree_with_the_config(place):
    rewrite(place, lambda tensors: tensors.pop(FIRST))
    refused(place, f"llama: {FIRST}: is missing; config.json or the files are of another model")
    rewrite(place, lambda tensors: tensors.update({FIRST: torch.zeros(24, 32)}))
    refused(place, rf"{FIRST}: has shape \[24, 32\], config.json says \[32, 24\]")
    rewrite(place, lambda tensors: tensors.update({FIRST: torch.zeros(32, 24, dtype=torch.int8)}))
    refused(place, f"{FIRST}: is stored as I8; use weights in float32, bfloat16 or float16")
    rewrite(place, lambda tensors: tensors.update({FIRST: torch.zeros(32, 24), "model.extra.weight": torch.zeros(3)}))
    refused(place, "model.extra.weight: belongs to nothing in config.json; config.json is of another model")
    rewrite(place, lambda tensors: tensors.pop("model.extra.weight"))
    huggingface.open_model(place)
    change(place, num_hidden_layers=1)
    refused(place, "model.layers.1.input_layernorm.weight: belongs to nothing")


def test_dtypes_that_disagree_have_to_be_chosen(place):
    rewrite(place, lambda tensors: tensors.update({FIRST: tensors[FIRST].bfloat16()}))
    refused(
        place, f"{FIRST}: is bfloat16, config.json says float32; choose what all become: param_dtype=float32, bfloat"
    )
    assert huggingface.open_model(place, param_dtype="bfloat16").config.param_dtype == "bfloat16"
    change(place, dtype=None)
    refused(place, "is (bfloat16|float32), others are (bfloat16|float32)")
    change(place, dtype=None, torch_dtype="bfloat16")
    refused(place, "model.embed_tokens.weight: is float32, config.json says bfloat16")
    refused(place, "param_dtype: no choice 'int8'; use stored, float32, bfloat16, float16", param_dtype="int8")


def test_what_old_files_hold_beside_the_weights_is_left_out(place):
    rewrite(place, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))
    huggingface.open_model(place)


def test_layers_that_predict_further_ahead_are_left_out(saved, tmp_path):
    place = pathlib.Path(shutil.copytree(saved("deepseek_v3")[0], tmp_path / "v3"))
    rewrite(place, lambda tensors: tensors.update({"model.layers.3.eh_proj.weight": torch.ones(4)}))
    huggingface.open_model(place)
    rewrite(place, lambda tensors: tensors.update({"model.layers.2.eh_proj.weight": torch.ones(4)}))
    refused(place, "model.layers.2.eh_proj.weight: belongs to nothing")


def test_a_tied_head_has_to_be_the_embedding(saved, tmp_path, monkeypatch):
    place = pathlib.Path(shutil.copytree(saved("llama_tied_linear")[0], tmp_path / "tied"))
    monkeypatch.setattr("kwaicoder_jax.huggingface.layout._COMPARED", 1000)
    table = load_file(place / "model.safetensors")["model.embed_tokens.weight"]
    rewrite(place, lambda tensors: tensors.update({"lm_head.weight": table.clone()}))
    huggingface.open_model(place)
    table[-1, -1] += 1
    rewrite(place, lambda tensors: tensors.update({"lm_head.weight": table}))
    refused(
        place, "lm_head.weight: is not the embedding, though config.json ties them; set tie_word_embeddings to false"
    )


def write_tokenizer(place, tokens):
    backend = Tokenizer(models.BPE({chr(256 + i): i for i in range(tokens)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel()
    (place / "tokenizer.json").write_text(backend.to_str())


def test_the_tokenizer_belongs_to_it(place, tmp_path):
    assert huggingface.open_model(place).tokenizer is None
    write_tokenizer(place, 53)
    (place / "tokenizer_config.json").write_text("{}")
    opened = huggingface.open_model(place)
    assert opened.tokenizer.vocab_size == 53
    assert opened.companions.keys() == {"tokenizer_config.json", "generation_config.json"}
    write_tokenizer(place, 54)
    refused(place, "llama: the tokenizer has 54 tokens, the model 53; use the tokenizer that")
    write_tokenizer(tmp_path, 20)
    assert huggingface.open_model(place, tokenizer=tmp_path / "tokenizer.json").tokenizer.vocab_size == 20
    (place / "tokenizer.json").write_text("{}")
    refused(place, "tokenizer.json: cannot be read as a tokenizer")


def test_identity_is_of_the_contents(saved, place):
    original = huggingface.open_model(saved("llama")[0]).identity
    assert huggingface.open_model(place).identity == original
    change(place, max_position_embeddings=17)
    other = huggingface.open_model(place).identity
    rewrite(place, lambda tensors: tensors[FIRST].fill_(1))
    assert len({original, other, huggingface.open_model(place).identity}) == 3


def test_a_number_beyond_float16_leaves_nothing(place, tmp_path):
    rewrite(place, lambda tensors: tensors[FIRST].fill_(1e6))
    source = huggingface.open_model(place, param_dtype="float16")
    with pytest.raises(
        UserError, match="layers/attention/query holds a number beyond float16; use another param_dtype"
    ):
        huggingface.save(source, tmp_path / "checkpoints", meta=META)
    assert not list((tmp_path / "checkpoints").iterdir())


def test_read_config_alone(place):
    (place / "model.safetensors").unlink()
    assert huggingface.read_config(place).model_dim == 24


def test_only_the_rows_that_are_asked_for_are_read(saved):
    """A part of a parameter is the part of the whole, and is made from the rows of it alone."""
    source = huggingface.open_model(saved("mixtral")[0])
    whole = {name: source.layout.gather(source.tensors, name, [slice(None)] * len(d.shape), np.dtype(np.float32))
             for name, d in source.layout.declared.items()}  # fmt: skip
    rng = np.random.default_rng(0)
    for name, array in whole.items():
        for _ in range(5):
            starts = [int(rng.integers(0, size)) for size in array.shape]
            index = tuple(
                slice(start, int(rng.integers(start + 1, size + 1))) for start, size in zip(starts, array.shape)
            )
            got = source.layout.gather(source.tensors, name, index, np.dtype(np.float32))
            np.testing.assert_array_equal(got, array[index])


def test_a_checkpoint_in_place_is_left_alone(saved, tmp_path):
    source = huggingface.open_model(saved("llama")[0])
    huggingface.save(source, tmp_path / "checkpoints", meta=META)
    written = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")}
    huggingface.save(source, tmp_path / "checkpoints", meta=META)
    assert {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*")} == written
    assert checkpoints.newest_step(tmp_path) == 0


def test_making_a_model_again_gives_the_same(saved):
    """`tiny` is deterministic, or comparisons across tests would mean nothing."""
    one, other = tiny.make("llama").state_dict(), saved("llama")[1].state_dict()
    assert all(torch.equal(one[name], other[name]) for name in one)
