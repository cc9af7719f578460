"""Back ends of attention against float64 numpy, at lengths of one block, several, and several with a rest."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kwaicoder_jax.models.attention_ops import AttentionBackend, dot_product_attention

HEADS, KV_HEADS, WIDTH = 6, 2, 8


def packed_case(time, seed=0):
    """Random queries, keys and values; three documents per row of different cuts, and padding at the end of one row."""
    rng = np.random.default_rng(seed)
    q, k, v = (rng.standard_normal((2, time, n, WIDTH)).astype(np.float32) for n in (HEADS, KV_HEADS, KV_HEADS))
    segments, positions = np.zeros((2, time), np.int32), np.zeros((2, time), np.int32)
    for row, cuts in enumerate(([0, time // 5, time // 2, time], [0, time // 3, time - time // 4, time])):
        for segment, (start, end) in enumerate(itertools.pairwise(cuts), start=1):
            segments[row, start:end], positions[row, start:end] = segment, np.arange(end - start)
    segments[1, time - time // 4 :] = 0
    return q, k, v, segments, positions


def reference(q, k, v, segments, positions):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    for row in range(len(q)):
        see = segments[row][:, None] == segments[row][None]
        see &= positions[row][:, None] >= positions[row][None]
        for head in range(HEADS):
            shared = head // (HEADS // KV_HEADS)
            scores = np.where(see, q[row, :, head] @ k[row, :, shared].T / np.sqrt(WIDTH), -np.inf)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            out[row, :, head] = weights / weights.sum(-1, keepdims=True) @ v[row, :, shared]
    return out


def attend(q, k, v, segments, positions, backend):
    return dot_product_attention(
        q, k, v, q_positions_BT=positions, k_positions_BS=positions, q_segments_BT=segments, k_segments_BS=segments,
        same_sequence=True, backend=backend,
    )  # fmt: skip


def derivative_along(case, weights, directions, step=1e-5):
    q, k, v, segments, positions = case
    ends = []
    for sign in (1, -1):
        moved = [np.asarray(x, np.float64) + sign * step * d for x, d in zip((q, k, v), directions)]
        ends.append(np.sum(reference(*moved, segments, positions) * weights))
    return (ends[0] - ends[1]) / (2 * step)


@pytest.mark.parametrize("backend", AttentionBackend)
@pytest.mark.parametrize("time", [24, 128, 150])
def test_output_and_gradients(backend, time):
    case = packed_case(time)
    rng = np.random.default_rng(1)
    weights = rng.standard_normal(case[0].shape).astype(np.float32)

    def total(q, k, v):
        out = attend(q, k, v, *map(jnp.asarray, case[3:]), backend)
        return jnp.sum(out * weights), out

    grads, out = jax.jit(jax.grad(total, (0, 1, 2), has_aux=True))(*map(jnp.asarray, case[:3]))
    np.testing.assert_allclose(out, reference(*case), atol=1e-5)  # float32 means of values of order 1
    for position, grad in enumerate(grads):
        directions = [np.zeros_like(x) for x in case[:3]]
        directions[position] = rng.standard_normal(case[position].shape)
        expected = derivative_along(case, weights, directions)
        np.testing.assert_allclose(np.sum(np.asarray(grad, np.float64) * directions[position]), expected, rtol=2e-4)


@pytest.mark.parametrize("backend", ["blocked", "reference"])
def test_bfloat16(backend):
    q, k, v, segments, positions = packed_case(150)
    q, k, v = (jnp.asarray(x, jnp.bfloat16) for x in (q, k, v))

    def total(q, k, v):
        return jnp.sum(attend(q, k, v, jnp.asarray(segments), jnp.asarray(positions), backend).astype(jnp.float32) ** 2)

    out = jax.jit(attend, static_argnums=5)(q, k, v, segments, positions, backend)
    assert out.dtype == jnp.bfloat16
    # Values of order 1 with 8 bits of mantissa, weights and result both rounded.
    np.testing.assert_allclose(np.asarray(out, np.float64), reference(q, k, v, segments, positions), atol=0.03)
    gradients = jax.jit(jax.grad(total, (0, 1, 2)))
    grads = gradients(q, k, v)
    exact = gradients(*(x.astype(jnp.float32) for x in (q, k, v)))
    for got, expected in zip(grads, exact):
        assert got.dtype == jnp.bfloat16
        error = np.linalg.norm(np.asarray(got, np.float32) - expected) / np.linalg.norm(expected)
        assert error < 0.03


def test_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="no_such"):
        attend(*map(jnp.asarray, packed_case(8)), "no_such")


def windowed_reference(q, k, v, segments, positions, window, scale):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros((*q.shape[:3], v.shape[-1]))
    for row, query, head in np.ndindex(*q.shape[:3]):
        distance = positions[row, query] - positions[row]
        see = np.flatnonzero((segments[row] == segments[row, query]) & (distance >= 0) & (distance < window))
        scores = k[row, see, head // (HEADS // KV_HEADS)] @ q[row, query, head] * scale
        weights = np.exp(scores - scores.max())
        out[row, query, head] = weights @ v[row, see, head // (HEADS // KV_HEADS)] / weights.sum()
    return out


@pytest.mark.parametrize("backend", ["blocked", "reference"])
@pytest.mark.parametrize("time", [24, 150])
def test_windows_scales_and_values_of_another_width(backend, time):
    q, k, _, segments, positions = packed_case(time)
    rng = np.random.default_rng(2)
    v, window, scale = rng.standard_normal((2, time, KV_HEADS, 5)).astype(np.float32), 7, 0.3
    weights = rng.standard_normal((2, time, HEADS, 5)).astype(np.float32)
    real = segments > 0

    def attend(q, k, v, window):
        return dot_product_attention(
            q, k, v, q_positions_BT=positions, k_positions_BS=positions, q_segments_BT=segments,
            k_segments_BS=segments, same_sequence=True, window=window, scale=scale, backend=backend,
        )  # fmt: skip

    out, pull = jax.vjp(lambda *x: attend(*x, jnp.int32(window)), *map(jnp.asarray, (q, k, v)))
    expected = windowed_reference(q, k, v, segments, positions, window, scale)
    np.testing.assert_allclose(np.asarray(out)[real], expected[real], atol=1e-5)
    for place, grad in enumerate(pull(jnp.asarray(weights * real[:, :, None, None]))):
        direction = rng.standard_normal((q, k, v)[place].shape)
        ends = []
        for sign in (1, -1):
            moved = [x + sign * 1e-5 * direction if at == place else x for at, x in enumerate((q, k, v))]
            ends.append(np.sum((windowed_reference(*moved, segments, positions, window, scale) * weights)[real]))
        got = np.sum(np.asarray(grad, np.float64) * direction)
        np.testing.assert_allclose(got, (ends[0] - ends[1]) / 2e-5, rtol=2e-4)
    np.testing.assert_array_equal(attend(q, k, v, jnp.int32(0)), attend(q, k, v, None))
