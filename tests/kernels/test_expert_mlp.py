"""The fused expert MLP against a float64 loop over tokens, and its gradients against autodiff of a dense formula."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels import routing
from kernels.grouped_matmul import Backend, expert_mlp
from tests.kernels import exact


def _dense(x_MD, weight_MX, experts_MX, gate_EDF, up_EDF, down_EFD, activation=jax.nn.silu):
    """Every expert on every token, then a weighted selection: plain jnp, differentiated by JAX."""
    experts = gate_EDF.shape[0]
    hidden = activation(jnp.einsum("MD,EDF->MEF", x_MD, gate_EDF)) * jnp.einsum("MD,EDF->MEF", x_MD, up_EDF)
    y_MED = jnp.einsum("MEF,EFD->MED", hidden, down_EFD)
    share_ME = jnp.einsum("MXE,MX->ME", jax.nn.one_hot(experts_MX, experts, dtype=x_MD.dtype), weight_MX)
    return jnp.einsum("ME,MED->MD", share_ME, y_MED)


def _arguments(seed, tokens, choices, experts, width, neurons):
    rng = np.random.default_rng(seed)
    scores = rng.normal(size=(tokens, experts)) + 2 * rng.normal(size=(1, experts))  # uneven groups
    experts_MX = np.argsort(-scores, axis=1)[:, :choices].astype(np.int32)
    projection = (experts, width, neurons)
    shapes = [(tokens, width), (tokens, choices), projection, projection, (experts, neurons, width)]
    return experts_MX, [rng.normal(size=shape) for shape in shapes], rng.normal(size=(tokens, width))


def _float64_value_and_gradients(experts_MX, arguments, dy_MD, activation=jax.nn.silu):
    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(a, np.float64)) for a in arguments]
        y, pull = jax.vjp(lambda x, w, *rest: _dense(x, w, experts_MX, *rest, activation), *wide)
        return jax.device_get((y, *pull(jnp.asarray(np.asarray(dy_MD, np.float64)))))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(backend, activation, arguments, dy_MD, experts_MX):
    order = routing.sort_by_expert(experts_MX, arguments[2].shape[0])
    function = lambda x, w, *rest: expert_mlp(x, w, order, *rest, activation=activation, backend=backend)  # noqa: E731
    y, pull = jax.vjp(function, *arguments)
    return y, *pull(dy_MD)


def _check(backend, sizes, dtype=jnp.float32, seed=0, activation=jax.nn.silu, tolerance=2e-5):
    experts_MX, arguments, dy_MD = _arguments(seed, *sizes)
    dtypes = [dtype, jnp.float32, dtype, dtype, dtype]
    cast = [jnp.asarray(a, d) for a, d in zip(arguments, dtypes, strict=True)]
    dy_MD = jnp.asarray(dy_MD, dtype)
    wide = [np.asarray(a.astype(jnp.float32)) for a in (*cast, dy_MD)]
    expected = _float64_value_and_gradients(experts_MX, wide[:-1], wide[-1], activation)

    names = ("y", "dx", "dweight", "dgate", "dup", "ddown")
    for name, got, want in zip(names, _run(backend, activation, cast, dy_MD, experts_MX), expected, strict=True):
        got = np.asarray(got.astype(jnp.float32), np.float64)
        assert np.abs(got - want).max() <= tolerance * max(np.abs(want).max(), 1e-30), name


@pytest.mark.parametrize("backend", exact.BACKENDS)
@pytest.mark.parametrize("activation", [jax.nn.silu, jax.nn.gelu])
def test_value_and_gradients(backend, activation):
    _check(backend, (40, 3, 6, 8, 12), activation=activation)


@pytest.mark.parametrize("backend", exact.BACKENDS)
def test_bfloat16(backend):
    # Two roundings of intermediate rows to bfloat16 (2^-8 each), relative to the largest entry.
    _check(backend, (40, 2, 4, 8, 12), dtype=jnp.bfloat16, tolerance=0.02)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from([(300, 4, 5), (7, 2, 64), (200, 3, 16)]))
def test_cpu_loops_for_any_routing(seed, sizes):
    _check(Backend.CPU, (*sizes, 4, 6), seed=seed)


def test_all_tokens_to_one_expert_and_large_tiles():
    experts_MX = np.zeros((700, 1), np.int32)
    _, arguments, dy_MD = _arguments(0, 700, 1, 3, 4, 6)
    expected = _float64_value_and_gradients(experts_MX, [np.float32(a) for a in arguments], np.float32(dy_MD))
    order = routing.sort_by_expert(jnp.asarray(experts_MX), 3)
    narrow = [jnp.asarray(a, jnp.float32) for a in arguments]
    y, pull = jax.vjp(lambda x, w, *rest: expert_mlp(x, w, order, *rest), *narrow)
    for got, want in zip((y, *pull(jnp.asarray(dy_MD, jnp.float32))), expected, strict=True):
        assert np.abs(got - want).max() <= 2e-5 * np.abs(want).max()


@pytest.mark.parametrize("backend", exact.BACKENDS)
def test_pairs_of_no_group_contribute_nothing(backend):
    experts_MX, arguments, dy_MD = _arguments(3, 30, 2, 4, 8, 6)
    local = np.where(experts_MX < 2, experts_MX, 2).astype(np.int32)  # only experts 0 and 1 are here
    x, weight, gate, up, down = [jnp.asarray(a, jnp.float32) for a in arguments]
    order = routing.sort_by_expert(jnp.asarray(local), 2)
    function = lambda x, w, *rest: expert_mlp(x, w, order, *rest, backend=backend)  # noqa: E731
    y, pull = jax.vjp(function, x, weight, gate[:2], up[:2], down[:2])
    kept = np.where(experts_MX < 2, np.asarray(weight), 0.0)
    dense = lambda x, w, *rest: _dense(x, w, jnp.asarray(local), *rest)  # noqa: E731
    want, want_pull = jax.vjp(dense, x, jnp.asarray(kept), gate[:2], up[:2], down[:2])
    dy = jnp.asarray(dy_MD, jnp.float32)
    np.testing.assert_allclose(y, want, rtol=1e-4, atol=1e-4)
    for got, wanted in zip(pull(dy), want_pull(dy), strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=2e-4)


def _by_token(experts_MX, x_MD, weight_MX, gate_EDF, up_EDF, down_EFD):
    """A loop over tokens and their experts, in the dtype of the arguments."""
    y_MD = np.zeros_like(x_MD)
    for token, experts in enumerate(experts_MX):
        for choice, expert in enumerate(experts):
            gate, up = x_MD[token] @ gate_EDF[expert], x_MD[token] @ up_EDF[expert]
            y_MD[token] += weight_MX[token, choice] * ((gate / (1 + np.exp(-gate)) * up) @ down_EFD[expert])
    return y_MD


@pytest.mark.parametrize("backend", exact.BACKENDS)
def test_gradients_by_finite_differences(backend):
    """The slope of sum(dy * y) along a random direction of each argument, in float64 numpy."""
    experts_MX, arguments, dy_MD = _arguments(5, 20, 2, 4, 8, 6)
    narrow = [np.float32(array) for array in (*arguments, dy_MD)]
    rng = np.random.default_rng(6)
    directions = [rng.normal(size=array.shape) for array in arguments]
    value = lambda *moved: np.sum(np.float64(narrow[-1]) * _by_token(experts_MX, *moved))  # noqa: E731
    slopes = exact.slopes(value, narrow[:-1], directions)
    _, *gradients = _run(backend, jax.nn.silu, [jnp.asarray(array) for array in narrow[:-1]], narrow[-1], experts_MX)
    for gradient, direction, slope in zip(gradients, directions, slopes, strict=True):
        # Float32 sums over rows and widths; the third derivative times 1e-10 is far below.
        np.testing.assert_allclose(np.sum(np.float64(gradient) * direction), slope, rtol=2e-5, atol=2e-3)


# Without ragged_dot, which on CPU multiplies rows of zeros with the matrices of other experts.
@pytest.mark.parametrize("backend", [backend for backend in exact.BACKENDS if backend != Backend.RAGGED_DOT])
def test_what_is_wrong_in_one_expert_stays_there(backend):
    """Tokens that it does not see, and the gradients of other experts, are as without it, bit for bit."""
    experts_MX, arguments, dy_MD = _arguments(7, 60, 2, 5, 8, 6)
    clean = [np.float32(array) for array in arguments]
    x, weight, gate, up, down = (array.copy() for array in clean)
    gate[1], up[1], down[1] = np.inf, np.nan, -np.inf
    seen = np.any(experts_MX == 1, axis=1)
    assert 0 < seen.sum() < 60
    runs = []
    for values in (clean, [x, weight, gate, up, down]):
        found = _run(backend, jax.nn.silu, [jnp.asarray(array) for array in values], np.float32(dy_MD), experts_MX)
        runs.append([np.asarray(each)[~seen] for each in found[:3]] + [np.delete(each, 1, 0) for each in found[3:]])
    for without, beside in zip(*runs, strict=True):
        np.testing.assert_array_equal(without, beside)


def test_shapes_that_do_not_fit_are_an_error():
    _, arguments, _ = _arguments(0, 8, 2, 4, 8, 6)
    x, weight, gate, up, down = [jnp.asarray(a, jnp.float32) for a in arguments]
    order = routing.sort_by_expert(jnp.zeros((8, 2), jnp.int32), 4)
    with pytest.raises(ValueError, match="shapes of x"):
        expert_mlp(x, weight, order, gate, up, down.swapaxes(1, 2))
