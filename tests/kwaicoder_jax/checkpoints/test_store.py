"""Checkpoints give back what was saved, to the bit, and what is not a whole checkpoint is never taken for one."""

import contextlib
import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from kwaicoder_jax import checkpoints
from kwaicoder_jax.errors import UserError
from tests.kwaicoder_jax.training import devices

META = {"model": {"layers": 2}, "lineage": [{"stage": "x"}], "identity": "abc", "progress": {"train_flops": 0.1 + 0.2}}
# One piece for each way in which a copied step can be short of something.
PIECES = ("_CHECKPOINT_METADATA", "meta", "meta/metadata", "params", "params/_METADATA", "params/manifest.ocdbt",
          "train", "train/_METADATA", "train/manifest.ocdbt")  # fmt: skip


def tree(seed=0):
    rng = np.random.default_rng(seed)
    bits = rng.integers(0, 2**16, 64, dtype=np.uint16)
    bits = np.where(bits & 0x7F80 == 0x7F80, 0, bits)  # no NaN: its payload is nobody's
    special = jnp.asarray([0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, 3e38], jnp.float32)
    return {
        "float32": {"a": jnp.asarray(rng.standard_normal((3, 5)), jnp.float32), "special": special},
        "bfloat16": jax.lax.bitcast_convert_type(jnp.asarray(bits), jnp.bfloat16),
        "int32": jnp.asarray(rng.integers(-(2**31), 2**31, (4,)), jnp.int32),
        "scalar": jnp.asarray(7, jnp.int32),
    }


def abstract(values):
    return checkpoints.on_device(jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), values))


def assert_same_bits(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected)):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


def opened(folder, **options):
    return contextlib.closing(checkpoints.CheckpointStore(folder, **options))


@pytest.fixture
def stage(tmp_path):
    """A stage folder with steps 3 and 5, whose trees are of those seeds."""
    with opened(tmp_path / "checkpoints") as store:
        for step in (3, 5):
            store.save(step, tree(step), {**META, "at": step}, {"opt_state": (tree(step + 10),), "extras": {}})
    return tmp_path


def test_what_is_saved_comes_back_bit_for_bit(stage):
    with opened(stage / "checkpoints") as store:
        assert store.latest_step() == 5
        for step in (3, 5):
            assert store.meta(step) == {**META, "at": step}
            assert_same_bits(store.restore(step, "params", abstract(tree())), tree(step))
            train = {"opt_state": (tree(step + 10),), "extras": {}}
            assert_same_bits(store.restore(step, "train", abstract(train)), train)
    assert checkpoints.read_meta(stage) == checkpoints.read_meta(stage / "checkpoints") == {**META, "at": 5}
    assert_same_bits(checkpoints.read_params(stage, abstract(tree())), tree(5))


def test_saving_a_step_again_does_nothing(stage):
    with opened(stage / "checkpoints") as store:
        store.save(5, tree(99), {**META, "at": 99})
        assert store.meta(5)["at"] == 5


def test_only_the_newest_are_kept(stage):
    with opened(stage / "checkpoints", keep=2) as store:
        for step in (6, 10):
            store.save(step, tree(step), META)
    assert sorted(int(path.name) for path in (stage / "checkpoints").iterdir()) == [6, 10]
    with opened(stage / "checkpoints", keep=3) as store:
        store.save(11, tree(11), META)
        assert_same_bits(store.restore(6, "params", abstract(tree())), tree(6))


def test_restores_onto_a_mesh():
    assert devices.run("checkpoints.restore_on_devices", 4) == {"same_bits": True, "shard": [2, 3], "devices": 4}


@pytest.mark.parametrize("piece", PIECES)
def test_a_step_that_lost_a_piece_is_passed_over_and_replaced(stage, piece):
    folder = stage / "checkpoints"
    shutil.copytree(folder / "5", folder / "7")
    lost = folder / "7" / piece
    shutil.rmtree(lost) if lost.is_dir() else lost.unlink()
    for read in (checkpoints.read_meta, lambda place: checkpoints.read_params(place, abstract(tree()))):
        assert "step 7, is damaged" in one_line(read, stage)  # another stage would start from something else
    with opened(folder) as store:
        assert store.latest_step() == 5
        assert_same_bits(store.restore(5, "params", abstract(tree())), tree(5))
        store.save(6, tree(6), {**META, "at": 6})
        store.save(7, tree(7), {**META, "at": 7})
        assert (store.latest_step(), store.meta(7)["at"]) == (7, 7)


def test_a_folder_whose_only_step_lost_a_piece_is_a_user_error(stage):
    shutil.rmtree(stage / "checkpoints" / "3")
    shutil.rmtree(stage / "checkpoints" / "5" / "params")
    for read in (checkpoints.read_meta, lambda place: checkpoints.read_params(place, abstract(tree()))):
        assert "holds no complete checkpoint" in one_line(read, stage)


def test_killed_in_the_middle_of_saves_every_reopening_finds_a_whole_step(tmp_path):
    root, rng = pathlib.Path(__file__).parents[3], random.Random(0)
    command = [sys.executable, "-m", "tests.kwaicoder_jax.checkpoints.save_forever", str(tmp_path / "checkpoints")]
    for _ in range(3):
        with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True, env={**os.environ}) as process:
            assert process.stdout
            done = [int(process.stdout.readline()) for _ in range(2)][-1]
            time.sleep(rng.uniform(0, 0.15))
            process.kill()
            done = max([done, *map(int, process.stdout.read().split())])
        with opened(tmp_path / "checkpoints") as store:
            step = store.latest_step()
            assert step in (done, done + 1)  # it may have been killed between the save and the line about it
            assert store.meta(step)["at"] == step
            got = store.restore(step, "params", abstract({"a": jnp.zeros(3000, jnp.int32)}))
            assert (np.asarray(got["a"]) == step).all()
            assert store.restore(step, "train", abstract({"step": jnp.asarray(0)}))["step"] == step


def one_line(function, *arguments):
    with pytest.raises(UserError) as caught:
        function(*arguments)
    assert str(arguments[0]) in str(caught.value)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_missing_folder_is_a_user_error(tmp_path):
    for read in (checkpoints.find, checkpoints.read_meta):
        assert "does not exist; name a stage folder" in one_line(read, tmp_path / "nowhere")
    assert not (tmp_path / "nowhere").exists()


def test_a_folder_of_something_else_is_a_user_error(tmp_path):
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "a.txt").write_text("hello")
    (tmp_path / "numbers" / "checkpoints" / "7" / "meta").mkdir(parents=True)
    (tmp_path / "numbers" / "checkpoints" / "7" / "meta" / "metadata").write_text("not JSON")
    assert "holds no checkpoint" in one_line(checkpoints.read_meta, tmp_path / "notes")
    assert "holds no checkpoint" in one_line(checkpoints.read_meta, tmp_path / "notes" / "a.txt")
    assert "holds no complete checkpoint" in one_line(checkpoints.read_meta, tmp_path / "numbers")


def test_another_program_s_orbax_checkpoint_is_a_user_error(tmp_path):
    items = {
        "state": ocp.args.Composite(state=ocp.args.StandardSave(tree())),
        "meta": ocp.args.Composite(params=ocp.args.StandardSave(tree()), meta=ocp.args.JsonSave({"epoch": 3})),
    }
    for name, arguments in items.items():
        with contextlib.closing(ocp.CheckpointManager(tmp_path / name)) as manager:
            manager.save(4, args=arguments)
            manager.wait_until_finished()
    assert "holds no checkpoint" in one_line(checkpoints.read_meta, tmp_path / "state")
    message = one_line(checkpoints.read_meta, tmp_path / "meta")
    assert "is not a checkpoint of this program (no model, lineage, identity)" in message


def test_broken_contents_are_user_errors(stage):
    (stage / "checkpoints" / "5" / "meta" / "metadata").write_text(json.dumps(META)[:-5])
    assert "holds no readable checkpoint" in one_line(checkpoints.read_meta, stage)
    shutil.rmtree(stage / "checkpoints" / "5" / "params" / "d")
    shutil.rmtree(stage / "checkpoints" / "5" / "params" / "ocdbt.process_0")
    one_line(checkpoints.read_params, stage, abstract(tree()))


def test_parameters_of_another_shape_or_name_are_a_user_error(stage):
    """Known from the description alone: nothing is read, so nothing of Orbax's can be left behind."""
    for change, words in (
        ({"scalar": jnp.zeros((2,), jnp.int32)}, "scalar has shape (), the config says (2,)"),
        ({"more": jnp.zeros((2,))}, "more is missing"),
        ({"scalar": {"inner": jnp.zeros(())}}, "scalar is no parameter of that config"),
    ):
        message = one_line(checkpoints.read_params, stage, abstract({**tree(), **change}))
        assert "does not fit its own model config" in message
        assert words in message


def test_on_device_keeps_shardings_that_are_there():
    mesh = jax.sharding.Mesh(np.asarray(jax.devices()[:1]), ("x",))
    place = NamedSharding(mesh, PartitionSpec())
    given = {"a": jax.ShapeDtypeStruct((2,), jnp.float32, sharding=place), "b": jax.ShapeDtypeStruct((), jnp.int32)}
    placed = checkpoints.on_device(given)
    assert placed["a"].sharding == place
    assert placed["b"].sharding == jax.sharding.SingleDeviceSharding(jax.devices()[0])
