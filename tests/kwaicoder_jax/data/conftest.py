"""A small corpus of three sources with documents from one line to many windows, built once a session."""

import random

import pytest

from kwaicoder_jax import data

WORDS = ["alpha", "beta", "return", "x1", "naïve", "日本語", "😀", "def", "print(x)", "0x1F", "value", "==", "{}", "\t"]


def document(rng, lines):
    rows = []
    for _ in range(lines):
        indent = " " * (4 * rng.randint(0, 3))
        rows.append(indent + " ".join(rng.choices(WORDS, k=rng.randint(0, 9))) + str(rng.randint(0, 10**6)))
    return "\n".join(rows) + "\n"


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("texts")
    rng = random.Random(7)
    for i in range(60):
        path = folder / f"part{i % 4}" / f"{i}.py"
        path.parent.mkdir(exist_ok=True)
        path.write_text(document(rng, rng.choice([1, 3, 10, 40, 150])), newline="")
    return folder


def sources(text_folder):
    return {
        "code": {"kind": "folder", "max_bytes": 10**6, "path": str(text_folder)},
        "mathematics": {"kind": "mathematics", "max_bytes": 12_000, "seed": 3},
        "tiny": {"kind": "mathematics", "max_bytes": 3_000, "seed": 4},
    }


@pytest.fixture(scope="session")
def corpus_config(text_folder):
    return sources(text_folder)


@pytest.fixture(scope="session")
def corpus_path(tmp_path_factory, corpus_config):
    target = tmp_path_factory.mktemp("corpora") / "corpus"
    data.prepare(corpus_config, target, vocab_size=500, valid_fraction=0.15, seed=1, shard_bytes=20_000)
    return target


@pytest.fixture(scope="session")
def corpus(corpus_path):
    return data.Corpus.open(corpus_path)
