"""From a unit to its documents: `read`."""

import dataclasses
import heapq
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path

from kwaicoder_jax.data.documents import Document
from kwaicoder_jax.data.reading import encoding, languages, licence_texts, licences, tables
from kwaicoder_jax.data.reading.archives import ENDINGS, Container, Listing, Skipped, clean_name, open_archive
from kwaicoder_jax.data.reading.folders import FolderFiles, GitFiles
from kwaicoder_jax.data.reading.licence_texts import PERMISSIVE
from kwaicoder_jax.data.reading.places import Archives, Folder, Git, Jsonl, Table, Unit
from kwaicoder_jax.data.reading.streams import Limits, Refused
from kwaicoder_jax.errors import UserError

_LONGEST_LICENCE = 4_000_000  # bytes; a RECORD may have tens of thousands of lines


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """What is taken.

    Attributes:
      languages: names of `languages.LANGUAGES`; None: all of them.
      licences: SPDX identifiers that are allowed; None: any.
      allow_unknown_licence: also take documents of which no licence is found.
      max_document_bytes: longer documents are skipped.
      guess_languages: ask magika, which must be installed, about files whose names tell nothing.
      limits: on archives and lines.
    """

    languages: tuple[str, ...] | None = None
    licences: frozenset[str] | None = PERMISSIVE
    allow_unknown_licence: bool = False
    max_document_bytes: int = 1_000_000
    guess_languages: bool = False
    limits: Limits = dataclasses.field(default_factory=Limits)

    def __post_init__(self) -> None:
        if unknown := sorted(set(self.languages or ()) - set(languages.LANGUAGES)):
            remedy = f"one of {', '.join(sorted(languages.LANGUAGES))}"
            raise UserError(f"{unknown[0]!r} is not a language", where="prepare_data.reading.languages", remedy=remedy)
        if self.max_document_bytes <= 0:
            raise UserError(
                f"{self.max_document_bytes!r} is not positive", where="prepare_data.reading.max_document_bytes"
            )

    def by_name(self, name: str, size: int) -> str:
        """Why a file is left out by its name and size alone; "" where it may be taken."""
        found = languages.candidates(name)
        if found == () and not self.guess_languages:
            return "unknown_language"
        if found and self.languages is not None and not set(found) & set(self.languages):
            return "other_language"
        return "too_large" if size > self.max_document_bytes * 4 else ""  # in UTF-32

    def by_licence(self, licence: str) -> str:
        """Why a licence is not taken."""
        if self.licences is None or (not licence and self.allow_unknown_licence):
            return ""
        if not licence:
            return "unknown_licence"
        return "" if licences.allowed(licence, self.licences) else "licence"


def read(unit: Unit, options: Options, counts: Counter[str] | None = None) -> Iterator[Document | Skipped]:
    """Yields the documents of a unit, and what is left out with its reason, in the order of their identifiers.

    Nothing that stands in a file can raise; a file that is broken as a whole is one `Skipped`. In memory at a time: the
    contents that `options.limits.held_bytes` allows twice, and one document.

    Args:
      unit: what to read.
      options: what to take of it.
      counts: raised by one for each decoded text that was not UTF-8 under its encoding's name, as "encoding_cp1252",
        and for each in which mojibake was mended, as "mojibake".

    Raises:
      UserError: the place is gone, or an optional library is missing.
    """
    place, root = unit.place, unit.place.root()
    counts = Counter() if counts is None else counts
    if isinstance(place, Table):
        yield from _rows(unit, root / unit.paths[0], options, counts)
    elif isinstance(place, Archives):
        path = unit.paths[0]
        name = path.rsplit("/", 1)[-1]
        repository = next((name[: -len(end)] for end in ENDINGS if name.lower().endswith(end)), name)
        yield from _archive(_Root(unit, counts, f"{clean_name(path)[0]}/", repository), root / path, options)
    elif isinstance(place, Git):
        name = place.name if unit.repository == "." else unit.repository
        files = GitFiles(root / unit.repository, (*unit.paths, *unit.context), options.limits)
        yield from _files(_Root(unit, counts, f"{name}/", name), files, options)
    elif isinstance(place, Folder):
        every = FolderFiles(root, (*unit.paths, *unit.context), options.limits)
        yield from _files(_Root(unit, counts, "", depth=place.repository_depth), every, options)
    else:
        raise TypeError(f"{type(place).__name__} is not a kind of place that is read")


@dataclasses.dataclass(frozen=True)
class _Root:
    """How documents of files are named: `prefix` comes before, `stripped` goes, `depth` top folders are the repository."""

    unit: Unit
    counts: Counter[str]
    prefix: str
    repository: str = ""
    depth: int = 0
    stripped: str = ""

    def identifier(self, name: str) -> str:
        return self.prefix + name.removeprefix(self.stripped)

    def of(self, name: str) -> tuple[str, str]:
        """Returns (repository, path in it)."""
        folders = name.removeprefix(self.stripped).split("/")
        depth = min(self.depth, len(folders) - 1)
        return self.repository or "/".join(folders[:depth]), "/".join(folders[depth:])


def _archive(root: _Root, path: Path, options: Options) -> Iterator[Document | Skipped]:
    def wanted(name: str) -> bool:
        return _speaks(name) or not options.by_name(name, 0)

    try:
        container = open_archive(path, options.limits, wanted)
    except OSError:
        yield Skipped(root.prefix[:-1], "unreadable")
        return
    yield from _files(root, container, options)


def _top(names: Collection[str]) -> str:
    """The folder that all of an archive is in, as in "flask-3.1.0/"; "" where there is none."""
    tops = {name.partition("/")[0] for name in names}
    return f"{tops.pop()}/" if len(tops) == 1 and all("/" in name for name in names) else ""


def _speaks(name: str) -> bool:
    return licences.is_licence_file(name) or licences.is_metadata_file(name)


def _files(root: _Root, container: Container, options: Options) -> Iterator[Document | Skipped]:
    try:
        listing = container.listing()
        finder = _finder(container, listing)
    except Refused as broken:
        yield Skipped(root.prefix[:-1] or root.unit.identifier, broken.reason)
        return
    if isinstance(root.unit.place, Archives):
        root = dataclasses.replace(root, stripped=_top(listing.sizes))
    # of a folder or repository that is read in parts, the context only speaks
    silent = {clean_name(path)[0] for path in root.unit.context}
    reasons = {name: options.by_name(name, size) for name, size in listing.sizes.items() if name not in silent}
    left_out = [*listing.refused, *(Skipped(name, reason) for name, reason in reasons.items() if reason)]
    contents = container.contents([name for name, reason in reasons.items() if not reason])
    refused = ((skipped.identifier, skipped) for skipped in sorted(left_out) if skipped.identifier not in silent)
    for name, raw in heapq.merge(refused, _until_refused(contents), key=lambda pair: pair[0]):
        if isinstance(raw, Skipped):
            yield Skipped(root.identifier(name), raw.reason)
        else:
            yield _document(root, name, raw, finder, options)


def _until_refused(contents: Iterator[tuple[str, bytes | Skipped]]) -> Iterator[tuple[str, bytes | Skipped]]:
    last = ""
    try:
        for last, raw in contents:
            yield last, raw
    except Refused as refused:  # it changed since it was listed
        yield last, Skipped(last, refused.reason)


def _finder(container: Container, listing: Listing) -> licences.Finder:
    texts: dict[str, str] = {}
    metadata: dict[str, bytes] = {}
    names = [name for name, size in listing.sizes.items() if _speaks(name) and size <= _LONGEST_LICENCE]
    for name, raw in container.contents(names):
        if isinstance(raw, Skipped):
            continue
        if licences.is_metadata_file(name):
            metadata[name] = raw
        elif not languages.is_binary(raw):
            texts[name] = encoding.decode(raw).text
    return licences.Finder(texts, metadata)


def _document(root: _Root, name: str, raw: bytes, finder: licences.Finder, options: Options) -> Document | Skipped:
    identifier = root.identifier(name)
    if languages.is_binary(raw):
        return Skipped(identifier, "binary")
    decoded = encoding.decode(raw)
    if decoded.reason:
        return Skipped(identifier, decoded.reason)
    _count(decoded, root.counts)
    language = languages.language_of(name, decoded.text)
    if not language and options.guess_languages:
        language = languages.guessed(raw)
    repository, path = root.of(name)
    document = Document(root.unit.place.name, identifier, decoded.text, path, repository, language, finder.of(name))
    return _judged(document, root.unit, options)


def _count(decoded: encoding.Decoded, counts: Counter[str]) -> None:
    if decoded.encoding != "utf-8":
        counts[f"encoding_{decoded.encoding}"] += 1
    if decoded.repaired:
        counts["mojibake"] += 1


def _judged(document: Document, unit: Unit, options: Options) -> Document | Skipped:
    """The document with what it says of its licence and what its place says where nothing else does, if it is taken."""
    language = document.language or unit.place.language
    licence = licence_texts.of_header(document.text) or document.licence or unit.place.licence
    reason = ""
    if not document.text.strip():
        reason = "empty"
    elif not language:
        reason = "unknown_language"
    elif options.languages is not None and language not in options.languages:
        reason = "other_language"
    elif len(document.text) > options.max_document_bytes or len(document.text.encode()) > options.max_document_bytes:
        reason = "too_large"
    reason = reason or options.by_licence(licence)
    if reason:
        return Skipped(document.identifier, reason)
    return dataclasses.replace(document, language=language, licence=licence)


def _rows(unit: Unit, path: Path, options: Options, counts: Counter[str]) -> Iterator[Document | Skipped]:
    place = unit.place
    assert isinstance(place, Table)
    file = clean_name(unit.paths[0])[0]
    if isinstance(place, Jsonl):
        rows = tables.json_lines(path, place.layout, unit.part, options.limits)
    else:
        rows = tables.parquet_rows(path, place.layout, unit.part, options.limits)
    for row in rows:
        if isinstance(row, Skipped):
            yield Skipped(f"{file}#{row.identifier}" if row.identifier else file, row.reason)
            continue
        settled = encoding.settle(row.text)
        named = f"/{row.identifier[:200]}" if row.identifier and row.identifier.isprintable() else ""
        identifier = f"{file}#{row.number:015d}{named}"
        if settled.reason:
            yield Skipped(identifier, settled.reason)
            continue
        _count(settled, counts)
        row_path, fault = clean_name(row.path.lstrip("/"))
        row_path = "" if fault else row_path
        language = languages.named(row.language) if row.language else languages.language_of(row.path, settled.text)
        if not (row.language or row.path):
            language = language or place.language or "text"
        names = [licence_texts.of_name(name) or name for name in row.licence.split(" AND ")] if row.licence else []
        licence = " AND ".join(names)
        repository = row.repository if row.repository.isprintable() else ascii(row.repository)
        document = Document(place.name, identifier, settled.text, row_path, repository, language, licence)
        yield _judged(document, unit, options)
