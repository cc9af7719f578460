"""Grouped matmul against a float64 loop over groups, forward and both gradients, for every back end that runs here."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels.grouped_matmul import Backend, cpu, grouped_matmul
from tests.kernels import exact
from tests.kwaicoder_jax.training import devices


@functools.partial(jax.jit, static_argnums=0)
def _run(backend, lhs_MK, rhs_GKN, sizes_G, dout_MN):
    out, pull = jax.vjp(lambda a, b: grouped_matmul(a, b, sizes_G, backend=backend), lhs_MK, rhs_GKN)
    return out, *pull(dout_MN)


def _check(backend, sizes, rows, k=6, n=5, dtype=jnp.float32, seed=0, poison=np.nan):
    rng = np.random.default_rng(seed)
    arrays = [rng.normal(size=shape) for shape in ((rows, k), (len(sizes), k, n), (rows, n))]
    lhs, rhs, dout = (np.array(jnp.asarray(array, dtype).astype(jnp.float32)) for array in arrays)
    expected = exact.products(lhs, rhs, sizes, dout)
    used = int(np.sum(sizes))
    lhs[used:], dout[used:] = poison, poison
    actual = _run(
        backend, *(jnp.asarray(a, dtype) for a in (lhs, rhs)), jnp.asarray(sizes, jnp.int32), jnp.asarray(dout, dtype)
    )
    # float32: sums of up to `rows` products. bfloat16: one rounding at the end of a float32 sum.
    tolerance = {"rtol": 1e-5, "atol": 1e-6 * rows**0.5} if dtype == jnp.float32 else {"rtol": 2**-8, "atol": 1e-5}
    for name, got, want in zip(("out", "dlhs", "drhs"), actual, expected, strict=True):
        assert got.dtype == dtype
        np.testing.assert_allclose(np.asarray(got.astype(jnp.float32)), want, err_msg=name, **tolerance)


@pytest.mark.parametrize("backend", exact.BACKENDS)
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(
    ("sizes", "rows"),
    [
        ([3, 0, 5, 2], 10),  # an empty group
        ([0, 10, 0], 10),  # one group with everything
        ([2, 1, 0], 10),  # rows behind the last group
        ([0, 0], 4),  # no rows in any group
        ([1], 1),
        ([33, 31, 64, 1], 140),  # across tiles of the CPU loops
        ([700, 5], 720),
    ],
)
def test_against_float64(backend, dtype, sizes, rows):
    _check(backend, sizes, rows, dtype=dtype)


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_cpu_loops_for_any_group_sizes(data):
    groups, rows = data.draw(st.sampled_from([(2, 700), (16, 1300), (64, 300), (3, 20)]))
    size = st.one_of(st.just(0), st.integers(0, 40), st.sampled_from([32, 64, 127, 128, 129, 160, 512, 550]))
    ends = np.minimum(np.cumsum(data.draw(st.lists(size, min_size=groups, max_size=groups))), rows)
    _check(Backend.CPU, np.diff(ends, prepend=0), rows, k=4, n=3, seed=groups)


@functools.partial(jax.jit, static_argnums=1)
def _visited(sizes_G, rows):
    """Rows of the tiles that the CPU's loops visit."""

    def group_step(_, start, end, total):
        return cpu.for_each_tile(rows, start, end, lambda tile, total: total + tile.rows, total)

    return cpu.for_each_group(sizes_G, group_step, jnp.int32(0))


@settings(max_examples=20, deadline=None)
@given(st.lists(st.one_of(st.integers(0, 40), st.sampled_from([127, 128, 129, 512, 700])), min_size=8, max_size=8))
def test_cpu_loops_execute_what_they_say(sizes):
    visited = int(_visited(jnp.asarray(sizes, jnp.int32), 6000))
    assert visited == cpu.executed_rows(sizes, 6000)
    assert sum(sizes) <= visited < sum(sizes) + cpu.TILES[-1] * len(sizes)


@pytest.mark.parametrize("backend", [Backend.CPU, Backend.RAGGED_DOT])
def test_infinite_tail_rows_do_not_leak(backend):
    _check(backend, [40, 3], 60, poison=np.inf)


@pytest.mark.parametrize("backend", exact.BACKENDS)
@pytest.mark.parametrize("groups", [1, 512])
def test_one_group_and_many(backend, groups):
    sizes = np.random.default_rng(groups).multinomial(150, np.full(groups, 1 / groups))  # most of 512 are empty
    _check(backend, sizes, 160)


@pytest.mark.parametrize("backend", exact.BACKENDS)  # one program each: sizes are known at run time only
def test_every_pattern_of_empty_groups(backend):
    for pattern in range(256):
        _check(backend, [11 * (pattern >> group & 1) for group in range(8)], 90)


@pytest.mark.parametrize("backend", exact.BACKENDS)
def test_gradients_by_finite_differences(backend):
    """The slope of sum(dout * out) along a random direction of each operand, in float64 numpy."""
    rng, sizes = np.random.default_rng(3), [7, 0, 40, 1]
    shapes = [(50, 6), (4, 6, 5), (50, 5)]
    lhs, rhs, dout = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
    directions = [rng.normal(size=shape) for shape in shapes[:2]]
    value = lambda a, b: np.sum(np.float64(dout) * exact.products(a, b, sizes, dout)[0])  # noqa: E731
    slopes = exact.slopes(value, (lhs, rhs), directions)
    gradients = _run(backend, *map(jnp.asarray, (lhs, rhs, np.int32(sizes), dout)))[1:]
    for gradient, direction, slope in zip(gradients, directions, slopes, strict=True):
        # Float32 sums of a few hundred terms of order one; the difference itself is good to 1e-9 (it is bilinear).
        np.testing.assert_allclose(np.sum(np.float64(gradient) * direction), slope, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("backend", exact.BACKENDS)
def test_what_is_wrong_in_one_group_stays_there(backend):
    """NaN in a group's rows and infinity in its matrix: everything of the other groups is as without, bit for bit."""
    rng, sizes = np.random.default_rng(1), [30, 40, 50, 0, 5]
    clean = [rng.normal(size=shape).astype(np.float32) for shape in ((130, 8), (5, 8, 6), (130, 6))]
    lhs, rhs, dout = (array.copy() for array in clean)
    lhs[30:70], dout[30:70] = np.nan, np.nan
    if backend != Backend.RAGGED_DOT:  # which on CPU multiplies rows of zeros with the matrices of other groups
        rhs[1] = np.inf
    runs = []
    for a, b, c in (clean, (lhs, rhs, dout)):
        out, dlhs, drhs = _run(backend, *map(jnp.asarray, (a, b, np.int32(sizes), c)))
        runs.append([np.delete(out, np.s_[30:70], 0), np.delete(dlhs, np.s_[30:70], 0), np.delete(drhs, 1, 0)])
    for without, beside in zip(*runs, strict=True):
        np.testing.assert_array_equal(without, beside)


@pytest.fixture(scope="module")
def sharded():
    return devices.run("kernels.experts_on_devices", 4)


@pytest.mark.parametrize("backend", exact.BACKENDS)
def test_experts_split_over_devices(sharded, backend):
    """Over the largest entry: products and gradients inside shard_map, each device's groups from an offset on."""
    assert max(sharded[backend]) < 1e-5


@pytest.mark.parametrize("backend", exact.BACKENDS)
def test_works_under_remat_and_scan(backend):
    sizes_G, rhs_LGKK = jnp.asarray([3, 0, 4], jnp.int32), jax.random.normal(jax.random.key(0), (2, 3, 4, 4))

    def loss(rhs_LGKK, lhs_MK, remat):
        layer = lambda x, rhs: (jnp.tanh(grouped_matmul(x, rhs, sizes_G, backend=backend)), None)  # noqa: E731
        return jnp.sum(jax.lax.scan(jax.checkpoint(layer) if remat else layer, lhs_MK, rhs_LGKK)[0] ** 2)

    lhs_MK = jax.random.normal(jax.random.key(1), (8, 4))
    plain = jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)(rhs_LGKK, lhs_MK, False)
    remat = jax.jit(jax.grad(loss, (0, 1)), static_argnums=2)(rhs_LGKK, lhs_MK, True)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), plain, remat)


def test_cpu_product_is_not_groups_times_the_work():
    # The compiled program must hold no product over all groups at once: every dot has two axes only.
    arrays = (jnp.ones((256, 8)), jnp.ones((16, 8, 8)), jnp.full((16,), 16, jnp.int32))
    text = jax.jit(lambda a, b, c: grouped_matmul(a, b, c)).lower(*arrays).as_text()
    dots = [line for line in text.splitlines() if "dot_general" in line]
    assert dots
    assert all("batching_dims" not in line and "ragged" not in line for line in dots)


@pytest.mark.parametrize(
    ("lhs", "rhs", "sizes"),
    [
        (jnp.ones((4, 3)), jnp.ones((2, 4, 3)), jnp.ones(2, jnp.int32)),
        (jnp.ones((4, 3)), jnp.ones((2, 3, 3)), jnp.ones(3, jnp.int32)),
        (jnp.ones((4, 3)), jnp.ones((2, 3, 3), jnp.bfloat16), jnp.ones(2, jnp.int32)),
        (jnp.ones((4, 3)), jnp.ones((2, 3, 3)), jnp.ones(2)),
        (jnp.ones((1, 4, 3)), jnp.ones((2, 3, 3)), jnp.ones(2, jnp.int32)),
    ],
)
def test_what_does_not_fit_is_an_error(lhs, rhs, sizes):
    with pytest.raises(ValueError, match=r"fit together|dtypes|need lhs"):
        grouped_matmul(lhs, rhs, sizes)
