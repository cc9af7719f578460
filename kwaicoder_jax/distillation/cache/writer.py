"""Writes a cache, shard by shard: a writer that was killed goes on behind the last whole shard, to the same bytes."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from kwaicoder_jax import files
from kwaicoder_jax.distillation.cache import format
from kwaicoder_jax.distillation.cache.format import BEGUN, MANIFEST
from kwaicoder_jax.distillation.cache.shard import Shard
from kwaicoder_jax.distillation.support import TopK
from kwaicoder_jax.errors import UserError


class CacheWriter:
    """One process's shards. `add` batches, `commit` now and then, `finish` when all processes are done.

    Attributes:
      position: what was handed to the last `commit`, also of a run before; None at the start.
    """

    def __init__(self, folder: str | os.PathLike[str], header: format.Header, *, process: int = 0):
        """Goes on with the cache in `folder`, or begins one; UserError if it is made from something else."""
        self._folder, self._header, self._process = files.path(folder), header, process
        self._folder.mkdir(parents=True, exist_ok=True)
        wanted = {"format": format.FORMAT, **dataclasses.asdict(header)}
        begun = self._folder / BEGUN
        if not begun.exists():
            files.write_json(begun, wanted)
        old = dataclasses.asdict(format.header_of(files.read_json(begun), str(begun)))
        for field, value in dataclasses.asdict(header).items():
            if old[field] != value:
                what = f"{self._folder} was begun with {field} {old[field]!r}, this is {value!r}"
                raise UserError(what, where=f"cache_teacher.{field}", remedy="use another folder, or start over")
        self._known: set[bytes] = set()
        self._shard, self.position = 0, None
        while (self._place(".json")).exists():
            self._take_up(files.read_json(self._place(".json")))
        self._begin()

    def add(self, batch: Mapping[str, np.ndarray], found: TopK) -> None:
        """Stores the examples of a batch that are not there yet; `found` is of numpy arrays, for each place of it."""
        for example in format.examples(batch["inputs"], batch["segment_ids"]):
            if example.key in self._known:
                continue
            arrays = (found.ids_BTK, found.log_p_BTK, found.log_tail_BT, found.logsumexp_BT)
            record = format.Record(*(np.asarray(x)[example.row, example.start : example.stop] for x in arrays))
            self._known.add(example.key)
            self._keys.append(example.key)
            self._tokens += len(record.log_tail_T)
            self._tail_mass += float(np.exp(record.log_tail_T.astype(np.float64)).sum())
            self._open().write(format.encode(example.key, record, self._header))

    def commit(self, position: Any) -> None:
        """Ends the shard: from now on it counts. A restart finds `position` (JSON), where its data ended."""
        record: dict[str, Any] = {"records": len(self._keys), "tokens": self._tokens, "tail_mass": self._tail_mass}
        if self._writer is not None:
            self._writer.close()
            whole, index = self._place(".array_record"), self._place(".index.npy")
            self._part().replace(whole)
            numbers_N2 = np.frombuffer(b"".join(self._keys), "<u8").reshape(-1, 2)
            temporary = self._place(".index.part.npy")
            with open(temporary, "wb") as file:
                np.save(file, numbers_N2)
            temporary.replace(index)
            record |= {"file": whole.name, "bytes": whole.stat().length, "index_bytes": index.stat().length}
            record["index"] = index.name
        files.write_json(self._place(".json"), record | {"position": position})
        self.position = position
        self._shard += 1
        self._begin()

    def close(self) -> None:
        """Drops what was not committed."""
        if self._writer is not None:
            self._writer.close()
            self._part().unlink()
        self._begin()

    def go_back(self, shards: int) -> None:
        """Drops all but the first so many shards; where several processes stood at different places, say."""
        if shards >= self.shards:
            return
        ends = (".json", ".array_record", ".index.npy")  # a shard counts as long as it has the first
        kept = [files.read_json(self._shard_place(number, ".json")) for number in range(shards)]
        for number in reversed(range(shards, self.shards)):
            for end in ends:
                self._shard_place(number, end).unlink(missing_ok=True)
        self._shard, self.position, self._known = 0, None, set()
        for record in kept:
            self._take_up(record)
        self._begin()

    def foreign(self, count: int) -> list[Any]:
        """The files of processes that are not among the first so many, those first that make a shard count."""
        found = [path for path in self._folder.glob("*-*.*") if int(path.name[:5]) >= count]
        return sorted(found, key=lambda path: path.suffix != ".json")

    def _begin(self) -> None:
        self._writer: ArrayRecordWriter | None = None
        self._keys: list[bytes] = []
        self._tokens, self._tail_mass = 0, 0.0

    def _open(self) -> ArrayRecordWriter:
        if self._writer is None:
            self._writer = ArrayRecordWriter(str(self._part()), "group_size:1")
        return self._writer

    def _take_up(self, record: dict[str, Any]) -> None:
        """Takes a shard of an earlier run as done."""
        if record["records"]:
            self._known.update(Shard(self._folder, record, self._header).keys())
        self.position = record["position"]
        self._shard += 1

    @property
    def shards(self) -> int:
        """How many are committed."""
        return self._shard

    def _place(self, end: str) -> Any:
        return self._shard_place(self._shard, end)

    def _shard_place(self, number: int, end: str) -> Any:
        return self._folder / f"{self._process:05d}-{number:05d}{end}"

    def _part(self) -> Any:
        return self._place(".part")


def finish(folder: str | os.PathLike[str]) -> dict[str, Any]:
    """Writes and returns the manifest, when every process has committed its last shard."""
    place = files.path(folder)
    shards = []
    for path in sorted(place.glob("*-*.json")):
        shard = files.read_json(path)
        del shard["position"]
        shards.append(shard)
    totals = {name: sum(shard[name] for shard in shards) for name in ("records", "tokens", "tail_mass")}
    manifest = {**files.read_json(place / BEGUN), **totals, "shards": [shard for shard in shards if shard["records"]]}
    files.write_json(place / MANIFEST, manifest)
    return manifest
