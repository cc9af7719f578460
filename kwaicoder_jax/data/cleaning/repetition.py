"""How much of a text says again what it has said: n-grams of words and lines that come more than once."""

import numpy as np

TOP = (2, 3, 4)
REPEATED = (5, 6, 7, 8, 9, 10)
_STEP = np.uint64(0xD1342543DE82EF95)


def ngram_shares(words: np.ndarray, lengths: np.ndarray) -> tuple[list[float], list[float]]:
    """Shares of the words' characters, as RedPajama defines them but with capitals and punctuation as they are.

    An n-gram can only come twice if both (n-1)-grams in it do: each n looks only at what the one before it left.

    Args:
      words: a 64-bit number for each word, the same for the same word.
      lengths: characters of each word.

    Returns:
      for n of `TOP`, what the most frequent n-gram takes (of equals, the longest; 0 if none comes twice); for n of
      `REPEATED`, what lies in n-grams that come more than once.
    """
    total = int(lengths.sum())
    sums = np.concatenate([[0], np.cumsum(lengths)])
    places, grams = np.arange(words.size), words  # n-grams that may come twice, by their first word
    top, repeated = [], []
    for n in range(2, REPEATED[-1] + 1):
        fits = places + n <= words.size
        places, grams = places[fits], grams[fits]
        grams = grams * _STEP + words[places + n - 1]
        order, starts, counts = _groups(grams)
        firsts = places[order[starts]] if starts.size else places[:0]
        if n in TOP:
            top.append(_most_frequent(sums[firsts + n] - sums[firsts], counts) / max(total, 1))
        twice = np.zeros(grams.size, bool)
        twice[order[np.repeat(counts > 1, counts)]] = True
        places, grams = places[twice], grams[twice]
        if n in REPEATED:
            covered = np.zeros(words.size + 1, np.int64)
            covered[places] += 1
            covered[places + n] -= 1
            repeated.append(int(lengths[np.cumsum(covered[:-1]) > 0].sum()) / max(total, 1))
        follows = np.diff(places, append=-1) == 1  # else the second n-gram of the (n+1)-gram there comes only once
        places, grams = places[follows], grams[follows]
    return top, repeated


def _groups(values: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns an order that puts equals together, where in it each group begins, and the groups' sizes."""
    order = np.argsort(values)
    ordered = values[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]])) if values.size else order
    return order, starts, np.diff(np.append(starts, values.size))


def _most_frequent(characters: np.ndarray, counts: np.ndarray) -> int:
    most = counts.max(initial=1)
    return int(most * characters[counts == most].max()) if most > 1 else 0


def repeated_share(lines: np.ndarray, counted: np.ndarray) -> float:
    """Share of the lines that come more than once, as numbers; only those that are `counted` can be repeated."""
    if not lines.size:
        return 0.0
    _, inverse, counts = np.unique(lines, return_inverse=True, return_counts=True)
    return float(((counts[inverse] > 1) & counted).mean())
