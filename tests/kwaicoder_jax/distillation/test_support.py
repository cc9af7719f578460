"""K tokens and the rest as one bucket: against the formula in float64, as a bound, and from stored arrays."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kwaicoder_jax import distillation
from kwaicoder_jax.distillation import LogitsLoss, LogitsSettings, logits, support
from tests.kwaicoder_jax.distillation import reference
from tests.kwaicoder_jax.distillation.test_divergences import OF_DISTRIBUTIONS
from tests.kwaicoder_jax.distillation.test_logits import B, D, T, V, arrays
from tests.kwaicoder_jax.training import devices

BY_STUDENT = (1, 2)


def settings(form=LogitsLoss.FORWARD_KL, **more):
    return LogitsSettings(form=LogitsLoss(form), skew=reference.SKEW, **more)


def both(function, *values):
    """Value and gradients by the student; compiled anew, since slices are cut as the module says at that time."""
    by_student = jax.value_and_grad(function, BY_STUDENT)
    return jax.jit(by_student, static_argnums=0, compiler_options=devices.QUICK)(*values)


def exact(values, form, count, temperature):
    """The masked sum as a float64 function of the student's logits, and these logits."""
    student, table, teacher, teacher_table, mask = (np.asarray(x, np.float64) for x in values)
    guide = teacher @ teacher_table.T

    def loss(scores):
        return (mask * reference.of_buckets(form, scores, guide, count, temperature)).sum()

    return loss, student @ table.T


@pytest.mark.parametrize("slice_tokens", [7, 1024])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("form", OF_DISTRIBUTIONS)
def test_value_and_gradients(monkeypatch, form, temperature, slice_tokens):
    monkeypatch.setattr(logits, "SLICE_TOKENS", slice_tokens)
    values = arrays(2, 5)
    options = settings(form, temperature=temperature, top_k=4)
    value, gradients = both(distillation.logits_loss, options, *values)
    loss, scores = exact(values, form, 4, temperature)
    np.testing.assert_allclose(value, loss(scores), rtol=1e-5)
    by_scores = reference.gradient(loss, scores)
    expected = by_scores @ values[1], np.einsum("BTV,BTD->VD", by_scores, values[0])
    for got, right in zip(gradients, expected):
        np.testing.assert_allclose(got, right, rtol=1e-4, atol=2e-5)  # float32 of logits up to 10


def test_the_formula_of_the_recipe():
    """sum_T p log(p/q) + (1 - p_T) log((1 - p_T) / (1 - q_T)), written once more with nothing shared."""
    values = arrays(2, 5)
    student, table, teacher, teacher_table, mask = (np.asarray(x, np.float64) for x in values)
    total = 0.0
    for row in np.ndindex(2, 5):
        q, p = (np.exp(reference.log_softmax(h[row] @ w.T)) for h, w in ((student, table), (teacher, teacher_table)))
        best = sorted(range(V), key=lambda token, p=p: -p[token])[:3]
        inside = sum(p[i] * np.log(p[i] / q[i]) for i in best)
        p_tail, q_tail = 1 - p[best].sum(), 1 - q[best].sum()
        total += mask[row] * (inside + p_tail * np.log(p_tail / q_tail))
    np.testing.assert_allclose(distillation.logits_loss(settings(top_k=3), *values), total, rtol=1e-5)


@pytest.mark.parametrize("form", OF_DISTRIBUTIONS)
def test_a_lower_bound_that_grows_to_the_whole_loss(form):
    values = arrays()
    whole, whole_gradients = both(distillation.logits_loss, settings(form), *values)
    bounds = [float(both(distillation.logits_loss, settings(form, top_k=k), *values)[0]) for k in (1, 4, 16)]
    assert all(0 <= a <= b * (1 + 1e-5) for a, b in zip(bounds, [*bounds[1:], float(whole)]))
    assert bounds[0] < 0.9 * whole
    value, gradients = both(distillation.logits_loss, settings(form, top_k=V), *values)
    np.testing.assert_allclose(value, whole, rtol=1e-5)  # K = V leaves an empty bucket
    for got, right in zip(gradients, whole_gradients):
        np.testing.assert_allclose(got, right, rtol=1e-4, atol=2e-5)


def test_the_student_s_tail_gets_a_gradient_that_moves_its_mass():
    rng = np.random.default_rng(3)
    student_V11, teacher_V11 = (jnp.asarray(rng.standard_normal((V, 1, 1)), jnp.float32) for _ in range(2))
    guide = support.top_k(teacher_V11, 4)
    chosen = np.asarray(guide.ids_BTK)[0, 0]
    tail = np.setdiff1d(np.arange(V), chosen)
    _, gradient = support.through_buckets(
        lambda s, t: logits.divergence(LogitsLoss.FORWARD_KL, s, t, 0.1), student_V11, guide
    )
    gradient = np.asarray(gradient)[:, 0, 0]
    p, q = (np.exp(reference.log_softmax(np.asarray(x, np.float64)[:, 0, 0])) for x in (teacher_V11, student_V11))
    # Closed form: q_j (1 - P_tail / Q_tail) in the tail, q_i - p_i at the chosen tokens.
    np.testing.assert_allclose(gradient[tail], q[tail] * (1 - p[tail].sum() / q[tail].sum()), rtol=1e-4)
    np.testing.assert_allclose(gradient[chosen], q[chosen] - p[chosen], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(gradient.sum(), 0, atol=1e-6)


def test_a_tiny_tail_keeps_its_digits():
    """1 - sum of p would be 0 or noise in float32: the tail here holds e^-40 of the mass."""
    teacher = np.zeros((V, 1, 1), np.float32)
    teacher[:3] = 40.0
    found = support.top_k(jnp.asarray(teacher), 3)
    np.testing.assert_allclose(found.log_tail_BT, np.log((V - 3) / 3) - 40, rtol=1e-6)
    np.testing.assert_allclose(np.asarray(found.log_p_BTK)[0, 0], np.full(3, -np.log(3)), rtol=5e-6)  # float32 of 40


def stored(values, count, temperature=1.0, dtype=np.float32):
    """The top K of every position as numpy found it in float64."""
    _, _, teacher, teacher_table, _ = (np.asarray(x, np.float64) for x in values)
    scores = teacher @ teacher_table.T / temperature
    ids = np.argsort(-scores, -1)[..., :count]
    p = reference.log_softmax(scores)
    best = np.take_along_axis(p, ids, -1)
    tail = np.log1p(-np.exp(best).sum(-1))
    total = np.log(np.exp(scores).sum(-1))
    return distillation.TopK(
        ids.astype(np.int32), best.astype(dtype), tail.astype(np.float32), total.astype(np.float32)
    )


@pytest.mark.parametrize("form", OF_DISTRIBUTIONS)
def test_stored_logits_teach_what_the_live_teacher_does(monkeypatch, form):
    monkeypatch.setattr(logits, "SLICE_TOKENS", 12)
    values, options = arrays(), settings(form, temperature=2.0, top_k=6)
    live = both(distillation.logits_loss, options, *values)
    got = both(distillation.cached_logits_loss, options, *values[:2], stored(values, 6, 2.0), values[4])
    for value, right in zip(jax.tree.leaves(got), jax.tree.leaves(live)):
        np.testing.assert_allclose(value, right, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(("dtype", "error"), [(np.float16, 2e-3), (jnp.bfloat16, 2e-2)])
def test_values_of_16_bits_are_near(dtype, error):
    values, options = arrays(), settings(top_k=6)
    live = distillation.logits_loss(options, *values)
    got = distillation.cached_logits_loss(options, *values[:2], stored(values, 6, dtype=dtype), values[4])
    np.testing.assert_allclose(got, live, rtol=error)


def test_ids_above_17_bits_are_kept():
    size = 2**17 + 30
    student, teacher = jnp.zeros((1, 2, 1)), jnp.ones((1, 2, 1))
    table = np.random.default_rng(0).standard_normal((size, 1)).astype(np.float32)
    table[size - 3 :] = 9.0 + np.arange(3, dtype=np.float32)[:, None]
    found = support.top_k(jnp.einsum("VD,BTD->VBT", table, teacher), 3)
    assert found.ids_BTK.dtype == jnp.int32
    assert np.asarray(found.ids_BTK).tolist() == [[[size - 1, size - 2, size - 3]] * 2]
    gradient = jax.grad(distillation.logits_loss, 2)(
        settings(top_k=3), student + 1, jnp.zeros((size, 1)), teacher, jnp.asarray(table), jnp.ones((1, 2))
    )
    assert (np.argsort(np.asarray(gradient)[:, 0])[:3] == [size - 1, size - 2, size - 3]).all()


def test_masked_positions_contribute_exactly_nothing_whatever_is_stored_there():
    values, options = arrays(), settings(top_k=5)
    mask, guide = values[4], stored(values, 5)
    hidden = mask == 0
    other = distillation.TopK(
        np.where(hidden[..., None], 0, guide.ids_BTK), np.where(hidden[..., None], np.float32(np.nan), guide.log_p_BTK),
        np.where(hidden, np.float32(np.inf), guide.log_tail_BT), guide.logsumexp_BT,
    )  # fmt: skip
    function = functools.partial(both, distillation.cached_logits_loss, options, *values[:2])
    a, b = (jax.tree.leaves(function(each, mask)) for each in (guide, other))
    for x, y in zip(a, b):
        np.testing.assert_array_equal(x, y)
    assert a[1].shape == (B, T, D)


def test_four_devices_agree_with_one_and_gather_nothing():
    values = arrays(4, 12)
    got = devices.run("distillation.top_k_on_devices", 4)
    value, gradients = both(distillation.logits_loss, LogitsSettings(temperature=2.0, top_k=5), *values)
    for name, exact in zip(("value", "by_hidden", "by_table"), (value, *gradients)):
        np.testing.assert_allclose(got[name], exact, rtol=1e-5, atol=2e-5)
    assert got["gathers"] == 0
    assert got["largest"] <= 12 * V  # the logits of its own row, for 12 positions
