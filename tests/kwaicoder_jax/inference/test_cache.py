"""The ring against lists: rows that write, join, leave, move, in caches that grow and shrink."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kwaicoder_jax import models, testing
from kwaicoder_jax.inference import cache as caches

CONFIG = testing.dense_config(layers=2, kv_heads=1, head_dim=2)
inserted = jax.jit(caches.inserted)
resized = jax.jit(caches.resized, static_argnames="slots")


def empty(rows, slots):
    return caches.empty(CONFIG, rows, slots, "float32")


def entry(token, layer, value):
    """What the cache holds for a token, told apart by layer and by kind."""
    return np.array([token, 1000 * layer + 500 * value], np.float32)


def prefix_of(tokens, slots):
    """A prompt as it comes out of the prefill program."""
    made, start = empty(1, slots), slots - len(tokens)
    arrays = {
        name: tuple(
            x.at[0, 0, start:].set(np.array([entry(t, layer, name == "values") for t in tokens]))
            for layer, x in enumerate(getattr(made, name))
        )
        for name in ("keys", "values")
    }
    positions_BS = made.positions_BS.at[0, start:].set(jnp.arange(len(tokens)))
    return made.replace(**arrays, positions_BS=positions_BS, segments_BS=made.segments_BS.at[0, start:].set(1))


@jax.jit
def written(cache, token_B, position_B, active_B):
    """One decode step, as the model does it."""
    at = (slice(None), cache.index)
    keys, values = (
        tuple(
            x.at[:, 0, cache.index].set(jnp.stack([token_B, jnp.full_like(token_B, 1000 * layer + extra)], -1))
            for layer, x in enumerate(xs)
        )
        for xs, extra in ((cache.keys, 0), (cache.values, 500))
    )
    positions_BS, segments_BS = cache.positions_BS.at[at].set(position_B), cache.segments_BS.at[at].set(active_B)
    stacked = models.Cache(jnp.stack(keys), jnp.stack(values), positions_BS, segments_BS, cache.index + 1)
    return caches.unstacked(stacked)


def check(cache, rows):
    """Every row has its tokens, with their positions, in the slots behind the index, and nothing else."""
    slots = (int(cache.index) - 1 - np.arange(cache.slots)) % cache.slots  # newest first
    for row, tokens in enumerate(rows):
        newest = slots[: len(tokens)][::-1]
        assert np.asarray(cache.segments_BS)[row, newest].all()
        assert np.asarray(cache.segments_BS)[row].sum() == len(tokens)
        np.testing.assert_array_equal(np.asarray(cache.positions_BS)[row, newest], np.arange(len(tokens)))
        for value, arrays in enumerate((cache.keys, cache.values)):
            for layer, x in enumerate(arrays):
                expected = [entry(token, layer, value) for token in tokens]
                np.testing.assert_array_equal(np.asarray(x)[row, 0, newest], np.reshape(expected, (-1, 2)))


@pytest.mark.parametrize("seed", range(2))
def test_random_lives_of_rows(seed):
    """Rows that leave stay in the cache as the engine leaves them there, and are seen no more when others take over."""
    rng, batch, slots = np.random.default_rng(seed), 4, 16
    cache, rows, active, wraps = empty(batch, slots), [[] for _ in range(batch)], np.zeros(batch, bool), 0
    for _ in range(200):
        row, choice = int(rng.integers(batch)), rng.random()
        if choice < 0.1 and not active[row]:
            tokens = rng.integers(1, 999, rng.integers(1, 9)).tolist()
            cache = inserted(cache, prefix_of(tokens, 8 if rng.random() < 0.5 else 16), jnp.int32(0), jnp.int32(row))
            rows[row], active[row] = tokens, True
        elif choice < 0.2 and active[row]:
            active[row] = False
        elif choice < 0.22:
            order = rng.permutation(batch)
            order[~active[order]] = -1
            longest = max([len(rows[at]) for at in order if at >= 0], default=0)
            slots = 16 if longest <= 16 and rng.random() < 0.5 else 32
            cache = resized(cache, jnp.asarray(order, jnp.int32), slots=slots)
            rows, active = [rows[at] if at >= 0 else [] for at in order], order >= 0
            assert int(cache.index) == 0
            assert not np.asarray(cache.segments_BS)[order < 0].any()
        else:
            active &= np.array([len(tokens) < slots for tokens in rows])  # one that cannot grow any more leaves
            new, position = rng.integers(1, 999, batch), np.array([len(tokens) for tokens in rows])
            arrays = (jnp.asarray(x, jnp.int32) for x in (new, position, active))
            cache = written(cache, *arrays)
            wraps += int(cache.index) == 0
            rows = [tokens + [int(token)] if on else tokens for tokens, token, on in zip(rows, new, active)]
        shown = [tokens if on else [] for tokens, on in zip(rows, active)]
        hidden = cache.replace(segments_BS=cache.segments_BS * jnp.asarray(active, jnp.int32)[:, None])
        check(hidden, shown)
    assert wraps > 1


def test_an_insert_leaves_other_rows_alone():
    cache = empty(3, 8)
    cache = inserted(cache, prefix_of([5, 6, 7], 4), jnp.int32(0), jnp.int32(1))
    cache = inserted(cache, prefix_of([8, 9], 8), jnp.int32(0), jnp.int32(2))
    check(cache, [[], [5, 6, 7], [8, 9]])
    check(inserted(cache, prefix_of([1], 4), jnp.int32(0), jnp.int32(1)), [[], [1], [8, 9]])


@pytest.mark.parametrize(
    ("dtype", "platform", "expected"),
    [("float32", "cpu", "float32"), ("bfloat16", "cpu", "float32"), ("bfloat16", "tpu", "bfloat16")],
)
def test_storage(dtype, platform, expected):
    assert caches.storage_dtype(testing.dense_config(dtype=dtype), platform) == expected


def test_latents_are_stored_as_they_are():
    config = testing.family_configs()["deepseek_v3"].replace(dtype="bfloat16")
    assert caches.storage_dtype(config, "cpu") == "bfloat16"
    made = caches.empty(config, 2, 8, "bfloat16")
    assert {x.shape for x in made.keys} == {(2, 1, 8, 6)}
    assert {x.shape for x in made.values} == {(2, 1, 8, 9)}
