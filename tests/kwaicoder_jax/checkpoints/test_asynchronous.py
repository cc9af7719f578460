"""Saves that go on while training does: what was handed over is what is written, and a failure is told."""

import contextlib
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kwaicoder_jax import checkpoints
from kwaicoder_jax.checkpoints import writing
from tests.kwaicoder_jax.training import devices

META = {"model": {}, "lineage": [], "identity": "x"}


def opened(folder, **options):
    return contextlib.closing(checkpoints.CheckpointStore(folder, asynchronous=True, **options))


def test_what_the_next_step_overwrites_is_saved_as_it_was(tmp_path):
    """The step reuses the very buffers (it is asked), and has long ended when the first chunk is written."""
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x * 2 + 1, tree), donate_argnums=0)
    state = {f"{number}": jnp.full((256, 1024), number, jnp.float32) for number in range(8)}
    saved = {}
    with opened(tmp_path) as store:
        for number in (1, 2, 3):
            saved[number] = {name: float(x[0, 0]) for name, x in state.items()}
            store.save(number, state, {**META, "at": number})
            places = {x.unsafe_buffer_pointer() for x in state.values()}
            for _ in range(3):
                state = step(state)
            assert {x.unsafe_buffer_pointer() for x in state.values()} & places  # donation was not refused
        store.wait()
        for number in (2, 3):
            abstract = checkpoints.on_device(jax.eval_shape(lambda: state))
            got = store.restore(number, "params", abstract)
            for name, value in saved[number].items():
                assert (np.asarray(got[name]) == np.float32(value)).all(), (number, name)


def test_the_copy_shares_no_buffer_and_keeps_the_place():
    tree = {"a": jnp.arange(10.0), "b": np.ones(3)}
    copy = writing.apart(tree)
    assert copy["a"].unsafe_buffer_pointer() != tree["a"].unsafe_buffer_pointer()
    assert copy["a"].sharding == tree["a"].sharding
    np.testing.assert_array_equal(copy["a"], tree["a"])


def test_memory_is_bounded_and_a_failed_save_is_an_error_that_spoils_nothing(tmp_path):
    """The state is copied once (1.0), so that what is encoded and not yet in a file may be half of it."""
    got = devices.run("checkpoints.save_in_little", 1, str(tmp_path))
    assert 0.9 < got["extra_memory"] < 1.5
    failure = got["failure"]
    assert failure["error"] == f"[Errno 27] {os.strerror(27)}: '{tmp_path / 'b'}'"
    assert failure["newest"] == 1
    assert (failure["newest_after"], failure["same_bits"], failure["folders"]) == (2, True, ["1", "2"])


def test_steps_that_a_newer_one_needs_are_kept(tmp_path):
    small = {"a": jnp.ones(3)}
    for step in (1, 2, 3, 4):
        with opened(tmp_path) as store:
            store.save(step, small, {**META, "needs": [1]})
    with opened(tmp_path) as store:
        assert store.complete_steps() == [4, 3, 1]
        store.save(5, small, {**META, "needs": [3]})
        store.wait()
        assert store.complete_steps() == [5, 4, 3, 1]  # 4 still needs it
        store.save(6, small, META)
        store.wait()
        assert store.complete_steps() == [6, 5, 3]


def test_a_step_that_cannot_be_read_is_passed_over_and_replaced(tmp_path):
    with opened(tmp_path) as store:
        for step in (1, 2):
            store.save(step, {"a": jnp.full(3, step)}, {**META, "at": step})
        store.wait()
        store.pass_over(2)
        assert store.latest_step() == 1
        store.save(2, {"a": jnp.full(3, 9)}, {**META, "at": 9})
        store.wait()
        assert store.meta(2)["at"] == 9


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_restores_in_another_dtype(tmp_path, dtype):
    values = np.random.default_rng(0).standard_normal(1000).astype(np.float32)
    with opened(tmp_path) as store:
        store.save(1, {"a": jnp.asarray(values)}, META)
        store.wait()
        got = store.restore(1, "params", checkpoints.on_device({"a": jax.ShapeDtypeStruct((1000,), dtype)}))["a"]
    assert got.dtype == dtype
    np.testing.assert_array_equal(np.asarray(got), values.astype(dtype))


@pytest.mark.parametrize("asynchronous", [False, True])
def test_an_array_larger_than_what_is_encoded_at_a_time(tmp_path, monkeypatch, asynchronous):
    monkeypatch.setattr(writing, "ENCODED_BYTES", 1000)
    tree = {"large": jnp.arange(10_000, dtype=jnp.float32), "small": jnp.ones((3,)), "other": jnp.zeros((10_000,))}
    store = checkpoints.CheckpointStore(tmp_path, asynchronous=asynchronous)
    store.save(1, tree, {"model": {}, "lineage": [], "identity": "x"}, {"moments": tree})
    store.wait()
    got = store.restore(1, "params", jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree))
    np.testing.assert_array_equal(got["large"], tree["large"])
    store.close()
