import hashlib
import os
import pickle
import shutil
import subprocess

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kwaicoder_jax.data.reading import KINDS, from_config
from kwaicoder_jax.data.reading.units import cut
from kwaicoder_jax.errors import UserError


def make(root, files):
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def tree(packages=12, files=8):
    return {f"p{i}/sub/{j}.py": f"x = {i * j}\n" * 50 for i in range(packages) for j in range(files)} | {
        "top.py": "x = 1\n"
    }


def folder(path, **more):
    return from_config("s", {"kind": "folder", "path": str(path), **more})


@settings(max_examples=80)
@given(
    st.dictionaries(
        st.lists(st.sampled_from("abcd"), min_size=1, max_size=5).map("/".join), st.integers(0, 100), max_size=60
    ),
    st.integers(1, 400),
)
def test_cut_is_a_partition_into_bounded_groups(sizes, most):
    groups = list(cut(sizes, most))
    assert sorted(path for _, paths in groups for path in paths) == sorted(sizes)
    assert len({name for name, _ in groups}) == len(groups)
    for _, paths in groups:
        assert len(paths) == 1 or sum(sizes[path] for path in paths) <= most


def test_cut_keeps_packages_whole_where_they_fit_and_other_groups_as_they_are():
    sizes = {f"p{i}/{j}.py": 10 for i in range(100) for j in range(10)}
    groups = dict(cut(sizes, 500))
    for paths in groups.values():
        for top in {path.split("/")[0] for path in paths}:
            assert sum(path.split("/")[0] == top for path in paths) == 10
    more = dict(cut(sizes | {"p5/new.py": 10}, 500))
    changed = [name for name in groups.keys() | more.keys() if groups.get(name) != more.get(name)]
    assert 1 <= len(changed) <= 3  # one, or one that is cut into two


def test_fingerprints_follow_contents_not_places(tmp_path):
    first = make(tmp_path / "first", tree())
    second = tmp_path / "elsewhere" / "second"
    make(second, dict(reversed(tree().items())))
    before = {unit.identifier: unit.fingerprint() for unit in folder(first, unit_bytes=5000).units()}
    assert len(before) > 4
    assert before == {unit.identifier: unit.fingerprint() for unit in folder(second, unit_bytes=5000).units()}
    (second / "p3/sub/4.py").write_text("x = 13\n" * 43)
    after = {unit.identifier: unit.fingerprint() for unit in folder(second, unit_bytes=5000).units()}
    assert sum(before.get(name) != digest for name, digest in after.items()) == 1
    other = folder(first, unit_bytes=5000, licence="MIT")
    assert not set(before.values()) & {unit.fingerprint() for unit in other.units()}, "settings count"


def test_a_licence_changes_the_units_that_it_speaks_for(tmp_path):
    root = make(tmp_path / "r", tree() | {"p1/LICENSE": "MIT", "p1/sub/deep/a.py": "x\n"})
    units = list(folder(root, unit_bytes=2000).units())
    before = [unit.fingerprint() for unit in units]
    (root / "p1/LICENSE").write_text("GPL")
    for unit, old in zip(units, before):
        concerned = any(path.startswith("p1/") for path in unit.paths)
        assert (unit.fingerprint() != old) == concerned


def test_units_can_be_pickled_with_hostile_names(tmp_path):
    root = make(tmp_path / "r", {"a.py": "x\n"})
    (root / os.fsdecode(b"caf\xe9.py")).write_text("x\n")
    (root / "new\nline.py").write_text("x\n")
    (root / "loop").symlink_to(root)
    (unit,) = folder(root).units()
    again = pickle.loads(pickle.dumps(unit))
    assert again == unit
    assert again.fingerprint() == unit.fingerprint()
    assert len(unit.paths) == 4


def git(repository, *arguments):
    names = {"GIT_AUTHOR_NAME": "a", "GIT_AUTHOR_EMAIL": "a@b", "GIT_COMMITTER_NAME": "a", "GIT_COMMITTER_EMAIL": "a@b"}
    subprocess.run(["git", "-C", repository, *arguments], check=True, capture_output=True, env=os.environ | names)


@pytest.fixture
def checkout(tmp_path):
    root = make(tmp_path / "repositories" / "one", tree(4, 4) | {"LICENSE": "MIT"})
    git(root, "init", "-q")
    git(root, "add", "-A")
    git(root, "commit", "-qm", "first")
    return root


def test_git_units(checkout, tmp_path):
    place = from_config("s", {"kind": "git", "path": str(checkout.parent), "unit_bytes": 2000})
    units = list(place.units())
    assert len(units) > 2
    assert {unit.repository for unit in units} == {"one"}
    assert all("LICENSE" in (*unit.context, *unit.paths) for unit in units)
    before = [unit.fingerprint() for unit in units]
    (checkout / "p1/sub/1.py").write_text("x = 77\n")
    assert [unit.fingerprint() for unit in units] == before, "what is not committed does not count"
    git(checkout, "commit", "-qam", "second")
    assert sum(unit.fingerprint() != old for unit, old in zip(units, before)) == 1
    bare = tmp_path / "bare" / "one"
    git(tmp_path, "clone", "-q", "--bare", str(checkout), str(bare))
    copies = list(from_config("s", {"kind": "git", "path": str(bare.parent), "unit_bytes": 2000}).units())
    assert [unit.fingerprint() for unit in copies] == [unit.fingerprint() for unit in units]


def test_a_part_of_a_file_has_a_fingerprint_of_its_own(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"".join(b'{"text": "%06d"}\n' % i for i in range(1000)))
    place = from_config("s", {"kind": "jsonl", "path": str(path), "unit_bytes": 3000})
    units = list(place.units())
    before = [unit.fingerprint() for unit in units]
    assert len(set(before)) == len(units) == -(-path.stat().st_size // 3000) > 5
    raw = bytearray(path.read_bytes())
    raw[4000] ^= 1
    path.write_bytes(raw)
    assert [i for i, unit in enumerate(units) if unit.fingerprint() != before[i]] == [1]
    raw[4000] ^= 1
    at = raw.index(b"\n", 6000) - 1
    raw[at] ^= 1  # of a line that begins in part 1 and ends in part 2
    path.write_bytes(raw)
    assert [i for i, unit in enumerate(units) if unit.fingerprint() != before[i]] == [1, 2]


def test_row_groups_have_fingerprints_of_their_own(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    path = tmp_path / "a.parquet"
    rows = [f"a = {i:06d}\n" for i in range(500)]

    def fingerprints():
        parquet.write_table(pyarrow.table({"text": rows}), path, row_group_size=100, compression="none")
        place = from_config("s", {"kind": "parquet", "path": str(path), "unit_bytes": 1000})
        return [unit.fingerprint() for unit in place.units()]

    before = fingerprints()
    assert len(set(before)) == 5
    assert fingerprints() == before
    rows[250] = "a = 123456\n"
    assert [i for i, digest in enumerate(fingerprints()) if digest != before[i]] == [2]


def test_archives_are_found_by_pattern(tmp_path):
    make(tmp_path, {"a.tar.gz": "1", "b/c.zip": "2", "b/d.txt": "3"})
    (tmp_path / "e.zip").symlink_to(tmp_path / "b/c.zip")

    def names(**more):
        return [
            unit.identifier for unit in from_config("s", {"kind": "archives", "path": str(tmp_path), **more}).units()
        ]

    assert names() == ["a.tar.gz", "b/c.zip"]
    assert names(files=["*.gz"]) == names(files="*.gz") == ["a.tar.gz"]
    with pytest.raises(UserError, match="no file of"):
        names(files="*.whl")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"kind": "nothing", "path": "a"}, "kind of place"),
        ({"kind": "folder"}, "is missing"),
        ({"kind": "folder", "path": "a", "depth": 1}, "unknown field 'depth'"),
        ({"kind": "folder", "path": "a", "language": "klingon"}, "is not a language"),
        ({"kind": "folder", "path": "a", "unit_bytes": 0}, "positive"),
        ({"kind": "jsonl", "path": "a", "layout": "nothing"}, "is not a layout"),
        ({"kind": "folder", "path": 3}, "is not a path"),
    ],
)
def test_wrong_configs_say_what_and_where(config, message):
    with pytest.raises(UserError, match=message) as error:
        from_config("s", config)
    assert "prepare_data.places.s" in str(error.value)


def test_a_place_that_is_gone(tmp_path):
    for kind in KINDS:
        with pytest.raises(UserError, match="does not exist"):
            list(from_config("s", {"kind": kind, "path": str(tmp_path / "gone")}).units())


def test_a_file_that_goes_away_changes_the_fingerprint(tmp_path):
    make(tmp_path, {"a.py": "x\n"})
    (unit,) = folder(tmp_path).units()
    before = unit.fingerprint()
    shutil.move(tmp_path / "a.py", tmp_path / "b.txt")
    assert unit.fingerprint() != before
    assert len(bytes.fromhex(before)) == hashlib.blake2b(digest_size=16).digest_size
