"""Records on disk: a spool while a corpus is being built, ArrayRecord shards in the end."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from array_record.python.array_record_module import ArrayRecordWriter

SPLITS = ("train", "valid")


def record(identifier: str, text: str) -> bytes:
    """Returns a document as it is stored: UTF-8 JSON with "id" and "text"."""
    return json.dumps({"id": identifier, "text": text}, ensure_ascii=False, separators=(",", ":")).encode()


def text_of(raw: bytes) -> str:
    """Returns the text of a stored document."""
    return json.loads(raw)["text"]


class Spool:
    """The records of one split of one source, appended to a file one a line (JSON has no raw line breaks)."""

    def __init__(self, path: Path):
        """Starts an empty spool at `path`."""
        self.path, self.count, self.bytes = path, 0, 0
        self._file = path.open("wb")

    def add(self, raw: bytes, text_bytes: int) -> None:
        """Appends one record, whose text has `text_bytes` bytes."""
        self._file.write(raw + b"\n")
        self.count += 1
        self.bytes += text_bytes

    def close(self) -> None:
        """Ends writing; the spool can be read from now on."""
        self._file.close()

    def __iter__(self) -> Iterator[bytes]:
        with self.path.open("rb") as file:
            for line in file:
                yield line[:-1]


class ShardWriter:
    """Writes records to numbered ArrayRecord files of about `shard_bytes` each, random access to each record."""

    def __init__(self, folder: Path, split: str, shard_bytes: int):
        """Makes the folder; files follow with the first record."""
        self._folder, self._split, self._shard_bytes = folder, split, shard_bytes
        self._writer: ArrayRecordWriter | None = None
        self._sizes: list[list[int]] = []  # records and bytes of each shard
        self._hash = hashlib.sha256()
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, raw: bytes) -> None:
        """Writes one record."""
        writer = self._writer
        if writer is None or self._sizes[-1][1] + len(raw) > self._shard_bytes:
            self._end()
            writer = self._writer = ArrayRecordWriter(str(self._part(len(self._sizes))), "group_size:1")
            self._sizes.append([0, 0])
        writer.write(raw)
        self._sizes[-1][0] += 1
        self._sizes[-1][1] += len(raw)
        self._hash.update(len(raw).to_bytes(8) + raw)

    def close(self) -> dict[str, Any]:
        """Names the files; returns {"sha256": over all records, "shards": [{"file", "records", "bytes"}]}."""
        self._end()
        shards = []
        for number, (records, _) in enumerate(self._sizes):
            name = f"{self._split}-{number:05d}-of-{len(self._sizes):05d}.array_record"
            path = self._part(number).rename(self._folder / name)
            shards.append({"file": f"{self._folder.name}/{name}", "records": records, "bytes": path.stat().st_size})
        return {"sha256": self._hash.hexdigest(), "shards": shards}

    def _part(self, number: int) -> Path:
        return self._folder / f"{self._split}-{number:05d}.part"

    def _end(self) -> None:
        if self._writer is not None:
            self._writer.close()
