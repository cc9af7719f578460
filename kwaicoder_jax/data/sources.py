"""What a source of text is, how its configuration is read, and which part of it is taken.

A source yields `Document`s and counts what it leaves out, by reason. The kinds live in `python_sources.py`
(the interpreter's own library and the installed packages), `mathematics.py` (generated problems) and here (a folder).
"""

import abc
import dataclasses
import hashlib
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar

from kwaicoder_jax.data.documents import Document
from kwaicoder_jax.errors import UserError

LONGEST_LINE = 1000  # characters; the OpenCoder rule: longer lines are data or minified code
READ_LIMIT = 1_000_000  # bytes; a larger file is not even read


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source(abc.ABC):
    """A kind of source with its settings.

    Attributes:
      max_bytes: UTF-8 bytes of text to take at most.
      max_document_bytes: longer documents are skipped.
    """

    section: ClassVar[str] = "sources"  # of prepare_data, that it is from

    max_bytes: int
    max_document_bytes: int = 100_000

    def __post_init__(self) -> None:
        for field in ("max_bytes", "max_document_bytes"):
            value = getattr(self, field)
            if not isinstance(value, int) or isinstance(value, bool) or value <= 0:
                raise UserError(f"{value!r} is not a positive number of bytes", where=f"prepare_data.sources.*.{field}")

    @abc.abstractmethod
    def documents(self, name: str, skipped: Counter[str]) -> Iterator[Document]:
        """Yields the documents in an order that depends on contents only, up to `max_bytes` of text.

        Args:
          name: the source's name in the corpus.
          skipped: raised by one, under its reason, for each candidate that is left out.
        """


@dataclasses.dataclass(frozen=True)
class Entry:
    """A candidate: `read` gives its raw bytes, `render` makes the text of them (None: nothing there)."""

    identifier: str
    read: Callable[[], bytes | None]
    render: Callable[[str], str | None] = str


def fault(text: str, max_bytes: int) -> str | None:
    """Returns the reason to leave `text` out, or None: "empty", "null_bytes", "too_large", "long_line" or "table"."""
    if not text.strip():
        return "empty"
    if "\0" in text:
        return "null_bytes"
    if len(text.encode()) > max_bytes:
        return "too_large"
    if max(map(len, text.splitlines())) > LONGEST_LINE:
        return "long_line"
    if sum(map(text.count, "0123456789")) > 0.2 * len(text) and len(text) > 2000:
        return "table"  # generated tables of numbers
    return None


def select(name: str, entries: Iterable[Entry], source: Source, skipped: Counter[str]) -> Iterator[Document]:
    """Yields the entries' documents in the order of their contents' SHA-256, up to `source.max_bytes`.

    The hash order spreads a partial selection over all packages and folders and does not depend on where or in which
    order the file system lists them. Two passes: one keeps a hash per entry, the other reads; no text is held.
    """
    keyed: list[tuple[bytes, str, Entry]] = []
    for entry in entries:
        raw = entry.read()
        if raw is None:
            skipped["too_large_or_unreadable"] += 1
        else:
            keyed.append((hashlib.sha256(raw).digest(), entry.identifier, entry))
    keyed.sort(key=lambda item: item[:2])
    taken = 0
    for digest, identifier, entry in keyed:
        raw = entry.read()
        if raw is None or hashlib.sha256(raw).digest() != digest:
            raise UserError("changed while it was being read", where=identifier, remedy="run again")
        text, reason = _text_of(raw, entry, source.max_document_bytes)
        if reason is not None:
            skipped[reason] += 1
            continue
        taken += len(text.encode())
        if taken > source.max_bytes:
            return
        yield Document(name, identifier, text)


def _text_of(raw: bytes, entry: Entry, max_bytes: int) -> tuple[str, str | None]:
    try:
        text = entry.render(raw.decode("utf-8"))
    except UnicodeDecodeError:
        return "", "not_utf8"
    if text is None:
        return "", "nothing_there"
    return text, fault(text, max_bytes)


def reader(path: Path, limit: int = READ_LIMIT) -> Callable[[], bytes | None]:
    """Returns a function that reads `path`, or gives None where the file is larger than `limit` bytes or unreadable."""

    def read() -> bytes | None:
        try:
            return path.read_bytes() if path.is_file() and path.stat().st_size <= limit else None
        except OSError:
            return None

    return read


@dataclasses.dataclass(frozen=True, kw_only=True)
class Folder(Source):
    """Files below a folder, any depth, by suffix; hidden files and folders and links out of it are left alone.

    Attributes:
      path: the folder.
      suffixes: endings to take, as in (".py", ".md").
    """

    path: str
    suffixes: tuple[str, ...] = (".py", ".md", ".txt")

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.suffixes, str):
            raise UserError(f"{self.suffixes!r} is not a list of endings", where="prepare_data.sources.*.suffixes")
        object.__setattr__(self, "suffixes", tuple(self.suffixes))

    def documents(self, name: str, skipped: Counter[str]) -> Iterator[Document]:
        """Yields one document a file, named by its path below the folder."""
        root = Path(self.path)
        if not root.is_dir():
            raise UserError("is not a folder", where=str(root), remedy=f"set prepare_data.sources.{name}.path to one")
        yield from select(name, self._entries(root), self, skipped)

    def _entries(self, root: Path) -> Iterator[Entry]:
        for path in root.rglob("*"):
            relative = path.relative_to(root)
            if not path.name.endswith(self.suffixes) or any(part.startswith(".") for part in relative.parts):
                continue
            if path.is_file() and path.resolve().is_relative_to(root.resolve()):
                yield Entry(relative.as_posix(), reader(path, min(READ_LIMIT, self.max_document_bytes)))


def from_config(name: str, config: Mapping[str, Any] | Source, kinds: Mapping[str, type[Source]]) -> Source:
    """Makes the source that a plain dict describes, as in {"kind": "folder", "max_bytes": 10**6, "path": "texts"}.

    Raises:
      UserError: an unknown kind or field, a missing one, or a name that is not lower-case letters, digits and "_".
    """
    where = f"prepare_data.sources.{name}"
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise UserError("is not a source's name", where=where, remedy="use lower-case letters, digits and underscores")
    if isinstance(config, Source):
        return config
    fields = dict(config)
    kind = fields.pop("kind", None)
    if kind not in kinds:
        raise UserError(f"{kind!r} is not a kind of source", where=f"{where}.kind", remedy=f"one of {sorted(kinds)}")
    known = {field.name: field for field in dataclasses.fields(kinds[kind])}
    if unknown := sorted(set(fields) - set(known)):
        raise UserError(f"unknown field {unknown[0]!r}", where=where, remedy=f"{kind} has {sorted(known)}")
    for field in known.values():
        if field.default is dataclasses.MISSING and field.name not in fields:
            raise UserError("is missing", where=f"{where}.{field.name}")
    return kinds[kind](**fields)
