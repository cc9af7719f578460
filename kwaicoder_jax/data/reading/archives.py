"""What is in an archive: its members' names, and their bytes in the order of names, never on disk and never without limits.

An archive is somebody else's program for making files. Members that would leave the folder, links, devices, nested
archives and names that are no text are refused one by one; a bomb or a broken archive is refused as a whole.
"""

import abc
import dataclasses
import re
import stat
import zipfile
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import IO, NamedTuple

from kwaicoder_jax.data.reading import streams, tar
from kwaicoder_jax.data.reading.streams import Limits, Refused

ENDINGS = (
    *(".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst", ".crate"),
    *(".zip", ".whl", ".egg", ".jar", ".nupkg"),
)
_NESTED = (*ENDINGS, ".gz", ".bz2", ".xz", ".zst", ".7z", ".rar", ".deb", ".rpm", ".iso", ".cab", ".war", ".apk")


class Skipped(NamedTuple):
    """What was left out, and why; `identifier` names a document, a member, a line of a file, or a whole archive."""

    identifier: str
    reason: str


@dataclasses.dataclass(frozen=True)
class Listing:
    """The members of an archive.

    Attributes:
      sizes: bytes by name, of those that can be read, in the order of names.
      refused: the others.
    """

    sizes: dict[str, int]
    refused: list[Skipped]


class Container(abc.ABC):
    """Files below one root: an archive, a folder, a repository."""

    @abc.abstractmethod
    def listing(self) -> Listing:
        """Names and sizes. Raises Refused where the whole cannot be read."""

    @abc.abstractmethod
    def contents(self, names: Collection[str]) -> Iterator[tuple[str, bytes | Skipped]]:
        """Yields each name of `names` once, in order, with its bytes or with why there are none."""


def clean_name(raw: bytes | str) -> tuple[str, str]:
    """Returns a member's name as a relative path of plain text, and why it cannot be one ("" where it can).

    Bytes that are no UTF-8 are written as "\\xe9"; "." and empty parts go. A string holds such bytes as the file system's
    functions give them (PEP 383).
    """
    if isinstance(raw, str):
        try:
            raw = raw.encode("utf-8", "surrogateescape")
        except UnicodeEncodeError:
            return ascii(raw)[1:-1], "bad_name"
    name = raw.decode("utf-8", "backslashreplace")
    if not name.isprintable():
        return ascii(name)[1:-1], "bad_name"
    if name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name) or re.match(r"[A-Za-z]:[/\\]", name):
        return name, "escape"
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if not parts or len(parts) > 100 or len(name) > 2000:
        return name[:2000], "bad_name"
    return "/".join(parts), ""


def _sort(members: dict[str, int], refused: list[Skipped]) -> Listing:
    return Listing(dict(sorted(members.items())), sorted(refused))


class _Members:
    """Collects names one by one and says which are refused."""

    def __init__(self, limits: Limits):
        self.sizes: dict[str, int] = {}
        self.refused: list[Skipped] = []
        self._limits, self._count, self._total = limits, 0, 0

    def take(self, raw: bytes | str, size: int, kind: str) -> str:
        """Returns the clean name, "" where the member is refused; raises Refused past the archive's limits."""
        self._count += 1
        self._total += size
        if self._count > self._limits.members:
            raise Refused("too_many_members")
        if self._total > self._limits.total_bytes:
            raise Refused("bomb")
        name, reason = clean_name(raw)
        if kind:
            reason = reason or kind
        elif not reason and name in self.sizes:
            reason = "duplicate_name"
        elif not reason and name.lower().endswith(_NESTED):
            reason = "nested_archive"
        elif not reason and size > self._limits.member_bytes:
            reason = "too_large"
        if reason:
            self.refused.append(Skipped(name, reason))
            return ""
        self.sizes[name] = size
        return name


class Zip(Container):
    """A zip file, wheel or jar; a member whose checksum is wrong is refused alone."""

    def __init__(self, path: Path, limits: Limits):
        self._path, self._limits = path, limits
        self._infos: dict[str, zipfile.ZipInfo] = {}

    def listing(self) -> Listing:
        members = _Members(self._limits)
        with streams.faults(), self._path.open("rb") as file:
            size = self._path.stat().st_size
            _check_directory(file, size)
            for info in zipfile.ZipFile(file).infolist():
                mode = info.external_attr >> 16
                if info.is_dir():
                    continue
                kind = "encrypted" if info.flag_bits & 1 else "link" if stat.S_ISLNK(mode) else ""
                if not kind and info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2):
                    kind = "unsupported"
                if not kind and stat.S_IFMT(mode) not in (0, stat.S_IFREG):
                    kind = "special_file"
                if name := members.take(info.filename, info.file_size, kind):
                    self._infos[name] = info
        total = sum(members.sizes.values())
        if total > self._limits.ratio * size + self._limits.free_bytes:
            raise Refused("bomb")  # also where members overlap
        return _sort(members.sizes, members.refused)

    def contents(self, names: Collection[str]) -> Iterator[tuple[str, bytes | Skipped]]:
        with streams.faults():
            file = self._path.open("rb")
        with file:
            with streams.faults():
                archive = zipfile.ZipFile(file)
            for name in sorted(names):
                try:
                    with streams.faults(), archive.open(self._infos[name]) as member:
                        raw = member.read(self._limits.member_bytes + 1)
                        if len(raw) != self._infos[name].file_size:
                            raise Refused("broken_member")
                    yield name, raw
                except Refused as refused:
                    yield name, Skipped(name, "broken_member" if refused.reason == "broken_archive" else refused.reason)


def _check_directory(file: IO[bytes], size: int, limit: int = 64 << 20) -> None:
    """zipfile reads the whole list of members into memory: refuse one that is larger than any sound archive's."""
    file.seek(max(0, size - 65_557))
    tail = file.read(65_557)
    at = tail.rfind(b"PK\x05\x06")
    if at < 0 or len(tail) < at + 22:
        raise Refused("broken_archive")
    directory = int.from_bytes(tail[at + 12 : at + 16], "little")
    if directory == 0xFFFFFFFF:  # zip64
        locator = tail.rfind(b"PK\x06\x06", 0, at)
        directory = int.from_bytes(tail[locator + 40 : locator + 48], "little") if locator >= 0 else size
    if directory > limit:
        raise Refused("too_many_members")
    file.seek(0)


class Tar(Container):
    """A tar file, compressed or not, of which one pass gives the names and as many contents as `limits.held_bytes` allow.

    The rest is read again, a part of the names at a time: sorted contents of any archive in bounded memory. An archive
    that is broken anywhere gives nothing, since its contents have no checksums of their own.
    """

    def __init__(self, path: Path, limits: Limits, wanted: Callable[[str], bool]):
        self._path, self._limits, self._wanted = path, limits, wanted
        self._held: dict[str, bytes] = {}
        self._sizes: dict[str, int] = {}

    def listing(self) -> Listing:
        members = _Members(self._limits)
        room = self._limits.held_bytes
        with streams.faults(), streams.opened(self._path, self._limits) as stream:
            for member in tar.members(stream):
                name = members.take(member.name, member.size, member.kind)
                if name and self._wanted(name) and (room := room - member.size) >= 0:
                    self._held[name] = member.read()
            streams.drain(stream)
        self._sizes = members.sizes
        return _sort(members.sizes, members.refused)

    def contents(self, names: Collection[str]) -> Iterator[tuple[str, bytes | Skipped]]:
        for part in self._parts(sorted(names)):
            found = {name: self._held[name] for name in part if name in self._held}
            if missing := set(part) - found.keys():
                found |= self._again(missing)
            for name in part:
                raw = found.pop(name, None)
                yield name, Skipped(name, "unreadable") if raw is None else raw

    def _parts(self, names: list[str]) -> Iterator[list[str]]:
        part: list[str] = []
        room = self._limits.held_bytes
        for name in names:
            size = 0 if name in self._held else self._sizes[name]
            if part and size > room:
                yield part
                part, room = [], self._limits.held_bytes
            part.append(name)
            room -= size
        yield part

    def _again(self, names: set[str]) -> dict[str, bytes]:
        found: dict[str, bytes] = {}
        with streams.faults(), streams.opened(self._path, self._limits) as stream:
            for member in tar.members(stream):
                name, reason = clean_name(member.name)
                if name in names and not (reason or member.kind or name in found):
                    found[name] = member.read()
                    if len(found) == len(names):
                        break
        return found


def open_archive(path: Path, limits: Limits, wanted: Callable[[str], bool]) -> Container:
    """Returns the archive of a file by its first bytes, whatever its name says.

    Args:
      path: the file.
      limits: see there.
      wanted: of a name, whether its contents will be asked for.
    """
    with path.open("rb") as file:
        magic = file.read(4)
    return Zip(path, limits) if magic in (b"PK\x03\x04", b"PK\x05\x06") else Tar(path, limits, wanted)
