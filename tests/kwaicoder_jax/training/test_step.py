"""The train step's numbers: against float64 differences, against fixed ones; and the held-out loss."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kwaicoder_jax import models, testing, training
from tests.kwaicoder_jax.training import devices
from tests.kwaicoder_jax.training.test_losses import reference_loss

MESH = training.make_mesh(training.MeshConfig(), jax.devices()[:1])
# Loss, gradient norm, and the loss after one update, of seed 0. They were read off the code, which the other tests here
# hold against independent references: a change means that training computes something else than it did.
GOLDEN = {"dense": (9.284935, 12.617142, 4.419634), "moe": (8.947294, 10.520351, 4.306130)}
CHANGED = "a train step no longer computes what it did: if that is meant, say so in docs/decisions.md and renew GOLDEN"


def make(config):
    rate = training.join([training.PhaseRate(10, 1e-2, law="constant")])
    optimizer = training.make_optimizer(training.OptimizerConfig(), rate, config)

    def loss(trainable, batch, frozen):
        balance = training.BalanceConfig()
        return training.language_model_loss(
            trainable["model"], config, batch, runtime=models.Runtime(), balance=balance
        )

    fresh = jax.jit(functools.partial(training.make_state, optimizer=optimizer))
    state = fresh({"model": testing.random_params(config)})
    return jax.device_put(state, training.replicated(MESH)), training.make_step(loss, optimizer, rate)


@pytest.mark.parametrize("kind", GOLDEN)
def test_golden_steps(kind):
    config = {"dense": testing.dense_config, "moe": testing.moe_config}[kind]()
    state, step = make(config)
    batch = training.shard_batch(testing.random_batch(config, 2, 16), MESH)
    step = jax.jit(step, compiler_options=devices.QUICK)
    state, first = step(state, batch, {})
    assert int(state.step) == 1
    assert float(first["learning_rate"]) == np.float32(1e-2)
    state, second = step(state, batch, {})
    got = [float(x) for x in (first["loss"], first["gradient_norm"], second["loss"])]
    np.testing.assert_allclose(got, GOLDEN[kind], rtol=1e-4, err_msg=f"{CHANGED}: {got}")  # float32, any XLA


@functools.partial(jax.jit, static_argnames="config", compiler_options=devices.QUICK)
def gradient_of(params, config, batch):
    def loss(params):
        balance = training.BalanceConfig(0.0, 0.0)
        return training.language_model_loss(params, config, batch, runtime=models.Runtime(), balance=balance)[0]

    return jax.grad(loss)(params)


@pytest.mark.parametrize("kind", ["odd", "moe_sigmoid"])
def test_gradient_of_the_whole_model_matches_float64_differences(kind):
    """For each parameter, the slope along a random direction and along the largest coordinate of the gradient."""
    config = testing.small_configs()[kind].replace(layers=2)
    params, batch = testing.random_params(config), testing.random_batch(config, 2, 9)
    gradients = models.flatten(gradient_of(params, config, batch))
    flat = {name: np.asarray(x, np.float64) for name, x in models.flatten(params).items()}
    rng = np.random.default_rng(4)
    for name, gradient in gradients.items():
        gradient = np.asarray(gradient, np.float64)
        largest = (np.abs(gradient) == np.abs(gradient).max()).astype(float)
        for direction in (rng.standard_normal(gradient.shape) / np.sqrt(gradient.size), largest):
            sides = [
                reference_loss(models.unflatten({**flat, name: flat[name] + step * direction}), config, batch)
                for step in (1e-6, -1e-6)
            ]
            slope = (sides[0] - sides[1]) / 2e-6
            # float32 gradient; float64 differences are good to 1e-8
            np.testing.assert_allclose((gradient * direction).sum(), slope, rtol=1e-4, atol=2e-6, err_msg=name)


def test_frozen_is_handed_over_extras_are_trained_and_the_old_state_is_given_away():
    config = testing.odd_config()
    rate = training.join([training.PhaseRate(10, 1e-2, law="constant")])
    optimizer = training.make_optimizer(training.OptimizerConfig(weight_decay=0.0), rate, config)
    fresh = jax.jit(functools.partial(training.make_state, optimizer=optimizer))

    def loss(trainable, batch, frozen):
        value = jnp.sum(jnp.square(trainable["extra"] - frozen)) * batch["weight"][0]
        return value, {"loss": value}

    target, extra = jnp.asarray([1.0, -2.0]), jnp.zeros(2)
    state = fresh({"model": testing.random_params(config), "extra": extra})
    old = jax.tree.leaves(state)  # not looked at: on CPU, an array that numpy sees is not given away
    state, metrics = training.make_step(loss, optimizer, rate)(state, {"weight": jnp.asarray([3.0])}, target)
    assert all(array.is_deleted() for array in old)
    np.testing.assert_allclose(metrics["loss"], 15.0, rtol=1e-6)
    np.testing.assert_allclose(metrics["gradient_norm"], 6 * np.sqrt(5), rtol=1e-6)  # before clipping
    np.testing.assert_allclose(state.trainable["extra"], [0.01, -0.01], rtol=1e-4)  # Adam's first step is the rate
    for old, new in zip(jax.tree.leaves(testing.random_params(config)), jax.tree.leaves(state.trainable["model"])):
        np.testing.assert_array_equal(old, new)


CONFIG = testing.odd_config()


def padded(batch, rows):
    return {
        key: np.concatenate([value, np.zeros((rows, *value.shape[1:]), value.dtype)]) for key, value in batch.items()
    }


def test_held_out_loss_weighs_tokens_not_batches_or_sources():
    params = testing.random_params(CONFIG)
    # Rows of one shape (one compilation) but of different counts of tokens: two of the batches are mostly masked.
    a, b, c = (testing.random_batch(CONFIG, 2, 12, seed) for seed in range(3))
    b["loss_mask"][:, 2:] = 0
    c["loss_mask"][1:] = 0
    got = training.HeldOutLoss(CONFIG, {"x": [a, b], "y": [c]}, MESH)(params)
    sums = [reference_loss(params, CONFIG, batch) * batch["loss_mask"].sum() for batch in (a, b, c)]
    tokens = [batch["loss_mask"].sum() for batch in (a, b, c)]
    assert len(set(tokens)) == 3
    np.testing.assert_allclose(got["valid_loss"], sum(sums) / sum(tokens), rtol=1e-5)  # float32 model
    expected = {"x": sum(sums[:2]) / sum(tokens[:2]), "y": sums[2] / tokens[2]}
    assert set(got["valid_loss_by_source"]) == {"x", "y"}
    for source, value in got["valid_loss_by_source"].items():
        np.testing.assert_allclose(value, expected[source], rtol=1e-5)


def test_rows_of_padding_do_not_count():
    params, batch = testing.random_params(CONFIG), testing.random_batch(CONFIG, 2, 12)
    losses = [
        training.HeldOutLoss(CONFIG, {"x": [each]}, MESH)(params)["valid_loss"] for each in (batch, padded(batch, 3))
    ]
    np.testing.assert_allclose(losses[1], losses[0], rtol=1e-6)  # sums in another order
