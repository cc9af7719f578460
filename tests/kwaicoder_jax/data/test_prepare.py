import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest

from kwaicoder_jax import data
from kwaicoder_jax.data import shards
from kwaicoder_jax.errors import UserError

OPTIONS = {"vocab_size": 500, "valid_fraction": 0.15, "seed": 1, "shard_bytes": 20_000}


def contents(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_same_inputs_same_bytes_in_another_process(corpus_path, corpus_config, tmp_path):
    code = (
        "import json, sys; from kwaicoder_jax import data;"
        "data.prepare(json.loads(sys.argv[1]), sys.argv[2], **json.loads(sys.argv[3]))"
    )
    arguments = [json.dumps(corpus_config), str(tmp_path / "again"), json.dumps(OPTIONS)]
    environment = {**os.environ, "PYTHONHASHSEED": "123", "RAYON_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-c", code, *arguments], check=True, env=environment)
    assert contents(tmp_path / "again") == contents(corpus_path)


def test_manifest_agrees_with_the_records(corpus):
    m = corpus.manifest
    for name, entry in m["sources"].items():
        kept = entry["documents_train"] + entry["documents_valid"]
        special = entry["dropped"].get("special_token", 0)
        assert entry["documents_in"] == kept + entry["duplicates"] + special
        for split in ("train", "valid"):
            raws = [bytes(corpus.records(name, split)[i]) for i in range(entry[f"documents_{split}"])]
            texts = [json.loads(raw)["text"] for raw in raws]
            assert len(corpus.documents(name, split)) == len(raws)
            assert list(corpus.documents(name, split)) == texts
            assert sum(len(t.encode()) for t in texts) == entry[f"bytes_{split}"]
            assert sum(len(corpus.tokenizer.encode(t)) + 1 for t in texts) == entry[f"tokens_{split}"]
            expected = hashlib.sha256(b"".join(len(raw).to_bytes(8) + raw for raw in raws)).hexdigest()
            assert entry[split]["sha256"] == expected
            assert all(set(json.loads(raw)) == {"id", "text"} for raw in raws)
    for key in ("documents_in", "documents_train", "documents_valid", "tokens_train", "tokens_valid"):
        assert m[key] == sum(entry[key] for entry in m["sources"].values())
    assert m["vocab_size"] == corpus.tokenizer.vocab_size == 500
    assert len(m["sources"]["code"]["train"]["shards"]) > 1, "small shards are wanted here"
    assert str(corpus._path.parent) not in json.dumps(m)


def test_no_text_twice_and_none_in_both_splits(corpus_path, corpus):
    every = [t for s in corpus.sources for split in ("train", "valid") for t in corpus.documents(s, split)]
    assert len(every) == len(set(every))


def test_duplicates_and_specials_are_dropped(tmp_path):
    for i in range(30):
        (tmp_path / f"{i}.txt").write_text(f"text number {i % 20}\n")
        (tmp_path / f"{i}.md").write_text(f"other text {i}\n" if i else "a <|endoftext|> b\n")
    config = {"kind": "folder", "max_bytes": 10**6, "path": str(tmp_path)}
    sources = {"first": {**config, "suffixes": [".txt"]}, "second": {**config, "suffixes": [".md", ".txt"]}}
    manifest = data.prepare(sources, tmp_path / "out", vocab_size=261, valid_fraction=0.3)
    first, second = manifest["sources"]["first"], manifest["sources"]["second"]
    assert (first["documents_in"], first["duplicates"]) == (30, 10)
    assert (second["documents_in"], second["duplicates"], second["dropped"]) == (60, 30, {"special_token": 1})
    assert manifest["documents_train"] + manifest["documents_valid"] == 20 + 29


def test_split_follows_the_text_not_the_corpus(tmp_path, corpus, corpus_config):
    """The same text falls on the same side when the corpus around it changes."""
    data.prepare({"code": corpus_config["code"]}, tmp_path / "code", **OPTIONS)
    alone = data.Corpus.open(tmp_path / "code")
    assert list(alone.documents("code", "valid")) == list(corpus.documents("code", "valid"))


@pytest.mark.parametrize(
    ("change", "fragment"),
    [
        ({"sources": {}}, "prepare_data.sources"),
        ({"valid_fraction": 0.0}, "prepare_data.valid_fraction"),
        ({"valid_fraction": 1e-9}, "no valid document"),
        ({"valid_fraction": 1 - 1e-9}, "no train document"),
        ({"vocab_size": 10}, "prepare_data.vocab_size"),
        ({"shard_bytes": 0}, "prepare_data.shard_bytes"),
        ({"sources": {"m": {"kind": "mathematics", "max_bytes": 5}}}, "prepare_data.sources.m"),
    ],
)
def test_errors_leave_nothing(tmp_path, corpus_config, change, fragment):
    arguments = {"sources": corpus_config, **OPTIONS, **change}
    with pytest.raises(UserError, match=fragment):
        data.prepare(arguments.pop("sources"), tmp_path / "out", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_target_is_not_overwritten(tmp_path, corpus_config):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        data.prepare(corpus_config, tmp_path / "out", **OPTIONS)
    assert contents(tmp_path / "out") == {"precious": b"mine"}


def test_a_kill_leaves_nothing_that_looks_finished(tmp_path, corpus_path, corpus_config):
    code = (
        "import json, os, signal, sys; from kwaicoder_jax import data;"
        "kill = lambda what, done, total: os.kill(os.getpid(), signal.SIGKILL) if 'write math' in what else None;"
        "data.prepare(json.loads(sys.argv[1]), sys.argv[2], progress=kill, **json.loads(sys.argv[3]))"
    )
    arguments = [json.dumps(corpus_config), str(tmp_path / "out"), json.dumps(OPTIONS)]
    result = subprocess.run([sys.executable, "-c", code, *arguments], check=False)
    assert result.returncode == -signal.SIGKILL
    assert [p.name for p in tmp_path.iterdir()] == [".out.partial"]
    with pytest.raises(UserError, match="no corpus here; run prepare_data"):
        data.Corpus.open(tmp_path / "out")
    data.prepare(corpus_config, tmp_path / "out", **OPTIONS)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert contents(tmp_path / "out") == contents(corpus_path)


def test_tokenizer_sample_is_bounded(tmp_path, text_folder):
    """A tokenizer that saw next to nothing merges next to nothing."""
    config = {"code": {"kind": "folder", "max_bytes": 10**6, "path": str(text_folder)}}
    manifest = data.prepare(config, tmp_path / "out", vocab_size=500, valid_fraction=0.3, tokenizer_sample_bytes=10)
    assert manifest["vocab_size"] == 261


def test_damaged_corpora_are_refused(tmp_path, corpus_path):
    def damaged(damage):
        folder = tmp_path / str(time.monotonic_ns())
        shutil.copytree(corpus_path, folder)
        damage(folder)
        with pytest.raises(UserError, match=r"prepare_data|tokenizer") as caught:
            data.Corpus.open(folder)
        assert str(folder) in str(caught.value)

    shard = next((corpus_path / "code").iterdir()).name
    damaged(lambda f: (f / "manifest.json").write_text("{"))
    damaged(lambda f: (f / "manifest.json").write_text("{}"))
    damaged(lambda f: (f / "tokenizer.json").unlink())
    damaged(lambda f: (f / "tokenizer.json").write_text("{}"))
    damaged(lambda f: (f / "code" / shard).unlink())
    damaged(lambda f: (f / "code" / shard).write_bytes((f / "code" / shard).read_bytes()[:-100]))


def test_a_copy_is_the_same_corpus(tmp_path, corpus, corpus_path):
    shutil.copytree(corpus_path, tmp_path / "copy")
    assert data.Corpus.open(tmp_path / "copy").hash == corpus.hash


def test_documents_are_a_sequence(corpus):
    documents = corpus.documents("code", "train")
    assert documents[-1] == documents[len(documents) - 1]
    assert documents[:3] == [documents[0], documents[1], documents[2]]
    with pytest.raises(IndexError):
        documents[len(documents)]
    with pytest.raises(UserError, match="no source 'nothing'"):
        corpus.documents("nothing", "train")
    with pytest.raises(UserError, match="split"):
        corpus.documents("code", "test")


def test_record_is_one_line():
    assert b"\n" not in shards.record("a\nb", "x\r\n\u2028y")
    assert shards.text_of(shards.record("a", "x\r\n\u2028y😀")) == "x\r\n\u2028y😀"
