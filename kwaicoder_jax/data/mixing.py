"""One logical stream: documents of several sources, cut, made into examples, and mixed by shares of tokens."""

import copy
import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any, NamedTuple

import grain
import numpy as np

from kwaicoder_jax.data import fill_in_the_middle as fim
from kwaicoder_jax.data import pieces
from kwaicoder_jax.data.corpus import Corpus
from kwaicoder_jax.data.tokenizer import Tokenizer

# Documents of a source that a stream has open at a time. It takes a piece of each in turn, so that the pieces of one
# long document do not fill a whole batch.
OPEN_DOCUMENTS = 4

_NONE = -1


def seed_of(*parts: object) -> int:
    """Returns a 31-bit number that belongs to `parts`, for seeds that have nothing to do with each other."""
    return int.from_bytes(hashlib.blake2b(json.dumps(parts).encode(), digest_size=4).digest()) >> 1


class Record(NamedTuple):
    """A text with its place in its source and how often the source was passed through before."""

    number: int
    epoch: int
    text: str


def endless(corpus: Corpus, source: str, seed: int) -> grain.MapDataset:
    """Returns the training records of a source, shuffled anew each epoch, repeated for ever."""
    records = corpus.records(source, "train")
    count = len(records)

    def parse(place: int, raw: bytes) -> Record:
        epoch, number = divmod(place, count)
        return Record(number, epoch, json.loads(raw)["text"])

    dataset = grain.MapDataset.source(records).map_with_index(parse)
    return dataset.shuffle(seed_of(seed, source, "order")).repeat()


@dataclasses.dataclass(frozen=True)
class StreamSettings:
    """What a stream does in one phase.

    Attributes:
      weights: by source, shares of the target tokens; they add up to 1.
      fim: fill-in-the-middle options.
      window: inputs an example has at most.
      seed: of the run.
      stream: this stream's number.
      streams: how many there are.
    """

    weights: tuple[float, ...]
    fim: fim.FimOptions
    window: int
    seed: int
    stream: int
    streams: int


class _Open(NamedTuple):
    record: Record
    start: int  # character of the document from which it was cut
    pieces: list[pieces.Piece]


def start_state(sources: int) -> dict[str, Any]:
    """Returns the state of a stream that has read nothing.

    "tokens": by source, target tokens given in this phase. "cursors": by source, "taken" documents begun, "turn" the
    place whose piece is next, "open" its places: [number among the taken, character the cut began at, next piece].
    """
    cursor = {"taken": 0, "turn": 0, "open": [[_NONE, 0, 0] for _ in range(OPEN_DOCUMENTS)]}
    return {"tokens": [0] * sources, "cursors": [copy.deepcopy(cursor) for _ in range(sources)]}


def _copy(state: Mapping[str, Any]) -> dict[str, Any]:
    # by hand: the packer asks for the state at each example, and deepcopy is slow
    cursors = [{**c, "open": [list(place) for place in c["open"]]} for c in state["cursors"]]
    return {"tokens": list(state["tokens"]), "cursors": cursors}


class StreamIterator(grain.DatasetIterator):
    """Yields {"pair": [length, 2] int32}; see `Stream`."""

    def __init__(self, sources: Mapping[str, grain.MapDataset], tokenizer: Tokenizer, settings: StreamSettings):
        """Starts before the first document."""
        super().__init__()
        self._names, self._datasets = tuple(sources), tuple(sources.values())
        self._tokenizer, self._settings = tokenizer, settings
        self._limit = pieces.room(settings.window, settings.fim.rate)
        self.set_state(start_state(len(sources)))

    def get_state(self) -> dict[str, Any]:
        """Returns the position, a few numbers a source."""
        return _copy(self._state)

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a position; documents that were open are read and cut again when their turn comes."""
        self._state = _copy(state)
        self._opened: dict[tuple[int, int], _Open] = {}

    def __next__(self) -> dict[str, np.ndarray]:
        source = self._neediest()
        cursor = self._state["cursors"][source]
        turn = cursor["turn"]
        cursor["turn"] = (turn + 1) % OPEN_DOCUMENTS
        place = cursor["open"][turn]
        if place[0] == _NONE:
            place[:] = [cursor["taken"], 0, 0]
            cursor["taken"] += 1
        opened = self._open(source, turn)
        example = pieces.example(self._tokens(source, opened, opened.pieces[place[2]]))
        place[2] += 1
        if place[2] == len(opened.pieces):
            place[:] = [_NONE, 0, 0]
            del self._opened[source, turn]
        self._state["tokens"][source] += len(example)
        return {"pair": example}

    def _neediest(self) -> int:
        """The source whose tokens lag most behind its share; the first one of equals."""
        tokens, weights = self._state["tokens"], self._settings.weights
        total = sum(tokens) + 1  # the 1 lets shares speak before the first token, and keeps a weight of 0 out
        lags = [
            weight * total - count if weight > 0 else -np.inf for weight, count in zip(weights, tokens, strict=True)
        ]
        return int(np.argmax(lags))

    def _open(self, source: int, turn: int) -> _Open:
        if (source, turn) not in self._opened:
            taken, start, _ = self._state["cursors"][source]["open"][turn]
            record = self._datasets[source][self._settings.stream + self._settings.streams * taken]
            cut = pieces.cut(record.text[start:], self._tokenizer, self._limit)
            self._opened[source, turn] = _Open(record, start, cut)
        return self._opened[source, turn]

    def _tokens(self, source: int, opened: _Open, piece: pieces.Piece) -> list[int]:
        start, stop = opened.start + piece.start, opened.start + piece.stop
        record, settings = opened.record, self._settings
        rng = fim.generator(settings.seed, self._names[source], record.number, record.epoch, start)
        text = record.text[start:stop]
        return pieces.sample(piece, text, self._tokenizer, rng, settings.fim, settings.window)

    def carried_over(self) -> dict[str, Any]:
        """Returns the state that the next phase begins with: open documents are cut anew from where they stand."""
        state = _copy(self._state)
        state["tokens"] = [0] * len(self._names)
        for source, cursor in enumerate(state["cursors"]):
            for turn, place in enumerate(cursor["open"]):
                if place[0] != _NONE and place[2] > 0:
                    opened = self._open(source, turn)
                    place[1:] = [opened.start + opened.pieces[place[2]].start, 0]
        return state


class Stream(grain.IterDataset):
    """The examples of one logical stream: documents taken in turn by shares of tokens, cut, some filled in the middle.

    Stream s of S takes documents s, s + S, s + 2S, ... of each endless source.
    """

    def __init__(self, sources: Mapping[str, grain.MapDataset], tokenizer: Tokenizer, settings: StreamSettings):
        """Takes the endless sources by name, in the order of the settings' weights."""
        super().__init__()
        self._arguments = (sources, tokenizer, settings)

    def __iter__(self) -> StreamIterator:
        return StreamIterator(*self._arguments)
