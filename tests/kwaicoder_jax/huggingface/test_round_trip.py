"""Every family in and out again: the same bits, and the logits that transformers gives."""

import functools

import jax
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

from kwaicoder_jax import checkpoints, huggingface, models, testing
from kwaicoder_jax.checkpoints import layout as checkpoint_layout
from tests.kwaicoder_jax.huggingface import tiny
from tests.kwaicoder_jax.training import devices

TOLERANCE = 1e-4  # float32 on both sides, logits of 10


def tensors(folder):
    found = {}
    for file in folder.glob("*.safetensors"):
        found |= load_file(file)
    return found


def assert_same_tensors(one, other):
    first, second = tensors(one), tensors(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.dtype == second[name].dtype, name
        assert value.shape == second[name].shape, name
        assert torch.equal(value.view(torch.uint8) if value.ndim else value, second[name].view(torch.uint8)), name


def batch(length=24, padded=True):
    """Rows without padding, with padding on the left and on the right; half of the positions are beyond `max_length`."""
    rng = np.random.default_rng(0)
    inputs_BT, mask_BT = rng.integers(0, tiny.SIZES["vocab_size"], (3, length)), np.ones((3, length), bool)
    if padded:
        mask_BT[1, :7], mask_BT[2, 15:] = False, False
    return inputs_BT, mask_BT


@functools.partial(jax.jit, static_argnames="config", compiler_options=devices.QUICK)
def model_logits(params, config, fields):
    return testing.model_logits(params, config, fields)


def ours(params, config, inputs_BT, mask_BT):
    positions_BT = np.maximum(mask_BT.cumsum(-1) - 1, 0)
    fields = {"inputs": inputs_BT, "positions": positions_BT, "segment_ids": mask_BT}
    return np.asarray(model_logits(params, config, {name: x.astype(np.int32) for name, x in fields.items()}))


@pytest.mark.parametrize("name", tiny.MODELS)
def test_logits_and_bits(saved, tmp_path, name):
    """Straight into memory and out: transformers' logits, its tensors to the bit, and a folder that it loads."""
    place, theirs = saved(name)
    source = huggingface.open_model(place)
    params = huggingface.load(source)
    models.check(params, source.config)
    inputs_BT, mask_BT = batch(padded="dynamic" not in name)  # its length is of the longest row there, of each row here
    expected = tiny.logits(theirs, inputs_BT, mask_BT)
    assert expected[mask_BT].std() > 2
    got = ours(params, source.config, inputs_BT, mask_BT)
    np.testing.assert_allclose(got[mask_BT], expected[mask_BT], atol=TOLERANCE, rtol=0)

    stored = checkpoints.from_params(jax.tree.map(np.asarray, params))
    planned = huggingface.plan_export(stored, source.config, lineage=[{"huggingface": source.origin()}])
    assert planned.family is source.family
    huggingface.export(stored, planned, tmp_path / "out")
    assert_same_tensors(place, tmp_path / "out")
    again, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager", output_loading_info=True
    )
    assert not any(info.values()), info
    assert type(again) is type(theirs)
    np.testing.assert_array_equal(tiny.logits(again, inputs_BT, mask_BT), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["llama", "mixtral", "deepseek_v3", "glm4_moe"])
def test_half_precision_through_a_streamed_checkpoint(tmp_path, monkeypatch, name, dtype):
    """Sharded files in, a checkpoint of small chunks, sharded files out: the same bits."""
    monkeypatch.setattr(checkpoint_layout, "CHUNK_BYTES", 200)
    model = tiny.make(name, getattr(torch, dtype))
    for place, value in model.named_buffers():
        if place.endswith("e_score_correction_bias"):  # float32 in the files of real models, whatever the rest
            value.data = value.data.float()
    model.save_pretrained(tmp_path / "in", max_shard_size="10KB")
    assert len(list((tmp_path / "in").glob("*.safetensors"))) > 2
    source = huggingface.open_model(tmp_path / "in")
    assert source.config.param_dtype == dtype
    meta = {"model": source.config.to_dict(), "lineage": [], "identity": "x"}
    huggingface.save(source, tmp_path / "checkpoints", meta=meta, memory_bytes=1)
    stored = checkpoints.open_tensors(tmp_path)
    planned = huggingface.plan_export(stored, source.config, max_shard_bytes=9_000)
    huggingface.export(stored, planned, tmp_path / "out", memory_bytes=1)
    assert len(list((tmp_path / "out").glob("*.safetensors"))) == len(planned.shards) > 2
    assert_same_tensors(tmp_path / "in", tmp_path / "out")
    assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == getattr(torch, dtype)
    restored = checkpoints.read_params(tmp_path, models.abstract(source.config))
    loaded = huggingface.load(source)
    for path, leaf in models.flatten(restored).items():
        assert np.asarray(leaf).tobytes() == np.asarray(models.flatten(loaded)[path]).tobytes(), path


def test_another_dtype_can_be_chosen(tmp_path):
    tiny.save("qwen2", tmp_path / "in", torch.bfloat16)
    exact = huggingface.load(huggingface.open_model(tmp_path / "in"))
    wide = huggingface.open_model(tmp_path / "in", param_dtype="float32", dtype="bfloat16")
    assert (wide.config.param_dtype, wide.config.dtype) == ("float32", "bfloat16")
    params = huggingface.load(wide)
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a, np.asarray(b, np.float32)), params, exact)
    stored = checkpoints.from_params(jax.tree.map(np.asarray, params))
    planned = huggingface.plan_export(stored, wide.config, dtype="bfloat16")
    huggingface.export(stored, planned, tmp_path / "out")
    assert_same_tensors(tmp_path / "in", tmp_path / "out")


def test_upcycled_weights_are_exact_in_a_mixture_of_float32_and_bfloat16(tmp_path):
    """A router bias stays float32 whatever the rest is, and one that is not there is written as zeros."""
    config = testing.moe_config("sigmoid", model_dim=24, heads=4, head_dim=6, param_dtype="bfloat16")
    params = jax.tree.map(np.asarray, testing.random_params(config))
    stored = checkpoints.from_params(params)
    huggingface.export(stored, huggingface.plan_export(stored, config), tmp_path / "out")
    found = tensors(tmp_path / "out")
    bias = found["model.layers.0.mlp.gate.e_score_correction_bias"]
    assert bias.dtype == torch.float32
    assert not bias.any()
    assert found["model.layers.0.mlp.gate.weight"].dtype == torch.bfloat16
    source = huggingface.open_model(tmp_path / "out")
    assert source.config.experts.router_bias
    loaded = models.flatten(huggingface.load(source))
    for name, value in models.flatten(params).items():
        assert np.asarray(loaded[name]).tobytes() == value.tobytes()


def test_straight_onto_a_mesh(saved):
    """Four devices, split by channels: every shard has the bits of the whole."""
    result = devices.run("huggingface.load_on_devices", 4, str(saved("mixtral")[0]))
    assert result == {
        "devices": 4, "same_bits": True, "placed": True, "query_shard": [2, 6, 4, 6], "most_query_rows": 24,
    }  # fmt: skip
