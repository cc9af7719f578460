"""Texts as bags of hashed tokens and pairs of tokens (Weinberger et al. 2009; Joulin et al. 2016, fastText)."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kwaicoder_jax.data.shingles import runs, tokens


class Features(NamedTuple):
    """Of some texts.

    Attributes:
      bucket_N: int32, those of the first text, then those of the second, ...; each once a text.
      offsets: where each text's begin, and the end; int64 [texts + 1].
    """

    bucket_N: np.ndarray
    offsets: np.ndarray


def features(texts: Sequence[bytes], buckets: int) -> Features:
    """Which of `buckets`, a power of two, each text has.

    How often it has one does not count: a long table would be nothing but its commas.
    """
    token_T, text_T = tokens(texts)
    hashes, numbers = [], []
    for width in (1, 2):
        hash_S, offsets = runs(token_T, text_T, len(texts), width)
        hashes.append(hash_S & np.uint64(buckets - 1))
        numbers.append(np.repeat(np.arange(len(texts), dtype=np.uint64), np.diff(offsets)))
    pair_N = np.unique(np.concatenate(numbers) * np.uint64(buckets) + np.concatenate(hashes))
    return Features(
        (pair_N & np.uint64(buckets - 1)).astype(np.int32),
        np.searchsorted(pair_N, np.arange(len(texts) + 1, dtype=np.uint64) * np.uint64(buckets)),
    )
