"""Forward KL against float64 numpy and against a plain float32 version under jax.grad."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kwaicoder_jax import distillation
from kwaicoder_jax.distillation import logits as implementation
from tests.kwaicoder_jax.distillation import reference as ref
from tests.kwaicoder_jax.training import devices

B, T, D, C, V = 3, 14, 8, 11, 29
TOLERANCE = {"rtol": 1e-5, "atol": 2e-5}  # float32 sums of 42 tokens; gradients are of size 1


def arrays(batch=B, time=T, seed=0, vocab=V):
    """Student and teacher hidden states and tables, and a mask of 0, 1 and weights between."""
    rng = np.random.default_rng(seed)
    shapes = [(batch, time, D), (vocab, D), (batch, time, C), (vocab, C)]
    mask = rng.choice([0.0, 1.0, 0.25], (batch, time), p=[0.3, 0.5, 0.2])
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes] + [mask.astype(np.float32)]


def log_softmax(x):
    x = x - x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def reference(student, student_table, teacher, teacher_table, mask, temperature=1.0):
    """The value and its gradients by the student's hidden states and table, float64."""
    h, w, g, u, mask = (np.asarray(x, np.float64) for x in (student, student_table, teacher, teacher_table, mask))
    q, p = log_softmax(h @ w.T / temperature), log_softmax(g @ u.T / temperature)
    value = temperature**2 * (mask * (np.exp(p) * (p - q)).sum(-1)).sum()
    error = temperature * mask[..., None] * (np.exp(q) - np.exp(p))
    return value, error @ w, np.einsum("BTV,BTD->VD", error, h)


def naive(student, student_table, teacher, teacher_table, mask, temperature=1.0):
    q = jax.nn.log_softmax(student @ student_table.T / temperature)
    p = jax.nn.log_softmax(teacher @ teacher_table.T / temperature)
    return temperature**2 * jnp.sum(mask * jnp.sum(jnp.exp(p) * (p - q), -1))


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
@pytest.mark.parametrize("slice_tokens", [1, 6, 7, 1024])  # 14 single tokens, slices of 2, the same, all at once
def test_value_and_gradients_in_any_slices(monkeypatch, slice_tokens, temperature):
    monkeypatch.setattr(implementation, "SLICE_TOKENS", slice_tokens)
    values, by_student = arrays(), (0, 1)
    value, gradients = jax.value_and_grad(distillation.forward_kl, by_student)(*values, temperature)
    expected = reference(*values, temperature)
    np.testing.assert_allclose(value, expected[0], rtol=1e-5)
    np.testing.assert_allclose(distillation.forward_kl(*values, temperature), expected[0], rtol=1e-5)
    for got, exact, plain in zip(gradients, expected[1:], jax.grad(naive, by_student)(*values, temperature)):
        np.testing.assert_allclose(got, exact, **TOLERANCE)
        np.testing.assert_allclose(got, plain, **TOLERANCE)


def test_a_teacher_of_equal_logits_costs_nothing():
    student, table, _, _, mask = arrays()
    value, gradients = jax.value_and_grad(distillation.forward_kl, (0, 1))(student, table, student, table, mask)
    assert value == 0
    assert all((np.asarray(g) == 0).all() for g in gradients)


@pytest.mark.parametrize("huge", [1e3, 1e15])  # logits of 1e6, where exp overflows, and of 1e30
def test_masked_positions_contribute_exactly_nothing(huge):
    values = arrays()
    mask = values[-1]
    function = jax.value_and_grad(distillation.forward_kl, (0, 1))
    value, (by_hidden, by_table) = function(*values)
    values[0] = np.where(mask[..., None] > 0, values[0], huge * values[0])
    values[2] = np.where(mask[..., None] > 0, values[2], -huge * values[2])
    other, (other_hidden, other_table) = function(*values)
    assert other == value
    np.testing.assert_array_equal(other_hidden, by_hidden)
    np.testing.assert_array_equal(other_table, by_table)
    assert (np.asarray(by_hidden)[mask == 0] == 0).all()


@pytest.mark.parametrize("scale", [1e3, 1e15])
def test_huge_logits_stay_finite(scale):
    student, table, teacher, teacher_table, mask = arrays()
    values = (student * scale, table, teacher * scale, teacher_table, mask)
    value, gradients = jax.value_and_grad(distillation.forward_kl, (0, 1))(*values)
    np.testing.assert_allclose(value, reference(*values)[0], rtol=1e-4)  # log-probabilities of size `scale`
    assert all(np.isfinite(g).all() for g in gradients)


def test_upstream_gradient_scales_and_teacher_and_mask_get_none():
    values = arrays()
    plain = jax.grad(distillation.forward_kl, (0, 1))(*values)
    scaled = jax.grad(lambda *x: 3.7 * distillation.forward_kl(*x), (0, 1, 2, 3, 4))(*values)
    for got, expected in zip(scaled, plain):
        np.testing.assert_allclose(got, 3.7 * expected, rtol=1e-6)
    assert all((np.asarray(g) == 0).all() for g in scaled[2:])


def test_bfloat16_hidden_states_give_a_float32_loss():
    values = arrays()
    rounded = [jnp.asarray(x, jnp.bfloat16) for x in values[:4]] + [values[4]]
    expected = reference(*rounded)
    function = jax.value_and_grad(distillation.forward_kl, (0, 1))
    for table in (rounded[1], jnp.asarray(rounded[1], jnp.float32)):  # parameters stored in either type
        inputs = [rounded[0], table, *rounded[2:]]
        value, gradients = function(*inputs)
        assert (value.dtype, gradients[0].dtype, gradients[1].dtype) == (jnp.float32, jnp.bfloat16, table.dtype)
        np.testing.assert_allclose(value, expected[0], rtol=1e-5)  # the inputs are exact; sums are float32
        for got, exact in zip(gradients, expected[1:]):  # dlogits and results have 8 bits of mantissa
            np.testing.assert_allclose(np.asarray(got, np.float64), exact, rtol=0.02, atol=0.02)


def test_upstream_gradient_is_not_rounded_to_bfloat16():
    student, *rest = arrays()
    student = jnp.asarray(student, jnp.bfloat16)
    factor = 1 + 2.0**-8  # bfloat16 has no number between 1 and 1 + 2^-7
    plain = jax.grad(distillation.forward_kl)(student, *rest)
    scaled = jax.grad(lambda x: factor * distillation.forward_kl(x, *rest))(student)
    expected = (plain.astype(jnp.float32) * factor).astype(jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(scaled, np.float32), np.asarray(expected, np.float32))


@pytest.mark.parametrize("temperature", [1.0, 3.0])
@pytest.mark.parametrize("form", tuple(distillation.LogitsLoss))
def test_every_loss_with_its_mask_and_temperature(monkeypatch, form, temperature):
    monkeypatch.setattr(implementation, "SLICE_TOKENS", 12)
    values = arrays(2, 9)  # slices of 5 positions, the last one filled up
    settings = distillation.LogitsSettings(form=form, skew=ref.SKEW, temperature=temperature)
    value, gradients = jax.value_and_grad(distillation.logits_loss, (1, 2))(settings, *values)
    student, table, teacher, teacher_table, mask = (np.asarray(x, np.float64) for x in values)
    guide = teacher @ teacher_table.T

    def loss(scores):
        return (mask * ref.of_logits(form, scores, guide, temperature)).sum()

    np.testing.assert_allclose(value, loss(student @ table.T), rtol=1e-5)
    by_scores = ref.gradient(loss, student @ table.T)
    for got, right in zip(gradients, (by_scores @ table, np.einsum("BTV,BTD->VD", by_scores, student))):
        np.testing.assert_allclose(got, right, rtol=1e-4, atol=2e-5)
    assert (np.asarray(gradients[0])[mask == 0] == 0).all()


def sizes_in(text):
    return [np.prod([int(n) for n in shape.split(",")]) for shape in re.findall(r"\w\d+\[([\d,]+)\]", text)]


VARIANTS = [distillation.LogitsSettings(form=form) for form in distillation.LogitsLoss] + [
    distillation.LogitsSettings(form=form, top_k=5) for form in distillation.LogitsLoss if form.of_distributions
]


@pytest.mark.parametrize("settings", VARIANTS, ids=lambda x: f"{x.form}-{x.top_k}")
def test_no_array_of_all_tokens_by_vocabulary_exists(settings):
    batch, time, vocab = 2, 6144, 389
    values = arrays(batch, time, vocab=vocab)
    function = jax.jit(jax.value_and_grad(functools.partial(distillation.logits_loss, settings), (0, 1)))
    compiled = function.lower(*values).compile()
    whole, piece = batch * time * vocab, implementation.SLICE_TOKENS * vocab
    for text in (str(jax.make_jaxpr(function)(*values)), compiled.as_text()):
        assert max(sizes_in(text)) < whole, "the logits of all tokens are made at once"
        assert piece in sizes_in(text), "the slices are not where this test looks for them"
    # In bytes: a few slices of float32, and the states, which are small here.
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * whole
    np.testing.assert_allclose(compiled(*values)[0], _exact_sum(settings, values), rtol=1e-4)


def _exact_sum(settings, values):
    student, table, teacher, teacher_table, mask = (np.asarray(x, np.float64) for x in values)
    scores, guide = student @ table.T, teacher @ teacher_table.T
    if settings.top_k is None:
        return (mask * ref.of_logits(settings.form, scores, guide, skew=settings.skew)).sum()
    return (mask * ref.of_buckets(settings.form, scores, guide, settings.top_k, skew=settings.skew)).sum()


def test_slices_grow_with_the_devices_that_share_them():
    values = arrays(4, 4096)
    counts = []
    for shards in (1, 2, 4):
        settings = distillation.LogitsSettings(shards=shards)
        text = str(jax.make_jaxpr(functools.partial(distillation.logits_loss, settings))(*values))
        counts.append(int(re.search(r"length=(\d+)", text).group(1)))
    assert counts == [16, 8, 4]


def test_four_devices_agree_with_one():
    values = arrays(4, 12)
    got = devices.run("distillation.kl_on_devices", 4)
    assert got["devices_of_hidden_gradient"] == 4
    expected = reference(*values, 2.0)
    for name, exact in zip(("value", "by_hidden", "by_table"), expected):
        np.testing.assert_allclose(got[name], exact, **TOLERANCE)
