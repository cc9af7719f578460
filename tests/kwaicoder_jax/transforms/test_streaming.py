"""A streamed transform gives the bits of the one in memory, in bounded memory, and goes on after a kill."""

import errno
import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import threading
import time

import jax
import numpy as np
import pytest

from kwaicoder_jax import checkpoints, models, testing
from kwaicoder_jax.checkpoints import layout, partial, pieces
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.transforms import Target, prune, streaming, upcycle
from tests.kwaicoder_jax.transforms.stream_until_killed import CHUNK_BYTES, META
from tests.kwaicoder_jax.transforms.test_prune import made_scores

CONFIG = testing.dense_config(layers=4, param_dtype="bfloat16")
TARGET = Target(layers=3, model_dim=20, mlp_dim=30, heads=4, kv_heads=2)
ROOT = pathlib.Path(__file__).parents[3]


def model(config, seed=0):
    return jax.tree.map(np.asarray, testing.random_params(config, seed))


def saved(place, config, params):
    """The model as an ordinary checkpoint."""
    store = checkpoints.CheckpointStore(place / "checkpoints")
    store.save(7, params, {"model": config.to_dict(), "lineage": [], "identity": "dense"})
    store.close()
    return place


def assert_same(place, config, expected):
    """The newest checkpoint in `place` is the tree `expected`, bit for bit."""
    got = models.flatten(checkpoints.read_params(place, jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), expected)))  # fmt: skip
    models.check(models.unflatten(got), config)
    for name, array in models.flatten(expected).items():
        assert got[name].dtype == array.dtype, name
        assert np.asarray(got[name]).tobytes() == np.asarray(array).tobytes(), name


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(layout, "CHUNK_BYTES", CHUNK_BYTES)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("tied", [True, False])
def test_pruning_gives_the_same_bits(tmp_path, dtype, tied):
    config = testing.dense_config(layers=4, param_dtype=dtype, tie_embeddings=tied)
    params = model(config)
    expected, small, record = prune.apply(params, config, made_scores(config), TARGET)
    assert record["norm_factors"]
    streaming.run(prune, saved(tmp_path / "dense", config, params), tmp_path / "in/checkpoints", record, meta=META)
    assert_same(tmp_path / "in", small, expected)
    record = json.loads(json.dumps(record))
    streaming.run(prune, checkpoints.from_params(params), tmp_path / "memory", record, meta=META, memory_bytes=1)
    assert_same(tmp_path / "memory", small, expected)


UPCYCLINGS = {
    "contiguous": {"granularity": 4, "replicas": 2},
    "random": {"granularity": 3, "replicas": 3, "partition": "random_per_replica", "seed": 5},
    "balanced": {"granularity": 6, "replicas": 2, "partition": "balanced"},
    "up": {"granularity": 2, "replicas": 3, "scale_placement": "up"},
    "down": {"granularity": 3, "replicas": 2, "scale_placement": "down", "router": "sigmoid", "routed_scale": 2.5},
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", UPCYCLINGS)
def test_upcycling_gives_the_same_bits(tmp_path, kind, dtype):
    config = testing.dense_config(param_dtype=dtype, tie_embeddings=kind != "random")
    params, arguments = model(config), UPCYCLINGS[kind]
    if kind == "balanced":
        arguments = arguments | {"scores": made_scores(config)}
    expected, moe, record = upcycle.apply(params, config, **arguments)
    planned = streaming.record_of(lambda params: upcycle.apply(params, config, **arguments), config)
    assert json.dumps(planned) == json.dumps(record)
    streaming.run(upcycle, saved(tmp_path / "dense", config, params), tmp_path / "moe/checkpoints", planned, meta=META)
    assert_same(tmp_path / "moe", moe, expected)


def test_one_streamed_result_is_the_source_of_the_next(tmp_path):
    params = model(CONFIG)
    small_params, small, record = prune.apply(params, CONFIG, made_scores(CONFIG), TARGET)
    streaming.run(prune, saved(tmp_path / "dense", CONFIG, params), tmp_path / "small/checkpoints", record, meta=META)
    expected, moe, record = upcycle.apply(small_params, small, granularity=3, replicas=2)
    streaming.run(upcycle, tmp_path / "small", tmp_path / "moe/checkpoints", record, meta=META)
    assert_same(tmp_path / "moe", moe, expected)


@pytest.fixture
def work(tmp_path):
    """A dense checkpoint, the record of its upcycling, and the mixture in memory."""
    params = model(CONFIG)
    expected, moe, record = upcycle.apply(params, CONFIG, granularity=4, replicas=2)
    return saved(tmp_path / "dense", CONFIG, params), record, moe, expected


def files(folder):
    """Bytes of every file, without what tells the time."""
    return {
        str(file.relative_to(folder)): file.read_bytes()
        for file in folder.rglob("*")
        if file.is_file() and file.name != "_CHECKPOINT_METADATA"
    }


def test_killed_at_random_moments_it_goes_on_to_the_same_bytes(tmp_path, work):
    source, record, moe, expected = work
    (tmp_path / "record.json").write_text(json.dumps(record))
    command = [sys.executable, "-m", "tests.kwaicoder_jax.transforms.stream_until_killed", str(source),
               str(tmp_path / "killed/checkpoints"), str(tmp_path / "record.json")]  # fmt: skip
    rng, written = random.Random(0), []
    while not (tmp_path / "killed/checkpoints/0").exists():
        with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ}) as process:
            assert process.stdout
            lines = [process.stdout.readline().strip()]
            if len(written) < 5:  # it may still come to its end before the signal does
                time.sleep(rng.uniform(0, 0.1))
                process.kill()
            lines += process.stdout.read().split()
        assert process.returncode in ((0, -signal.SIGKILL) if len(written) < 5 else (0,))
        written.append([line for line in lines if line and line.rsplit("/", 1)[1][0].isdigit()])
        finished = (tmp_path / "killed/checkpoints/0").exists()
        assert finished == checkpoints.is_complete(tmp_path / "killed/checkpoints", 0)
    assert len(written) > 1
    chunks = [chunk for run in written for chunk in run]
    assert len(chunks) == len(set(chunks))  # what was written is not written again
    streaming.run(upcycle, source, tmp_path / "whole/checkpoints", record, meta=META)
    assert files(tmp_path / "killed/checkpoints") == files(tmp_path / "whole/checkpoints")
    assert_same(tmp_path / "killed", moe, expected)


def failing(monkeypatch, after, error):
    """Makes every file after the first `after` fail; returns the list of files."""
    written, lock, original = [], threading.Lock(), partial._stage

    def stage(file, *data):
        with lock:
            written.append(file)
            if len(written) > after:
                raise error
        original(file, *data)

    monkeypatch.setattr(partial, "_stage", stage)
    return written


@pytest.mark.parametrize("after", [0, 1, 20, 60])
def test_a_full_disk_is_one_line_and_nothing_to_see(tmp_path, work, monkeypatch, after):
    source, record, moe, expected = work
    with monkeypatch.context() as patch:
        failing(patch, after, OSError(errno.ENOSPC, "No space left on device"))
        with pytest.raises(
            UserError, match=r"^[^\n]*moe/checkpoints: No space left on device, with .* GB .*; make room[^\n]*$"
        ):
            streaming.run(upcycle, source, tmp_path / "moe/checkpoints", record, meta=META)
    with pytest.raises(UserError, match="holds no checkpoint"):
        checkpoints.find(tmp_path / "moe")
    streaming.run(upcycle, source, tmp_path / "moe/checkpoints", record, meta=META)
    assert_same(tmp_path / "moe", moe, expected)


def test_progress_begins_where_it_was_left_and_ends_at_all(tmp_path, work):
    source, record, _, expected = work
    target, told = tmp_path / "moe/checkpoints", []

    class Enough(BaseException):
        pass

    def stop(done, total):
        told.append((done, total))
        if len(told) == 12:
            raise Enough

    with pytest.raises(Enough):
        streaming.run(upcycle, source, target, record, meta=META, on_progress=stop)
    again = []
    streaming.run(upcycle, source, target, record, meta=META, on_progress=lambda *now: again.append(now))
    total = sum(array.nbytes for array in jax.tree.leaves(expected))
    assert told[0] == (0, total)
    assert told[-1][0] <= again[0][0] < total
    assert again[-1] == (total, total)
    assert again == sorted(again)
    streaming.run(upcycle, source, target, record, meta=META, on_progress=lambda *now: again.append(None))
    assert None not in again  # it is there already


def test_as_much_is_held_at_once_as_was_allowed(tmp_path, monkeypatch):
    """Pieces being worked on never need more than the limit together, and one that needs more is alone."""
    params = model(CONFIG)
    record = streaming.record_of(lambda params: upcycle.apply(params, CONFIG, granularity=4, replicas=2), CONFIG)
    limit, held, lock, seen = 60_000, [], threading.Lock(), []
    need, compute = streaming._Plan.memory_bytes, streaming._Plan.compute

    def watched(self, name, layer):
        size = need(self, name, layer)
        with lock:
            held.append(size)
            seen.append(list(held))
        time.sleep(0.003)
        try:
            return compute(self, name, layer)
        finally:
            with lock:
                held.remove(size)

    monkeypatch.setattr(streaming._Plan, "compute", watched)
    streaming.run(upcycle, checkpoints.from_params(params), tmp_path, record, meta=META, memory_bytes=limit)
    assert max(map(len, seen)) > 1
    assert all(len(sizes) == 1 or sum(sizes) <= limit for sizes in seen)


def test_other_work_is_refused(tmp_path, work, monkeypatch):
    source, record, _, _ = work
    target = tmp_path / "moe/checkpoints"
    with monkeypatch.context() as patch:
        failing(patch, 30, OSError(errno.EIO, "Input/output error"))
        with pytest.raises(UserError, match="Input/output error"):
            streaming.run(upcycle, source, target, record, meta=META)
    others = [
        upcycle.plan(CONFIG, granularity=2, replicas=2),
        upcycle.plan(CONFIG, granularity=4, replicas=2, seed=1),  # these have tensors of the same shapes
        upcycle.plan(CONFIG, granularity=4, replicas=2, partition="random"),
        upcycle.plan(CONFIG, granularity=4, replicas=2, scale_placement="down"),
    ]
    work = [(source, other) for other in others] + [(checkpoints.from_params(model(CONFIG, seed=1)), record)]
    for other_source, other in work:
        with pytest.raises(UserError, match="it was begun from another source"):
            streaming.run(upcycle, other_source, target, other, meta=META)


def test_a_record_of_another_model_is_a_user_error(tmp_path, work):
    source, _, _, _ = work
    other = CONFIG.replace(mlp_dim=60)
    record = streaming.record_of(lambda params: upcycle.apply(params, other, granularity=2, replicas=2), other)
    with pytest.raises(UserError, match=r"source: layers/mlp/down has shape \(4, 48, 32\), the config says"):
        streaming.run(upcycle, source, tmp_path / "moe/checkpoints", record, meta=META)
    lacking = models.flatten(model(CONFIG))
    del lacking["final_norm/scale"]
    record = streaming.record_of(lambda params: upcycle.apply(params, CONFIG, granularity=2, replicas=2), CONFIG)
    with pytest.raises(UserError, match="source: final_norm/scale: missing"):
        streaming.run(upcycle, checkpoints.from_params(models.unflatten(lacking)), tmp_path / "moe", record, meta=META)
    assert not (tmp_path / "moe").exists()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_not_finite_are_refused(tmp_path, dtype, bad):
    """Streaming compares no outputs: it has to say itself that the source cannot be anything's equal."""
    config = testing.dense_config(layers=4, param_dtype=dtype)
    params = jax.tree.map(np.array, model(config))
    place = saved(tmp_path / "dense", config, params)
    record = upcycle.plan(config, granularity=4, replicas=2)
    streaming.run(upcycle, place, tmp_path / "good", record, meta=META)
    params["layers"]["mlp"]["up"][2, 1, 3] = bad
    wrong = saved(tmp_path / "wrong", config, params)
    with pytest.raises(UserError, match="layers/mlp/up holds numbers that are not finite"):
        streaming.run(upcycle, wrong, tmp_path / "bad", record, meta=META)
    assert not checkpoints.is_complete(tmp_path / "bad", 0)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64", "int32"])
def test_the_largest_numbers_are_finite(dtype, monkeypatch):
    monkeypatch.setattr(pieces, "FINITE", 4)
    kind = jax.numpy.dtype(dtype)
    limits = jax.numpy.iinfo(kind) if kind.kind == "i" else jax.numpy.finfo(kind)
    array = np.zeros((3, 3), kind)
    array[2] = limits.max, limits.min, -1
    assert checkpoints.is_finite(array)
    assert checkpoints.is_finite(array[:0])
    assert checkpoints.is_finite(np.array(1, kind))
