"""A document longer than the window, in pieces; and a piece as an example of inputs and targets."""

from typing import NamedTuple

import numpy as np

from kwaicoder_jax.data import fill_in_the_middle as fim
from kwaicoder_jax.data.tokenizer import Tokenizer

SMALLEST_WINDOW = 16  # tokens; below, sentinels leave no room for text
_FIM_ROOM = 16  # tokens kept free in a full piece: three sentinels, the end, and what two cuts add by splitting tokens


class Piece(NamedTuple):
    """Characters start:stop of a document, their tokens, and whether the document ends here."""

    start: int
    stop: int
    ids: list[int]
    last: bool


def room(window: int, fim_rate: float) -> int:
    """Returns how many tokens of text a piece may hold: less the begin token, and room for FIM where it is used."""
    return window - 1 - (min(_FIM_ROOM, window // 2) if fim_rate > 0 else 0)


def cut(text: str, tokenizer: Tokenizer, limit: int) -> list[Piece]:
    """Cuts `text` into pieces of at most `limit` tokens, at line borders; an over-long line between characters.

    The pieces joined are the text, and their tokens joined are its tokens. A line that is not indented, in the last
    quarter of a piece, is preferred to a later one that is: what belongs together stays together. A pure function,
    so a position in a document is (where the cutting began, the piece's number).
    """
    ids, spans = tokenizer.encode_with_spans(text)
    if len(ids) <= limit:
        return [Piece(0, len(text), ids, True)]
    places, ends = np.asarray([*spans, (len(text), len(text))]).T
    rank = _ranks(text, places, ends)
    pieces, begin = [], 0
    while begin < len(ids):
        end = len(ids)
        if begin + limit < end:
            end = begin + _end(rank[begin : begin + limit + 1])
        pieces.append(Piece(int(places[begin]), int(places[end]), ids[begin:end], end == len(ids)))
        begin = end
    return pieces


def _end(rank: np.ndarray) -> int:
    """Where a piece ends that starts at place 0 and has at most len(rank) - 1 tokens."""
    late = rank.copy()
    late[: len(rank) * 3 // 4] = 0
    if (late == 3).any():
        return int(np.flatnonzero(late == 3)[-1])
    best = min(int(rank[1:].max()), 2)
    return 1 + int(np.flatnonzero(rank[1:] >= best)[-1])


def _ranks(text: str, places: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """How good it is to cut before each token.

    3 is the start of a line that is not indented, 2 another start or end of a line (a token often holds a line break
    and the indentation after it), 1 between characters, 0 inside a character
    (a token can even hold the end of one character and the beginning of the next).
    """
    characters = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    before = np.append(np.uint32(0), characters)[places]
    after = np.append(characters, np.uint32(0))[places]
    breaks = np.asarray([10, 13], np.uint32)
    starts_line, ends_line = before == 10, np.isin(after, breaks) & ~np.isin(before, breaks)
    indented = np.isin(after, np.asarray([9, 10, 13, 32], np.uint32))
    rank = np.ones(len(places), np.int8)
    rank[starts_line | ends_line] = 2
    rank[starts_line & ~indented] = 3
    rank[np.append(False, places[1:] < np.maximum.accumulate(ends)[:-1])] = 0
    return rank


def plain(piece: Piece, tokenizer: Tokenizer) -> list[int]:
    """Returns the piece's tokens after the begin token, with the end token where the document ends."""
    end = tokenizer.end_of_text
    return [end, *piece.ids, end] if piece.last else [end, *piece.ids]


def sample(
    piece: Piece, text: str, tokenizer: Tokenizer, rng: np.random.Generator, options: fim.FimOptions, window: int
) -> list[int]:
    """Returns the piece's tokens, by chance as fill-in-the-middle; one that would not fit the window stays plain."""
    split = fim.apply(text, rng, options) if options.rate > 0 else None
    if split is not None:
        tokens = [tokenizer.end_of_text, *fim.assemble(tokenizer, split)]
        if len(tokens) <= window + 1:
            return tokens
    return plain(piece, tokenizer)


def example(tokens: list[int]) -> np.ndarray:
    """Returns [length - 1, 2] int32: inputs and targets, the tokens and the same one place later."""
    array = np.asarray(tokens, np.int32)
    return np.stack([array[:-1], array[1:]], axis=1)
