"""A step written slice by slice is an ordinary checkpoint once it is whole, and nothing before."""

import contextlib
import errno
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kwaicoder_jax import checkpoints
from kwaicoder_jax.checkpoints import layout, partial
from kwaicoder_jax.errors import UserError
from tests.kwaicoder_jax.training import devices

META = {"model": {"layers": 2}, "lineage": [{"stage": "x"}], "identity": "abc", "number": 0.1 + 0.2}
SPECS = {
    "embedding": checkpoints.Spec((7, 3), np.dtype(jnp.bfloat16)),
    "layers/mlp/gate": checkpoints.Spec((4, 6, 2), np.dtype(np.float32), layered=True),
}
PIECES = [(name, layer) for name, spec in SPECS.items() for layer in spec.slices]


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(layout, "CHUNK_BYTES", 24)


def values(name, layer=None):
    array = np.random.default_rng(len(name)).standard_normal(SPECS[name].shape).astype(SPECS[name].dtype)
    return array if layer is None else array[layer : layer + 1]


def begun(place, identity="work", specs=SPECS):
    return checkpoints.PartialStep(place / "checkpoints", 3, specs, identity)


def write_all(place, meta=META):
    step = begun(place)
    for piece in PIECES:
        if not step.is_written(*piece):
            step.write(piece[0], values(*piece), piece[1])
    step.finish(meta)


def abstract():
    return {
        "embedding": jax.ShapeDtypeStruct((7, 3), jnp.bfloat16),
        "layers": {"mlp": {"gate": jax.ShapeDtypeStruct((4, 6, 2), jnp.float32)}},
    }


def assert_whole(place):
    assert checkpoints.read_meta(place) == META
    got = checkpoints.read_params(place, abstract())
    assert isinstance(got["embedding"], jax.Array)
    assert np.asarray(got["embedding"]).tobytes() == values("embedding").tobytes()
    assert np.asarray(got["layers"]["mlp"]["gate"]).tobytes() == values("layers/mlp/gate").tobytes()
    assert [path.name for path in (place / "checkpoints").iterdir()] == ["3"]
    assert not [path for path in place.rglob("*") if path.name.endswith(layout.TEMPORARY) or path.name == "begun.json"]


def test_the_whole_step_is_an_ordinary_checkpoint(tmp_path):
    write_all(tmp_path)
    assert_whole(tmp_path)
    with contextlib.closing(checkpoints.CheckpointStore(tmp_path / "checkpoints")) as store:
        assert store.latest_step() == 3
        store.save(4, {"a": jnp.ones(3)}, {**META, "at": 4})
        assert store.latest_step() == 4
    assert checkpoints.newest_step(tmp_path) == 4


def test_restores_onto_a_mesh():
    assert devices.run("checkpoints.restore_streamed_on_devices", 4) == {
        "same_bits": True, "shard": [2, 3], "devices": 4
    }  # fmt: skip


def test_nothing_is_seen_before_the_end(tmp_path):
    step = begun(tmp_path)
    for name, layer in PIECES:
        with pytest.raises(ValueError, match="is not written yet"):
            step.finish(META)
        with pytest.raises(UserError, match="holds no checkpoint"):
            checkpoints.find(tmp_path)
        with contextlib.closing(checkpoints.CheckpointStore(tmp_path / "checkpoints")) as store:
            assert store.latest_step() is None
        step.write(name, values(name, layer), layer)
    step.finish(META)
    assert_whole(tmp_path)


@pytest.mark.parametrize("failed_at", range(1, 32, 3))
def test_goes_on_after_a_failure_at_any_write(tmp_path, monkeypatch, failed_at):
    """The n-th file cannot be written to its end, as on a full disk."""
    written, original, failures = [], partial._stage, failed_at

    def fail(file, *data):
        written.append(file)
        if len(written) == failures:
            (file.parent / f"{file.name}{layout.TEMPORARY}").write_bytes(bytes(data[0])[:5])
            raise OSError(errno.ENOSPC, "No space left on device")
        original(file, *data)

    monkeypatch.setattr(partial, "_stage", fail)
    with contextlib.suppress(OSError):
        write_all(tmp_path)
    if len(written) < failures:
        assert_whole(tmp_path)  # there are not that many
        return
    assert not (tmp_path / "checkpoints/3").exists()
    done = [file for file in tmp_path.rglob("[0-9].[0-9]*") if not file.name.endswith(layout.TEMPORARY)]
    written.clear()
    failures = 0
    write_all(tmp_path)
    assert_whole(tmp_path)
    assert bool(done) == (failed_at > len(SPECS) + 3)
    assert not set(done) & set(written)


def test_other_work_does_not_go_on_with_it(tmp_path):
    begun(tmp_path).write("embedding", values("embedding"))
    for other in (
        lambda: begun(tmp_path, identity="other"),
        lambda: begun(tmp_path, specs={"embedding": SPECS["embedding"]}),
    ):
        with pytest.raises(UserError, match=r"\.3\.partial: it was begun from another source"):
            other()
    shutil.rmtree(tmp_path / "checkpoints" / ".3.partial")
    assert not begun(tmp_path, identity="other").is_written("embedding")


def test_a_folder_that_says_nothing_of_its_work_is_begun_anew(tmp_path):
    begun(tmp_path).write("embedding", values("embedding"))
    (tmp_path / "checkpoints/.3.partial/begun.json").unlink()
    assert not begun(tmp_path).is_written("embedding")


def test_rows_are_asked_for_a_chunk_at_a_time_and_not_again(tmp_path):
    specs = SPECS | {
        "one": checkpoints.Spec((), np.dtype(np.float32)),
        "layers/one": checkpoints.Spec((4,), np.dtype(np.float32), True),
    }
    whole = {
        name: np.asarray(np.arange(np.prod(spec.shape)), spec.dtype).reshape(spec.shape) for name, spec in specs.items()
    }
    asked = []

    def rows(name, layer, stop_after=None):
        def read(start, stop):
            asked.append((name, layer, start, stop))
            if len(asked) == stop_after:
                raise OSError(errno.ENOSPC, "No space left on device")
            array = whole[name] if layer is None else whole[name][layer : layer + 1]
            axis = 0 if layer is None else 1
            return array if array.ndim == axis else array[(slice(None),) * axis + (slice(start, stop),)]

        return read

    def write(stop_after=None):
        step = begun(tmp_path, specs=specs)
        for name, spec in specs.items():
            for layer in spec.slices:
                step.write_rows(name, rows(name, layer, stop_after), layer)
        step.finish(META)

    with pytest.raises(OSError, match="No space"):
        write(stop_after=5)
    write()
    assert len(asked) == len(set(asked)) + 1  # the one that failed
    assert max(stop - start for _, _, start, stop in asked) == 4  # of 7 rows, 24 bytes a chunk
    got = checkpoints.open_tensors(tmp_path)
    assert {name: got[name].read().tobytes() for name in specs} == {name: x.tobytes() for name, x in whole.items()}
    with pytest.raises(ValueError, match=r"embedding: .* instead of bfloat16"):
        begun(tmp_path / "other").write_rows("embedding", lambda start, stop: np.zeros((stop - start, 3), np.float32))


@pytest.mark.parametrize("array", [np.zeros((7, 3), np.float32), np.zeros((7, 2), jnp.bfloat16)])
def test_another_shape_or_dtype_is_not_written(tmp_path, array):
    with pytest.raises(ValueError, match=r"embedding: .* instead of bfloat16"):
        begun(tmp_path).write("embedding", array)


@pytest.mark.parametrize("piece", ["_CHECKPOINT_METADATA", "meta/metadata", "params/_METADATA", "params/streamed.json",
                                   "params/embedding/.zarray", "params/layers.mlp.gate/2.1.0"])  # fmt: skip
def test_a_step_that_lost_a_piece_is_passed_over_and_replaced(tmp_path, piece):
    write_all(tmp_path)
    (tmp_path / "checkpoints/3" / piece).unlink()
    assert not checkpoints.is_complete(tmp_path / "checkpoints", 3)
    with pytest.raises(UserError, match="holds no complete checkpoint"):
        checkpoints.read_meta(tmp_path)
    write_all(tmp_path)
    assert_whole(tmp_path)


def test_meta_is_plain_json(tmp_path):
    write_all(tmp_path)
    assert json.loads((tmp_path / "checkpoints/3/meta/metadata").read_text()) == META
