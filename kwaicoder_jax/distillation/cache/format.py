"""What lies in a cache, and how an example of a batch is found in it.

    FOLDER/begun.json                       what is being written, first
    FOLDER/PPPPP-NNNNN.array_record         shard N of process P: a record for each example
    FOLDER/PPPPP-NNNNN.index.npy            by record, its key as two uint64
    FOLDER/PPPPP-NNNNN.json                 its sizes, and where the data goes on behind it; the shard counts from then on
    FOLDER/manifest.json                    all of it, last

The key of an example is a digest of its input tokens. Tokens see their own segment alone, at positions that count from 0
(`data.packing`), so the teacher's logits for an example depend on nothing else: not on the row, its neighbours, the
batch or the process. What comes twice (a document of a second epoch) is stored once.
"""

import dataclasses
import hashlib
import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from kwaicoder_jax.errors import UserError

FORMAT = 1
BEGUN, MANIFEST = "begun.json", "manifest.json"
DTYPES = ("float16", "bfloat16", "float32")
KEY_BYTES = 16
_LOWEST = -6e4  # log-probability that float16 still holds


@dataclasses.dataclass(frozen=True)
class Header:
    """What a cache was made from.

    Attributes:
      teacher: identity of its checkpoint.
      tokenizer: hash of the tokenizer.
      corpus: hash of the corpus.
      vocab_size: of the teacher.
      top_k: tokens kept at each position.
      dtype: of their log-probabilities; ids are int32, tail and logsumexp float32.
      temperature: that logits were divided by; a tail of one temperature says nothing about another.
    """

    teacher: str
    tokenizer: str
    corpus: str
    vocab_size: int
    top_k: int
    dtype: str = "float16"
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise UserError(f"no choice {self.dtype!r}", where="cache_teacher.dtype", remedy=f"use {', '.join(DTYPES)}")
        if not 1 <= self.top_k <= self.vocab_size:
            what = f"{self.top_k} of {self.vocab_size} tokens"
            raise UserError(what, where="cache_teacher.top_k", remedy="use 1 to the vocabulary")

    @property
    def bytes_per_token(self) -> int:
        """Of a record, beside its key and length."""
        return self.top_k * (4 + jnp.dtype(self.dtype).itemsize) + 8


class Example(NamedTuple):
    """Places start:stop of a row of a batch, and the key of what stands there."""

    row: int
    start: int
    stop: int
    key: bytes


def examples(inputs_BT: np.ndarray, segments_BT: np.ndarray) -> Iterator[Example]:
    """The examples of a batch, row by row; segment 0 is padding."""
    for row, segments_T in enumerate(segments_BT):
        borders = [0, *(np.flatnonzero(np.diff(segments_T)) + 1).tolist(), len(segments_T)]
        for start, stop in itertools.pairwise(borders):
            if segments_T[start]:
                tokens = np.ascontiguousarray(inputs_BT[row, start:stop], "<i4").tobytes()
                yield Example(row, start, stop, hashlib.blake2b(tokens, digest_size=KEY_BYTES).digest())


def number_of(key: bytes) -> int:
    """The first half of a key, by which it is looked up."""
    return int.from_bytes(key[:8], "little")


class Record(NamedTuple):
    """What is stored of an example of T tokens."""

    ids_TK: np.ndarray
    log_p_TK: np.ndarray
    log_tail_T: np.ndarray
    logsumexp_T: np.ndarray


def encode(key: bytes, record: Record, header: Header) -> bytes:
    """The bytes of a record, little-endian: key, length, ids, log-probabilities, tails, logsumexps."""
    log_p_TK = np.maximum(record.log_p_TK, _LOWEST).astype(jnp.dtype(header.dtype))
    arrays = (
        np.asarray(len(log_p_TK), "<i4"), record.ids_TK.astype("<i4"), log_p_TK,
        record.log_tail_T.astype("<f4"), record.logsumexp_T.astype("<f4"),
    )  # fmt: skip
    return key + b"".join(array.tobytes() for array in arrays)


def decode(raw: bytes, header: Header) -> tuple[bytes, Record]:
    """The key and the arrays; ValueError if the bytes are no record of this header."""
    length = int(np.frombuffer(raw, "<i4", 1, KEY_BYTES)[0]) if len(raw) >= KEY_BYTES + 4 else -1
    if length < 0 or len(raw) != KEY_BYTES + 4 + length * header.bytes_per_token:
        raise ValueError(f"a record of {len(raw)} bytes is not one of {length} tokens")
    place, found = KEY_BYTES + 4, []
    for dtype, shape in ((np.dtype("<i4"), (length, header.top_k)), (jnp.dtype(header.dtype), (length, header.top_k)),
                         (np.dtype("<f4"), (length,)), (np.dtype("<f4"), (length,))):  # fmt: skip
        count = int(np.prod(shape))
        found.append(np.frombuffer(raw, dtype, count, place).reshape(shape))
        place += count * dtype.itemsize
    return raw[:KEY_BYTES], Record(*found)


def header_of(values: Any, where: str) -> Header:
    """The header that a file holds; UserError if it is of something else."""
    fields = [field.name for field in dataclasses.fields(Header)]
    if not isinstance(values, dict) or values.get("format") != FORMAT or not set(fields) <= values.keys():
        what, remedy = f"is not of a teacher's cache of format {FORMAT}", "write it with cache_teacher"
        raise UserError(what, where=where, remedy=remedy)
    return Header(**{name: values[name] for name in fields})
