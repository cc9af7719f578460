"""Single tensors come out of any of our checkpoints bit for bit, and only those that are asked for are read."""

import contextlib
import shutil

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from kwaicoder_jax import checkpoints
from kwaicoder_jax.checkpoints import layout, tensors
from kwaicoder_jax.errors import UserError
from tests.kwaicoder_jax.training import devices

META = {"model": {}, "lineage": [], "identity": "abc"}


def flat_values(dtype):
    rng = np.random.default_rng(0)
    shapes = {"embedding": (11, 3), "layers/mlp/gate": (4, 3, 5), "layers/norm/scale": (4, 3), "scale": (3,), "one": ()}
    return {name: np.asarray(rng.standard_normal(shape)).astype(dtype) for name, shape in shapes.items()}


def save_whole(place, flat):
    tree = jax.tree.map(jnp.asarray, {
        "embedding": flat["embedding"], "scale": flat["scale"], "one": flat["one"],
        "layers": {"mlp": {"gate": flat["layers/mlp/gate"]}, "norm": {"scale": flat["layers/norm/scale"]}},
    })  # fmt: skip
    with contextlib.closing(checkpoints.CheckpointStore(place / "checkpoints")) as store:
        store.save(2, tree, META)


def save_streamed(place, flat):
    specs = {name: checkpoints.Spec(x.shape, x.dtype, name.startswith("layers/")) for name, x in flat.items()}
    partial = checkpoints.PartialStep(place / "checkpoints", 2, specs, "work")
    for name, spec in specs.items():
        for layer in spec.slices:
            partial.write(name, flat[name] if layer is None else flat[name][layer : layer + 1], layer)
    partial.finish(META)


SAVES = {"whole": save_whole, "streamed": save_streamed}


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
@pytest.mark.parametrize("chunk_bytes", [20, 2**20])
@pytest.mark.parametrize("kind", SAVES)
def test_every_tensor_and_every_layer_comes_back(tmp_path, monkeypatch, kind, chunk_bytes, dtype):
    monkeypatch.setattr(layout, "CHUNK_BYTES", chunk_bytes)
    flat = flat_values(dtype)
    SAVES[kind](tmp_path, flat)
    for read_bytes in (1, tensors.READ_BYTES):
        monkeypatch.setattr(tensors, "READ_BYTES", read_bytes)
        opened = checkpoints.open_tensors(tmp_path)
        assert sorted(opened) == sorted(flat)
        for name, expected in flat.items():
            assert opened[name].shape == expected.shape
            assert_same(opened[name].read(), expected)
            assert opened[name].slice_bytes() == expected.nbytes
            for layer in range(4) if name.startswith("layers/") else ():
                assert_same(opened[name].read(layer), expected[layer : layer + 1])
                assert opened[name].slice_bytes(layer) == expected[0].nbytes
            if expected.ndim:
                assert_same(opened[name].read(rows=(1, 3)), expected[1:3])
            if expected.ndim > 1:
                assert_same(opened[name].read(2, rows=(1, 2)), expected[2:3, 1:2])
                assert_same(checkpoints.Tensor(name, expected).read(2, rows=(1, 2)), expected[2:3, 1:2])


def assert_same(got, expected):
    assert got.dtype == expected.dtype
    assert got.shape == expected.shape
    assert got.tobytes() == expected.tobytes()


def test_large_arrays_are_saved_by_layers_and_by_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(layout, "CHUNK_BYTES", 72)
    flat = flat_values(np.float32) | {"embedding": np.zeros((12, 3), np.float32)}
    save_whole(tmp_path, flat)
    opened = checkpoints.open_tensors(tmp_path)
    chunks = {name: tuple(tensor._array.chunk_layout.read_chunk.shape or ()) for name, tensor in opened.items()}
    assert chunks == {
        "embedding": (6, 3), "layers/mlp/gate": (1, 3, 5), "layers/norm/scale": (4, 3), "scale": (3,), "one": ()
    }  # fmt: skip


def test_large_sharded_arrays_are_saved_by_layers_too():
    result = devices.run("checkpoints.save_sharded_on_devices", 4)
    assert result == {"same_bits": True, "chunks": {"embedding": [4, 3], "layers/a": [1, 2, 5], "prime": [29, 3]}}


def test_the_others_are_not_read(tmp_path):
    flat = flat_values(np.float32)
    save_streamed(tmp_path, flat)
    opened = checkpoints.open_tensors(tmp_path)
    for file in (tmp_path / "checkpoints/2/params/layers.mlp.gate").glob("[023].*"):
        file.unlink()
    assert_same(opened["layers/mlp/gate"].read(1), flat["layers/mlp/gate"][1:2])
    assert_same(opened["embedding"].read(), flat["embedding"])
    with pytest.raises(UserError, match=r"layers/mlp/gate cannot be read: 2\.0\.0 is missing or cut off"):
        opened["layers/mlp/gate"].read(2)
    (tmp_path / "checkpoints/2/params/embedding/0.0").write_bytes(b"short")
    with pytest.raises(UserError, match=r"embedding cannot be read: 0\.0 is missing or cut off"):
        opened["embedding"].read()


def test_data_that_went_missing_in_a_whole_checkpoint_is_a_user_error(tmp_path):
    gate = np.random.default_rng(0).random((4, 30, 50), np.float32)  # Orbax keeps small values beside the names
    save_whole(tmp_path, flat_values(np.float32) | {"layers/mlp/gate": gate})
    opened = checkpoints.open_tensors(tmp_path)
    for folder in ("d", "ocdbt.process_0/d"):
        shutil.rmtree(tmp_path / "checkpoints/2/params" / folder)
    with pytest.raises(UserError, match=r"^layers/mlp/gate cannot be read: [^\n]*$"):
        opened["layers/mlp/gate"].read(0)


def test_no_checkpoint_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        checkpoints.open_tensors(tmp_path / "nowhere")
    save_whole(tmp_path, flat_values(np.float32))
    (tmp_path / "checkpoints/2/params/_METADATA").write_text("{")
    with pytest.raises(UserError, match="holds no readable params"):
        checkpoints.open_tensors(tmp_path)


def test_a_tree_in_memory_looks_the_same():
    tree = {"a": {"b": np.arange(6.0).reshape(3, 2)}, "c": np.ones(4, ml_dtypes.bfloat16)}
    opened = checkpoints.from_params(tree)
    assert list(opened) == ["a/b", "c"]
    assert_same(opened["a/b"].read(1), tree["a"]["b"][1:2])
    assert_same(opened["c"].read(), tree["c"])
    changed = {**tree, "c": np.zeros(4, ml_dtypes.bfloat16)}
    assert opened.identity == checkpoints.from_params(tree).identity != checkpoints.from_params(changed).identity
