"""Connected components of pairs: which documents are one cluster."""

from collections.abc import Iterable

import numpy as np


def components(count: int, edges: Iterable[np.ndarray], parent_N: np.ndarray | None = None) -> np.ndarray:
    """For each of `count` numbers the smallest one that it is connected to.

    Whatever the order of the edges is, the result is the same. Numbers hook on to smaller ones and paths are halved until
    nothing changes (Shiloach and Vishkin 1982), on whole arrays of edges at once.

    Args:
      count: of numbers, from 0.
      edges: arrays [E, 2].
      parent_N: int64 [count] to work in, a mapped file perhaps; what it holds is lost.
    """
    if parent_N is None:
        parent_N = np.empty(count, np.int64)
    parent_N[:] = np.arange(count)
    for edges_E2 in edges:
        _connect(parent_N, edges_E2)
    _flatten(parent_N)
    return parent_N


def _connect(parent_N: np.ndarray, edges_E2: np.ndarray) -> None:
    left = edges_E2
    while len(left):
        root_E2 = _roots(parent_N, left)
        apart = root_E2[:, 0] != root_E2[:, 1]
        left, root_E2 = left[apart], root_E2[apart]
        if not len(left):
            return
        low, high = root_E2.min(1), root_E2.max(1)
        np.minimum.at(parent_N, high, low)  # several may hook the same root: the smallest wins, the others come again


def _roots(parent_N: np.ndarray, edges_E2: np.ndarray) -> np.ndarray:
    root_E2 = parent_N[edges_E2]
    while True:
        next_E2 = parent_N[root_E2]
        if np.array_equal(next_E2, root_E2):
            parent_N[edges_E2] = root_E2
            return root_E2
        root_E2 = next_E2


def _flatten(parent_N: np.ndarray, block: int = 2**22) -> None:
    for first in range(0, len(parent_N), block):
        place = np.arange(first, min(first + block, len(parent_N)))
        root = parent_N[place]
        while not np.array_equal(root, parent_N[root]):
            root = parent_N[root]
        parent_N[place] = root
