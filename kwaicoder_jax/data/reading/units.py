"""Units of work: parts of a place that one worker reads, with fingerprints of their contents."""

import dataclasses
import hashlib
import os
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kwaicoder_jax.data.reading import languages, licences
from kwaicoder_jax.data.reading.streams import BLOCK

if TYPE_CHECKING:
    from kwaicoder_jax.data.reading.places import Place

_HEAVIEST = 1_000_000  # bytes; a larger file is most likely not read, and does not count


@dataclasses.dataclass(frozen=True)
class Unit:
    """A part of a place that is read by one worker.

    Attributes:
      place: what it is a part of.
      identifier: unique in its place.
      paths: files below the place's folder; for a repository, below that.
      context: further files that say what licence holds.
      part: (start, stop) of the bytes of a JSONL file, or of the row groups of a Parquet file; None: all.
      repository: the repository's path below the place's folder, for git.
    """

    place: "Place"
    identifier: str
    paths: tuple[str, ...]
    context: tuple[str, ...] = ()
    part: tuple[int, int] | None = None
    repository: str = ""

    def fingerprint(self) -> str:
        """Hex digest over names and contents, read as a stream; a file that cannot be read counts as such."""
        digest = hashlib.blake2b(digest_size=16)
        for name in (self.identifier, *self.place.settings()):
            add(digest, name.encode("utf-8", "surrogateescape"))
        self.place.digest(self, digest)
        return digest.hexdigest()


def add(digest: Any, raw: bytes) -> None:
    """Adds bytes to a digest so that where they end is told too."""
    digest.update(len(raw).to_bytes(8, "little") + raw)


def add_file(digest: Any, path: Path, part: tuple[int, int] | None = None) -> None:
    """Adds the length and the bytes of a file, or of a part of it."""
    start, stop = part or (0, 1 << 62)
    try:
        status = os.lstat(path)
        if not stat.S_ISREG(status.st_mode):
            return add(digest, b"not a file")
        with path.open("rb") as file:
            digest.update((min(stop, status.st_size) - start).to_bytes(8, "little", signed=True))
            file.seek(start)
            while start < stop and (raw := file.read(min(BLOCK, stop - start))):
                digest.update(raw)
                start += len(raw)
    except OSError:
        add(digest, b"unreadable")


def cut(sizes: Mapping[str, int], most: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Cuts files into named groups of at most `most` bytes (or one file), folders whole where they fit.

    Extendible hashing: a group that is too large is split by the next bit of a hash of its top folders, one level deeper
    where there is but one; so a new file changes the group that it falls in, and no other.
    """
    waiting = [("", 1, 0, tuple(sorted(sizes)))]
    while waiting:
        name, depth, bit, paths = waiting.pop()
        if not paths:
            continue
        if len(paths) == 1 or sum(sizes[path] for path in paths) <= most:
            yield name or "all", paths
            continue
        keys = {path: "/".join(path.split("/")[:depth]) for path in paths}
        if len(set(keys.values())) == 1:
            waiting.append((name, depth + 1, 0, paths))
            continue
        sides: tuple[list[str], list[str]] = ([], [])
        for path, key in keys.items():
            hashed = hashlib.blake2b(key.encode("utf-8", "surrogateescape"), digest_size=64).digest()
            sides[hashed[bit // 8] >> bit % 8 & 1].append(path)
        waiting.extend((name + digit, depth, bit + 1, tuple(side)) for digit, side in zip("10", reversed(sides)))


def weights(sizes: Mapping[str, int]) -> dict[str, int]:
    """Bytes of each file that may be text."""
    return {path: size if size <= _HEAVIEST and languages.candidates(path) != () else 0 for path, size in sizes.items()}


def context_of(paths: Iterable[str], speaking: Mapping[str, list[str]], owners: Mapping[str, str]) -> tuple[str, ...]:
    """Licence and metadata files above the files, and those of the Python packages that they belong to."""
    paths = list(paths)
    folders = {""}
    for path in paths:
        while (path := path.rpartition("/")[0]) and path not in folders:
            folders.add(path)
    owned = {owners[name] for name in (*folders, *(path for path in paths if path in owners)) if name in owners}
    found = {path for folder in folders | owned for path in speaking.get(folder, ())}
    return tuple(sorted(found.difference(paths)))


def speaking_files(paths: Iterable[str]) -> dict[str, list[str]]:
    """Licence and metadata files by the folder that they speak for."""
    found: dict[str, list[str]] = {}
    for path in paths:
        if licences.is_licence_file(path) or licences.is_metadata_file(path):
            folder, _, _ = path.rpartition("/")
            above, _, last = folder.rpartition("/")
            found.setdefault(above if last.lower() in ("licenses", "licences") else folder, []).append(path)
    return found
