"""One shard of a cache: a file of records and the index of their keys."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordReader

from kwaicoder_jax.distillation.cache import format
from kwaicoder_jax.distillation.cache.format import Header, Record
from kwaicoder_jax.errors import UserError

REMEDY = "copy it again, or write it anew with cache_teacher --restart"


class Shard:
    """One file of records, checked for its size and opened when first asked.

    Attributes:
      numbers_N2: by record, its key as two numbers.
    """

    def __init__(self, folder: Any, record: Mapping[str, Any], header: Header):
        """Takes the shard's description; UserError if its files are not there, or not whole."""
        self._path, index = folder / record["file"], folder / record["index"]
        for path, size in ((self._path, record["bytes"]), (index, record["index_bytes"])):
            if not path.exists():
                raise UserError("is missing", where=str(path), remedy=REMEDY)
            if path.stat().length != size:
                raise UserError(f"has not its {size} bytes", where=str(path), remedy=REMEDY)
        self._header = header
        self._reader: ArrayRecordReader | None = None
        try:
            self.numbers_N2 = np.load(index, allow_pickle=False)
        except ValueError as error:
            raise UserError(f"cannot be read ({error})", where=str(index), remedy=REMEDY) from error
        if self.numbers_N2.shape != (record["records"], 2) or self.numbers_N2.dtype != np.uint64:
            raise UserError(f"is no index of {record['records']} records", where=str(index), remedy=REMEDY)

    def read(self, places: list[int]) -> list[tuple[bytes, Record]]:
        """The keys and arrays of some records."""
        try:
            if self._reader is None:
                self._reader = ArrayRecordReader(str(self._path), "readahead_buffer_size:0")
            return [format.decode(raw, self._header) for raw in self._reader.read(places)]
        except (ValueError, IndexError, RuntimeError, OSError) as error:  # what array_record raises is of no one type
            raise UserError(f"cannot be read ({error})", where=str(self._path), remedy=REMEDY) from error

    def keys(self) -> list[bytes]:
        """Of all records, from the index."""
        return [row.tobytes() for row in self.numbers_N2]
