"""Where text is, as a config says it, and how a place is cut into units of work.

A unit is small enough for one worker, can be pickled, and has a fingerprint: the same contents give the same one wherever
the folder lies, and a file that changes changes one unit (several, if its licence speaks for them).
"""

import abc
import dataclasses
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from kwaicoder_jax.data.reading import languages, licences, tables
from kwaicoder_jax.data.reading.archives import ENDINGS
from kwaicoder_jax.data.reading.folders import GitFiles, read_file, walk
from kwaicoder_jax.data.reading.streams import BLOCK, Limits, Refused
from kwaicoder_jax.data.reading.units import Unit, add, add_file, context_of, cut, speaking_files, weights
from kwaicoder_jax.errors import UserError

UNIT_BYTES = 64_000_000  # of raw text


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place(abc.ABC):
    """A kind of place with its settings.

    Attributes:
      name: the source of its documents.
      path: a folder; for files, one file too.
      licence: SPDX expression for documents of which no licence is found.
      language: for documents of which no language is found.
      unit_bytes: of raw text in a unit, about.
    """

    name: str
    path: str
    licence: str = ""
    language: str = ""
    unit_bytes: int = UNIT_BYTES

    def __post_init__(self) -> None:
        where = f"prepare_data.places.{self.name}"
        if self.language and self.language not in languages.LANGUAGES:
            raise UserError(
                f"{self.language!r} is not a language", where=f"{where}.language", remedy="see reading.languages"
            )
        if not isinstance(self.unit_bytes, int) or isinstance(self.unit_bytes, bool) or self.unit_bytes <= 0:
            raise UserError(f"{self.unit_bytes!r} is not a positive number of bytes", where=f"{where}.unit_bytes")
        if not isinstance(self.path, str):
            raise UserError(f"{self.path!r} is not a path", where=f"{where}.path")

    def root(self) -> Path:
        """The folder that names are below. Raises UserError where there is none."""
        path, remedy = Path(self.path), f"set prepare_data.places.{self.name}.path"
        if not self.path or not path.exists():
            raise UserError("does not exist", where=self.path or "an empty path", remedy=remedy)
        if not path.is_dir() and not isinstance(self, Files):
            raise UserError("is not a folder", where=self.path, remedy=remedy)
        return path if path.is_dir() else path.parent

    def settings(self) -> Iterator[str]:
        """The settings that say what the documents of a unit are; where the folder lies is none of them."""
        for field in dataclasses.fields(self):
            if field.name not in ("path", "unit_bytes"):
                yield f"{field.name}={getattr(self, field.name)!r}"

    @abc.abstractmethod
    def units(self) -> Iterator[Unit]:
        """Cuts the place, in an order that depends on contents alone."""

    def digest(self, unit: Unit, digest: Any) -> None:
        """Adds names and contents of a unit's files."""
        root = self.root()
        for path in (*unit.paths, *unit.context):
            add(digest, path.encode("utf-8", "surrogateescape"))
            add_file(digest, root / path, unit.part)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Folder(Place):
    """Files below a folder, at any depth; links are not followed.

    Attributes:
      repository_depth: levels of folders that make a repository: 0: all is one; 1: each top folder is one.
    """

    repository_depth: int = 1

    def units(self) -> Iterator[Unit]:
        root = self.root()
        sizes = {path: status.st_size for path, status in walk(root)}
        speaking = speaking_files(sizes)
        records = {path: read_file(root / path, 1 << 26) for path in sizes if path.endswith(licences.RECORD)}
        owners = licences.owners({path: raw for path, raw in records.items() if isinstance(raw, bytes)})
        for name, paths in cut(weights(sizes), self.unit_bytes):
            yield Unit(self, name, paths, context_of(paths, speaking, owners))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Git(Place):
    """Git repositories below a folder, or one: checkouts and bare ones, read at HEAD."""

    def repositories(self) -> list[str]:
        """Their paths below `root()`, sorted; one repository is "."."""
        root = self.root()
        found, folders = [], ["."]
        while folders:
            folder = folders.pop()
            inside = root / folder
            if (inside / ".git").exists() or all((inside / name).exists() for name in ("HEAD", "objects", "refs")):
                found.append(folder)
                continue
            try:
                with os.scandir(inside) as entries:
                    names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
            except OSError:
                continue
            folders += [name if folder == "." else f"{folder}/{name}" for name in names]
        return sorted(found)

    def units(self) -> Iterator[Unit]:
        root = self.root()
        for repository in self.repositories():
            try:
                tree = GitFiles(root / repository, None, Limits()).tree()
            except Refused:
                yield Unit(self, repository, (), repository=repository)
                continue
            sizes = {path: size for path, (_, _, size) in tree.items()}
            speaking = speaking_files(sizes)
            for name, paths in cut(weights(sizes), self.unit_bytes):
                yield Unit(self, f"{repository}/{name}", paths, context_of(paths, speaking, {}), repository=repository)

    def digest(self, unit: Unit, digest: Any) -> None:
        """Object names stand for contents."""
        try:
            tree = GitFiles(self.root() / unit.repository, None, Limits()).tree()
        except Refused:
            return add(digest, b"broken")
        for path in (*unit.paths, *unit.context):
            mode, name, _ = tree.get(path, ("", "missing", 0))
            add(digest, f"{mode} {name} ".encode() + path.encode("utf-8", "surrogateescape"))
        return None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Files(Place):
    """Files of a kind below a folder.

    Attributes:
      files: patterns of their paths, as in ("**/*.tar.gz",); empty: by the kind's endings.
    """

    files: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        files = (self.files,) if isinstance(self.files, str) else tuple(self.files)
        object.__setattr__(self, "files", files)

    def found(self, endings: tuple[str, ...]) -> list[str]:
        """Paths below `root()`, sorted. Raises UserError where there are none."""
        root, path = self.root(), Path(self.path)
        if path.is_file():
            return [path.name]
        every = (found for pattern in self.files or ("**/*",) for found in root.glob(pattern))
        paths = {each.relative_to(root).as_posix() for each in every if each.is_file() and not each.is_symlink()}
        if not self.files:
            paths = {each for each in paths if each.lower().endswith(endings)}
        if not paths:
            wanted = self.files or endings
            raise UserError(
                f"no file of {wanted} there", where=str(root), remedy=f"set prepare_data.places.{self.name}.files"
            )
        return sorted(paths)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Archives(Files):
    """Archives below a folder: tar (plain, gz, bz2, xz, zst), zip, wheels, sdists, Debian's sources; one is one unit."""

    def units(self) -> Iterator[Unit]:
        for path in self.found(ENDINGS):
            yield Unit(self, path, (path,))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table(Files):
    """Files of rows.

    Attributes:
      layout: a name of `tables.LAYOUTS`, or a mapping as `tables.Fields` has.
    """

    layout: Any = "fineweb"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.layout, tables.Fields):
            where = f"prepare_data.places.{self.name}.layout"
            object.__setattr__(self, "layout", tables.fields_from_config(self.layout, where))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Jsonl(Table):
    """JSONL files, plain ones in parts; compressed ones are one unit each."""

    def units(self) -> Iterator[Unit]:
        root = self.root()
        for path in self.found((".jsonl", ".jsonl.gz", ".jsonl.zst", ".json.gz", ".ndjson")):
            size = (root / path).stat().st_size
            if path.lower().endswith((".gz", ".zst", ".bz2", ".xz")) or size <= self.unit_bytes:
                yield Unit(self, path, (path,))
                continue
            for start in range(0, size, self.unit_bytes):
                part = (start, min(size, start + self.unit_bytes))
                yield Unit(self, f"{path}#{start:015d}", (path,), part=part)

    def digest(self, unit: Unit, digest: Any) -> None:
        """A line may begin in a part and end behind it, and whether one begins at its start is told by the byte before."""
        if unit.part is None:
            return super().digest(unit, digest)
        path, (start, stop) = self.root() / unit.paths[0], unit.part
        add(digest, unit.paths[0].encode("utf-8", "surrogateescape"))
        try:
            with path.open("rb") as file:
                file.seek(stop - 1)
                while (line := file.readline(BLOCK)) and not line.endswith(b"\n"):
                    pass
                stop = file.tell()
        except OSError:
            pass
        return add_file(digest, path, (max(0, start - 1), stop))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Parquet(Table):
    """Parquet files, in parts of whole row groups."""

    def units(self) -> Iterator[Unit]:
        root = self.root()
        for path in self.found((".parquet",)):
            sizes = tables.row_groups(root / path)
            start, taken = 0, 0
            for i, size in enumerate(sizes):
                if taken and taken + size > self.unit_bytes:
                    yield Unit(self, f"{path}#{start:06d}", (path,), part=(start, i))
                    start, taken = i, 0
                taken += size
            part = (start, len(sizes)) if sizes else None  # a broken file is a unit that says so
            yield Unit(self, f"{path}#{start:06d}" if part else path, (path,), part=part)

    def digest(self, unit: Unit, digest: Any) -> None:
        """Of the bytes of its row groups, the schema, and the number of the first row."""
        if unit.part is None:
            return super().digest(unit, digest)
        path = self.root() / unit.paths[0]
        add(digest, unit.paths[0].encode("utf-8", "surrogateescape"))
        try:
            start, stop, more = tables.span(path, unit.part)
        except ValueError:
            return add(digest, b"broken")
        add(digest, more.encode())
        return add_file(digest, path, (start, stop))


KINDS: Mapping[str, type[Place]] = {
    "folder": Folder,
    "git": Git,
    "archives": Archives,
    "jsonl": Jsonl,
    "parquet": Parquet,
}


def from_config(name: str, config: Mapping[str, Any] | Place) -> Place:
    """Makes the place that a plain dict describes, as in {"kind": "archives", "path": "sdists", "licence": "MIT"}.

    Raises:
      UserError: an unknown kind or field, a missing or a wrong one.
    """
    where = f"prepare_data.places.{name}"
    if isinstance(config, Place):
        return config
    fields = dict(config)
    kind = fields.pop("kind", None)
    if kind not in KINDS:
        raise UserError(f"{kind!r} is not a kind of place", where=f"{where}.kind", remedy=f"one of {sorted(KINDS)}")
    known = {field.name for field in dataclasses.fields(KINDS[kind])} - {"name"}
    if unknown := sorted(set(fields) - known):
        raise UserError(f"unknown field {unknown[0]!r}", where=where, remedy=f"{kind} has {sorted(known)}")
    if "path" not in fields:
        raise UserError("is missing", where=f"{where}.path")
    return KINDS[kind](name=name, **fields)
