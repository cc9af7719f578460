"""The cache: what was written is found in any batch; killed writers, damaged files, foreign files."""

import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest

from kwaicoder_jax import distillation, testing
from kwaicoder_jax.distillation import CacheReader, CacheWriter, TopK
from kwaicoder_jax.distillation.cache import format
from kwaicoder_jax.errors import UserError

K, V = 5, 200_000
HEADER = distillation.Header("teacher", "tokenizer", "corpus", V, K, "float32")


def documents(count=12, seed=0):
    """Token lists of different lengths, and the teacher's arrays for each."""
    rng = np.random.default_rng(seed)
    found = []
    for length in rng.integers(1, 9, count):
        arrays = (
            rng.integers(0, V, (length, K)).astype(np.int32), rng.standard_normal((length, K)).astype(np.float32),
            -rng.random(length).astype(np.float32), rng.standard_normal(length).astype(np.float32),
        )  # fmt: skip
        found.append((rng.integers(0, V, length).astype(np.int32), arrays))
    return found


def batch_of(rows, window=16):
    """A batch whose rows hold these documents one after the other, and the teacher's arrays for it; padding is random."""
    rng = np.random.default_rng(99)
    shape = (len(rows), window)
    inputs, segments = rng.integers(0, V, shape).astype(np.int32), np.zeros(shape, np.int32)
    guide = [
        rng.standard_normal((*shape, *x)).astype(t) for x, t in (((K,), np.int32), ((K,), "f4"), ((), "f4"), ((), "f4"))
    ]
    for row, documents in enumerate(rows):
        place = 0
        for number, (tokens, arrays) in enumerate(documents, 1):
            end = place + len(tokens)
            inputs[row, place:end], segments[row, place:end] = tokens, number
            for whole, part in zip(guide, arrays):
                whole[row, place:end] = part
            place = end
    return {"inputs": inputs, "segment_ids": segments}, TopK(*guide)


def rows_of(documents, window=16):
    """Packed in turn."""
    rows, used = [[]], 0
    for document in documents:
        if used + len(document[0]) > window:
            rows, used = [*rows, []], 0
        rows[-1].append(document)
        used += len(document[0])
    return rows


def write(folder, documents, header=HEADER, batches=3, **options):
    """In several batches and shards, to the end."""
    writer = CacheWriter(folder, header, **options)
    for number, part in enumerate(np.array_split(np.arange(len(documents)), batches)):
        writer.add(*batch_of(rows_of([documents[i] for i in part])))
        writer.commit({"batch": number})
    return distillation.finish(folder)


def assert_holds(reader, documents, dtype=np.float32):
    batch, guide = batch_of(rows_of(documents))
    found, inside = reader.add(batch), batch["segment_ids"] > 0
    assert (found["inputs"] == batch["inputs"]).all()
    np.testing.assert_array_equal(found["ids_BTK"][inside], guide.ids_BTK[inside])
    np.testing.assert_array_equal(found["log_p_BTK"][inside], guide.log_p_BTK[inside].astype(dtype))
    np.testing.assert_array_equal(found["log_tail_BT"][inside], guide.log_tail_BT[inside])
    assert not any(found[name][~inside].any() for name in ("ids_BTK", "log_p_BTK", "log_tail_BT"))
    assert found["ids_BTK"].dtype == np.int32


@pytest.mark.parametrize("dtype", format.DTYPES)
def test_any_batch_finds_its_examples(tmp_path, dtype):
    known = documents()
    write(tmp_path, known, distillation.Header("t", "t", "c", V, K, dtype))
    reader = CacheReader(tmp_path)
    rng = np.random.default_rng(1)
    for count in (1, 5, 12):  # other rows, other neighbours, another order, each document any number of times
        assert_holds(reader, [known[i] for i in rng.integers(0, len(known), count)], jnp.dtype(dtype))
    assert_holds(CacheReader(tmp_path.parent / tmp_path.name), known, jnp.dtype(dtype))


def test_what_comes_twice_is_stored_once(tmp_path):
    known = documents()
    once = write(tmp_path / "once", known)
    twice = write(tmp_path / "twice", [*known, *known], batches=4)
    assert once["records"] == twice["records"] == len(known)
    assert once["tokens"] == sum(len(tokens) for tokens, _ in known)
    mass = sum(np.exp(arrays[2].astype(np.float64)).sum() for _, arrays in known)
    np.testing.assert_allclose(twice["tail_mass"], mass, rtol=1e-12)


def test_processes_write_shards_of_their_own(tmp_path):
    known = documents()
    for process in (1, 0):
        writer = CacheWriter(tmp_path, HEADER, process=process)
        writer.add(*batch_of(rows_of(known[process::2])))
        writer.commit(None)
    assert len(distillation.finish(tmp_path)["shards"]) == 2
    assert_holds(CacheReader(tmp_path), known)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_killed_writer_goes_on_to_the_same_bytes(tmp_path):
    known = documents(40)
    known += known[:9]  # what an earlier shard holds comes again
    write(tmp_path / "whole", known, batches=5)
    parts = np.array_split(np.arange(len(known)), 5)
    for number in range(5):  # a new writer for every batch, which is dropped in the middle of the next
        writer = CacheWriter(tmp_path / "killed", HEADER)
        assert writer.position == ({"batch": number - 1} if number else None)
        writer.add(*batch_of(rows_of([known[i] for i in parts[number]])))
        writer.commit({"batch": number})
        if number < 4:
            writer.add(*batch_of(rows_of([known[i] for i in parts[number + 1][:3]])))
        del writer
    for name in ("00000-00005.part", "00000-00004.index.part.npy"):  # what a kill may leave besides
        (tmp_path / "killed" / name).write_bytes(b"half")
    distillation.finish(tmp_path / "killed")
    left = contents(tmp_path / "killed")
    assert {name: x for name, x in left.items() if ".part" not in name} == contents(tmp_path / "whole")
    assert_holds(CacheReader(tmp_path / "killed"), known)


def test_a_kill_between_a_shard_s_files_leaves_the_shard_to_be_written_again(tmp_path):
    known = documents()
    write(tmp_path / "whole", known)
    shutil.copytree(tmp_path / "whole", tmp_path / "killed")
    for name in ("manifest.json", "00000-00002.json"):
        (tmp_path / "killed" / name).unlink()
    writer = CacheWriter(tmp_path / "killed", HEADER)
    assert writer.position == {"batch": 1}
    writer.add(*batch_of(rows_of(known[8:])))
    writer.commit({"batch": 2})
    distillation.finish(tmp_path / "killed")
    assert contents(tmp_path / "killed") == contents(tmp_path / "whole")


def test_processes_that_stood_at_different_shards_go_back_to_one(tmp_path):
    """And from there on to the same bytes."""
    known = documents(40)
    write(tmp_path / "whole", known, batches=4)
    write(tmp_path / "back", known, batches=4)
    (tmp_path / "back" / "manifest.json").unlink()
    writer = CacheWriter(tmp_path / "back", HEADER)
    writer.go_back(7)  # it has no more than 4
    assert (writer.shards, writer.position) == (4, {"batch": 3})
    writer.go_back(1)
    assert (writer.shards, writer.position) == (1, {"batch": 0})
    assert sorted(contents(tmp_path / "back")) == [
        "00000-00000.array_record", "00000-00000.index.npy", "00000-00000.json", "begun.json"
    ]  # fmt: skip
    for number, part in enumerate(np.array_split(np.arange(40), 4)[1:], 1):
        writer.add(*batch_of(rows_of([known[i] for i in part])))
        writer.commit({"batch": number})
    distillation.finish(tmp_path / "back")
    assert contents(tmp_path / "back") == contents(tmp_path / "whole")
    writer = CacheWriter(tmp_path / "back", HEADER)
    writer.go_back(0)
    assert writer.position is None
    writer.add(*batch_of(rows_of(known[:3])))  # nothing is known any more
    writer.commit(None)
    assert distillation.finish(tmp_path / "back")["records"] == 3


def test_shards_of_more_processes_than_there_are_are_foreign(tmp_path):
    known = documents()
    for process in range(12):
        writer = CacheWriter(tmp_path, HEADER, process=process)
        writer.add(*batch_of(rows_of(known[process::12])))
        writer.commit(None)
    names = [path.name for path in writer.foreign(10)]
    assert sorted(names) == sorted(name for name in contents(tmp_path) if name.startswith(("00010", "00011")))
    assert [name.endswith(".json") for name in names] == [True, True, False, False, False, False]  # first what counts
    assert writer.foreign(12) == []


def refused(place, words):
    with pytest.raises(UserError, match=words) as error:
        assert_holds(CacheReader(place), documents())
    assert "\n" not in str(error.value)


def test_damaged_and_foreign_files_are_named(tmp_path):
    write(tmp_path, documents())
    shard, index = (tmp_path / f"00000-00001.{end}" for end in ("array_record", "index.npy"))
    manifest = tmp_path / "manifest.json"
    for path in (shard, index):
        whole = path.read_bytes()
        path.write_bytes(whole[:-7])
        refused(tmp_path, rf"{path.name}: has not its {len(whole)} bytes")
        path.unlink()
        refused(tmp_path, rf"{path.name}: is missing")
        path.write_bytes(bytes(len(whole)))
        refused(tmp_path, rf"{path.name}: (cannot be read|is no index)")
        place = len(whole) - 40 if path == index else len(whole) // 2
        turned = bytes(byte ^ 255 for byte in whole[place : place + 40])
        path.write_bytes(whole[:place] + turned + whole[place + 40 :])
        refused(tmp_path, rf"{path.name}: cannot be read" if path == shard else "it lacks")
        path.write_bytes(whole)
    assert_holds(CacheReader(tmp_path), documents())
    text = json.loads(manifest.read_text())
    for values in ({**text, "format": 9}, {}, [], {**text, "dtype": "int4"}):
        manifest.write_text(json.dumps(values))
        refused(tmp_path, r"manifest\.json: is not of a teacher's cache of format 1|dtype: no choice")
    manifest.write_text("{")
    refused(tmp_path, r"manifest\.json: is not JSON")
    manifest.unlink()
    refused(tmp_path, "there is no finished cache here; run cache_teacher to the end")


def test_an_example_that_is_not_there_is_an_error(tmp_path):
    write(tmp_path, documents())
    with pytest.raises(UserError, match="it lacks 2 of the 14 examples of a batch; write it anew"):
        CacheReader(tmp_path).add(batch_of(rows_of([*documents(), *documents(2, seed=5)]))[0])


def test_two_keys_of_one_number_are_told_apart(tmp_path, monkeypatch):
    known = documents()
    write(tmp_path, known)
    reader = CacheReader(tmp_path)
    reader._numbers = np.zeros_like(reader._numbers)  # as if all of them collided
    monkeypatch.setattr(format, "number_of", lambda key: 0)
    assert_holds(reader, known)


@pytest.mark.parametrize(
    ("field", "value"),
    [("teacher", "other"), ("corpus", "x"), ("top_k", 4), ("temperature", 2.0), ("dtype", "float16")],
)
def test_a_folder_begun_from_something_else_is_refused(tmp_path, field, value):
    CacheWriter(tmp_path, HEADER)
    values = {**HEADER.__dict__, field: value}
    with pytest.raises(UserError, match=rf"cache_teacher\.{field}: .* was begun with {field} "):
        CacheWriter(tmp_path, distillation.Header(**values))


def test_very_unlikely_tokens_stay_finite_in_16_bits():
    record = format.Record(np.zeros((1, K), np.int32), np.full((1, K), -1e9, np.float32), np.zeros(1), np.zeros(1))
    header = distillation.Header("t", "t", "c", V, K, "float16")
    _, found = format.decode(format.encode(bytes(16), record, header), header)
    assert np.isfinite(found.log_p_TK).all()
    assert (found.log_p_TK < -5e4).all()


def test_the_teacher_s_top_k_in_slices(monkeypatch):
    """`teacher_top_k` against numpy, with places that slices fill up."""
    from kwaicoder_jax.distillation import logits

    monkeypatch.setattr(logits, "SLICE_TOKENS", 8)
    config = testing.dense_config()
    params, batch = testing.random_params(config), testing.random_batch(config, 3, 13)
    scores = np.asarray(testing.model_logits(params, config, batch), np.float64) / 2
    hidden = testing.run(params, config, batch).hidden_BTD
    found = distillation.teacher_top_k(
        distillation.LogitsSettings(temperature=2.0, top_k=6), hidden, params["embedding"]
    )
    order = np.argsort(-scores, -1)[..., :6]
    total = np.log(np.exp(scores).sum(-1))
    np.testing.assert_array_equal(found.ids_BTK, order)
    np.testing.assert_allclose(found.logsumexp_BT, total, rtol=1e-5)
    np.testing.assert_allclose(
        found.log_p_BTK + np.asarray(found.logsumexp_BT)[..., None],
        np.take_along_axis(scores, order, -1),
        rtol=1e-4,
        atol=1e-5,
    )
    np.testing.assert_allclose(np.exp(found.log_tail_BT) + np.exp(found.log_p_BTK).sum(-1), 1, rtol=1e-5)
