import gzip
import io
import json
import os
import subprocess
import tarfile
import zipfile
from collections import Counter

import pytest

from kwaicoder_jax.data.documents import Document
from kwaicoder_jax.data.reading import Limits, Options, Skipped, from_config, read
from kwaicoder_jax.errors import UserError

MIT = """Permission is hereby granted, free of charge, to any person obtaining a copy of this software, to deal in the
Software without restriction. The above copyright notice and this permission notice shall be included in all copies."""
GPL = "GNU GENERAL PUBLIC LICENSE\nVersion 2, June 1991\n"
ANY = Options(licences=None, allow_unknown_licence=True)


def collect(config, options=ANY):
    """Documents and reasons by identifier; checks the order, that both can be encoded, and that it comes again."""
    found = []
    for unit in from_config("s", config).units():
        part = list(read(unit, options))
        assert part == list(read(unit, options))
        names = [each.identifier for each in part]
        assert names == sorted(names)
        found += part
    documents = {each.identifier: each for each in found if isinstance(each, Document)}
    skipped = {each.identifier: each.reason for each in found if isinstance(each, Skipped)}
    assert len(documents) + len(skipped) == len(found), "identifiers are unique"
    for document in documents.values():
        assert Document.decoded(document.encoded()) == document
    return documents, skipped


def make(root, files):
    for name, raw in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(raw if isinstance(raw, bytes) else raw.encode())
    return root


def committed(root):
    """The folder as a repository with one commit."""
    names = ("GIT_AUTHOR_NAME", "GIT_AUTHOR_EMAIL", "GIT_COMMITTER_NAME", "GIT_COMMITTER_EMAIL")
    for arguments in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "first"]):
        subprocess.run(["git", "-C", root, *arguments], check=True, env=os.environ | dict.fromkeys(names, "a"))


def tar_gz(files):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w:gz") as archive:
        for name, raw in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            archive.addfile(info, io.BytesIO(raw))
    return out.getvalue()


FILES = {
    "p/LICENSE": MIT,
    "p/a.py": b"a = 1\r\n",
    "p/latin.py": "# café\n".encode("latin-1"),
    "p/empty.py": b" \n",
    "p/image.png": b"\x89PNG\0\0",
    "p/nulls.py": b"a = '\0'\n",
    "p/huge.py": b"a = 1\n" * 100_000,
    "p/run": b"#!/bin/sh\nexit 0\n",
    "p/words": b"some words\n",
    "p/gpl/COPYING": GPL,
    "p/gpl/b.c": b"int b;\n",
    "p/own.c": b"/* SPDX-License-Identifier: LGPL-2.1-or-later */\nint c;\n",
}
EXPECTED = {"p/LICENSE": "MIT", "p/a.py": "MIT", "p/latin.py": "MIT", "p/run": "MIT"}
REASONS = {
    "p/empty.py": "empty",
    "p/image.png": "unknown_language",
    "p/nulls.py": "binary",
    "p/huge.py": "too_large",
    "p/words": "unknown_language",
    "p/gpl/COPYING": "licence",
    "p/gpl/b.c": "licence",
    "p/own.c": "licence",
}


def raw_files():
    return {name: raw if isinstance(raw, bytes) else raw.encode() for name, raw in FILES.items()}


def zip_of(files):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, raw in files.items():
            archive.writestr(name, raw)
    return out.getvalue()


def test_a_folder_a_tar_a_zip_and_a_repository_give_the_same(tmp_path):
    options = Options(max_document_bytes=100_000)
    documents, skipped = collect({"kind": "folder", "path": str(make(tmp_path / "folder", FILES))}, options)
    assert {name: document.licence for name, document in documents.items()} == EXPECTED
    assert skipped == REASONS
    first = documents["p/a.py"]
    assert first == Document("s", "p/a.py", "a = 1\n", "a.py", "p", "python", "MIT")
    assert documents["p/latin.py"].text == "# café\n"
    assert documents["p/run"].language == "shell"

    make(tmp_path / "archives", {"q-1.tar.gz": tar_gz(raw_files()), "q-2.zip": zip_of(raw_files())})
    packed, packed_skipped = collect({"kind": "archives", "path": str(tmp_path / "archives")}, options)
    for archive, repository in (("q-1.tar.gz", "q-1"), ("q-2.zip", "q-2")):
        for name, document in documents.items():
            path = name.removeprefix("p/")
            there = packed[f"{archive}/{path}"]
            assert (there.text, there.path, there.language, there.licence) == (
                *(document.text, path, document.language, document.licence),
            )
            assert there.repository == repository
        assert {
            f"{archive}/{name.removeprefix('p/')}": reason for name, reason in skipped.items()
        }.items() <= packed_skipped.items()

    repository = make(tmp_path / "git" / "one", {name.removeprefix("p/"): raw for name, raw in FILES.items()})
    committed(repository)
    for place, name in ((tmp_path / "git", "one"), (repository, "s")):  # one alone bears the place's name
        tracked, tracked_skipped = collect({"kind": "git", "path": str(place)}, options)
        assert {key: document.text for key, document in tracked.items()} == {
            key.replace("p", name, 1): document.text for key, document in documents.items()
        }
        assert tracked_skipped == {key.replace("p", name, 1): reason for key, reason in skipped.items()}


def test_a_folder_cut_into_many_units_gives_what_one_unit_gives(tmp_path):
    make(tmp_path, FILES | {f"p/sub{i}/{j}.py": f"x = {i + j}\n" * 20 for i in range(6) for j in range(5)})
    place = {"kind": "folder", "path": str(tmp_path)}
    assert collect(place | {"unit_bytes": 200}, Options()) == collect(place, Options())


def test_options(tmp_path):
    place = {"kind": "folder", "path": str(make(tmp_path, FILES))}
    documents, skipped = collect(place, Options(languages=("python",), licences=None))
    assert set(documents) == {"p/a.py", "p/latin.py", "p/huge.py"}
    assert skipped["p/own.c"] == "other_language"
    assert skipped["p/run"] == "other_language"
    documents, _ = collect(place, Options(licences=frozenset({"GPL-2.0"})))
    assert set(documents) == {"p/gpl/COPYING", "p/gpl/b.c"}
    os.remove(tmp_path / "p/LICENSE")
    _, skipped = collect(place, Options())
    assert skipped["p/a.py"] == "unknown_licence"
    assert "p/a.py" in collect(place, Options(allow_unknown_licence=True))[0]
    assert collect(place | {"licence": "ISC"}, Options())[0]["p/a.py"].licence == "ISC"
    with pytest.raises(UserError, match="is not a language"):
        Options(languages=("pyton",))


def test_hostile_folders(tmp_path):
    root = make(tmp_path / "r", {"p/a.py": "x = 1\n", "p/.git/config": "x", "p/__pycache__/a.py": "x"})
    (root / "p/loop").symlink_to(root)
    (root / "p/self.py").symlink_to("self.py")
    (root / "p/passwd.py").symlink_to("/etc/passwd")
    (root / "p/gone.py").symlink_to("/nowhere")
    os.mkfifo(root / "p/pipe.py")
    (root / "p" / os.fsdecode(b"caf\xe9.py")).write_text("x = 2\n")
    (root / "p/caf\\xe9.py").write_text("x = 4\n")
    (root / "p/new\nline.py").write_text("x = 3\n")
    (root / "p/tab\t.py").write_text("x = 3\n")
    (unit,) = from_config("s", {"kind": "folder", "path": str(root)}).units()
    found = list(read(unit, ANY))
    documents = {each.identifier: each for each in found if isinstance(each, Document)}
    skipped = {each.identifier: each.reason for each in found if isinstance(each, Skipped)}
    assert {name: document.text for name, document in documents.items()} == {
        "p/a.py": "x = 1\n",
        "p/caf\\xe9.py": "x = 4\n",
    }
    assert skipped == {
        "p/caf\\xe9.py": "duplicate_name",
        "p/loop": "link",
        "p/self.py": "link",
        "p/passwd.py": "link",
        "p/gone.py": "link",
        "p/pipe.py": "special_file",
        "p/new\\nline.py": "bad_name",
        "p/tab\\t.py": "bad_name",
    }


def test_a_file_that_goes_away_is_unreadable(tmp_path):
    make(tmp_path, {"a.py": "x\n", "b.py": "y\n"})
    (unit,) = from_config("s", {"kind": "folder", "path": str(tmp_path)}).units()
    os.remove(tmp_path / "a.py")
    assert [each for each in read(unit, ANY) if isinstance(each, Skipped)] == [Skipped("a.py", "unreadable")]


def test_broken_archives_are_one_skip_each(tmp_path):
    whole = tar_gz(raw_files())
    bomb = gzip.compress(b"\0" * 50_000_000)
    make(
        tmp_path,
        {"a.tar.gz": whole[:-100], "b.zip": zip_of(raw_files())[:300], "c.tgz": bomb, "d.tar": b"", "e.zip": b"words"},
    )
    documents, skipped = collect({"kind": "archives", "path": str(tmp_path)})
    assert documents == {}
    assert skipped == {name: "broken_archive" for name in ("a.tar.gz", "b.zip", "d.tar", "e.zip")} | {"c.tgz": "bomb"}


def test_a_broken_repository_is_one_skip(tmp_path):
    make(tmp_path / "a", {".git/HEAD": "ref: refs/heads/main\n"})
    assert collect({"kind": "git", "path": str(tmp_path)}) == ({}, {"a": "broken_repository"})


def test_a_hostile_repository_runs_nothing(tmp_path):
    root = make(tmp_path / "r", {"a.py": "x = 1\n"})
    committed(root)
    blob = subprocess.run(["git", "-C", root, "rev-parse", "HEAD:a.py"], capture_output=True, text=True).stdout.strip()
    trap = f"touch {tmp_path}/trapped"
    other = f"touch {tmp_path}/trapped_too"
    config = f"""[core]
        fsmonitor = "{other}"
        sshCommand = "{other}"
        pager = "{other}"
        repositoryformatversion = 1
    [extensions]
        partialClone = origin
    [remote "origin"]
        url = "ext::{trap}"
        promisor = true
    [protocol "ext"]
        allow = always
    """
    with (root / ".git/config").open("a") as out:
        out.write(config)
    (root / ".git/objects" / blob[:2] / blob[2:]).unlink()  # git would fetch it from the "promisor"
    documents, skipped = collect({"kind": "git", "path": str(root)})
    assert documents == {}
    assert set(skipped.values()) <= {"unreadable", "broken_repository"}
    assert len(skipped) == 1
    assert not list(tmp_path.glob("trapped*"))
    subprocess.run(["git", "-C", root, "cat-file", "-p", blob], capture_output=True)
    assert (tmp_path / "trapped").exists(), "it is a trap for those who do not take care"


def test_rows(tmp_path):
    rows = [
        {
            "content": "a = 1\r\n",
            "path": "x/a.py",
            "repo_name": "u/r",
            "detected_licenses": ["mit"],
            "language": "Python",
        },
        {
            "content": "b",
            "path": "../b.py",
            "repo_name": "u\nr",
            "detected_licenses": ["GPL-3.0-only"],
            "language": "Python",
        },
        {"content": "c", "path": "c.rs", "detected_licenses": [], "blob_id": "id\n"},
        {"content": "d", "path": "d.xyz", "detected_licenses": ["MIT"], "language": "Klingon"},
        {"content": "\0", "path": "e.py"},
        {"content": "\ud800", "path": "f.py"},
    ]
    raw = b"".join(json.dumps(row).encode() + b"\n" for row in rows)
    make(tmp_path, {"a.jsonl": raw, "b.jsonl.gz": gzip.compress(raw)})
    documents, skipped = collect({"kind": "jsonl", "path": str(tmp_path), "layout": "the_stack"}, Options())
    assert [document.licence for document in documents.values()] == ["MIT", "MIT"]
    first = documents["a.jsonl#000000000000000"]
    assert first == Document("s", first.identifier, "a = 1\n", "x/a.py", "u/r", "python", "MIT")
    reasons = ["licence", "unknown_licence", "unknown_language", "null_bytes", "surrogates"]
    assert Counter(skipped.values()) == Counter(2 * reasons)
    pieces, _ = collect({"kind": "jsonl", "path": str(tmp_path), "layout": "the_stack", "unit_bytes": 50}, Options())
    assert pieces == documents


def test_web_pages_are_text(tmp_path):
    make(tmp_path, {"a.jsonl": json.dumps({"text": "some words", "id": "<urn:uuid:1>", "language": "en"})})
    documents, _ = collect({"kind": "jsonl", "path": str(tmp_path), "licence": "ODC-By-1.0"}, Options(licences=None))
    (document,) = documents.values()
    assert (document.language, document.licence, document.path) == ("text", "ODC-By-1.0", "")
    assert document.identifier.endswith("/<urn:uuid:1>")


def test_parquet_and_jsonl_of_the_same_rows_give_the_same_texts(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [{"content": f"a = {i}\n", "path": f"{i}.py", "licenses": ["MIT"]} for i in range(300)]
    make(tmp_path, {"a.jsonl": b"".join(json.dumps(row).encode() + b"\n" for row in rows), "c.parquet": b"PAR1"})
    parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "b.parquet", row_group_size=100)
    place = {"path": str(tmp_path), "layout": "the_stack", "unit_bytes": 1000}
    from_lines, _ = collect(place | {"kind": "jsonl"})
    from_columns, skipped = collect(place | {"kind": "parquet"})
    assert [document.text for document in from_columns.values()] == [document.text for document in from_lines.values()]
    assert skipped == {"c.parquet#0": "broken_table"}


def test_what_was_done_to_texts_is_counted(tmp_path):
    mojibake = "# naïve “quoted”\n".encode().decode("cp1252", "replace")
    make(tmp_path, {"a.py": "# café\n".encode("latin-1"), "b.py": mojibake, "c.py": "x = 1\n"})
    make(tmp_path, {"d.jsonl": json.dumps({"text": mojibake})})
    counts = Counter()
    for config in ({"kind": "folder", "path": str(tmp_path)}, {"kind": "jsonl", "path": str(tmp_path)}):
        for unit in from_config("s", config).units():
            list(read(unit, ANY, counts))
    assert counts == {"encoding_cp1252": 1, "mojibake": 2}


def test_names_that_tell_nothing_can_be_guessed(tmp_path):
    pytest.importorskip("magika")
    code = "import os\n\n\ndef main():\n    for name in os.listdir('.'):\n        print(name)\n\n\n"
    make(tmp_path, {"a.unheard_of": code, "b": code, "c.png": b"\x89PNG\0"})
    documents, skipped = collect(
        {"kind": "folder", "path": str(tmp_path)},
        Options(guess_languages=True, languages=("python",), allow_unknown_licence=True),
    )
    assert set(documents) == {"a.unheard_of", "b"}
    assert skipped == {"c.png": "binary"}


def test_limits_reach_the_archives(tmp_path):
    make(tmp_path, {"a.tar.gz": tar_gz(raw_files())})
    _, skipped = collect({"kind": "archives", "path": str(tmp_path)}, Options(limits=Limits(members=5)))
    assert skipped == {"a.tar.gz": "too_many_members"}
