"""Runs of layers against the reference's residual streams; the loss without a layer against a model that lacks it."""

import numpy as np
import pytest

from kwaicoder_jax import models, testing
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.transforms import importance, layer_importance

from . import raw_activations, reference
from .test_importance import make_batches

CONFIGS = testing.small_configs()


@pytest.mark.parametrize("name", ["dense", "odd", "moe_bias"])
def test_runs_of_layers(name):
    config, batches = CONFIGS[name], make_batches(CONFIGS[name])
    params = testing.random_params(config)
    raw = raw_activations.of(params, config, batches)
    scores = importance.collect(params, config, batches, blocks=True)
    expected_LL = np.zeros((config.layers, config.layers))
    for i in range(config.layers):
        for j in range(i, config.layers):
            expected_LL[i, j] = raw_activations.influence(raw["in"][i], raw["out"][j])
    np.testing.assert_allclose(scores.blocks_LL, expected_LL, atol=1e-5)  # 1 - cos is rounded at 1
    np.testing.assert_allclose(np.diag(scores.blocks_LL), scores.layers_L, atol=1e-5)
    assert (np.tril(scores.blocks_LL, -1) == 0).all()


def reference_loss(params, config, batches):
    """Mean loss over the unmasked targets of all batches."""
    total = count = 0.0
    for batch in batches:
        log_p = np.log(reference.softmax(reference.forward(params, config, batch)["logits"]))
        picked = np.take_along_axis(log_p, batch["targets"][..., None], axis=-1)[..., 0]
        total, count = total - (picked * batch["loss_mask"]).sum(), count + batch["loss_mask"].sum()
    return total / count, int(count)


def without(params, config, layer):
    """The model that never had the layer."""
    flat = models.flatten(params)
    for name, declaration in models.declarations(config).items():
        if "layers" in declaration.axes:
            flat[name] = np.delete(np.asarray(flat[name]), layer, axis=declaration.axes.index("layers"))
    return models.unflatten(flat), config.replace(layers=config.layers - 1)


@pytest.mark.parametrize("name", ["dense", "odd", "moe_bias", "moe_shared_gate"])
def test_leave_one_out(name):
    config = CONFIGS[name]
    batches = [testing.random_batch(config, rows, 12, rows) for rows in (2, 3)]  # batches of unequal weight
    batches[0]["loss_mask"][:, :3] = 0
    params = testing.random_params(config)
    result = importance.leave_one_out(params, config, batches)
    expected, tokens = reference_loss(params, config, batches)
    assert result.tokens == tokens
    np.testing.assert_allclose(result.loss, expected, rtol=1e-5)  # float32, a few layers
    losses_L = [reference_loss(*without(params, config, i), batches)[0] for i in range(config.layers)]
    np.testing.assert_allclose(result.loss_L, losses_L, rtol=1e-5)
    np.testing.assert_allclose(result.increase_L, np.array(losses_L) - expected, atol=1e-4)


def test_leave_one_out_compiles_once():
    config = testing.dense_config(layers=4, model_dim=20)
    before = layer_importance._loss._cache_size()
    importance.leave_one_out(testing.random_params(config), config, [testing.random_batch(config, 2, 8)] * 2)
    assert layer_importance._loss._cache_size() == before + 1


def test_errors():
    config = CONFIGS["dense"]
    params, batch = testing.random_params(config), testing.random_batch(config, 2, 8)
    with pytest.raises(UserError, match="'targets'"):
        importance.leave_one_out(params, config, [{k: x for k, x in batch.items() if k != "targets"}])
    with pytest.raises(UserError, match="batches: no targets"):
        importance.leave_one_out(params, config, [])
    with pytest.raises(UserError, match="batches: no targets"):
        importance.leave_one_out(params, config, [batch | {"loss_mask": batch["loss_mask"] * 0}])
