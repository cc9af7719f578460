"""What lines begin with, from the hashes of their first words: imports, assertions, prints."""

import functools
from typing import NamedTuple

import numpy as np

from kwaicoder_jax.data.cleaning import characters

GAP = 2  # signs between the words of one name, as in std::cout
_PREFIX = 5  # letters: println, printf, assertEqual and their like begin alike
_EXACT = {"imports": ("import", "from"), "passes": ("pass",), "prints": ("puts", "echo")}
_BEGINNINGS = {"asserts": ("asser", "Asser", "ASSER", "EXPEC"), "prints": ("print", "Print", "PRINT")}
_PAIRS = {"prints": (("conso", "log"), ("Conso", "Write"), ("std", "cout"))}


@functools.cache
def _numbers(*names: str) -> np.ndarray:
    codes = characters.code_points("".join(names))
    ends = np.cumsum([len(name) for name in names])
    return characters.Hashed(codes).pieces(np.append(0, ends[:-1]), ends)


def _count(hashes: np.ndarray, names: tuple[str, ...]) -> int:
    """How many lines have one of the names; hashes are [lines] or [words, lines]."""
    found = np.logical_or.reduce([hashes == number for number in _numbers(*names)])
    return int(np.count_nonzero(found if found.ndim == 1 else found.any(axis=0)))


class Words(NamedTuple):
    """The words of a text.

    Attributes:
      visible: its code points without white space.
      starts: where in them each word begins.
      ends: where it has ended.
      hashes: of the words.
      joined: whether nothing but one or two signs stands between a word and the one before it.
    """

    visible: characters.Hashed
    starts: np.ndarray
    ends: np.ndarray
    hashes: np.ndarray
    joined: np.ndarray

    def shares(self, lines: np.ndarray) -> dict[str, float]:
        """Returns which share of the lines begins with an import, a pass, an assertion, a print or a directive.

        Args:
          lines: place of the first visible character of each line that has one.

        The first three words of a line count as far as they are one name, as in System.out.println.
        """
        if not self.starts.size:
            return dict.fromkeys(("asserts", "directives", "imports", "passes", "prints"), 0.0)
        directives = (self.visible.codes[lines] == ord("#")) & (lines + 1 < self.visible.codes.size)
        after = self.visible.codes[lines[directives] + 1]
        found = {"directives": int(np.count_nonzero((after >= ord("a")) & (after <= ord("z"))))}
        first = np.searchsorted(self.starts, lines)
        first = first[(first < self.starts.size) & (self.starts[np.minimum(first, self.starts.size - 1)] == lines)]
        for name, words in _EXACT.items():
            found[name] = _count(self.hashes[first], words)
        names = self._names(first)
        for name, beginnings in _BEGINNINGS.items():
            found[name] = found.get(name, 0) + _count(names, beginnings)
        for name, pairs in _PAIRS.items():
            for one, other in pairs:
                both = (names[0] == _numbers(one)[0]) & (names[1] == _numbers(other)[0])
                found[name] += int(np.count_nonzero(both))
        return {name: count / lines.size for name, count in sorted(found.items())}

    def _names(self, first: np.ndarray) -> np.ndarray:
        """Numbers of the beginnings of the first three words of lines, [3, lines]; 0 where the name has ended."""
        rows, joined = [], np.ones(first.size, bool)
        for turn in range(3):
            place = np.minimum(first + turn, self.starts.size - 1)
            if turn:
                joined &= (place == first + turn) & self.joined[place]
            ends = np.minimum(self.ends[place], self.starts[place] + _PREFIX)
            rows.append(np.where(joined, self.visible.pieces(self.starts[place], ends), np.uint64(0)))
        return np.stack(rows)
