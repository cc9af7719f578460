"""What benchmarks say, as hashes of runs of words: what training text may not contain.

Of every string in every record of a benchmark's files (prompts, docstrings, solutions, tests) each run of `width` words, and
a shorter text of `shortest` words or more as a whole; tokens as in `shingles`, lower-case, words alone, so that layout and
punctuation do not hide a copy. Runs of which fewer than half are different words count for nothing. Lines that import
something are left out: ten of their words in a row are in any program.
"""

import gzip
import io
import json
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import zstandard

from kwaicoder_jax.data.shingles import runs, tokens
from kwaicoder_jax.errors import UserError

ENTRIES = np.dtype([("hash", "<u8"), ("task", "<u4")])
_FILES = (".jsonl", ".json", ".jsonl.gz", ".jsonl.zst", ".parquet", ".txt", ".py")
_IMPORTS = re.compile(rb"^\s*(?:import|from|using|use|package|require|#\s*include)\b.*$", re.MULTILINE)
_WORD = re.compile(rb"[A-Za-z0-9_\x80-\xff]+")
_NAMES = ("task_id", "name", "id", "question_id", "problem_id")
_FILTER_BITS = 24


class Index(NamedTuple):
    """What is looked for.

    Attributes:
      entries: ENTRIES, sorted by hash, each hash once, with the first task that has it.
      tasks: "benchmark: task" by number.
      widths: words of the runs.
    """

    entries: np.ndarray
    tasks: list[str]
    widths: list[int]


def build(folder: Path, width: int, shortest: int, allowed: Sequence[str] = ()) -> Index:
    """Of all files below a folder that have records or text.

    Args:
      folder: with JSONL, JSON, Parquet, text or Python files; a benchmark's name is its file's path.
      width: words of a run.
      shortest: words of the shortest text that counts as a whole.
      allowed: texts that everybody writes, which count for nothing.

    Raises:
      UserError: no such folder, no such file in it, a file that cannot be read, or widths that make no sense.
    """
    if not 1 < shortest <= width:
        what = f"width {width} and shortest {shortest}"
        raise UserError(what, where="prepare_data.decontamination", remedy="use 1 < shortest <= width")
    if not folder.is_dir():
        raise UserError("is not a folder", where=f"prepare_data.decontamination.folder: {folder}")
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name.endswith(_FILES)]
    if not files:
        raise UserError("has no benchmark", where=f"prepare_data.decontamination.folder: {folder}", remedy=f"{_FILES}")
    tasks: list[str] = []
    parts: list[np.ndarray] = []
    widths: set[int] = set()
    for path in files:
        benchmark = path.relative_to(folder).as_posix()
        for number, record in enumerate(_records(path)):
            entries, found = _entries(record, width, shortest, len(tasks))
            parts.append(entries)
            widths |= found
            tasks.append(f"{benchmark}: {_name(record, number)}")
    free = _entries({"": list(allowed)}, width, shortest, 0)[0]["hash"]
    entries = np.concatenate([np.zeros(0, ENTRIES), *parts])
    entries = entries[~np.isin(entries["hash"], free)]
    if not len(entries):
        raise UserError(f"has no text of {shortest} words", where=f"prepare_data.decontamination.folder: {folder}")
    _, first = np.unique(entries["hash"], return_index=True)  # sorted, and the first of equals
    return Index(entries[first], tasks, sorted(widths))


def _entries(record: Any, width: int, shortest: int, task: int) -> tuple[np.ndarray, set[int]]:
    hashes, widths = [], {width}
    for text in _strings(record):
        lowered = _IMPORTS.sub(b"", text.encode(errors="replace")).lower()
        words = _WORD.findall(lowered)
        length = min(width, len(words))
        if length >= shortest:
            hash_S, _ = runs(*tokens([lowered], words_alone=True), 1, length)
            telling = [_telling(words[place : place + length]) for place in range(len(hash_S))]
            hashes.append(hash_S[np.array(telling, bool)])
            widths.add(length)
    entries = np.zeros(sum(map(len, hashes)), ENTRIES)
    entries["hash"], entries["task"] = np.concatenate([np.zeros(0, np.uint64), *hashes]), task
    return entries, widths


def _telling(run: Sequence[bytes]) -> bool:
    """Whether half of a run are words that differ: rows of numbers and of single letters are in many programs."""
    return 2 * len({word for word in run if len(word) > 1 and not word[:1].isdigit()}) >= len(run)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from _strings(each)
    elif isinstance(value, list | tuple):
        for each in value:
            yield from _strings(each)


def _name(record: Any, number: int) -> str:
    if isinstance(record, dict):
        for key in _NAMES:
            if isinstance(record.get(key), str | int):
                return str(record[key])
    return str(number)


def _records(path: Path) -> Iterable[Any]:
    try:
        if path.name.endswith(".parquet"):
            return _parquet(path)
        content = path.read_bytes()
        if path.name.endswith(".gz"):
            content = gzip.decompress(content)
        elif path.name.endswith(".zst"):
            content = zstandard.ZstdDecompressor().stream_reader(io.BytesIO(content)).read()
        if path.name.endswith((".txt", ".py")):
            return [content.decode(errors="replace")]
        if path.name.endswith(".json"):
            whole = json.loads(content)
            return whole if isinstance(whole, list) else [whole]
        return [json.loads(line) for line in content.splitlines() if line.strip()]
    except (ValueError, OSError, EOFError, zstandard.ZstdError) as error:
        raise UserError(f"cannot be read ({error})", where=str(path)) from error


def _parquet(path: Path) -> list[Any]:
    try:
        import pyarrow.parquet  # an extra
    except ImportError:
        raise UserError("needs pyarrow", where=str(path), remedy="pip install 'kwaicoder_jax[data]'") from None
    return pyarrow.parquet.read_table(path).to_pylist()  # type: ignore[no-any-return]


class Finder:
    """Looks for an index's runs in many texts at once."""

    def __init__(self, hashes: np.ndarray, widths: Sequence[int]):
        """Takes the sorted hashes and the widths of an index."""
        self._hashes, self._widths = hashes, widths
        self._seen = np.zeros(2**_FILTER_BITS, bool)  # few of the runs of a text are there: most stop here
        self._seen[self._short(hashes)] = True

    def find(self, texts: Sequence[bytes]) -> tuple[np.ndarray, np.ndarray]:
        """Which text has which hash: numbers of texts, int64, and hashes, uint64; each pair once, sorted."""
        token_T, text_T = tokens([text.lower() for text in texts], words_alone=True)
        pairs = []
        for width in self._widths:
            hash_S, offsets = runs(token_T, text_T, len(texts), width)
            place = np.flatnonzero(self._seen[self._short(hash_S)])
            found = self._hashes[np.searchsorted(self._hashes, hash_S[place]).clip(max=len(self._hashes) - 1)]
            place = place[found == hash_S[place]]
            text = np.searchsorted(offsets, place, side="right") - 1
            pairs.append(np.stack([text.astype(np.uint64), hash_S[place]], axis=1))
        found = np.unique(np.concatenate(pairs), axis=0)
        return found[:, 0].astype(np.int64), found[:, 1]

    @staticmethod
    def _short(hash_N: np.ndarray) -> np.ndarray:
        return hash_N >> np.uint64(64 - _FILTER_BITS)
