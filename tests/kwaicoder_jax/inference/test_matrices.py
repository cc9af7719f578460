"""Stored matrices against float64 products, and int8 against its closed-form error."""

import jax.numpy as jnp
import numpy as np
import pytest

from kwaicoder_jax.inference import matrices
from kwaicoder_jax.inference.matrices import Columns, FloatMatrix


def random(*shape, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) * np.exp(rng.standard_normal(shape))).astype(np.float32)


@pytest.mark.parametrize("axis", [0, 1])
def test_quantised_values_are_off_by_half_a_scale_at_most(axis):
    x = random(40, 30)
    q, scale = (np.asarray(each) for each in matrices.quantise(jnp.asarray(x), axis))
    assert q.dtype == np.int8
    assert np.abs(q.astype(int)).max(axis).tolist() == [127] * (x.size // x.shape[axis])
    np.testing.assert_allclose(scale, np.abs(x).max(axis, keepdims=True) / 127, rtol=1e-6)
    error = np.abs(x.astype(np.float64) - q * scale.astype(np.float64))
    assert (error <= scale / 2 * (1 + 1e-4)).all()
    assert error.max() > scale.min() / 4, "the bound would hold for anything"


def test_zeros_stay_zeros():
    q, scale = matrices.quantise(jnp.zeros((3, 4)), 0)
    assert not np.asarray(q).any()
    assert np.isfinite(scale).all()


@pytest.mark.parametrize("rows", [1, 2, 7])
def test_int8_products_within_their_bound(rows):
    """|sum (x + a)(w + b) - xw| <= sum |x| |b| + |w| |a| + |a| |b|, where a and b are half a scale at most."""
    x, w = random(rows, 50), random(50, 20, seed=1)
    got = np.asarray(matrices.int8(jnp.asarray(w)).multiply(jnp.asarray(x)))
    assert got.dtype == np.float32
    a, b = np.abs(x).max(1, keepdims=True) / 254, np.abs(w).max(0, keepdims=True) / 254
    bound = np.abs(x).sum(1, keepdims=True) * b + np.abs(w).sum(0, keepdims=True) * a + len(w) * a * b
    error = np.abs(got - x.astype(np.float64) @ w)
    assert (error <= bound).all()
    assert error.max() < 0.3 * bound.max(), "rounding errors of random numbers cancel"


def test_int8_products_of_whole_numbers_are_exact():
    """Scales are 1 where the largest value is 127: sums in int32, beyond what float32 or bfloat16 holds."""
    x, w = np.full((3, 3000), 127, np.float32), np.full((3000, 5), 127, np.float32)
    w[1::2] = -126
    x[:, 0] = 127
    expected = (x.astype(np.int64) @ w.astype(np.int64)).astype(np.float32)
    np.testing.assert_allclose(matrices.int8(jnp.asarray(w)).multiply(jnp.asarray(x)), expected, rtol=1e-6)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("rows", [1, 3])
def test_columns_are_weights_of_their_own(dtype, rows):
    """bfloat16 too gives the float32 sums of its rounded factors; one row is no special case."""
    x, one, two = (jnp.asarray(random(*shape), dtype) for shape in ((rows, 2, 5), (5, 6), (5, 4)))
    whole = FloatMatrix(jnp.concatenate([one, two], axis=1))
    for weight, columns in ((one.reshape(5, 2, 3), Columns(whole, 0, (2, 3))), (two, Columns(whole, 6, (4,)))):
        got = columns.project(x, 1)
        expected = np.tensordot(np.asarray(x, np.float64), np.asarray(weight, np.float64), 1)
        assert got.dtype == dtype
        np.testing.assert_allclose(
            np.asarray(got, np.float64), expected, rtol=1e-5 if dtype == "float32" else 8e-3, atol=1e-5
        )


def test_a_product_over_two_axes():
    x, weight = random(2, 3, 4, 5), random(4, 5, 7)
    columns = Columns(FloatMatrix(jnp.asarray(weight.reshape(20, 7))), 0, (7,))
    np.testing.assert_allclose(columns.project(jnp.asarray(x), 2), np.tensordot(x, weight, 2), rtol=1e-4, atol=1e-4)
