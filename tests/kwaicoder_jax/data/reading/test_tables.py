import gzip
import json

import pytest
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kwaicoder_jax.data.reading import tables
from kwaicoder_jax.data.reading.archives import Skipped
from kwaicoder_jax.data.reading.streams import Limits
from kwaicoder_jax.data.reading.tables import LAYOUTS, Fields, Row, fields_from_config, json_lines, parquet_rows, pick
from kwaicoder_jax.errors import UserError

TEXT = Fields(text=("text",))


def lines(path, part=None, fields=TEXT, **limits):
    return list(json_lines(path, fields, part, Limits(**limits)))


def test_public_layouts():
    stack_v1 = {
        **{"hexsha": "0a", "lang": "Python", "max_stars_repo_path": "a/b.py", "max_stars_repo_name": "u/r"},
        **{"max_stars_repo_licenses": ["MIT", "Apache-2.0"], "content": "a = 1\n"},
    }
    assert pick(stack_v1, LAYOUTS["the_stack"], 3) == Row(
        3, "a = 1\n", "0a", "a/b.py", "u/r", "Python", "Apache-2.0 AND MIT"
    )
    stack_v2 = {
        **{"blob_id": "0b", "language": "Python", "path": "/a/b.py", "repo_name": "u/r", "license_type": "permissive"},
        **{"detected_licenses": ["MIT"], "content": "a = 1\n", "is_vendor": False},
    }
    assert pick(stack_v2, LAYOUTS["the_stack"], 3) == Row(3, "a = 1\n", "0b", "/a/b.py", "u/r", "Python", "MIT")
    web = {"text": "words", "id": "<urn:uuid:1>", "url": "https://a.b/c", "language": "en", "token_count": 1}
    assert pick(web, LAYOUTS["fineweb"], 0) == Row(0, "words", "<urn:uuid:1>")
    tuning = {"seq_id": 7, "instruction": "Add.", "output": "a + b", "code": "", "testcase": []}
    assert pick(tuning, LAYOUTS["opencoder_sft"], 0) == Row(0, "Add.\n\na + b", "7")
    assert pick({"content": None}, LAYOUTS["the_stack"], 0) == "no_text"


def test_own_layouts():
    fields = fields_from_config({"text": "body", "path": ["file.name", "name"]}, "here")
    assert pick({"body": "x", "file": {"name": "a.py"}}, fields, 0).path == "a.py"
    assert pick({"body": "x", "file": 3, "name": "b.py"}, fields, 0).path == "b.py"
    for wrong in ("no_such", {"txt": "a"}, {"path": "a"}, {"text": [3]}):
        with pytest.raises(UserError, match="here"):
            fields_from_config(wrong, "here")


BROKEN = [
    b'{"text": "one"}\n',
    b"\n",
    b'{"text": "tw\n',
    b'["text"]\n',
    b'{"text": 3}\n',
    b'{"text": "' + b"x" * 5000 + b'"}\n',
    b"[" * 900 + b"\n",
    b'{"text": "\xff"}\n',
    b'{"text": "\\ud800"}\n',
    b'{"text": "last"}',
]


@pytest.mark.parametrize("compress", [bytes, gzip.compress, zstandard.compress])
def test_broken_lines_are_skipped_alone(tmp_path, compress):
    path = tmp_path / "a.jsonl"
    path.write_bytes(compress(b"".join(BROKEN)))
    starts = [sum(map(len, BROKEN[:i])) for i in range(len(BROKEN))]
    assert lines(path, member_bytes=1000) == [
        Row(0, "one"),
        Skipped(str(starts[2]), "broken_line"),
        Skipped(str(starts[3]), "broken_line"),
        Skipped(str(starts[4]), "no_text"),
        Skipped(str(starts[5]), "too_large"),
        Skipped(str(starts[6]), "broken_line"),
        Skipped(str(starts[7]), "broken_line"),
        Row(starts[8], "\ud800"),
        Row(starts[9], "last"),
    ]


def test_a_line_of_100_megabytes_is_not_held(tmp_path):
    import tracemalloc

    path = tmp_path / "a.jsonl"
    with path.open("wb") as out:
        out.write(b'{"text": "')
        for _ in range(100):
            out.write(b"x" * 1_000_000)
        out.write(b'"}\n{"text": "after"}\n')
    tracemalloc.start()
    found = lines(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [type(each) for each in found] == [Skipped, Row]
    assert peak < 40e6


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.integers(0, 60), max_size=12), st.integers(1, 100), st.booleans())
def test_parts_of_any_size_give_each_line_once(tmp_path, lengths, size, ended):
    raw = b"\n".join(json.dumps({"text": str(i) + "x" * length}).encode() for i, length in enumerate(lengths))
    raw += b"\n" * ended
    path = tmp_path / "a.jsonl"
    path.write_bytes(raw)
    parts = [(start, min(len(raw), start + size)) for start in range(0, len(raw), size)]
    assert [row for part in parts for row in lines(path, part)] == lines(path)


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress])
def test_a_truncated_file_gives_what_came_before(tmp_path, compress):
    path = tmp_path / "a.jsonl"
    whole = compress(b"".join(json.dumps({"text": f"{i:x}" * 50}).encode() + b"\n" for i in range(9000)))
    path.write_bytes(whole[: len(whole) // 2])
    *_, last = lines(path)
    assert last == Skipped("", "broken_table")


def test_parquet(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"content": f"a = {i}\n", "path": f"{i}.py", "licenses": ["MIT"], "other": i} for i in range(1000)]
    rows[7]["content"] = None
    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=300)
    fields = LAYOUTS["the_stack"]
    found = list(parquet_rows(path, fields, None, Limits()))
    assert found == [Skipped("7", "no_text") if i == 7 else pick(row, fields, i) for i, row in enumerate(rows)]
    assert len(tables.row_groups(path)) == 4
    assert [row for part in [(0, 1), (1, 3), (3, 4)] for row in parquet_rows(path, fields, part, Limits())] == found
    assert list(parquet_rows(path, TEXT, None, Limits())) == [Skipped("", "no_text")]


def test_one_long_text_for_many_rows_of_parquet_is_not_held_many_times(tmp_path):
    import tracemalloc

    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": ["x" * 4_000_000] * 40}), path, compression="zstd")
    assert path.stat().st_size < 100_000
    tracemalloc.start()
    count = sum(isinstance(row, Row) for row in parquet_rows(path, TEXT, None, Limits(held_bytes=16_000_000)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert count == 40
    assert peak < 50e6


def test_broken_parquet_is_counted(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    parquet.write_table(pyarrow.table({"text": [f"{i} words" * 9 for i in range(500)]}), path, row_group_size=100)
    whole = path.read_bytes()
    for length in (0, 4, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        assert list(parquet_rows(path, TEXT, None, Limits())) == [Skipped("0", "broken_table")]
        assert tables.row_groups(path) == []
    for at in range(0, len(whole), 37):
        raw = bytearray(whole)
        raw[at] ^= 0x55
        path.write_bytes(raw)
        for each in parquet_rows(path, TEXT, None, Limits()):
            assert isinstance(each, Row | Skipped)
