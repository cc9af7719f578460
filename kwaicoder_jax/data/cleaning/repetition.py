"""How much of a text says again what it has said: n-grams of words and lines that come more than once."""

import numpy as np

TOP = (2, 3, 4)
REPEATED = (5, 6, 7, 8, 9, 10)
_LEAST = 4  # times; in a short text an n-gram that comes twice takes much by chance
_STEP = np.uint64(0xD1342543DE82EF95)


def ngram_shares(words: np.ndarray, lengths: np.ndarray) -> tuple[list[float], list[float]]:
    """Shares of the words' characters, as RedPajama defines them but of words as they are written.

    An n-gram can only come twice if both (n-1)-grams in it do: each n looks only at what the one before it left.

    Args:
      words: a 64-bit number for each word, the same for the same word.
      lengths: characters of each word.

    Returns:
      for n of `TOP`, what the most frequent n-gram takes (of equals, the longest; 0 if none comes 4 times); for n of
      `REPEATED`, what lies in n-grams that come more than once.
    """
    total = max(int(lengths.sum()), 1)
    top, repeated = [0.0] * len(TOP), [0.0] * len(REPEATED)
    places = np.arange(max(words.size - 1, 0))  # n-grams that may come twice, by their first word
    grams = words[:-1]
    for n in range(2, REPEATED[-1] + 1):
        if not places.size:
            break
        grams = grams * _STEP + words[places + n - 1]
        order = np.argsort(grams)
        ordered = grams[order]
        same = ordered[1:] == ordered[:-1]
        if n in TOP:
            top[TOP.index(n)] = _most_frequent(lengths, places[order], same, n) / total
        paired = np.zeros(grams.size, bool)
        paired[1:] = same
        paired[:-1] |= same
        twice = np.empty_like(paired)
        twice[order] = paired
        places, grams = places[twice], grams[twice]
        if n in REPEATED:
            repeated[REPEATED.index(n)] = _covered(lengths, places, n) / total
        # else the second n-gram of the (n+1)-gram there comes only once, or lies behind the end
        follows = np.zeros(places.size, bool)
        follows[:-1] = places[1:] == places[:-1] + 1
        places, grams = places[follows], grams[follows]
    return top, repeated


def _most_frequent(lengths: np.ndarray, places: np.ndarray, same: np.ndarray, n: int) -> int:
    """Characters of the most frequent n-gram, all its places together; equal ones stand beside each other."""
    if np.count_nonzero(same) < _LEAST - 1:
        return 0
    starts = np.flatnonzero(np.concatenate([[True], ~same]))
    counts = np.concatenate([starts[1:], [places.size]]) - starts
    most = counts.max()
    if most < _LEAST:
        return 0
    firsts = places[starts[counts == most]]
    return int(most * sum(lengths[firsts + turn] for turn in range(n)).max())


def _covered(lengths: np.ndarray, places: np.ndarray, n: int) -> int:
    """Characters of the words that lie in an n-gram at one of the places."""
    depth = np.zeros(lengths.size + 1, np.int64)
    depth[places] += 1
    depth[places + n] -= 1
    return int(lengths[np.cumsum(depth[:-1]) > 0].sum())


def repeated_share(lines: np.ndarray, counted: np.ndarray) -> float:
    """Share of the lines that come more than once, as numbers; only those that are `counted` can be repeated."""
    if not lines.size:
        return 0.0
    _, inverse, counts = np.unique(lines, return_inverse=True, return_counts=True)
    return float(((counts[inverse] > 1) & counted).mean())
