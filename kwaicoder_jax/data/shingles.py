"""Shingles of code as 64-bit hashes: runs of `width` tokens, of many documents at once.

A token is a run of letters, digits, "_" and bytes of non-ASCII characters, or one other byte that is no white space. Case,
punctuation and numbers stay: text normalisers make different code equal. Hashes of tokens are differences of one prefix sum
over all bytes, b_i B^i, divided by B^start (B is odd, so it has an inverse modulo 2^64); no loop sees a token.
"""

from collections.abc import Sequence

import numpy as np

_BASE = 0x9E3779B97F4A7C15
_INVERSE = pow(_BASE, -1, 2**64)
_SPACE, _WORD, _OTHER = 0, 1, 2


def _classes() -> np.ndarray:
    table = np.full(256, _OTHER, np.uint8)
    table[[9, 10, 11, 12, 13, 32, 0]] = _SPACE
    table[128:] = _WORD
    table[np.frombuffer(b"_0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ", np.uint8)] = _WORD
    return table


_CLASSES = _classes()
_WORDS_ALONE = np.where(_CLASSES == _WORD, _WORD, _SPACE).astype(np.uint8)


def shingles(texts: Sequence[bytes], width: int) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of all shingles of all texts, in order, and where each text's begin.

    Args:
      texts: UTF-8.
      width: tokens of a shingle, at least 1; a text with fewer has none.

    Returns:
      uint64 [shingles] and int64 [texts + 1].
    """
    return runs(*tokens(texts), len(texts), width)


def runs(token_T: np.ndarray, text_T: np.ndarray, texts: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """`shingles`, from the tokens."""
    count = max(len(token_T) - width + 1, 0)
    hash_S = np.zeros(count, np.uint64)
    for place in range(width):  # order counts: each place has a factor of its own
        hash_S += token_T[place : place + count] * np.uint64(pow(_BASE, place + 1, 2**64))
    whole_S = text_T[:count] == text_T[width - 1 : width - 1 + count]
    offsets = np.searchsorted(text_T[:count][whole_S], np.arange(texts + 1))
    return mixed(hash_S[whole_S]), offsets


def tokens(texts: Sequence[bytes], *, words_alone: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Hashes of all tokens, uint64, and the text that each is of; with `words_alone` other bytes are as white space."""
    # A space between texts, so that no token reaches over their border.
    byte_N = np.frombuffer(b" ".join((*texts, b"")), np.uint8)
    class_N = (_WORDS_ALONE if words_alone else _CLASSES)[byte_N]
    before_N = np.concatenate([[_SPACE], class_N[:-1]])
    begins_N = (class_N == _OTHER) | ((class_N == _WORD) & (before_N != _WORD))
    behind_N = (before_N == _OTHER) | ((before_N == _WORD) & (class_N != _WORD))  # the byte behind a token's last one
    start_T, end_T = np.flatnonzero(begins_N), np.flatnonzero(behind_N)
    power_N, inverse_N = _powers(_BASE, len(byte_N)), _powers(_INVERSE, len(byte_N))
    sums_N = np.concatenate([np.zeros(1, np.uint64), np.cumsum((byte_N.astype(np.uint64) + np.uint64(1)) * power_N)])
    hash_T = mixed((sums_N[end_T] - sums_N[start_T]) * inverse_N[start_T])
    ends = np.cumsum([len(text) + 1 for text in texts])
    return hash_T, np.searchsorted(ends, start_T, side="right")


_POWERS: dict[int, np.ndarray] = {}


def _powers(base: int, count: int) -> np.ndarray:
    """base^0, base^1, ... modulo 2^64; made longer when more are needed."""
    known = _POWERS.get(base)
    if known is None or len(known) < count:
        factors = np.full(max(count, 2**16), base, np.uint64)
        factors[0] = 1
        known = _POWERS[base] = np.cumprod(factors)
    return known[:count]


def mixed(hash_N: np.ndarray) -> np.ndarray:
    """Uniform bits from hashes that differ: the finaliser of SplitMix64 (Steele et al. 2014)."""
    hash_N = (hash_N ^ (hash_N >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    hash_N = (hash_N ^ (hash_N >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return hash_N ^ (hash_N >> np.uint64(31))
