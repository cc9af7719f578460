"""Data that is spelled as text: base64, hexadecimal digits, escapes of bytes."""

import numpy as np

from kwaicoder_jax.data.cleaning import characters

_SHORTEST = 40  # characters of a run; hashes of 160 bits begin here, names hardly reach it
_GAP = 5  # visible characters between two runs of one piece of data: quotes, a comma, b', \\n or +
_UPPER, _LOWER, _DIGIT, _HEX_LETTER, _OTHER = 1, 2, 4, 8, 16


def _alphabet() -> np.ndarray:
    table = np.zeros(256, np.uint8)
    for bit, members in (
        (_UPPER, range(ord("A"), ord("Z") + 1)),
        (_LOWER, range(ord("a"), ord("z") + 1)),
        (_DIGIT, range(ord("0"), ord("9") + 1)),
        (_HEX_LETTER, b"abcdefABCDEF"),
        (_OTHER, b"+/"),
    ):
        table[list(members)] |= bit
    return table


_ALPHABET = _alphabet()


def data_runs(visible: np.ndarray) -> tuple[int, int]:
    """Finds runs of base64 or hexadecimal digits.

    Args:
      visible: code points of a text without its white space.

    Returns:
      characters of the longest piece of data (runs with no more than a few signs between them are one piece), and of
      all the runs of 40 characters or more. A run counts if it has capitals, small letters and digits, or is all
      hexadecimal with letters and digits: neither paths nor names nor numbers.
    """
    bits = _ALPHABET[visible] if visible.dtype == np.uint8 else np.where(visible < 128, _ALPHABET[visible & 127], 0)
    starts, ends = characters.runs(bits != 0)
    long = ends - starts >= _SHORTEST
    starts, ends = starts[long], ends[long]
    if not starts.size:
        return 0, 0
    data = np.array([_is_data(bits[start:end]) for start, end in zip(starts, ends, strict=True)])
    starts, ends = starts[data], ends[data]
    if not starts.size:
        return 0, 0
    pieces = np.cumsum(np.concatenate([[0], starts[1:] - ends[:-1] > _GAP]))
    return int(np.bincount(pieces, weights=ends - starts).max()), int((ends - starts).sum())


def _is_data(bits: np.ndarray) -> bool:
    counts = np.bincount(bits, minlength=32)
    upper, lower, digits = counts[_UPPER] + counts[_UPPER | _HEX_LETTER], counts[_LOWER] + counts[10], counts[_DIGIT]
    hexadecimal = counts[_DIGIT] + counts[_UPPER | _HEX_LETTER] + counts[_LOWER | _HEX_LETTER]
    if hexadecimal == bits.size:
        return bool(digits and digits < bits.size)
    return bool(min(upper, lower, digits) >= bits.size / 32)


def escaped(codes: np.ndarray) -> int:
    """Returns the characters of escapes such as \\x1f, \\u00e9 and \\U0001F600."""
    slashes = np.flatnonzero(codes[:-1] == ord("\\"))
    following = codes[slashes + 1]
    return int(
        4 * np.count_nonzero(following == ord("x"))
        + 6 * np.count_nonzero(following == ord("u"))
        + 10 * np.count_nonzero(following == ord("U"))
    )
