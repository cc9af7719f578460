"""Rows of JSONL and Parquet files, and which of their fields make a document."""

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from kwaicoder_jax.data.reading import streams
from kwaicoder_jax.data.reading.archives import Skipped
from kwaicoder_jax.data.reading.streams import BLOCK, Limits, Refused
from kwaicoder_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Fields:
    """Which fields of a row hold what; of each tuple, the first that the row has. "a.b" is field b of the object in a.

    Attributes:
      text: the document.
      join: further fields, put after the text with an empty line between, as a solution after its question.
      identifier: unique in its file; the row's number stands in where it is empty.
      path: in its repository.
      repository: its name.
      language: in the data set's spelling; see `languages.named`.
      licence: SPDX identifiers, one or a list of them.
    """

    text: tuple[str, ...]
    join: tuple[str, ...] = ()
    identifier: tuple[str, ...] = ()
    path: tuple[str, ...] = ()
    repository: tuple[str, ...] = ()
    language: tuple[str, ...] = ()
    licence: tuple[str, ...] = ()

    def names(self) -> set[str]:
        """All fields at the top of a row, as in "a" of "a.b"."""
        return {name.split(".")[0] for group in dataclasses.astuple(self) for name in group}


LAYOUTS: Mapping[str, Fields] = {
    # bigcode/the-stack, -dedup, -smol and the-stack-v2 with its contents fetched; starcoderdata
    "the_stack": Fields(
        text=("content",),
        identifier=("blob_id", "hexsha", "id"),
        path=("path", "max_stars_repo_path"),
        repository=("repo_name", "max_stars_repo_name", "repository_name"),
        language=("language", "lang"),
        licence=("detected_licenses", "max_stars_repo_licenses", "licenses", "license"),
    ),
    # HuggingFaceFW/fineweb, -edu; OpenCoder's fineweb-code-corpus and fineweb-math-corpus
    "fineweb": Fields(text=("text",), identifier=("id", "url")),
    # OpenCoder-LLM/opc-annealing-corpus
    "opencoder_annealing": Fields(text=("text", "content"), identifier=("id",), language=("lang", "language")),
    # OpenCoder-LLM/opc-sft-stage1 and -stage2
    "opencoder_sft": Fields(text=("instruction",), join=("output",), identifier=("seq_id",)),
}


def fields_from_config(value: str | Mapping[str, Any], where: str) -> Fields:
    """Returns a layout by its name, or one of one's own: {"text": "body", "path": ["file", "name"]}."""
    if isinstance(value, str):
        if value not in LAYOUTS:
            raise UserError(f"{value!r} is not a layout", where=where, remedy=f"one of {sorted(LAYOUTS)}, or a mapping")
        return LAYOUTS[value]
    known = [field.name for field in dataclasses.fields(Fields)]
    if unknown := sorted(set(value) - set(known)):
        raise UserError(f"unknown field {unknown[0]!r}", where=where, remedy=f"a layout has {known}")
    given = {key: (names,) if isinstance(names, str) else tuple(names) for key, names in dict(value).items()}
    if not given.get("text"):
        raise UserError("says not where the text is", where=f"{where}.text", remedy="name a field of the rows")
    if any(not isinstance(name, str) for names in given.values() for name in names):
        raise UserError("names of fields are strings", where=where)
    return Fields(**given)


@dataclasses.dataclass(frozen=True)
class Row:
    """A row's values, as strings; `number` counts from 0 in its file (in bytes of offset for JSONL)."""

    number: int
    text: str
    identifier: str = ""
    path: str = ""
    repository: str = ""
    language: str = ""
    licence: str = ""


def pick(row: Mapping[str, Any], fields: Fields, number: int) -> Row | str:
    """Makes a Row, or says why not: "no_text"."""
    text = _first(row, fields.text)
    if not isinstance(text, str):
        return "no_text"
    more = [value for name in fields.join if isinstance(value := _first(row, (name,)), str)]
    licence = _first(row, fields.licence)
    if isinstance(licence, list | tuple):
        licence = " AND ".join(sorted({str(name) for name in licence if name}))
    return Row(
        number,
        "\n\n".join([text, *more]),
        identifier=_text(_first(row, fields.identifier)),
        path=_text(_first(row, fields.path)),
        repository=_text(_first(row, fields.repository)),
        language=_text(_first(row, fields.language)),
        licence=_text(licence),
    )


def _text(value: Any) -> str:
    return str(value) if isinstance(value, str | int) else ""


def _first(row: Mapping[str, Any], names: tuple[str, ...]) -> Any:
    for name in names:
        value: Any = row
        for part in (name,) if name in row else name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        if value is not None:
            return value
    return None


def json_lines(path: Path, fields: Fields, part: tuple[int, int] | None, limits: Limits) -> Iterator[Row | Skipped]:
    """Yields the rows of a JSONL file, plain or compressed; a line that is broken or too long is skipped alone.

    Args:
      path: the file.
      fields: which values to take.
      part: (start, stop) in bytes: the lines that begin there; for files that are not compressed.
      limits: `member_bytes` bounds a line.
    """
    start, stop = part or (0, 1 << 62)
    try:
        with streams.faults(), streams.opened(path, limits) as stream:
            lines = cast(Any, path.open("rb")) if part else streams.buffered(stream)
            with lines:
                at = _seek(lines, start) if part else 0
                while at < stop and (line := lines.readline(limits.member_bytes + 1)):
                    here, at = at, at + len(line)
                    if len(line) > limits.member_bytes:
                        while line and not line.endswith(b"\n"):
                            line = lines.readline(BLOCK)
                            at += len(line)
                        yield Skipped(str(here), "too_large")
                    elif line.strip():
                        yield _row(line, fields, here)
    except Refused as refused:
        yield Skipped("", "broken_table" if refused.reason == "broken_archive" else refused.reason)


def _seek(lines: Any, start: int) -> int:
    """Goes to the first line that begins at `start` or later."""
    if start == 0:
        return 0
    lines.seek(start - 1)
    at = start - 1
    while line := lines.readline(BLOCK):
        at += len(line)
        if line.endswith(b"\n"):
            break
    return at


def _row(line: bytes, fields: Fields, number: int) -> Row | Skipped:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return Skipped(str(number), "broken_line")
    row = pick(value, fields, number) if isinstance(value, dict) else "broken_line"
    return row if isinstance(row, Row) else Skipped(str(number), row)


def _parquet(path: Path) -> Any:
    try:
        from pyarrow import parquet
    except ImportError as error:
        raise UserError("pyarrow is not installed", where=str(path), remedy="pip install pyarrow") from error
    return parquet.ParquetFile(path, buffer_size=BLOCK)  # reads a column bit by bit, not a row group at once


def row_groups(path: Path) -> list[int]:
    """Bytes of each row group of a Parquet file before compression; [] where the file is broken."""
    try:
        with _parquet(path) as file:
            return [file.metadata.row_group(i).total_byte_size for i in range(file.metadata.num_row_groups)]
    except UserError:
        raise
    except Exception:  # pyarrow raises nearly anything on broken input
        return []


def span(path: Path, part: tuple[int, int]) -> tuple[int, int, str]:
    """Where some row groups stand, (start, stop) in bytes, and what else their rows depend on: the schema, their numbers.

    Raises ValueError where the file is broken.
    """
    try:
        with _parquet(path) as file:
            before = sum(file.metadata.row_group(i).num_rows for i in range(part[0]))
            groups = [file.metadata.row_group(i) for i in range(*part)]
            chunks = [group.column(i) for group in groups for i in range(group.num_columns)]
            starts = [chunk.dictionary_page_offset or chunk.data_page_offset for chunk in chunks]
            stops = [start + chunk.total_compressed_size for start, chunk in zip(starts, chunks)]
            return min(starts), max(stops), f"{before} {file.schema_arrow.to_string(show_schema_metadata=False)}"
    except UserError:
        raise
    except Exception as error:  # pyarrow raises nearly anything on broken input
        raise ValueError(f"{path} is broken") from error


def _batch_rows(file: Any, group: int, columns: list[str], limits: Limits) -> int:
    """How many rows fit into `held_bytes` whatever they are: each may be as long as all that is stored of a column."""
    row_group = file.metadata.row_group(group)
    chunks = [row_group.column(i) for i in range(row_group.num_columns)]
    stored = sum(chunk.total_uncompressed_size for chunk in chunks if chunk.path_in_schema.split(".")[0] in columns)
    return max(1, min(64, limits.held_bytes // max(1, stored)))


def parquet_rows(path: Path, fields: Fields, part: tuple[int, int] | None, limits: Limits) -> Iterator[Row | Skipped]:
    """Yields the rows of a Parquet file, at most 64 in memory at a time; a broken row group ends the file.

    Args:
      path: the file.
      fields: which columns to take; no other is read.
      part: (start, stop) of the row groups.
      limits: `held_bytes` bounds the rows in memory, at least one.
    """
    number = 0
    try:
        with _parquet(path) as file:
            columns = sorted(set(file.schema_arrow.names) & fields.names())
            if not columns:
                yield Skipped("", "no_text")
                return
            start, stop = part or (0, file.metadata.num_row_groups)
            number = sum(file.metadata.row_group(i).num_rows for i in range(start))
            for group in range(start, stop):
                rows = _batch_rows(file, group, columns, limits)
                for batch in file.iter_batches(rows, [group], columns, use_threads=False):
                    for values in batch.to_pylist():
                        row = pick(values, fields, number)
                        yield row if isinstance(row, Row) else Skipped(str(number), row)
                        number += 1
    except UserError:
        raise
    except Exception:  # pyarrow raises nearly anything on broken input
        yield Skipped(str(number), "broken_table")
