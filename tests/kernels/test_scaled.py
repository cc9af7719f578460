"""Matrices of 8 bits: their error by closed form, and products of every back end against float64 of what they stand for."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call

from kernels import routing
from kernels.grouped_matmul import Backend, ScaledMatrices, expert_mlp, grouped_matmul, quantize, tpu, tpu_mlp
from kernels.grouped_matmul.mlp_types import Arguments
from kwaicoder_jax.hardware import schedule
from tests.kernels import exact, test_tpu_mlp
from tests.kernels.test_tpu_products import CHIPS, ONE_CORE, TWO_CORES, multinomial, strict

DTYPES = [jnp.int8, jnp.float8_e4m3fn]
SIZES, ROWS = [7, 0, 20, 3], 40  # an empty group, and rows of none


def drawn(*shape, seed=0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(shape) * np.exp(rng.standard_normal(shape[:1] + (1,) * (len(shape) - 1)))).astype(
        np.float32
    )


def float64(array):
    return np.asarray(array.astype(jnp.float32)).astype(np.float64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantized_values_are_within_their_bound(dtype):
    rhs = drawn(3, 50, 20)
    got = quantize(jnp.asarray(rhs), dtype)
    assert got.values_GKN.dtype == dtype
    assert got.scale_G1N.dtype == jnp.float32
    scale, largest = float64(got.scale_G1N), {"int8": 127, "float8_e4m3fn": 448}[jnp.dtype(dtype).name]
    np.testing.assert_allclose(scale, np.abs(rhs).max(1, keepdims=True) / largest, rtol=1e-6)
    error = np.abs(float64(got.dense(jnp.float32)) - rhs)
    # e4m3: three bits of mantissa, and numbers below 2^-6 in steps of 2^-9.
    half = scale / 2 if dtype == jnp.int8 else np.maximum(np.abs(rhs) / 16, scale / 1024)
    assert (error <= half * (1 + 1e-4)).all()
    assert error.max() > half.min() / 4, "the bound would hold for anything"


@pytest.mark.parametrize("dtype", DTYPES)
def test_zeros_and_the_largest_numbers_stay(dtype):
    rhs = jnp.asarray([[[0.0, 3e38, 1e-30], [0.0, -3e38, 0.0]]])
    got = quantize(rhs, dtype)
    np.testing.assert_allclose(got.dense(jnp.float32), rhs, rtol=1e-6)


def test_other_dtypes_are_refused():
    with pytest.raises(ValueError, match=r"scaled to int8, float8_e4m3fn, not int16"):
        quantize(jnp.ones((1, 2, 2)), jnp.int16)
    order, some = routing.sort_by_expert(jnp.zeros((4, 1), jnp.int32), 1), jnp.ones((1, 2, 2))
    with pytest.raises(ValueError, match="all three, or none"):
        expert_mlp(jnp.ones((4, 2)), jnp.ones((4, 1)), order, quantize(some), some, some)


@pytest.mark.parametrize("backend", exact.BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_and_the_gradient_of_rows(backend, dtype):
    rhs = quantize(jnp.asarray(drawn(4, 16, 24)), dtype)
    lhs, dout = drawn(ROWS, 16, seed=1), drawn(ROWS, 24, seed=2)
    out, dlhs, _ = exact.products(lhs, float64(rhs.dense(jnp.float32)), SIZES, dout)
    lhs[sum(SIZES) :], dout[sum(SIZES) :] = np.nan, np.nan  # reach nothing

    @jax.jit
    def products(lhs, rhs, dout):
        call = functools.partial(grouped_matmul, group_sizes_G=jnp.asarray(SIZES, jnp.int32), backend=backend)
        got, pull = jax.vjp(call, lhs, rhs)
        return got, pull(dout)

    got, (got_lhs, got_rhs) = products(jnp.asarray(lhs), rhs, jnp.asarray(dout))
    for have, want in ((got, out), (got_lhs, dlhs)):
        np.testing.assert_allclose(have, want, rtol=1e-4, atol=2e-5 * np.abs(want).max())
    assert not np.any(np.asarray(got_rhs.scale_G1N)), "constants"


@pytest.mark.parametrize("backend", [Backend.CPU, Backend.REFERENCE, Backend.RAGGED_DOT])
def test_what_is_wrong_in_one_group_stays_there(backend):
    rhs = quantize(jnp.asarray(drawn(4, 16, 24)))
    poisoned = ScaledMatrices(rhs.values_GKN, rhs.scale_G1N.at[3].set(jnp.nan))
    call = functools.partial(grouped_matmul, group_sizes_G=jnp.asarray(SIZES, jnp.int32), backend=backend)
    clean, other = (np.array(call(jnp.asarray(drawn(ROWS, 16)), each)) for each in (rhs, poisoned))
    theirs = slice(27, 30)
    assert np.isnan(other[theirs]).all()
    other[theirs] = clean[theirs]
    np.testing.assert_array_equal(other, clean)


@pytest.mark.parametrize("backend", exact.BACKENDS)
def test_the_layer(backend):
    """Forward, and the gradients that are left: of tokens and of combine weights."""
    tokens, experts, width, neurons = 12, 4, 16, 8
    expert_MX = np.random.default_rng(0).integers(0, 5, (tokens, 2)).astype(np.int32)  # one is elsewhere
    x, weight, dy = drawn(tokens, width), np.abs(drawn(tokens, 2, seed=1)), drawn(tokens, width, seed=2)
    shapes = ((experts, width, neurons), (experts, width, neurons), (experts, neurons, width))
    matrices = [quantize(jnp.asarray(drawn(*shape, seed=3 + place))) for place, shape in enumerate(shapes)]
    wanted = exact.layer(x, weight, expert_MX, *(float64(each.dense(jnp.float32)) for each in matrices), dy)

    @jax.jit
    def layer(x, weight, matrices, dy):
        order = routing.sort_by_expert(jnp.asarray(expert_MX), experts)
        y, pull = jax.vjp(lambda x, w, m: expert_mlp(x, w, order, *m, backend=backend), x, weight, matrices)
        return y, *pull(dy)[:2]

    got = layer(jnp.asarray(x), jnp.asarray(weight), matrices, jnp.asarray(dy))
    for name, have, want in zip(("y", "dx", "dweight"), got, wanted, strict=False):
        np.testing.assert_allclose(have, want, rtol=1e-4, atol=2e-5 * np.abs(want).max(), err_msg=name)


@pytest.mark.parametrize(("chip", "dtype"), [(ONE_CORE, jnp.float8_e4m3fn), (TWO_CORES, jnp.int8)], ids=["fp8", "int8"])
def test_on_tpu_interpreted(chip, dtype):
    sizes, rows = [37, 0, 5, 150, 61], 320
    rhs = quantize(jnp.asarray(drawn(5, 200, 130)), dtype)  # widths that no tile divides
    lhs, dout = (jnp.asarray(drawn(rows, width, seed=1), jnp.bfloat16) for width in (200, 130))
    wanted = exact.products(float64(lhs), float64(rhs.dense(jnp.float32)), sizes, float64(dout))
    product = functools.partial(
        tpu.product, group_sizes_G=jnp.asarray(sizes, jnp.int32), chip=chip, interpret=strict(chip)
    )
    got, got_lhs = (
        jax.jit(product)(lhs, rhs),
        jax.jit(functools.partial(product, transpose_rhs=True))(dout, rhs.values_GKN),
    )
    np.testing.assert_allclose(float64(got), wanted[0], rtol=2**-8, atol=1e-4 * np.abs(wanted[0]).max())
    plain = exact.products(float64(lhs), float64(rhs.values_GKN), sizes, float64(dout))[1]
    np.testing.assert_allclose(float64(got_lhs), plain, rtol=2**-8, atol=1e-4 * np.abs(plain).max())
    assert not interpret_pallas_call.races.races_found


def test_the_fused_layer_on_tpu_interpreted():
    """Experts without rows, one with most of them, and scales that differ by orders of magnitude."""
    expert_MX = np.array([[2, 1 + token % 5] if token % 7 else [2, 6] for token in range(71)], np.int32)
    experts, width, neurons, chip = 6, 256, 128, test_tpu_mlp.TWO_CORES
    shapes = ((experts, width, neurons), (experts, width, neurons), (experts, neurons, width))
    matrices = [quantize(jnp.asarray(drawn(*shape, seed=place) * width**-0.5)) for place, shape in enumerate(shapes)]
    x, weight = jnp.asarray(drawn(71, width, seed=3), jnp.bfloat16), jnp.abs(jnp.asarray(drawn(71, 2, seed=4)))
    arguments = Arguments(x, weight, *matrices)
    assert tpu_mlp.fits(arguments)
    dense = [float64(each.dense(jnp.float32)) for each in matrices]
    wanted, *_ = exact.layer(float64(x), float64(weight), expert_MX, *dense, np.zeros((71, width)))

    @jax.jit
    def layer(arguments):
        order = routing.sort_by_expert(jnp.asarray(expert_MX), experts)
        return tpu_mlp.forward(
            jax.nn.silu, arguments, order, keep=False, chip=chip, piece=test_tpu_mlp.PIECE, interpret=strict(chip)
        )[0]

    # Relative to each token's largest number: the activation is rounded to bfloat16, and so is the sum.
    error = np.abs(float64(layer(arguments)) - wanted).max(axis=1) / np.abs(wanted).max(axis=1)
    assert error.max() < 0.02
    assert not interpret_pallas_call.races.races_found


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_compiled_for(chip, dtype):
    """64 experts of 2048 x 1408, 512 rows on average: half of the matrices' bytes; int8 no slower than bfloat16."""
    groups, rows, depth, width = 64, 32_768, 2048, 1408
    least = {"v5e": (0.87, 0.76), "v5p": (0.86, 0.75), "v6e": (0.64, 0.32)}[chip]
    rhs = functools.partial(quantize, dtype=dtype)
    arguments = (
        jax.ShapeDtypeStruct((rows, depth), jnp.bfloat16),
        jax.eval_shape(rhs, jax.ShapeDtypeStruct((groups, depth, width), jnp.float32)),
        jax.ShapeDtypeStruct((groups,), jnp.int32),
    )
    kernel = schedule.compile_kernel(tpu.product, arguments, chip=chip, kernel="grouped_")
    found = kernel.predict({0: multinomial(rows, groups)}, useful_flops=2 * rows * depth * width)
    assert found.cores_used == CHIPS[chip].cores
    assert found.hbm_bytes < 1.08 * (groups * depth * width + 2 * rows * (depth + width))
    assert found.utilization > least[DTYPES.index(dtype)]
