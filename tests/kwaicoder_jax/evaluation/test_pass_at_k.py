"""Against the formula in exact fractions, against enumeration, and against simulation."""

import itertools
from fractions import Fraction
from math import comb

import numpy as np
import pytest

from kwaicoder_jax import errors
from kwaicoder_jax.evaluation import pass_at_k


@pytest.mark.parametrize("n", [1, 2, 5, 20, 200])
def test_equals_the_exact_formula(n):
    for c in range(0, n + 1, max(1, n // 20)):
        for k in {1, 2, 5, n // 2, n} - {0}:
            if k <= n:
                exact = 1 - Fraction(comb(n - c, k), comb(n, k))
                # n factors, each rounded to half a unit in the last place
                assert pass_at_k.pass_at_k(n, c, k) == pytest.approx(float(exact), rel=0, abs=n * 2.3e-16)


def test_equals_enumeration():
    """Of all pairs out of 5 samples with 2 right, the share with a right one."""
    samples = [True, True, False, False, False]
    share = Fraction(sum(any(pair) for pair in itertools.combinations(samples, 2)), comb(5, 2))
    assert pass_at_k.pass_at_k(5, 2, 2) == pytest.approx(float(share), abs=1e-15)


def test_large_numbers_stay_finite():
    value = pass_at_k.pass_at_k(100_000, 3, 50_000)
    assert value == pytest.approx(float(1 - Fraction(comb(99_997, 50_000), comb(100_000, 50_000))), abs=1e-10)


@pytest.mark.parametrize(("n", "c", "k"), [(5, 1, 6), (5, 6, 1), (5, -1, 1), (5, 1, 0), (0, 0, 1)])
def test_impossible_counts(n, c, k):
    with pytest.raises(errors.UserError):
        pass_at_k.pass_at_k(n, c, k)


def test_mean_over_tasks_with_different_numbers_of_samples():
    estimate = pass_at_k.mean_pass_at_k([(2, 1), (4, 0), (10, 10)], 2)
    assert estimate.mean == pytest.approx((1 + 0 + 1) / 3, abs=1e-15)
    with pytest.raises(errors.UserError, match="samples per task are 2"):
        pass_at_k.mean_pass_at_k([(2, 1), (4, 0)], 3)
    with pytest.raises(errors.UserError, match="no task"):
        pass_at_k.mean_pass_at_k([], 1)


def test_interval():
    """For 0/1 scores the bootstrap of the mean is binomial, so its interval is near p +- 1.96 sqrt(p(1-p)/n)."""
    counts = [(1, int(i % 4 == 0)) for i in range(400)]
    one = pass_at_k.mean_pass_at_k(counts, 1, seed=3)
    half = 1.96 * np.sqrt(0.25 * 0.75 / 400)
    assert one.mean == 0.25
    assert one.low == pytest.approx(0.25 - half, abs=0.006)  # steps of 1/400, and 2000 draws
    assert one.high == pytest.approx(0.25 + half, abs=0.006)
    assert one == pass_at_k.mean_pass_at_k(counts, 1, seed=3)
    assert one != pass_at_k.mean_pass_at_k(counts, 1, seed=4)
    certain = pass_at_k.mean_pass_at_k([(3, 3)] * 5, 1)
    assert (certain.low, certain.mean, certain.high) == (1, 1, 1)
