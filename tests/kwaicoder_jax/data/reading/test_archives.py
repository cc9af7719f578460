"""The oracle of well-formed archives is the standard library; hostile ones are made by hand."""

import bz2
import gzip
import io
import lzma
import random
import struct
import tarfile
import zipfile

import pytest
import zstandard
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st

from kwaicoder_jax.data.reading.archives import Skipped, clean_name, open_archive
from kwaicoder_jax.data.reading.streams import Limits, Refused

FILES = {
    "p/README": b"words\n",
    "p/src/a.py": b"a = 1\n" * 300,
    "p/src/" + "long" * 50 + "/b.py": b"b = 2\n",
    "p/naïve.py": "x = 'é'\n".encode(),
    "p/empty.py": b"",
    "p/exact.py": b"#" * 512,
}
COMPRESSORS = {
    "": bytes,
    ".gz": gzip.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
    ".zst": zstandard.compress,
}


def tar_bytes(files=FILES, format=tarfile.PAX_FORMAT, more=()):
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as archive:
        for name, raw in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(raw)
            archive.addfile(info, io.BytesIO(raw))
        for info, raw in more:
            archive.addfile(info, io.BytesIO(raw))
    return out.getvalue()


def zip_bytes(files=FILES, method=zipfile.ZIP_DEFLATED):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, raw in files.items():
            archive.writestr(name, raw)
    return out.getvalue()


def everything(path, limits=None, wanted=lambda name: True):
    """All contents by name, and reasons by name of what is refused; raises Refused."""
    archive = open_archive(path, limits or Limits(), wanted)
    listing = archive.listing()
    assert list(listing.sizes) == sorted(listing.sizes)
    contents = list(archive.contents(list(listing.sizes)))
    assert [name for name, _ in contents] == sorted(listing.sizes)
    refused = listing.refused + [raw for _, raw in contents if isinstance(raw, Skipped)]
    return {name: raw for name, raw in contents if isinstance(raw, bytes)}, dict(refused)


def reason(path, raw, **limits):
    path.write_bytes(raw)
    with pytest.raises(Refused) as refused:
        everything(path, Limits(**limits))
    return refused.value.reason


@pytest.fixture
def path(tmp_path):
    return tmp_path / "archive"


@pytest.mark.parametrize("ending", COMPRESSORS)
@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_tar(path, ending, format):
    files = {name: raw for name, raw in FILES.items() if format != tarfile.USTAR_FORMAT or len(name) < 100}
    path.write_bytes(COMPRESSORS[ending](tar_bytes(files, format)))
    assert everything(path) == (files, {})


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
def test_zip(path, method):
    path.write_bytes(zip_bytes(method=method))
    assert everything(path) == (FILES, {})


@pytest.mark.parametrize("held", [0, 300, 1000, 10**6])
def test_contents_are_the_same_whatever_fits_in_memory(path, held):
    names = list(FILES)
    random.Random(1).shuffle(names)
    path.write_bytes(gzip.compress(tar_bytes({name: FILES[name] for name in names})))
    assert everything(path, Limits(held_bytes=held)) == (FILES, {})
    assert everything(path, wanted=lambda name: False) == (FILES, {})


def test_of_two_members_of_one_name_the_first_counts(path):
    twice, last = tarfile.TarInfo("p/README"), tarfile.TarInfo("p/z.py")
    twice.size = last.size = 6
    path.write_bytes(tar_bytes(more=[(twice, b"other\n"), (last, b"z = 1\n")]))
    for wanted in (True, False):  # read at once, or in a second pass
        files, refused = everything(path, wanted=lambda name, wanted=wanted: wanted)
        assert files == FILES | {"p/z.py": b"z = 1\n"}
        assert refused == {"p/README": "duplicate_name"}


def _with_sum(header, signed=False):
    header[148:156] = b" " * 8
    total = sum(header) - (256 * sum(byte > 127 for byte in header) if signed else 0)
    header[148:156] = b"%06o\0 " % total
    return header


def test_headers_of_old_programs(path):
    raw = bytearray(tar_bytes({"naïve.py": b"a = 1\n"}, tarfile.GNU_FORMAT))
    raw[:512] = _with_sum(raw[:512], signed=True)
    path.write_bytes(raw)
    assert everything(path)[0] == {"naïve.py": b"a = 1\n"}
    raw[345:357] = b"14000000000\0"  # GNU keeps times where ustar keeps the name's first part
    raw[:512] = _with_sum(raw[:512])
    path.write_bytes(raw)
    assert everything(path)[0] == {"naïve.py": b"a = 1\n"}
    raw[156:157], raw[482] = b"S", 1  # a sparse file with more of its map behind the header
    raw[:512] = _with_sum(raw[:512])
    path.write_bytes(raw[:512] + b"\0" * 512 + raw[512:])
    assert everything(path) == ({}, {"naïve.py": "sparse"})


def test_several_streams_and_padding(path):
    raw = tar_bytes()
    path.write_bytes(lzma.compress(raw[:1000]) + lzma.compress(raw[1000:]) + b"\0" * 8)
    assert everything(path)[0] == FILES
    path.write_bytes(gzip.compress(raw[:1000]) + gzip.compress(raw[1000:]))
    assert everything(path)[0] == FILES
    path.write_bytes(zstandard.compress(raw[:1000]) + zstandard.compress(raw[1000:]))
    assert everything(path)[0] == FILES


def test_hostile_members_of_a_tar_are_refused_alone(path):
    def info(name, kind=tarfile.REGTYPE, target=""):
        made = tarfile.TarInfo(name)
        made.type, made.linkname = kind, target
        return made, b""

    more = [
        info("/etc/passwd.py"),
        info("../up.py"),
        info("p/../../up.py"),
        info("C:\\up.py"),
        info("p\\..\\..\\up.py"),
        info("p/link.py", tarfile.SYMTYPE, "/etc/passwd"),
        info("p/hard.py", tarfile.LNKTYPE, "p/README"),
        info("p/pipe.py", tarfile.FIFOTYPE),
        info("p/disk.py", tarfile.BLKTYPE),
        info("p/new\nline.py"),
        info("p/src/a.py"),
        info("p/./src//a.py"),
        info("p/inner.tar.gz"),
        info("p/folder", tarfile.DIRTYPE),
        info("."),
    ]
    path.write_bytes(tar_bytes(more=more))
    files, refused = everything(path)
    assert files == FILES
    assert refused == {
        "/etc/passwd.py": "escape",
        "../up.py": "escape",
        "p/../../up.py": "escape",
        "C:\\up.py": "escape",
        "p\\..\\..\\up.py": "escape",
        "p/link.py": "link",
        "p/hard.py": "link",
        "p/pipe.py": "special_file",
        "p/disk.py": "special_file",
        "p/new\\nline.py": "bad_name",
        "p/src/a.py": "duplicate_name",
        "p/inner.tar.gz": "nested_archive",
        ".": "bad_name",
    }


def test_hostile_members_of_a_zip_are_refused_alone(path):
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.writestr("../up.py", "x")
        archive.writestr("/up.py", "x")
        archive.writestr("good.py", "x = 1\n")
        archive.writestr("inner.zip", "x")
        link = zipfile.ZipInfo("link.py")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("good.py", "x = 2\n")
        large = zipfile.ZipInfo("lzma.py")
        large.compress_type = zipfile.ZIP_LZMA
        archive.writestr(large, "x")
    path.write_bytes(out.getvalue())
    files, refused = everything(path)
    assert files == {"good.py": b"x = 1\n"}
    assert refused == {
        "../up.py": "escape",
        "/up.py": "escape",
        "inner.zip": "nested_archive",
        "link.py": "link",
        "good.py": "duplicate_name",
        "lzma.py": "unsupported",
    }


def test_a_damaged_member_of_a_zip_is_refused_alone(path):
    raw = bytearray(zip_bytes(method=zipfile.ZIP_STORED))
    raw[raw.index(b"words")] ^= 1
    path.write_bytes(raw)
    files, refused = everything(path)
    assert refused == {"p/README": "broken_member"}
    assert files == {name: raw for name, raw in FILES.items() if name != "p/README"}


def test_a_zip_that_lies_about_sizes(path):
    raw = bytearray(zip_bytes({"a.py": b"a" * 100_000, "b.py": b"b = 1\n"}))
    at = raw.index(b"PK\x01\x02")
    for size in (10, 99_999, 100_001, 5_000_000):
        raw[at + 24 : at + 28] = struct.pack("<I", size)  # uncompressed, in the directory
        path.write_bytes(raw)
        assert everything(path) == ({"b.py": b"b = 1\n"}, {"a.py": "broken_member"})


def test_bombs(path):
    zeros = tar_bytes({"a.py": b"\0" * 20_000_000})
    for ending, compress in COMPRESSORS.items():
        if ending:
            assert reason(path, compress(zeros), free_bytes=1_000_000) == "bomb"
    parts = {f"{i}.py": b"\0" * 1_000_000 for i in range(9)}
    assert reason(path, zip_bytes(parts), free_bytes=1_000_000) == "bomb"
    path.write_bytes(zip_bytes({"a.py": b"\0" * 20_000_000, "b.py": b"b"}))
    assert everything(path) == ({"b.py": b"b"}, {"a.py": "too_large"})
    assert reason(path, tar_bytes({f"{i}.py": b"" for i in range(30)}), members=20) == "too_many_members"
    assert reason(path, tar_bytes({f"{i}.py": b"x" * 100 for i in range(30)}), total_bytes=2000) == "bomb"
    path.write_bytes(tar_bytes({"a.py": b"a" * 1000, "b.py": b"b"}))
    assert everything(path, Limits(member_bytes=999)) == ({"b.py": b"b"}, {"a.py": "too_large"})


def test_a_header_that_claims_a_huge_header_is_refused_before_it_is_read(path):
    info = tarfile.TarInfo("x")
    for kind in (tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XGLTYPE):
        info.type, info.size = kind, 10**10
        assert reason(path, info.tobuf(tarfile.GNU_FORMAT) + b"\0" * 1024) == "bomb"
    info.type, info.size = tarfile.REGTYPE, 2**62
    assert reason(path, info.tobuf(tarfile.GNU_FORMAT)) == "broken_archive"


def test_xz_may_not_ask_for_memory_without_end(path):
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 1 << 30}]
    raw = bytearray(lzma.compress(tar_bytes(), filters=filters))
    assert reason(path, raw) == "broken_archive"


def test_an_overlapping_zip_is_a_bomb(path):
    """Many names for one body, as in D. Fifield, A better zip bomb (2019)."""
    raw = zip_bytes({"a.py": b"a" * 2_000_000})
    at = raw.index(b"PK\x01\x02")
    entry, end = raw[at : raw.index(b"PK\x05\x06")], raw[raw.index(b"PK\x05\x06") :]
    entries = b"".join(entry.replace(b"a.py", b"%4d" % i) for i in range(1000, 2000))
    end = end[:8] + struct.pack("<HHI", 1000, 1000, len(entries)) + end[16:]
    assert reason(path, raw[:at] + entries + end) == "bomb"


def test_files_that_are_no_archives(path):
    for raw in (
        b"",
        b"x",
        b"words\n" * 1000,
        b"\x1f\x8b",
        b"PK\x03\x04",
        b"PK\x05\x06",
        b"BZh9",
        b"\xfd7zXZ\0",
        b"\x28\xb5\x2f\xfd",
    ):
        assert reason(path, raw) == "broken_archive", raw


@pytest.mark.parametrize("ending", COMPRESSORS)
def test_every_truncation_is_noticed(path, ending):
    whole = COMPRESSORS[ending](tar_bytes({"a.py": bytes(random.Random(3).choices(range(97, 122), k=2000))}))
    for length in {*range(0, len(whole), max(1, len(whole) // 60))}:
        path.write_bytes(whole[:length])
        try:
            files, _ = everything(path)
        except Refused:
            continue
        # only what an uncompressed tar has behind its last member may go unnoticed
        assert ending == "", length
        assert len(files["a.py"]) == 2000


SMALL = {name: make(tar_bytes()) for name, make in COMPRESSORS.items()} | {".zip": zip_bytes()}


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(sorted(SMALL)), st.data())
def test_mutated_archives_never_crash(path, ending, data):
    raw = bytearray(SMALL[ending])
    # bytes of a tar are mostly padding: look where something is
    places = [i for i in range(len(raw)) if raw[i]]
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.sampled_from(places)) + data.draw(st.integers(-2, 2))
        kind = data.draw(st.sampled_from(["flip", "set", "cut", "repeat"]))
        if kind == "cut" and at > 0:
            del raw[at : at + data.draw(st.integers(1, 600))]
        elif kind == "repeat" and at >= 0:
            raw[at:at] = raw[at : at + data.draw(st.integers(1, 600))]
        elif 0 <= at < len(raw):
            raw[at] = raw[at] ^ 1 << data.draw(st.integers(0, 7)) if kind == "flip" else data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    try:
        files, _ = everything(path)
    except Refused as error:
        event(error.reason)
        return
    for name in files:
        assert clean_name(name) == (name, "")
    if ending not in ("",):  # the others have checksums over contents: what is given is what was put in
        assert set(files.values()) <= set(FILES.values()) | {b""}


@settings(max_examples=60)
@given(st.one_of(st.binary(max_size=40), st.text(st.characters(codec=None), max_size=40)))
def test_any_name_is_plain_or_refused(raw):
    name, reason = clean_name(raw)
    name.encode()
    assert name.isprintable() or reason == "escape"
    if not reason:
        assert not name.startswith("/")
        assert not {"", ".", ".."} & set(name.split("/"))
        assert clean_name(name) == (name, "")


def test_names_that_are_not_utf8():
    assert clean_name(b"caf\xe9.py") == clean_name("caf\udce9.py") == ("caf\\xe9.py", "")
    assert clean_name("a/./b//c.py") == ("a/b/c.py", "")
    assert clean_name("a\ud800.py")[1] == "bad_name"
