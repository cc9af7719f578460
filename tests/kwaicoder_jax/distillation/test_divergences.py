"""Values against definitions in float64, gradients against finite differences of those."""

import jax.numpy as jnp
import numpy as np
import pytest

from kwaicoder_jax.distillation.divergences import LogitsLoss, divergence
from tests.kwaicoder_jax.distillation import reference

FORMS = tuple(LogitsLoss)
OF_DISTRIBUTIONS = tuple(form for form in FORMS if form.of_distributions)
V = 11


def logits(scale=2.0, seed=0):
    """Logits of student and teacher, [5, V]."""
    rng = np.random.default_rng(seed)
    return [(scale * rng.standard_normal((5, V))).astype(np.float32) for _ in range(2)]


def compare(form, student, teacher):
    """Value [5] and gradient [5, V]; the function has the vocabulary first."""
    value, gradient = divergence(form, jnp.asarray(student.T), jnp.asarray(teacher.T), reference.SKEW)
    return np.asarray(value), np.asarray(gradient).T


@pytest.mark.parametrize("scale", [0.1, 2.0, 8.0])
@pytest.mark.parametrize("form", FORMS)
def test_value_and_gradient(form, scale):
    student, teacher = logits(scale)
    value, gradient = compare(form, student, teacher)
    np.testing.assert_allclose(value, reference.of_logits(form, student, teacher), rtol=1e-4, atol=2e-6)
    exact = reference.gradient(lambda x: reference.of_logits(form, x, teacher).sum(), student)
    np.testing.assert_allclose(gradient, exact, rtol=1e-4, atol=2e-6)  # float32 of logits up to 20


@pytest.mark.parametrize("form", FORMS)
def test_equal_logits_cost_nothing_and_teach_nothing(form):
    student, _ = logits()
    value, gradient = compare(form, student, student)
    np.testing.assert_allclose(value, 0, atol=3e-7)
    np.testing.assert_allclose(gradient, 0, atol=3e-7)


@pytest.mark.parametrize("form", OF_DISTRIBUTIONS)
def test_a_constant_on_all_logits_changes_nothing(form):
    student, teacher = logits()
    moved, _ = compare(form, student + 3, teacher - 2)
    np.testing.assert_allclose(moved, compare(form, student, teacher)[0], rtol=1e-4)


def test_jensen_shannon_is_symmetric_and_bounded_and_skews_meet_the_ends():
    student, teacher = logits(20.0)
    one, other = (compare(LogitsLoss.JENSEN_SHANNON, *pair)[0] for pair in ((student, teacher), (teacher, student)))
    np.testing.assert_allclose(one, other, rtol=1e-5)
    assert (one <= np.log(2) + 1e-6).all()
    s, t = jnp.asarray(logits()[0].T), jnp.asarray(logits()[1].T)
    nearly = divergence(LogitsLoss.SKEWED_KL, s, t, 1e-7)[0]
    np.testing.assert_allclose(nearly, divergence(LogitsLoss.FORWARD_KL, s, t, 0.5)[0], rtol=1e-4)


@pytest.mark.parametrize("scale", [1e4, 1e18])
@pytest.mark.parametrize("form", [form for form in FORMS if form is not LogitsLoss.MSE])
def test_huge_logits_stay_finite(form, scale):
    value, gradient = compare(form, *logits(scale))
    assert np.isfinite(value).all()
    assert np.isfinite(gradient).all()


def test_the_cosine_of_zeros_is_finite():
    student, teacher = logits()
    value, gradient = compare(LogitsLoss.COSINE, 0 * student, teacher)
    np.testing.assert_allclose(value, 1)
    assert np.isfinite(gradient).all()
