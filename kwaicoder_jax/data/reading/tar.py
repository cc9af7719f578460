"""The tar format, read as a stream: POSIX.1-2001 (pax), ustar, GNU and the old one.

The standard library's reader is not for strangers' files: it takes a header's word for the size of the next header and
reads that much into memory.
"""

from collections.abc import Iterator
from typing import NamedTuple

from kwaicoder_jax.data.reading.streams import BLOCK, Refused, Stream

_RECORD = 512
_ASCII = bytes(range(128))
_LONGEST_HEADER = 1 << 20  # bytes of a long name or of pax fields
_KINDS = {b"1": "link", b"2": "link", b"3": "special_file", b"4": "special_file", b"6": "special_file", b"S": "sparse"}


class Member:
    """A file of the archive, readable until the next one is asked for.

    Attributes:
      name: as it stands there, in bytes.
      size: in bytes.
      kind: "" for a plain file; "link", "special_file", "sparse".
    """

    def __init__(self, name: bytes, size: int, kind: str, stream: Stream):
        self.name, self.size, self.kind = name, size, kind
        self._stream, self._left = stream, size

    def read(self) -> bytes:
        """All of it."""
        raw = _exactly(self._stream, self._left)
        self._left = 0
        return raw

    def skip(self) -> None:
        """Passes over what was not read and over the padding."""
        left = self._left + -self.size % _RECORD
        while left > 0:
            left -= len(_exactly(self._stream, min(left, BLOCK)))


class _Pending(NamedTuple):
    """What extension headers say of the next member."""

    name: bytes | None = None
    size: int | None = None
    sparse: bool = False


def members(stream: Stream) -> Iterator[Member]:
    """Yields the files, links and devices of a tar stream; folders are left out.

    Raises:
      Refused: "broken_archive" where a header's checksum or number is wrong or the stream ends early.
    """
    pending = _Pending()
    seen = False
    while True:
        header = stream.read(_RECORD)
        if header.count(0) == len(header):  # the end: two empty records, or as some write it one or none
            if len(header) < _RECORD and not (seen and not header):
                raise Refused("broken_archive")
            return
        if len(header) < _RECORD:
            raise Refused("broken_archive")
        _check_sum(header)
        seen = True
        kind, size = header[156:157], _number(header[124:136])
        if kind in (b"L", b"K", b"x", b"g", b"X"):
            pending = _extended(kind, size, stream, pending)
            continue
        size = pending.size if pending.size is not None else size
        plain = kind not in _KINDS and kind not in (b"5", b"D", b"V", b"M")
        name = pending.name or _name(header)
        if kind == b"5" or (plain and name.endswith(b"/") and kind in (b"\0", b"0")):
            plain, reason = False, ""
        else:
            reason = _KINDS.get(kind, "" if plain else "special_file")
        member = Member(name, 0 if kind in (b"1", b"2", b"3", b"4", b"5", b"6") else size, reason, stream)
        if pending.sparse:
            member.kind = "sparse"
        extended = kind == b"S" and header[482]
        while extended:  # more of a sparse file's map
            extended = _exactly(stream, _RECORD)[504]
        pending = _Pending()
        if plain or member.kind:
            yield member
        member.skip()


def _name(header: bytes) -> bytes:
    name = header[:100].split(b"\0", 1)[0]
    if header[257:263] == b"ustar\0" and (prefix := header[345:500].split(b"\0", 1)[0]):
        return prefix + b"/" + name
    return name


def _number(field: bytes) -> int:
    if field[0] & 0x80:  # GNU: base 256
        value = int.from_bytes(field, "big") & ~(0x80 << 8 * (len(field) - 1))
        if field[0] & 0x40:
            raise Refused("broken_archive")
    else:
        digits = field.split(b"\0", 1)[0].strip()
        if digits and not (digits.isdigit() and digits.isascii() and not set(digits) & set(b"89")):
            raise Refused("broken_archive")
        value = int(digits or b"0", 8)
    if value >= 1 << 60:
        raise Refused("broken_archive")
    return value


def _check_sum(header: bytes) -> None:
    plain = header[:148] + 8 * b" " + header[156:]
    total = sum(plain)
    signed = total - 256 * len(plain.translate(None, _ASCII))
    if _number(header[148:156]) not in (total, signed):  # some old programs add signed characters
        raise Refused("broken_archive")


def _extended(kind: bytes, size: int, stream: Stream, pending: _Pending) -> _Pending:
    if size > _LONGEST_HEADER:
        raise Refused("bomb")
    raw = _exactly(stream, size)
    _exactly(stream, -size % _RECORD)
    if kind == b"L":
        return pending._replace(name=raw.split(b"\0", 1)[0])
    if kind in (b"x", b"X"):
        fields = _pax(raw)
        stated = fields.get(b"size", b"")
        if stated and not (stated.isdigit() and len(stated) < 19):
            raise Refused("broken_archive")
        sparse = any(field.startswith(b"GNU.sparse") for field in fields)
        return _Pending(fields.get(b"path", pending.name), int(stated) if stated else pending.size, sparse)
    return pending  # a link's long target, or fields for all members: neither names nor sizes a file


def _pax(raw: bytes) -> dict[bytes, bytes]:
    """Fields of "LENGTH NAME=VALUE\\n"."""
    fields: dict[bytes, bytes] = {}
    at = 0
    while at < len(raw) and raw[at : at + 1] != b"\0":
        space = raw.find(b" ", at, at + 20)
        length = raw[at:space] if space > 0 else b""
        if not length.isdigit() or raw[at + int(length) - 1 : at + int(length)] != b"\n":
            raise Refused("broken_archive")
        name, equals, value = raw[space + 1 : at + int(length) - 1].partition(b"=")
        if not equals or int(length) < 5:
            raise Refused("broken_archive")
        fields[name] = value
        at += int(length)
    return fields


def _exactly(stream: Stream, size: int) -> bytes:
    raw = stream.read(size) if size else b""
    if len(raw) != size:
        raise Refused("broken_archive")
    return raw
