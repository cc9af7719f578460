"""Documents between two steps: lines of JSON, compressed with zstd, and arrays."""

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import zstandard

from kwaicoder_jax.data.documents import Document
from kwaicoder_jax.data.engine.store import Result, Store
from kwaicoder_jax.errors import UserError

_LEVEL = 3
_BLOCK = 2**20  # bytes
_REMEDY = "remove it and run again"


def write(store: Store, documents: Iterable[Document]) -> str:
    """Writes documents as one object, streamed; returns its name. The same documents give the same bytes."""
    with store.writing() as (output, names):
        compressor = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=True).compressobj()
        waiting: list[bytes] = []
        size = 0
        for document in documents:
            line = document.encoded()
            waiting += (line, b"\n")
            size += len(line) + 1
            if size >= _BLOCK:
                output.write(compressor.compress(b"".join(waiting)))
                waiting, size = [], 0
        output.write(compressor.compress(b"".join(waiting)) + compressor.flush())
    return names[0]


def read(path: Path) -> Iterator[Document]:
    """Yields them."""
    return map(Document.decoded, lines(path))


def lines(path: Path) -> Iterator[bytes]:
    """Yields the lines of a compressed file, without their ends; UserError where it is cut off or something else."""
    decompressor, rest = zstandard.ZstdDecompressor().decompressobj(), b""
    try:
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                *whole, rest = (rest + decompressor.decompress(block)).split(b"\n")
                yield from whole
    except zstandard.ZstdError as error:
        raise UserError(f"cannot be read ({error})", where=str(path), remedy=_REMEDY) from error
    if not decompressor.eof or rest:
        raise UserError("cannot be read (it is cut off)", where=str(path), remedy=_REMEDY)


def batches(documents: Iterable[Document], most: int = 2**21) -> Iterator[list[Document]]:
    """Yields documents together until they have so many characters: what is worked on at once is bounded."""
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= most:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def without(store: Store, shard: str, reasons: Mapping[int, str], names: Sequence[str]) -> Result:
    """A shard without some rows; facts are [documents, bytes] that are "kept", and for each reason.

    Args:
      store: where the shard is.
      shard: of documents.
      reasons: of the rows that are left out.
      names: of all reasons there are.
    """
    counts = {name: [0, 0] for name in ("kept", *names)}

    def kept() -> Iterator[Document]:
        for row, document in enumerate(read(store.path(shard))):
            count = counts[reasons.get(row, "kept")]
            count[0] += 1
            count[1] += len(document.text.encode())
            if row not in reasons:
                yield document

    return Result({"shard": write(store, kept())}, counts)


def write_array(store: Store, array: np.ndarray) -> str:
    """Writes an array as it lies in memory, as .npy; returns the object's name."""
    buffer = io.BytesIO()
    np.save(buffer, np.ascontiguousarray(array), allow_pickle=False)
    return store.add(buffer.getvalue())


def read_array(store: Store, digest: str, *, mapped: bool = False) -> np.ndarray:
    """Reads it; or maps it, so that only what is used comes into memory."""
    return np.load(store.path(digest), mmap_mode="r" if mapped else None, allow_pickle=False)
