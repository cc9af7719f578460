"""Draws against the distributions that numpy computes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kwaicoder_jax.inference import Settings, choose_tokens, highest, nucleus, row_keys

LOGITS = np.array([1.0, 3.0, -2.0, 2.5, 0.0, 2.5, -30.0, 1.5], np.float32)
DRAWS = 20_000
choose = jax.jit(choose_tokens)


def probabilities(temperature, top_k, top_p):
    """Sorted, cut twice and renormalised in float64: of equal tokens (3 and 5) the lower id comes first."""
    p = np.exp(LOGITS.astype(np.float64) / temperature)
    order = np.argsort(-p, kind="stable")
    if top_k:
        p[order[top_k:]] = 0.0
    p /= p.sum()
    before = np.cumsum(p[order]) - p[order]
    p[order[before >= top_p]] = 0.0
    return p / p.sum()


def setting(rows, temperature=1.0, top_k=0, top_p=1.0, seed=0):
    return Settings(
        seed_B=jnp.full(rows, seed, jnp.int32),
        id_B=jnp.arange(rows, dtype=jnp.uint32),
        temperature_B=jnp.full(rows, temperature, jnp.float32),
        top_k_B=jnp.full(rows, top_k, jnp.int32),
        top_p_B=jnp.full(rows, top_p, jnp.float32),
    )


def draw(*settings):
    rows = jnp.broadcast_to(jnp.asarray(LOGITS)[None], (DRAWS, len(LOGITS)))
    return np.asarray(choose(rows, jnp.zeros(DRAWS, jnp.int32), setting(DRAWS, *settings)))


@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"),
    [(1.0, 0, 1.0), (0.5, 0, 1.0), (2.0, 0, 0.8), (1.0, 0, 0.5), (1.0, 0, 1e-6)]
    + [(1.5, 1, 1.0), (1.5, 2, 1.0), (2.0, 5, 0.7), (1.0, 8, 1.0), (1.0, 99, 0.9)],
)
def test_frequencies(temperature, top_k, top_p):
    expected = probabilities(temperature, top_k, top_p)
    counts = np.bincount(draw(temperature, top_k, top_p), minlength=len(LOGITS))
    assert (counts[expected == 0] == 0).all(), "a token outside the nucleus was drawn"
    # Five standard deviations of a binomial: fails by chance once in a million draws of the seed, which is fixed.
    assert (np.abs(counts - DRAWS * expected) <= 5 * np.sqrt(DRAWS * expected * (1 - expected)) + 1e-9).all()


def test_greedy_takes_the_lowest_id_among_equals():
    rows = jnp.asarray([[0, 5, 5, 1], [2, 2, 2, 2], [0, 1, 2, 3]], jnp.float32)
    np.testing.assert_array_equal(choose(rows, jnp.zeros(3, jnp.int32), setting(3, 0.0, 2, 0.5)), [1, 0, 3])


def test_rows_with_their_own_settings():
    """One greedy row, others with few tokens, another seed: each as if alone."""
    rows = jnp.broadcast_to(jnp.asarray(LOGITS)[None], (5, len(LOGITS)))
    positions = jnp.arange(5, dtype=jnp.int32)
    mixed = Settings(
        seed_B=jnp.asarray([0, 0, 0, 0, 9]),
        id_B=jnp.arange(5, dtype=jnp.uint32),
        temperature_B=jnp.asarray([0.0, 1.3, 1.3, 9.0, 9.0]),
        top_k_B=jnp.asarray([0, 0, 0, 3, 0]),
        top_p_B=jnp.asarray([1.0, 1.0, 0.4, 1.0, 1.0]),
    )
    together = choose(rows, positions, mixed)
    alone = [choose(*jax.tree.map(lambda x, i=i: x[i : i + 1], (rows, positions, mixed)))[0] for i in range(5)]
    np.testing.assert_array_equal(together, alone)
    assert int(together[0]) == 1


@pytest.mark.parametrize("top_k", [1, 2, 7, 100, 499, 500, 501])
def test_highest_of_random_vocabularies(top_k):
    """Ties, zeros of both signs and infinities too."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((6, 500)).astype(np.float32) * 4
    rows[3] = np.round(rows[3])
    rows[4] = rng.choice([0.0, -0.0, -1.0], 500)
    rows[5, ::2] = -np.inf
    got = np.asarray(highest(jnp.asarray(rows), jnp.full(6, top_k)))
    for row, kept in zip(rows, got):
        assert set(np.flatnonzero(kept)) == set(np.argsort(-row, kind="stable")[:top_k])


@pytest.mark.parametrize("top_p", [1e-6, 0.1, 0.5, 0.9, 0.999])
def test_nucleus_of_random_vocabularies(top_p):
    rows = np.random.default_rng(0).standard_normal((8, 500)).astype(np.float32) * 4
    got = np.asarray(nucleus(jnp.asarray(rows), jnp.full(8, top_p)))
    p = np.exp(rows.astype(np.float64))
    p /= p.sum(-1, keepdims=True)
    for row in range(8):
        order = np.argsort(-p[row], kind="stable")
        expected = order[np.cumsum(p[row, order]) - p[row, order] < top_p]
        assert set(np.flatnonzero(got[row])) == set(expected)


def test_nucleus_cuts_equal_tokens_by_id():
    got = nucleus(jnp.zeros((1, 10)), jnp.asarray([0.35]))
    np.testing.assert_array_equal(got[0], np.arange(10) < 4)


def test_nucleus_of_one_keeps_the_tail():
    rows = jnp.asarray([[0.0, -200.0, -50.0]])
    assert np.asarray(nucleus(rows, jnp.ones(1))).all()
    np.testing.assert_array_equal(nucleus(rows, jnp.asarray([0.99]))[0], [True, False, False])


def test_keys_depend_on_each_of_seed_id_and_position():
    def data(seed, row, position):
        key = row_keys(jnp.asarray([seed]), jnp.asarray([row], jnp.uint32), jnp.asarray([position], jnp.int32))
        return tuple(np.asarray(jax.random.key_data(key))[0].tolist())

    assert len({data(s, i, p) for s in range(3) for i in range(3) for p in range(3)}) == 27
    many = row_keys(jnp.asarray([2, 2]), jnp.asarray([5, 1], jnp.uint32), jnp.asarray([9, 2], jnp.int32))
    assert tuple(np.asarray(jax.random.key_data(many))[1].tolist()) == data(2, 1, 2)
