import collections
import hashlib
import sys

import pytest

from kwaicoder_jax import data
from kwaicoder_jax.data import python_sources, sources
from kwaicoder_jax.errors import UserError


def collect(config, name="s"):
    skipped = collections.Counter()
    source = sources.from_config(name, config, data.KINDS)
    return list(source.documents(name, skipped)), skipped


def folder(path, **more):
    return {"kind": "folder", "max_bytes": 10**6, "path": str(path), **more}


def test_hostile_files_are_skipped_and_counted(tmp_path):
    (tmp_path / "good.py").write_bytes(b"x = 1\r\nprint(x)\r\n")
    (tmp_path / "latin.py").write_bytes(b"caf\xe9 = 1\n")
    (tmp_path / "empty.py").write_bytes(b"")
    (tmp_path / "blank.py").write_bytes(b" \n\n")
    (tmp_path / "nulls.py").write_bytes(b"x = '\0'\n")
    (tmp_path / "minified.py").write_bytes(b"x = '" + b"a" * 5000 + b"'\n")
    (tmp_path / "huge.py").write_bytes(b"a" * 10_000_000)
    (tmp_path / "table.py").write_bytes(b"[" + b"123456, 234567,\n" * 300 + b"]\n")
    (tmp_path / "folder.py").mkdir()
    (tmp_path / "dangling.py").symlink_to(tmp_path / "nowhere")
    (tmp_path / ".hidden.py").write_bytes(b"secret = 1\n")
    (tmp_path / "binary.bin").write_bytes(bytes(range(256)))
    documents, skipped = collect(folder(tmp_path))
    assert [(d.identifier, d.text) for d in documents] == [("good.py", "x = 1\r\nprint(x)\r\n")]
    assert skipped == {
        "not_utf8": 1,
        "empty": 2,
        "null_bytes": 1,
        "long_line": 1,
        "table": 1,
        "too_large_or_unreadable": 1,
    }


def test_links_out_of_the_folder_are_not_followed(tmp_path):
    (tmp_path / "outside.py").write_text("a = 1\n")
    inside = tmp_path / "inside"
    inside.mkdir()
    (inside / "link.py").symlink_to(tmp_path / "outside.py")
    assert collect(folder(inside))[0] == []


def test_selection_depends_on_contents_only(tmp_path, text_folder):
    """Other names for the folder, other order of creation: the same documents in the same order."""
    first, _ = collect(folder(text_folder, max_bytes=20_000))
    copy = tmp_path / "elsewhere"
    for path in sorted(text_folder.rglob("*.py"), reverse=True):
        target = copy / path.relative_to(text_folder)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    second, _ = collect(folder(copy, max_bytes=20_000))
    assert first == second
    hashes = [hashlib.sha256(d.text.encode()).digest() for d in first]
    assert hashes == sorted(hashes)
    assert 0 < sum(len(d.text.encode()) for d in first) <= 20_000
    assert len({d.identifier.split("/")[0] for d in first}) > 1, "the selection is spread over the folders"


def test_standard_library_is_code_without_tests():
    documents, _ = collect({"kind": "standard_library", "max_bytes": 300_000})
    assert len(documents) > 5
    assert sum(len(d.text.encode()) for d in documents) <= 300_000
    for d in documents:
        compile(d.text, d.identifier, "exec")
        assert not {"test", "tests", "idlelib", "site-packages"} & set(d.identifier.split("/"))
        assert not d.identifier.startswith("/")


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """One installed package, in a place of its own."""
    package, info = tmp_path / "parrot", tmp_path / "parrot-1.0.dist-info"
    (package / "tests").mkdir(parents=True)
    info.mkdir()
    (package / "__init__.py").write_text('"""A parrot."""\nVOICE = "squawk"\n')
    (package / "tests" / "test_voice.py").write_text("assert True\n")
    (package / "voice_pb2.py").write_text("generated = True\n")
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: parrot\nVersion: 1.0\n\n" + "A talking bird. é\n" * 40)
    names = ["parrot/__init__.py", "parrot/tests/test_voice.py", "parrot/voice_pb2.py", "../../bin/parrot.py"]
    (info / "RECORD").write_text("".join(f"{n},,\n" for n in names))
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    return tmp_path


def test_installed_packages_leave_tests_and_generated_code_out(installed):
    documents, _ = collect({"kind": "installed_packages", "max_bytes": 10**6})
    assert [d.identifier for d in documents] == ["parrot:parrot/__init__.py"]


def test_knowledge_joins_descriptions_and_docstrings(installed, monkeypatch):
    module = installed / "walk.py"
    module.write_text('"""' + "How to walk. " * 30 + '"""\ndef step():\n    """One."""\n')
    monkeypatch.setattr(python_sources, "_standard_library", lambda: iter([("walk.py", module)]))
    documents, _ = collect({"kind": "knowledge", "max_bytes": 10**6})
    texts = {d.identifier: d.text for d in documents}
    assert texts["package:parrot"] == "A talking bird. é\n" * 40
    assert texts["docstrings:walk"].startswith("walk\n\nHow to walk.")
    assert "One." not in texts["docstrings:walk"], "too short to say anything"


def test_docstrings_name_nested_functions():
    code = 'class A:\n    def f(self):\n        """' + "x" * 400 + '"""\n'
    assert python_sources.docstrings("m", code) == "m.A.f\n\n" + "x" * 400 + "\n"
    assert python_sources.docstrings("m", "def (") is None


@pytest.mark.parametrize(
    ("config", "fragment"),
    [
        ({"kind": "web", "max_bytes": 1}, "prepare_data.sources.s.kind"),
        ({"kind": "folder", "max_bytes": 1}, "prepare_data.sources.s.path"),
        ({"kind": "mathematics", "max_bytes": 1, "sead": 0}, "sead"),
        ({"kind": "mathematics", "max_bytes": 0}, "max_bytes"),
        ({"kind": "mathematics", "max_bytes": 10, "seed": -1}, "seed"),
        ({"kind": "folder", "max_bytes": 1, "path": "/nonexistent"}, "not a folder"),
        ({"kind": "folder", "max_bytes": 1, "path": ".", "suffixes": ".py"}, "suffixes"),
    ],
)
def test_bad_configs_name_their_field(config, fragment):
    with pytest.raises(UserError, match=fragment):
        collect(config)


def test_bad_name():
    with pytest.raises(UserError, match=r"data\.sources\.A/b"):
        sources.from_config("A/b", {"kind": "mathematics", "max_bytes": 1}, data.KINDS)
