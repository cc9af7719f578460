"""Reads a cache: the teacher's logits for the examples of any batch."""

import os
from collections.abc import Mapping

import numpy as np

from kwaicoder_jax import files
from kwaicoder_jax.distillation.cache import format
from kwaicoder_jax.distillation.cache.format import MANIFEST, Record
from kwaicoder_jax.distillation.cache.shard import Shard
from kwaicoder_jax.errors import UserError


class CacheReader:
    """Finds what the teacher said about the examples of a batch.

    Attributes:
      header: what the cache was made from.
      manifest: its description.
    """

    def __init__(self, place: str | os.PathLike[str]):
        """Opens the cache in a folder, or in a stage's folder; UserError if it is unfinished, foreign or not whole."""
        folder = files.path(place)
        folder = folder if (folder / MANIFEST).exists() else folder / "cache"
        if not (folder / MANIFEST).exists():
            raise UserError("there is no finished cache here", where=str(place), remedy="run cache_teacher to the end")
        self.manifest = files.read_json(folder / MANIFEST)
        self.header, self._where = format.header_of(self.manifest, str(folder / MANIFEST)), str(place)
        self._shards = [Shard(folder, each, self.header) for each in self.manifest["shards"]]
        numbers = [shard.numbers_N2[:, 0] for shard in self._shards] or [np.zeros(0, np.uint64)]
        shards = np.repeat(np.arange(len(numbers), dtype=np.int32), [len(x) for x in numbers])
        places = np.concatenate([np.arange(len(x), dtype=np.int32) for x in numbers])
        joined = np.concatenate(numbers)
        order = np.argsort(joined, kind="stable")
        self._numbers, self._places = joined[order], np.stack([shards, places], axis=1)[order]

    @property
    def identity(self) -> str:
        """Equal for caches of the same contents, wherever they lie."""
        return files.digest(self.manifest)

    def add(self, batch: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """The batch [B, T] with ids_BTK int32, log_p_BTK of the cache's dtype, log_tail_BT float32; zeros at padding.

        Raises:
          UserError: an example that the cache does not hold, or a damaged file.
        """
        examples = list(format.examples(batch["inputs"], batch["segment_ids"]))
        records = self._find([example.key for example in examples])
        shape = batch["inputs"].shape
        log_p_dtype = np.dtype(records[0].log_p_TK.dtype if records else self.header.dtype)
        arrays = {
            "ids_BTK": np.zeros((*shape, self.header.top_k), np.int32),
            "log_p_BTK": np.zeros((*shape, self.header.top_k), log_p_dtype),
            "log_tail_BT": np.zeros(shape, np.float32),
        }
        for example, record in zip(examples, records):
            for array, values in zip(arrays.values(), record):
                array[example.row, example.start : example.stop] = values
        return {**batch, **arrays}

    def _find(self, keys: list[bytes]) -> list[Record]:
        """The records of some keys; each shard is asked once. Two keys may share a number, and all are looked at."""
        numbers = np.asarray([format.number_of(key) for key in keys], np.uint64)
        first, last = (np.searchsorted(self._numbers, numbers, side) for side in ("left", "right"))
        wanted: dict[int, list[int]] = {}
        for begin, end in zip(first, last):
            for shard, place in self._places[begin:end].tolist():
                wanted.setdefault(shard, []).append(place)
        found = {key: record for shard, places in wanted.items() for key, record in self._shards[shard].read(places)}
        lacking = sum(key not in found for key in keys)
        if lacking:
            what = f"it lacks {lacking} of the {len(keys)} examples of a batch"
            remedy = "write it anew with cache_teacher for this data: corpus, seed, fill-in-the-middle, sequence length"
            raise UserError(what, where=self._where, remedy=remedy)
        return [found[key] for key in keys]
