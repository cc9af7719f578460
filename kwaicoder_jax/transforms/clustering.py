"""Seeded k-means, plain and with clusters of exactly equal size; numpy, so that every machine finds the same clusters."""

import numpy as np


def balanced_clusters(
    points_NS: np.ndarray, clusters: int, *, seed: int = 0, restarts: int = 4, iterations: int = 30
) -> np.ndarray:
    """Clusters of exactly N / clusters points that are alike: spherical k-means under a capacity.

    Points are handed out greedily, the most decided pair of point and cluster first; then pairs of clusters swap points
    as long as that helps. F neurons in G clusters cost O(F S G) an iteration.

    Args:
      points_NS: profiles; rows are scaled to length 1, and only their direction counts.
      clusters: a divisor of N.
      seed: of the first centres.
      restarts: how many first centres to try; the tightest result is returned.
      iterations: at most, for each of them.

    Returns:
      [N] labels; clusters are numbered by their first member.
    """
    points_NS = _unit(np.asarray(points_NS, np.float64))
    best_N, best = np.zeros(len(points_NS), np.int64), -np.inf
    for restart in range(restarts if clusters > 1 else 1):
        centres_CS = _first_centres(points_NS, clusters, np.random.default_rng((seed, restart)))
        label_N = _assign(points_NS @ centres_CS.T)
        for _ in range(iterations):
            centres_CS = _unit(_sums(points_NS, label_N, clusters))
            before_N, label_N = label_N, _assign(points_NS @ centres_CS.T)
            if (before_N == label_N).all():
                break
        tightness = np.sum(np.linalg.norm(_sums(points_NS, label_N, clusters), axis=1))
        if tightness > best + 1e-9:
            best_N, best = label_N, tightness
    return _by_first_member(best_N)


def centroids(
    points_ND: np.ndarray, clusters: int, *, seed: int = 0, restarts: int = 4, iterations: int = 50
) -> np.ndarray:
    """Centres of plain k-means, [clusters, D]; the tightest of some restarts, by Lloyd's algorithm."""
    points_ND = np.asarray(points_ND, np.float64)
    best_CD, best = points_ND[:clusters], np.inf
    for restart in range(restarts):
        centres_CD = _first_centres(points_ND, clusters, np.random.default_rng((seed, restart)))
        for _ in range(iterations):
            label_N = np.argmin(_distances(points_ND, centres_CD), axis=1)
            size_C = np.bincount(label_N, minlength=clusters)[:, None]
            moved_CD = np.where(size_C > 0, _sums(points_ND, label_N, clusters) / np.maximum(size_C, 1), centres_CD)
            if np.array_equal(moved_CD, centres_CD):
                break
            centres_CD = moved_CD
        spread = np.sum(np.min(_distances(points_ND, centres_CD), axis=1))
        if spread < best:
            best_CD, best = centres_CD, spread
    return best_CD


def _first_centres(points_NS: np.ndarray, clusters: int, generator: np.random.Generator) -> np.ndarray:
    """k-means++ (Arthur and Vassilvitskii 2007): each next centre is drawn by squared distance to those before.

    Greedy, as in their section 5: of some draws, the one that leaves the least distance.
    """
    chosen = [int(generator.integers(len(points_NS)))]
    nearest_N = _distances(points_NS, points_NS[chosen])[:, 0]
    for _ in range(clusters - 1):
        total = nearest_N.sum()
        share_N = nearest_N / total if total > 0 else np.full(len(points_NS), 1 / len(points_NS))
        drawn_T = generator.choice(len(points_NS), size=2 + int(np.log2(clusters)), p=share_N)
        left_NT = np.minimum(nearest_N[:, None], _distances(points_NS, points_NS[drawn_T]))
        best = int(np.argmin(left_NT.sum(axis=0)))
        chosen.append(int(drawn_T[best]))
        nearest_N = left_NT[:, best]
    return points_NS[chosen]


def _assign(similarity_NC: np.ndarray) -> np.ndarray:
    """Labels [N] with every cluster of the same size and a high sum of similarity."""
    points, clusters = similarity_NC.shape
    label_N, room_C = np.full(points, -1), np.full(clusters, points // clusters)
    for pair in np.argsort(-similarity_NC, axis=None, kind="stable"):
        point, cluster = divmod(int(pair), clusters)
        if label_N[point] < 0 and room_C[cluster] > 0:
            label_N[point] = cluster
            room_C[cluster] -= 1
    for a in range(clusters):
        for b in range(a + 1, clusters):
            _swap(similarity_NC, label_N, a, b)
    return label_N


def _swap(similarity_NC: np.ndarray, label_N: np.ndarray, a: int, b: int) -> None:
    """Exchanges members of two clusters, pair by pair, while the sum of similarity grows."""
    in_a, in_b = np.flatnonzero(label_N == a), np.flatnonzero(label_N == b)
    gain_N = similarity_NC[:, b] - similarity_NC[:, a]
    in_a = in_a[np.argsort(-gain_N[in_a], kind="stable")]
    in_b = in_b[np.argsort(gain_N[in_b], kind="stable")]
    count = int(np.sum(gain_N[in_a] - gain_N[in_b] > 1e-12))
    label_N[in_a[:count]], label_N[in_b[:count]] = b, a


def _sums(points_NS: np.ndarray, label_N: np.ndarray, clusters: int) -> np.ndarray:
    return (label_N[None, :] == np.arange(clusters)[:, None]).astype(points_NS.dtype) @ points_NS


def _distances(points_NS: np.ndarray, centres_CS: np.ndarray) -> np.ndarray:
    """Squared, [N, C]."""
    square = np.sum(points_NS**2, axis=1)[:, None] + np.sum(centres_CS**2, axis=1)[None]
    return np.maximum(square - 2 * points_NS @ centres_CS.T, 0.0)


def _unit(points_NS: np.ndarray) -> np.ndarray:
    return points_NS / np.maximum(np.linalg.norm(points_NS, axis=1, keepdims=True), 1e-12)


def _by_first_member(label_N: np.ndarray) -> np.ndarray:
    _, first, inverse = np.unique(label_N, return_index=True, return_inverse=True)
    return np.argsort(np.argsort(first))[inverse]
