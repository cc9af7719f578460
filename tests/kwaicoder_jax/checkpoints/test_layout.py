"""The chunks of a streamed checkpoint: what tensorstore reads is what was meant, and Orbax's own files say the same."""

import json
import math

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import tensorstore as ts
from hypothesis import given, settings
from hypothesis import strategies as st

from kwaicoder_jax import checkpoints
from kwaicoder_jax.checkpoints import layout

DTYPES = (np.float32, np.int32, np.uint16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn)
shapes = st.lists(st.integers(1, 9), min_size=1, max_size=4).map(tuple)


@settings(deadline=None, max_examples=60)
@given(shapes, st.sampled_from(DTYPES), st.booleans(), st.integers(1, 200))
def test_the_parts_of_all_slices_are_the_tensor(shape, dtype, layered, limit):
    spec = checkpoints.Spec(shape, np.dtype(dtype), layered)
    chunks = chunk_shape(spec, limit)
    for layer in spec.slices:
        covered = 0
        for part in layout.parts(spec, chunks, layer):
            assert part.start == covered < part.stop
            assert part.stop - part.start + part.padding == math.prod(chunks)
            covered = part.stop
        assert covered == math.prod(spec.slice_shape)
    files = [part.file for layer in spec.slices for part in layout.parts(spec, chunks, layer)]
    assert len(files) == len(set(files))


@settings(deadline=None, max_examples=60)
@given(st.integers(1, 3000), st.integers(1, 64), st.integers(1, 5000))
def test_chunks_fit_and_are_not_many(rows, width, limit):
    spec = checkpoints.Spec((3, rows, width), np.dtype(np.float32), True)
    one, size, rest = chunk_shape(spec, limit)
    assert (one, rest) == (1, width)
    assert size == 1 or size * width * 4 <= limit
    fit = min(rows, max(1, limit // (width * 4)))
    assert math.ceil(rows / size) <= 2 * math.ceil(rows / fit)


def chunk_shape(spec, limit):
    """As if CHUNK_BYTES were `limit`."""
    before, layout.CHUNK_BYTES = layout.CHUNK_BYTES, limit
    try:
        return layout.chunk_shape(spec)
    finally:
        layout.CHUNK_BYTES = before


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shape", "layered"), [((), False), ((5,), False), ((4,), True), ((3, 7, 2), True)])
def test_tensorstore_reads_what_the_parts_say(tmp_path, monkeypatch, dtype, shape, layered):
    monkeypatch.setattr(layout, "CHUNK_BYTES", 12)
    values = np.random.default_rng(0).integers(0, 100, shape).astype(dtype)
    spec = checkpoints.Spec(shape, values.dtype, layered)
    (tmp_path / ".zarray").write_text(layout.zarray(spec))
    for layer in spec.slices:
        flat = (values if layer is None else values[layer : layer + 1]).reshape(-1)
        for part in layout.parts(spec, layout.chunk_shape(spec), layer):
            zeros = bytes(part.padding * values.dtype.itemsize)
            (tmp_path / part.file).write_bytes(flat[part.start : part.stop].tobytes() + zeros)
    store = ts.open({"driver": "zarr", "kvstore": f"file://{tmp_path}/"}).result()
    got = store.read().result()
    assert got.dtype == values.dtype
    assert got.tobytes() == values.tobytes()
    parsed, chunks = layout.parse_zarray(layout.zarray(spec))
    assert chunks == tuple(store.chunk_layout.read_chunk.shape or ()) == layout.chunk_shape(spec)
    assert (parsed.shape, parsed.dtype) == (spec.shape, spec.dtype)


@pytest.mark.parametrize("change", [
    {"compressor": {"id": "zstd"}}, {"filters": [{"id": "x"}]}, {"order": "F"}, {"dtype": ">f4"}, {"dtype": "|O2"},
    {"dtype": [["a", "<f4"]]}, {"chunks": [2, 2, 2]}, {"chunks": [1, 7, 1]}, {"dimension_separator": "/"},
])  # fmt: skip
def test_other_arrays_are_not_taken_for_ours(change):
    fields = json.loads(layout.zarray(checkpoints.Spec((3, 7, 2), np.dtype(np.float32), True)))
    assert layout.parse_zarray(json.dumps(fields))
    assert layout.parse_zarray(json.dumps(fields | change)) is None


def test_the_descriptions_are_those_that_orbax_writes(tmp_path):
    flat = {"a": jnp.ones((3, 5)), "b/c": jnp.ones(7, jnp.bfloat16), "b/d/e": jnp.ones((2, 2, 2))}
    specs = {name: checkpoints.Spec(x.shape, np.dtype(x.dtype)) for name, x in flat.items()}
    tree = {"a": flat["a"], "b": {"c": flat["b/c"], "d": {"e": flat["b/d/e"]}}}
    store = checkpoints.CheckpointStore(tmp_path)
    store.save(3, tree, {})
    store.close()
    theirs, ours = json.loads((tmp_path / "3/params/_METADATA").read_text()), json.loads(layout.tree_metadata(specs))
    assert ours.keys() == theirs.keys()
    assert ours.pop("use_ocdbt") is False
    assert theirs.pop("use_ocdbt") is True
    assert ours == theirs
    theirs, ours = json.loads((tmp_path / "3/_CHECKPOINT_METADATA").read_text()), json.loads(layout.step_metadata(1))
    for times in ("init_timestamp_nsecs", "commit_timestamp_nsecs"):
        assert isinstance(ours.pop(times), type(theirs.pop(times)))
    assert ours == theirs
