"""The cache of keys and values: any way of cutting a sequence gives what the whole sequence gives."""

import itertools

import numpy as np
import pytest

from kwaicoder_jax import models, testing
from kwaicoder_jax.models.latent_attention import absorb_is_cheaper

CONFIGS = testing.small_configs() | testing.family_configs()
TOLERANCE = 1e-4  # float32 logits of 10, sums in another order


def left_padded(config, lengths, time, seed=0):
    """A batch of one document per row, padded on the left with segment 0 and with random tokens."""
    batch = testing.random_batch(config, len(lengths), time, seed, packed=False)
    offsets = np.arange(time)[None] - (time - np.asarray(lengths))[:, None]
    batch["segment_ids"] = (offsets >= 0).astype(np.int32)
    batch["positions"] = np.maximum(offsets, 0).astype(np.int32)
    return batch


def run_in_pieces(params, config, batch, cuts, slots):
    cache, pieces = models.empty_cache(config, len(batch["inputs"]), slots), []
    for start, stop in itertools.pairwise(cuts):
        piece = {name: array[:, start:stop] for name, array in batch.items()}
        output = testing.run(params, config, piece, cache=cache)
        cache = output.cache
        pieces.append(models.logits(output.hidden_BTD, models.projection(params)))
    return np.concatenate(pieces, axis=1), cache


@pytest.mark.parametrize("name", ["dense", "odd", "moe_sigmoid"])
def test_token_by_token_equals_the_whole_sequence(name):
    config = CONFIGS[name]
    params, batch = testing.random_params(config), left_padded(config, [12, 5, 1], 12)
    got, cache = run_in_pieces(
        params, config, batch, [0, 8, 9, 10, 11, 12], slots=15
    )  # prompt, tokens; slots left over
    real = batch["segment_ids"] > 0
    np.testing.assert_allclose(got[real], testing.reference_logits(params, config, batch)[real], atol=TOLERANCE, rtol=0)
    assert int(cache.index) == 12
    np.testing.assert_array_equal(cache.segments_BS[:, 12:], 0)


LONG = ("mixtral_with_biases", "qwen3_moe", "olmoe", "deepseek_v2", "glm4_moe")  # what they add, others here have too


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if name in LONG else name
        for name in testing.family_configs()
        if name != "llama_dynamic"
    ],
)
def test_families_token_by_token(name):
    """Windows end inside the prompt. Latent attention makes keys of the 16 tokens, and reads the latents of the rest."""
    config = CONFIGS[name]
    params, batch = testing.random_params(config), left_padded(config, [20, 17, 5], 20)
    got, _ = run_in_pieces(params, config, batch, [0, 16, 17, 18, 20], slots=22)
    real = batch["segment_ids"] > 0
    np.testing.assert_allclose(got[real], testing.reference_logits(params, config, batch)[real], atol=TOLERANCE, rtol=0)


def test_latents_are_read_where_that_is_less_work():
    m = CONFIGS["deepseek_v3"].mla
    assert [absorb_is_cheaper(m, queries) for queries in (1, 14, 15, 16)] == [True, True, False, False]
    large = models.MlaConfig(1536, 512, 128, 64, 128)  # DeepSeek-V2: 170 queries
    assert [absorb_is_cheaper(large, queries) for queries in (1, 170, 171, 4096)] == [True, True, False, False]


def test_every_cut_gives_the_same_logits_and_cache():
    config = testing.odd_config()
    params, batch = testing.random_params(config), left_padded(config, [10, 7], 10)
    real = batch["segment_ids"] > 0
    whole, cache = run_in_pieces(params, config, batch, [0, 10], slots=10)
    for cuts in (list(range(11)), [0, 5, 10]):
        got, other = run_in_pieces(params, config, batch, cuts, slots=10)
        np.testing.assert_allclose(got[real], whole[real], atol=TOLERANCE, rtol=0)
        np.testing.assert_allclose(
            np.asarray(other.key_LBKSN).swapaxes(2, 3)[:, real],
            np.asarray(cache.key_LBKSN).swapaxes(2, 3)[:, real],
            atol=1e-5,
        )
        np.testing.assert_array_equal(other.positions_BS, cache.positions_BS)


def test_packed_documents_stay_apart_in_a_cache():
    config = testing.dense_config()
    params, batch = testing.random_params(config), testing.random_batch(config, 2, 12)
    got, _ = run_in_pieces(params, config, batch, [0, 6, 12], slots=12)
    real = batch["segment_ids"] > 0
    np.testing.assert_allclose(got[real], testing.reference_logits(params, config, batch)[real], atol=TOLERANCE, rtol=0)


def test_a_latent_cache_holds_the_latent_and_one_rotary_key():
    cache = models.empty_cache(CONFIGS["deepseek_v3"], batch=4, slots=9)
    assert cache.key_LBKSN.shape == (4, 4, 1, 9, 6)
    assert cache.value_LBKSN.shape == (4, 4, 1, 9, 9)


def test_empty_cache_shapes():
    config = testing.dense_config(dtype="bfloat16")
    cache = models.empty_cache(config, batch=4, slots=9)
    assert cache.key_LBKSN.shape == cache.value_LBKSN.shape == (3, 4, 2, 9, 8)
    assert cache.key_LBKSN.dtype == "bfloat16"
    assert cache.positions_BS.shape == cache.segments_BS.shape == (4, 9)
