import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kwaicoder_jax import models, testing

RNG = np.random.default_rng(0)
HIDDEN, TABLE = RNG.standard_normal((3, 10, 8)).astype(np.float32), RNG.standard_normal((29, 8)).astype(np.float32)
TARGETS, MASK = RNG.integers(0, 29, (3, 10), dtype=np.int32), (RNG.random((3, 10)) < 0.7).astype(np.float32)


@pytest.fixture(autouse=True, params=[2**22, 250, 1])
def chunk(request, monkeypatch):
    """The time axis at once, in chunks that do not divide it, and one position at a time."""
    monkeypatch.setattr("kwaicoder_jax.models.vocabulary._CHUNK", request.param)


def reference(hidden, table):
    logits = hidden.astype(np.float64) @ table.astype(np.float64).T
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return -(MASK * np.take_along_axis(logp, TARGETS[..., None], -1)[..., 0]).sum(), np.exp(logp)


def test_cross_entropy_is_a_masked_sum_in_nats():
    np.testing.assert_allclose(
        models.cross_entropy(HIDDEN, TABLE, TARGETS, MASK), reference(HIDDEN, TABLE)[0], rtol=1e-5
    )


def test_gradients_are_probability_minus_target():
    got_hidden, got_table = jax.grad(models.cross_entropy, (0, 1))(HIDDEN, TABLE, TARGETS, MASK)
    error = (reference(HIDDEN, TABLE)[1] - np.eye(29)[TARGETS]) * MASK[..., None]
    np.testing.assert_allclose(got_hidden, error @ TABLE, atol=1e-5)
    np.testing.assert_allclose(got_table, np.einsum("BTV,BTD->VD", error, HIDDEN), atol=1e-5)


def test_masked_target_may_be_anything():
    other = np.where(MASK > 0, TARGETS, 0).astype(np.int32)
    a, b = (models.cross_entropy(HIDDEN, TABLE, t, MASK) for t in (TARGETS, other))
    np.testing.assert_array_equal(a, b)


def test_fractional_mask_weighs():
    half = models.cross_entropy(HIDDEN, TABLE, TARGETS, MASK * 0.5)
    np.testing.assert_allclose(half, 0.5 * reference(HIDDEN, TABLE)[0], rtol=1e-5)


def test_bfloat16_hidden_states_give_float32_loss():
    loss = models.cross_entropy(jnp.asarray(HIDDEN, jnp.bfloat16), jnp.asarray(TABLE), TARGETS, MASK)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, reference(HIDDEN, TABLE)[0], rtol=0.02)  # 8 bits of mantissa


def test_projection_is_the_head_or_the_tied_table():
    for tied in (True, False):
        params = testing.random_params(testing.dense_config(tie_embeddings=tied))
        assert models.projection(params) is params["embedding" if tied else "head"]
