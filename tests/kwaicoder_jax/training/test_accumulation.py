"""Gradients in parts are those of the whole batch, whatever the parts hold."""

import functools

import jax
import numpy as np
import pytest

from kwaicoder_jax import models, testing, training
from kwaicoder_jax.training.accumulation import accumulate

CONFIG = testing.dense_config(vocab_size=94, layers=1, heads=4, kv_heads=2, mlp_dim=44)


def gradient_of(config, balance):
    loss = lambda trainable, batch, frozen: training.language_model_loss(  # noqa: E731
        trainable["model"], config, batch, runtime=models.Runtime(), balance=balance
    )
    return jax.value_and_grad(loss, has_aux=True)


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_a_dense_model(parts):
    whole = gradient_of(CONFIG, training.BalanceConfig())
    trainable = {"model": testing.random_params(CONFIG)}
    batch = dict(testing.random_batch(CONFIG, 8, 16))
    batch["loss_mask"] = np.array(batch["loss_mask"])
    batch["loss_mask"][1::2, 3:] = 0  # parts of unequal weight
    batch["loss_mask"][0] = 0  # with eight parts, one without tokens
    (loss, metrics), gradients = jax.jit(whole)(trainable, batch, {})
    (in_parts, its_metrics), its_gradients = jax.jit(accumulate(whole, parts))(trainable, batch, {})
    np.testing.assert_allclose(in_parts, loss, rtol=1e-6)
    assert its_metrics["tokens"] == metrics["tokens"] == batch["loss_mask"].sum()
    assert its_metrics.keys() == metrics.keys()
    for got, want in zip(jax.tree.leaves(its_gradients), jax.tree.leaves(gradients), strict=True):
        assert got.dtype == want.dtype
        np.testing.assert_allclose(got, want, atol=2e-6 * np.abs(want).max())  # float32 sums in another order


def test_a_step_in_parts_moves_as_the_whole_one_does():
    rate = functools.partial(lambda step: step * 0.0 + 1e-2)
    optimizer = training.make_optimizer(training.OptimizerConfig(), rate, CONFIG)
    loss = lambda trainable, batch, frozen: training.language_model_loss(  # noqa: E731
        trainable["model"], CONFIG, batch, runtime=models.Runtime(), balance=training.BalanceConfig()
    )
    batch = testing.random_batch(CONFIG, 4, 16)
    results = []
    for parts in (1, 4):
        state = training.make_state({"model": testing.random_params(CONFIG)}, optimizer)
        results.append(training.make_step(loss, optimizer, rate, microbatches=parts)(state, batch, {}))
    (one, metrics), (four, its_metrics) = results
    np.testing.assert_allclose(its_metrics["gradient_norm"], metrics["gradient_norm"], rtol=1e-5)
    for got, want in zip(jax.tree.leaves(four.trainable), jax.tree.leaves(one.trainable), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-4)  # Adam's first step is the sign of the gradient: 1e-2 large
