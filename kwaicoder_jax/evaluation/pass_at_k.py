"""pass@k: the chance that at least one of k samples is right, estimated from n samples of which c are.

Chen et al. 2021, "Evaluating Large Language Models Trained on Code", equation 1: 1 - C(n-c, k) / C(n, k), unbiased for
every k <= n. The ratio of binomials is computed as a product of k factors or n-c, never as a quotient of large numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from kwaicoder_jax import errors


@dataclass(frozen=True)
class Estimate:
    """Mean over tasks with a percentile bootstrap interval over tasks.

    Attributes:
      mean: between 0 and 1.
      low: lower end of the interval.
      high: upper end.
      level: the interval's coverage, 0.95 for 95%.
    """

    mean: float
    low: float
    high: float
    level: float


def pass_at_k(n: int, c: int, k: int) -> float:
    """Unbiased estimate for one task.

    Args:
      n: samples drawn.
      c: samples that passed.
      k: samples allowed.

    Raises:
      UserError: k > n (no unbiased estimate exists), or counts that cannot be.
    """
    if k < 1:
        raise errors.UserError(f"k is {k}", where="pass@k", remedy="take k >= 1")
    if not 0 <= c <= n:
        raise errors.UserError(f"{c} of {n} samples passed", where="pass@k", remedy="0 <= passed <= samples")
    if k > n:
        raise errors.UserError(
            f"k is {k}, samples per task are {n}", where="pass@k", remedy=f"draw {k} samples or more"
        )
    if n - c < k:
        return 1.0
    # C(n-c, k) / C(n, k) = prod_{i=n-c+1..n} (1 - k/i); every factor is within (0, 1]
    return float(1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1, dtype=np.float64)))


def mean_pass_at_k(
    counts: Sequence[tuple[int, int]], k: int, *, level: float = 0.95, resamples: int = 2000, seed: int = 0
) -> Estimate:
    """Mean over tasks and its bootstrap interval.

    Args:
      counts: (samples, passed) of every task; samples may differ.
      k: samples allowed.
      level: coverage of the interval.
      resamples: draws of as many tasks with replacement. The same seed gives the same interval.
      seed: of those draws.

    Raises:
      UserError: no task, or k > the samples of some task.
    """
    if not counts:
        raise errors.UserError("no task to average over", where="pass@k", remedy="score at least one task")
    values = np.array([pass_at_k(n, c, k) for n, c in counts])
    draws = np.random.default_rng(seed)
    means = np.array([values[draws.integers(len(values), size=len(values))].mean() for _ in range(resamples)])
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Estimate(float(values.mean()), float(low), float(high), level)
