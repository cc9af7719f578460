"""Routing against numpy: a stable argsort, and loops over tokens."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import routing
from kernels.routing import reference


def _experts(seed: int, tokens: int, choices: int, experts: int, *, elsewhere: bool = False) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, experts + elsewhere, (tokens, choices)).astype(np.int32)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 40), st.integers(1, 5), st.integers(1, 64), st.booleans())
def test_sort_is_the_stable_argsort(seed, tokens, choices, experts, elsewhere):
    experts_MX = _experts(seed, tokens, choices, experts, elsewhere=elsewhere)
    order = routing.sort_by_expert(jnp.asarray(experts_MX), experts)
    flat = experts_MX.reshape(-1)
    expected = np.argsort(flat, kind="stable")
    np.testing.assert_array_equal(order.slot_R, expected)
    np.testing.assert_array_equal(np.asarray(order.row_MX).reshape(-1)[expected], np.arange(flat.size))
    np.testing.assert_array_equal(order.group_sizes_E, np.bincount(flat, minlength=experts + 1)[:experts])
    slot_R, row_MX, sizes_E = reference.sort_by_expert(jnp.asarray(experts_MX), experts)
    np.testing.assert_array_equal(order.slot_R, slot_R)
    np.testing.assert_array_equal(order.row_MX, row_MX)
    np.testing.assert_array_equal(order.group_sizes_E, sizes_E)


def test_sort_falls_back_where_packed_keys_overflow():
    experts_MX = jnp.asarray(_experts(0, 50, 2, 7))
    many = 2**31 // experts_MX.size + 1
    slot_R = jax.eval_shape(lambda e: routing.sort_by_expert(e, many).slot_R, experts_MX)
    assert slot_R.shape == (100,)
    narrow = routing.sort_by_expert(experts_MX, 7)
    text = str(jax.make_jaxpr(lambda e: routing.sort_by_expert(e, many).slot_R)(experts_MX))
    assert "num_keys=1" in text
    assert narrow.slot_R.dtype == jnp.int32


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_moves_and_their_gradients_against_float64(dtype):
    tokens, choices, experts, width = 23, 3, 5, 7
    rng = np.random.default_rng(1)
    order = routing.sort_by_expert(jnp.asarray(_experts(2, tokens, choices, experts)), experts)
    x_MD = jnp.asarray(rng.normal(size=(tokens, width)), dtype)
    weight_MX = jnp.asarray(rng.random((tokens, choices)), jnp.float32)
    rows_RD = jnp.asarray(rng.normal(size=(tokens * choices, width)), dtype)
    drows_RD = jnp.asarray(rng.normal(size=rows_RD.shape), dtype)
    dy_MD = jnp.asarray(rng.normal(size=x_MD.shape), dtype)

    permuted_RD, pull_permute = jax.vjp(lambda x: routing.permute(x, order), x_MD)
    combined_MD, pull_combine = jax.vjp(lambda r, w: routing.combine(r, w, order), rows_RD, weight_MX)
    assert permuted_RD.dtype == combined_MD.dtype == dtype

    def f64(array):
        return np.asarray(array.astype(jnp.float32), np.float64)

    token_R, row_MX = np.asarray(order.token_R), np.asarray(order.row_MX)
    np.testing.assert_array_equal(f64(permuted_RD), f64(x_MD)[token_R])
    dx = np.zeros((tokens, width))
    np.add.at(dx, token_R, f64(drows_RD))
    combined = np.einsum("mxd,mx->md", f64(rows_RD)[row_MX], f64(weight_MX))
    drows = (f64(weight_MX)[:, :, None] * f64(dy_MD)[:, None, :]).reshape(-1, width)[np.asarray(order.slot_R)]
    dweight = np.einsum("mxd,md->mx", f64(rows_RD)[row_MX], f64(dy_MD))

    # One rounding to the dtype at the end; sums in between are float32.
    tolerance = {"rtol": 2e-6, "atol": 2e-6} if dtype == jnp.float32 else {"rtol": 2**-8, "atol": 1e-6}
    np.testing.assert_allclose(f64(pull_permute(drows_RD)[0]), dx, **tolerance)
    np.testing.assert_allclose(f64(combined_MD), combined, **tolerance)
    actual_drows, actual_dweight = pull_combine(dy_MD)
    np.testing.assert_allclose(f64(actual_drows), drows, **tolerance)
    np.testing.assert_allclose(f64(actual_dweight), dweight, rtol=2e-5, atol=2e-6)
    np.testing.assert_allclose(f64(combined_MD), f64(reference.combine(rows_RD, weight_MX, order.row_MX)), **tolerance)
    np.testing.assert_array_equal(f64(permuted_RD), f64(reference.permute(x_MD, order.row_MX)))


def test_combine_within_half_an_ulp_a_choice():
    """Of the sum of magnitudes: X products and X - 1 additions round once each, in float32."""
    tokens, choices, experts = 64, 8, 16
    rng = np.random.default_rng(4)
    order = routing.sort_by_expert(jnp.asarray(_experts(4, tokens, choices, experts)), experts)
    rows_RD = rng.normal(size=(tokens * choices, 5)).astype(np.float32)
    weight_MX = rng.random((tokens, choices)).astype(np.float32)
    chosen_MXD = rows_RD.astype(np.float64)[np.asarray(order.row_MX)] * weight_MX.astype(np.float64)[:, :, None]
    error = np.abs(np.asarray(routing.combine(jnp.asarray(rows_RD), jnp.asarray(weight_MX), order)) - chosen_MXD.sum(1))
    assert np.all(error <= choices * 2.0**-24 * np.abs(chosen_MXD).sum(1))


def test_no_scatter_of_rows_in_any_direction():
    order = routing.sort_by_expert(jnp.asarray(_experts(0, 16, 2, 4)), 4)

    def loss(x_MD, weight_MX):
        return jnp.sum(routing.combine(routing.permute(x_MD, order), weight_MX, order))

    text = jax.jit(jax.grad(loss, (0, 1))).lower(jnp.ones((16, 8)), jnp.ones((16, 2))).as_text()
    assert "scatter" not in text
