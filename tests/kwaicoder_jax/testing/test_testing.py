"""The helpers that other tests trust."""

import jax
import numpy as np
import pytest

from kwaicoder_jax import models, testing


@pytest.mark.parametrize("name", testing.small_configs())
def test_params_are_declared_reproducible_and_of_trained_scale(name):
    config = testing.small_configs()[name]
    params = testing.random_params(config)
    models.check(params, config)
    again, other = testing.random_params(config), testing.random_params(config, seed=1)
    assert all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(again)))
    assert not any(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(other)))
    for parameter, leaf in models.flatten(params).items():
        if parameter.endswith("scale"):
            assert np.std(leaf) > 0.1
    doubled = testing.random_params(config, scale=2.0)
    np.testing.assert_allclose(doubled["embedding"], 2 * params["embedding"], rtol=1e-6)
    np.testing.assert_array_equal(doubled["final_norm"]["scale"], params["final_norm"]["scale"])


def test_a_parameter_does_not_depend_on_the_others():
    dense, untied = (testing.random_params(testing.dense_config(tie_embeddings=t)) for t in (True, False))
    np.testing.assert_array_equal(dense["embedding"], untied["embedding"])


@pytest.mark.parametrize("time", [4, 5, 24, 300])
def test_packed_batches(time):
    batch = testing.random_batch(testing.dense_config(), 16, time, seed=time)
    for name in ("inputs", "targets", "segment_ids", "positions"):
        assert batch[name].shape == (16, time)
        assert batch[name].dtype == np.int32
    assert batch["loss_mask"].dtype == np.float32
    np.testing.assert_array_equal(batch["loss_mask"], batch["segment_ids"] > 0)
    for row in range(16):
        segments = batch["segment_ids"][row]
        assert segments[0] == 1
        assert segments[-1] == 0
        assert 2 <= segments.max() <= 4
        for segment in range(1, segments.max() + 1):
            here = np.flatnonzero(segments == segment)
            np.testing.assert_array_equal(batch["positions"][row, here], np.arange(len(here)))
            assert here[-1] - here[0] + 1 == len(here)
            np.testing.assert_array_equal(batch["inputs"][row, here[1:]], batch["targets"][row, here[:-1]])


def test_unpacked_batches_are_one_full_document_per_row():
    batch = testing.random_batch(testing.dense_config(), 2, 9, packed=False)
    np.testing.assert_array_equal(batch["segment_ids"], 1)
    np.testing.assert_array_equal(batch["positions"], np.broadcast_to(np.arange(9), (2, 9)))
    np.testing.assert_array_equal(batch["inputs"][:, 1:], batch["targets"][:, :-1])


def test_mean_loss_is_the_cross_entropy_of_the_reference():
    config = testing.odd_config()
    params, batch = testing.random_params(config), testing.random_batch(config, 3, 24)
    logits = testing.reference_logits(params, config, batch)[batch["segment_ids"] > 0]
    logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    expected = -np.take_along_axis(logp, batch["targets"][batch["segment_ids"] > 0][:, None], -1).mean()
    np.testing.assert_allclose(testing.mean_loss(params, config, batch), expected, rtol=1e-5)
