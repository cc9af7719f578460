"""MinHash signatures, and the bands of them by which near duplicates meet (Broder 1997; Indyk and Motwani 1998).

Two texts whose sets of shingles have a Jaccard index J agree in each number of their signatures with probability J, and meet
in at least one of b bands of r numbers with probability 1 - (1 - J^r)^b.
"""

import functools
from collections.abc import Sequence

import numpy as np

from kwaicoder_jax.data.shingles import mixed, shingles

_SEED = 1
_BATCH = 2**21  # bytes of text that are worked on together


def signatures(texts: Sequence[bytes], permutations: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Signatures of texts, and how many shingles each has: uint32 [texts, permutations], int64 [texts].

    Args:
      texts: UTF-8.
      permutations: numbers of a signature.
      width: tokens of a shingle; the signature of a text that has none means nothing.
    """
    parts, counts = [np.zeros((0, permutations), np.uint32)], [np.zeros(0, np.int64)]
    for first, last in _batches(texts):
        hash_S, offsets = shingles(texts[first:last], width)
        parts.append(_of_shingles(hash_S, offsets, permutations))
        counts.append(np.diff(offsets))
    return np.concatenate(parts), np.concatenate(counts)


def _batches(texts: Sequence[bytes]) -> list[tuple[int, int]]:
    found, first, size = [], 0, 0
    for place, text in enumerate(texts):
        size += len(text)
        if size >= _BATCH:
            found.append((first, place + 1))
            first, size = place + 1, 0
    return found + [(first, len(texts))] * (first < len(texts))


def _of_shingles(hash_S: np.ndarray, offsets: np.ndarray, permutations: int) -> np.ndarray:
    import rensa  # Rust; a hundred times faster than numpy, and not for those who only train

    if not len(hash_S):
        return np.full((len(offsets) - 1, permutations), 2**32 - 1, np.uint32)  # as of an empty text beside others
    made = rensa.RMinHash.digest_matrix_from_flat_token_hashes(hash_S, offsets.astype(np.uint64), permutations, _SEED)
    return np.array(made.to_rows(), np.uint32).reshape(-1, permutations)


@functools.cache
def bands(threshold: float, permutations: int) -> tuple[int, int]:
    """Numbers of bands and of rows of each, for which false positives and negatives at `threshold` are fewest.

    What is minimal is the area under the curve of meeting below the threshold plus the area over it above, with J uniform;
    datasketch chooses in the same way.
    """
    step = 1e-3
    below, above = np.arange(step / 2, threshold, step), np.arange(threshold + step / 2, 1.0, step)
    best = min(
        (np.sum(meeting(below, b, r)) + np.sum(1 - meeting(above, b, r)), b, r)
        for b in range(1, permutations + 1)
        for r in range(1, permutations // b + 1)
    )
    return best[1], best[2]


def meeting(jaccard: np.ndarray, count: int, rows: int) -> np.ndarray:
    """Probability that two texts meet in one of `count` bands of `rows` numbers."""
    return 1 - (1 - jaccard**rows) ** count


def band_keys(signature_MP: np.ndarray, count: int, rows: int) -> np.ndarray:
    """A 64-bit key for each band of each signature, [M, count]; those of different bands differ."""
    banded = signature_MP[:, : count * rows].reshape(-1, count, rows).astype(np.uint64)
    key_MB = np.broadcast_to(np.arange(count, dtype=np.uint64), banded.shape[:2])
    for row in range(rows):
        key_MB = mixed(key_MB * np.uint64(0x9E3779B97F4A7C15) + banded[:, :, row])
    return key_MB
