"""A model whose experts have a capacity: without drops it is the model; with drops the layer is what numpy says."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from experiments import language_model
from kwaicoder_jax import models, testing, training
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.models.expert_capacity import capped_experts
from kwaicoder_jax.models.moe import MoE


def loss_and_gradients(params, config, batch, factor):
    balance = dataclasses.replace(training.BalanceConfig(), capacity_factor=factor)

    @jax.jit
    def run(params):
        return jax.value_and_grad(training.language_model_loss, has_aux=True)(
            params, config, batch, runtime=models.Runtime(), balance=balance
        )

    (loss, metrics), gradients = run(params)
    return float(loss), metrics, models.flatten(gradients)


def test_a_capacity_that_all_fit_in_changes_nothing():
    config = testing.moe_config("softmax_topk")
    params, batch = testing.random_params(config), testing.random_batch(config, 3, 24)
    loss, metrics, gradients = loss_and_gradients(params, config, batch, None)
    capped, with_share, others = loss_and_gradients(params, config, batch, 100.0)
    assert "dropped_share" not in metrics
    assert with_share["dropped_share"] == 0.0
    assert capped == pytest.approx(loss, rel=1e-6)
    for name, gradient in gradients.items():  # float32 sums in another order
        np.testing.assert_allclose(others[name], gradient, atol=1e-5 * np.abs(gradient).max(), err_msg=name)


def test_a_layer_with_a_capacity_against_numpy():
    config = testing.moe_config("topk_softmax", layers=1)
    e = config.experts
    p = {name: np.asarray(x, np.float64)[0] for name, x in testing.random_params(config)["layers"]["moe"].items()}
    x = np.random.default_rng(5).standard_normal((2, 9, config.model_dim)).astype(np.float32)
    mask = np.ones((2, 9), bool)
    mask[1, 6:] = False
    apply = jax.jit(functools.partial(MoE(config, models.Runtime(), 0.8).apply))
    y, router = apply({"params": jax.tree.map(np.float32, p)}, x, mask)
    rows = int(np.ceil(0.8 * 9 * e.experts_per_token / e.num_experts))
    expected, dropped = np.zeros(x.shape), 0
    for row in range(2):
        logits = x[row].astype(np.float64) @ p["router"]
        chosen = np.argsort(-logits, axis=-1)[:, : e.experts_per_token]
        taken = np.zeros(e.num_experts, int)
        for choice in range(e.experts_per_token):
            for time in np.flatnonzero(mask[row]):
                expert = chosen[time, choice]
                taken[expert] += 1
                if taken[expert] > rows:
                    dropped += 1
                    continue
                weights = np.exp(logits[time, chosen[time]] - logits[time].max())
                gate = x[row, time] @ p["gate"][expert]
                neurons = gate / (1 + np.exp(-gate)) * (x[row, time] @ p["up"][expert])
                expected[row, time] += weights[choice] / weights.sum() * (neurons @ p["down"][expert])
    assert dropped > 3
    np.testing.assert_allclose(router.dropped, dropped / (15 * e.experts_per_token), rtol=1e-6)
    np.testing.assert_allclose(y, expected, atol=1e-5 * np.abs(expected).max())
    free = jax.jit(MoE(config, models.Runtime()).apply)({"params": jax.tree.map(np.float32, p)}, x, mask)[1]
    assert free.dropped is None
    for name in ("load_E", "probability_E", "z", "entropy", "confidence", "sequence_balance"):
        np.testing.assert_array_equal(getattr(router, name), getattr(free, name))  # of what was chosen


def test_statistics_are_those_of_the_whole_mixture():
    config = testing.moe_config("softmax_topk")
    with pytest.raises(ValueError, match="leave out capacity_factor"):
        models.forward({}, config, None, None, None, statistics=True, capacity_factor=1.0)


def test_a_mesh_that_splits_sequences_is_a_user_error():
    mesh, nothing = AbstractMesh((2, 2), ("expert", "context")), np.zeros((4, 2), np.int32)
    with pytest.raises(UserError, match=r"balance.capacity_factor: .*mesh.context to 1"):
        capped_experts(
            mesh, (nothing, nothing), nothing, (nothing,) * 3, np.ones((2, 2), bool), factor=1.0, gather_weights=True
        )


def test_a_dense_model_has_no_capacity():
    balance, mesh = (
        training.BalanceConfig(capacity_factor=1.0),
        training.make_mesh(training.MeshConfig(), jax.devices()[:1]),
    )
    with pytest.raises(UserError, match=r"cpt.balance.capacity_factor: .*no experts"):
        language_model.check_capacity(balance, testing.dense_config(), "cpt.balance", mesh)


@pytest.mark.parametrize("factor", [0.0, -1.0, float("inf"), float("nan")])
def test_no_capacity_is_a_user_error(factor):
    with pytest.raises(UserError, match=r"balance.capacity_factor: .*above 0"):
        training.BalanceConfig(capacity_factor=factor)
