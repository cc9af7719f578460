"""Texts as arrays of code points: their classes, the pieces between boundaries, and hashes of all the pieces at once."""

import functools

import numpy as np

LETTER, DIGIT, SPACE, IDEOGRAPH = 1, 2, 4, 8

_ASSIGNED = 0x40000  # no letter, digit or space lies above
_IDEOGRAPHS = 0x2E80  # scripts without spaces between words begin here; the few that come later do no harm
_BASE = np.uint64(0x9E3779B97F4A7C15)
_INVERSE = np.uint64(pow(int(_BASE), -1, 1 << 64))


def names(listed: str) -> frozenset[str]:
    """Returns the words of a list in one string."""
    return frozenset(listed.split())


def code_points(text: str) -> np.ndarray:
    """Returns the text's code points: uint8 where all are ASCII, else uint32."""
    if text.isascii():
        return np.frombuffer(text.encode("ascii"), np.uint8)
    return np.frombuffer(text.encode("utf-32-le"), "<u4")


@functools.lru_cache(2)
def _table(size: int) -> np.ndarray:
    characters = list(map(chr, range(size)))
    classes = np.zeros(size, np.uint8)
    for bit, test in ((LETTER, str.isalpha), (DIGIT, str.isdigit), (SPACE, str.isspace)):
        classes |= np.fromiter(map(test, characters), np.uint8, size) * np.uint8(bit)
    classes[_IDEOGRAPHS:] |= (classes[_IDEOGRAPHS:] & LETTER) * np.uint8(IDEOGRAPH)
    return classes


def classes(codes: np.ndarray) -> np.ndarray:
    """Returns the LETTER, DIGIT, SPACE and IDEOGRAPH bits of each code point, as `str` knows them."""
    if codes.dtype == np.uint8:
        return _table(256)[codes]
    return _table(_ASSIGNED)[np.minimum(codes, _ASSIGNED - 1)]


def runs(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns where the runs of True begin and where they have ended."""
    edges = np.flatnonzero(mask[1:] != mask[:-1]) + 1
    edges = np.concatenate([[0] if mask[:1].any() else [], edges, [mask.size] if mask[-1:].any() else []]).astype(
        np.int64
    )
    return edges[::2], edges[1::2]


def words(kinds: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Returns where the words begin and have ended: runs of letters and digits, and each ideograph by itself."""
    starts, ends = runs((kinds & (LETTER | DIGIT)) != 0)
    ideographs = np.flatnonzero(kinds & IDEOGRAPH)
    if ideographs.size:
        borders = np.concatenate([ideographs, ideographs + 1])
        inner = np.append(kinds, 0)[borders] & (LETTER | DIGIT)
        before = np.append(kinds, 0)[borders - 1] & (LETTER | DIGIT)
        borders = borders[(inner != 0) & (before != 0)]
        starts, ends = np.union1d(starts, borders), np.union1d(ends, borders)
    return starts, ends


@functools.lru_cache(1)
def _powers(log_size: int) -> tuple[np.ndarray, np.ndarray]:
    rows = []
    for base in (_BASE, _INVERSE):
        row = np.full(1 << log_size, base, np.uint64)
        row[0] = 1
        rows.append(np.multiply.accumulate(row))
    return rows[0], rows[1]


class Hashed:
    """Code points whose pieces [start:end] have 64-bit numbers, the same for the same piece, whatever text it is in.

    A polynomial modulo 2^64, from differences of prefix sums: all pieces cost one pass over the text. 16 bytes a
    character of the longest text so far are kept for the powers.
    """

    def __init__(self, codes: np.ndarray):
        powers, self._inverses = _powers(max(16, int(codes.size).bit_length()))
        self.codes = codes
        self._sums = np.zeros(codes.size + 1, np.uint64)
        np.cumsum(codes * powers[: codes.size], out=self._sums[1:])

    def pieces(self, starts: np.ndarray, ends: np.ndarray) -> np.ndarray:
        """Returns the number of each piece."""
        return (self._sums[ends] - self._sums[starts]) * self._inverses[starts]
