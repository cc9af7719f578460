"""Benchmarks' texts are found in documents whatever their layout, and nothing else is."""

import gzip
import json
import os
import re
import sysconfig
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kwaicoder_jax.data import decontamination
from kwaicoder_jax.data.decontamination import Settings, build
from kwaicoder_jax.data.documents import Document
from kwaicoder_jax.data.engine import runners, shards
from kwaicoder_jax.data.engine.store import Store
from kwaicoder_jax.errors import UserError

PROMPT = '''import os
def tally(values, limit):
    """Count how many of the given values lie below the limit, ignoring those that are negative or missing."""
'''
SOLUTION = "    return sum(value < limit for value in values if value is not None and value >= 0)\n"
NUMBERS = "assert tally([1, 2, 3, 4, 5, 6, 7, 8, 9, 10], 2) == 1, 'a b c d e f g h i j'"
TASKS = [
    {"task_id": "Small/0", "prompt": PROMPT, "canonical_solution": SOLUTION, "tests": [NUMBERS]},
    {"task_id": "Small/1", "prompt": "Say hello.", "canonical_solution": "print('one two three four five six')"},
]


@pytest.fixture
def folder(tmp_path):
    place = tmp_path / "benchmarks"
    place.mkdir()
    with gzip.open(place / "small.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(task) + "\n" for task in TASKS)
    return place


def left(tmp_path, folder, texts, **how):
    store = Store(tmp_path / "store")
    documents = [Document("code", str(number), text) for number, text in enumerate(texts)]
    made = [shards.write(store, documents[:2]), shards.write(store, documents[2:])]
    found = decontamination.decontaminate(store, made, folder, Settings(**({"shortest": 6} | how)), runners.InProcess())
    kept = [int(d.identifier) for each in found.shards for d in shards.read(store.path(each))]
    assert sum(each["kept"][0] for each in found.dropped) == len(kept)
    assert sum(each["hit"][0] for each in found.dropped) == len(texts) - len(kept)
    return kept, found


def test_copies_are_found_and_what_is_like_them_is_not(tmp_path, folder):
    texts = [
        "x = 1\n" + PROMPT + SOLUTION,  # 0: as it is
        re.sub(r"\s+", "\n# ", PROMPT.upper()),  # 1: as a comment, another case and layout
        "COUNT how many of the given values lie BELOW the limit",  # 2: a run of ten words
        "count how many of the given values lie below a limit, ignoring",  # 3: runs of nine
        "import os\nimport sys\nfrom a import b\n" * 10,  # 4: nothing but imports
        "print('one two three four five six')",  # 5: a whole short solution
        "print('one two three four five seven')",  # 6
        "Say hello.",  # 7: too short to tell
        "",  # 8
        "1 2 3 4 5 6 7 8 9 10, a b c d e f g h i j",  # 9: in the tests of a task, and anywhere
    ]
    kept, found = left(tmp_path, folder, texts)
    assert kept == [3, 4, 6, 7, 8, 9]
    assert found.facts["benchmarks"] == {"small.jsonl.gz": 4}
    assert found.facts["tasks"] == {"small.jsonl.gz: Small/0": 3, "small.jsonl.gz: Small/1": 1}
    assert found.facts["examples"] == [
        [0, 0, "small.jsonl.gz: Small/0"], [0, 1, "small.jsonl.gz: Small/0"], [1, 0, "small.jsonl.gz: Small/0"],
        [1, 3, "small.jsonl.gz: Small/1"],
    ]  # fmt: skip


def test_what_many_documents_have_is_generic(tmp_path, folder):
    texts = [f"a{number} print('one two three four five six')" for number in range(4)] + [SOLUTION]
    kept, found = left(tmp_path, folder, texts, generic_above=3)
    assert kept == [0, 1, 2, 3]
    assert found.facts["generic"] == 1
    kept, _ = left(tmp_path, folder, texts, generic_above=4)
    assert kept == []


def test_what_is_allowed_counts_for_nothing(tmp_path, folder):
    kept, _ = left(tmp_path, folder, [SOLUTION, PROMPT], allowed=(SOLUTION,))
    assert kept == [0]


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.sampled_from(["aa", "bb", "_c1", "é", "d"]), max_size=30),
    st.lists(st.lists(st.sampled_from(["aa", "bb", "_c1", "é", "d", "+"]), max_size=30), min_size=1, max_size=4),
)
def test_runs_are_those_of_a_loop(benchmark, texts):
    width, shortest = 5, 3
    entries, widths = decontamination.index._entries(" ".join(benchmark), width, shortest, 0)
    finder = decontamination.Finder(np.unique(entries["hash"]), sorted(widths))
    found = set(finder.find([" ".join(text).encode() for text in texts])[0].tolist()) if len(entries) else set()
    length = min(width, len(benchmark))
    wanted = (
        {tuple(benchmark[i : i + length]) for i in range(len(benchmark) - length + 1)} if length >= shortest else set()
    )
    words = [[word for word in text if word != "+"] for text in texts]
    expected = {
        number for number, text in enumerate(words)
        if any(tuple(text[i : i + length]) in wanted for i in range(len(text) - length + 1))
    }  # fmt: skip
    assert found == expected


@pytest.mark.parametrize(
    ("name", "content", "what"),
    [
        ("a.jsonl", b'{"x": 1\n', "a.jsonl: cannot be read"),
        ("a.jsonl.gz", b"no gzip", "a.jsonl.gz: cannot be read"),
        ("a.jsonl.zst", b"no zstd", "a.jsonl.zst: cannot be read"),
        ("a.jsonl", b'{"x": "too short"}\n', "has no text of 6 words"),
        ("a.csv", b"x", "has no benchmark"),
    ],
)
def test_files_that_are_none_are_named(tmp_path, name, content, what):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=what):
        build(tmp_path, 10, 6)


def test_other_kinds_of_files(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    import pyarrow.parquet  # noqa: F811

    rows = pyarrow.Table.from_pylist([{"id": 7, "nested": {"text": [SOLUTION]}}])
    pyarrow.parquet.write_table(rows, tmp_path / "a.parquet")
    (tmp_path / "b.json").write_text(json.dumps([{"name": "x", "text": SOLUTION}]))
    (tmp_path / "c.py").write_text(SOLUTION)
    index = build(tmp_path, 10, 6)
    assert index.tasks == ["a.parquet: 7", "b.json: x", "c.py: 0"]
    assert set(index.entries["task"].tolist()) == {0}, "the first that has it"


@pytest.mark.skipif("KWAICODER_BENCHMARK_DATA" not in os.environ, reason="no benchmark files")
def test_every_benchmark_finds_itself_and_not_the_standard_library(tmp_path):
    folder = Path(os.environ["KWAICODER_BENCHMARK_DATA"])
    index = build(folder, 10, 6)
    finder = decontamination.Finder(index.entries["hash"], index.widths)
    texts = []
    for line in (folder / "mbpp" / "mbpp.jsonl").read_text().splitlines():
        task = json.loads(line)
        texts.append(f"# {task['text']}\n{task['code']}".encode())
    found, _ = finder.find(texts)
    assert len(set(found.tolist())) > 0.99 * len(texts)
    library = [path.read_bytes() for path in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))]
    assert len(set(finder.find(library)[0].tolist())) < 0.1 * len(library)
