"""Balance losses against numpy; the language-model loss against the float64 reference model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kwaicoder_jax import models, testing, training
from kwaicoder_jax.models import RouterStatistics
from kwaicoder_jax.training import BalanceConfig
from tests.kwaicoder_jax.training import devices

L, E, X = 3, 8, 2


def statistics(load, probability):
    zeros = jnp.zeros(len(load))
    return RouterStatistics(
        jnp.asarray(load), jnp.asarray(probability), zeros + 2.0, zeros + 3.0, zeros + 0.5, zeros + 1.5
    )


def random_statistics(seed=0):
    rng = np.random.default_rng(seed)
    load, probability = rng.random((L, E)), rng.random((L, E))
    load, probability = X * load / load.sum(-1, keepdims=True), probability / probability.sum(-1, keepdims=True)
    return load.astype(np.float32), probability.astype(np.float32)


def test_uniform_routing_costs_one_and_collapse_costs_the_most():
    uniform = statistics(np.full((L, E), X / E), np.full((L, E), 1 / E))
    np.testing.assert_allclose(training.load_balance_loss(uniform), 1.0, rtol=1e-6)
    collapsed = np.zeros((L, E))
    collapsed[:, :X] = 1
    np.testing.assert_allclose(training.load_balance_loss(statistics(collapsed, collapsed / X)), E / X, rtol=1e-6)


def test_load_balance_loss_matches_numpy_and_its_gradient_reaches_probabilities():
    load, probability = random_statistics()
    expected = np.mean([E / X * np.sum(load[i].astype(np.float64) * probability[i]) for i in range(L)])
    np.testing.assert_allclose(training.load_balance_loss(statistics(load, probability)), expected, rtol=1e-6)
    gradient = jax.grad(lambda p: training.load_balance_loss(statistics(load, p)))(jnp.asarray(probability))
    np.testing.assert_allclose(gradient, E / X * load / L, rtol=1e-5)


def test_router_metrics_are_shares_and_their_unevenness():
    load, probability = random_statistics()
    got = training.router_metrics(statistics(load, probability))
    np.testing.assert_allclose(got["expert_load"], load / X, rtol=1e-6)
    np.testing.assert_allclose(np.sum(got["expert_load"], -1), 1, rtol=1e-6)
    np.testing.assert_allclose(got["expert_load_max_over_mean"], np.mean(load.max(-1) / load.mean(-1)), rtol=1e-6)
    found = [float(got[name]) for name in ("router_z_loss", "router_entropy", "router_confidence")]
    np.testing.assert_allclose(found, [2.0, 3.0, 0.5], rtol=1e-6)


def reference_loss(params, config, batch):
    """Mean cross-entropy of the unmasked targets, float64."""
    logits = testing.reference_logits(params, config, batch)
    real = batch["loss_mask"] > 0
    chosen = logits[real]
    peak = chosen.max(-1, keepdims=True)
    logp = chosen - peak - np.log(np.exp(chosen - peak).sum(-1, keepdims=True))
    weight = batch["loss_mask"][real]
    return -(weight * logp[np.arange(len(logp)), batch["targets"][real]]).sum() / weight.sum()


@functools.partial(jax.jit, static_argnames=("config", "balance"), compiler_options=devices.QUICK)
def loss_of(params, config, batch, balance):
    return training.language_model_loss(params, config, batch, runtime=models.Runtime(), balance=balance)


BALANCE = BalanceConfig(load=0.3, z=0.07)


@pytest.mark.parametrize("name", ["odd", "moe_topk_softmax"])
def test_language_model_loss_is_cross_entropy_per_unmasked_token_plus_balance(name):
    config = testing.small_configs()[name]
    params, batch = testing.random_params(config), testing.random_batch(config, 3, 12)
    rng = np.random.default_rng(1)
    batch["loss_mask"] = batch["loss_mask"] * (rng.random(batch["loss_mask"].shape) < 0.7).astype(np.float32)
    loss, metrics = loss_of(params, config, batch, BALANCE)
    np.testing.assert_allclose(metrics["loss"], reference_loss(params, config, batch), rtol=1e-5)
    assert metrics["tokens"] == batch["loss_mask"].sum()
    if config.experts is None:
        assert set(metrics) == {"loss", "tokens"}
        assert loss == metrics["loss"]
    else:
        balance = 0.3 * metrics["load_balance_loss"] + 0.07 * metrics["router_z_loss"]
        np.testing.assert_allclose(loss, metrics["loss"] + balance, rtol=1e-6)
        assert metrics["expert_load"].shape == (config.layers, config.experts.num_experts)


def test_padding_reaches_neither_loss_nor_balance():
    config = testing.moe_config()
    params, batch = testing.random_params(config), testing.random_batch(config, 3, 12)
    noise = np.random.default_rng(2).integers(0, config.vocab_size, batch["inputs"].shape, dtype=np.int32)
    padding = batch["segment_ids"] == 0
    other = {**batch, **{name: np.where(padding, noise, batch[name]) for name in ("inputs", "targets")}}
    a, b = loss_of(params, config, batch, BALANCE), loss_of(params, config, other, BALANCE)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=1e-6)  # experts' tiles are cut elsewhere


def test_a_batch_without_targets_costs_nothing():
    config = testing.odd_config()
    batch = testing.random_batch(config, 3, 12)
    batch["loss_mask"] = np.zeros_like(batch["loss_mask"])
    loss, metrics = loss_of(testing.random_params(config), config, batch, BALANCE)
    assert (float(loss), float(metrics["tokens"])) == (0.0, 0.0)


def test_the_balance_loss_weighs_its_parts():
    metrics = {"load_balance_loss": 2.0, "router_z_loss": 3.0, "sequence_balance_loss": 5.0}
    assert training.balance_loss(metrics, BalanceConfig(0.1, 0.01, 0.001)) == pytest.approx(0.2 + 0.03 + 0.005)


def test_biases_move_against_the_load_and_nothing_else_does():
    config = testing.moe_config(models.Router.SIGMOID)
    config = config.replace(experts=models.ExpertsConfig(7, 3, 24, "sigmoid", router_bias=True))
    params = testing.random_params(config)
    load_LE = np.full((config.layers, 7), 1 / 7, np.float32)
    load_LE[0, :3] = 0.5, 0.0, 1 / 7
    moved = training.move_biases(params, {"expert_load": jnp.asarray(load_LE)}, 0.01)
    change = np.asarray(moved["layers"]["moe"]["router_bias"] - params["layers"]["moe"]["router_bias"])
    np.testing.assert_allclose(change[0, :3], [-0.01, 0.01, 0.0], atol=1e-8)
    np.testing.assert_allclose(change[1:], 0.0, atol=1e-8)
    same = jax.tree.map(lambda a, b: a is b, moved, params)
    assert [name for name, kept in models.flatten(same).items() if not kept] == ["layers/moe/router_bias"]


def test_selection_biases_even_out_a_load_without_any_loss():
    """The router prefers two experts for every token; the bias alone has to undo that."""
    config = testing.moe_config(models.Router.SIGMOID)
    config = config.replace(layers=1, experts=models.ExpertsConfig(8, 2, 24, "sigmoid", router_bias=True))
    params = testing.random_params(config)
    params["layers"]["moe"]["router_bias"] = jnp.asarray([[1.0, 1.0, 0, 0, 0, 0, 0, 0]], jnp.float32)
    batch = testing.random_batch(config, 4, 32)
    load = jax.jit(lambda params: training.router_metrics(testing.run(params, config, batch).router)["expert_load"])
    first = float(load(params).max())
    for _ in range(60):
        params = training.move_biases(params, {"expert_load": load(params)}, 0.02)
    last = float(load(params).max())
    assert first > 0.45
    assert last < 0.2  # even would be 0.125
