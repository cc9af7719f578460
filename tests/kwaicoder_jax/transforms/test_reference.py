"""The float64 reference and the model agree, so that what holds for the one says something about the other."""

import functools

import jax
import pytest

from kwaicoder_jax import models, testing

from . import reference


@pytest.mark.parametrize("config", [testing.odd_config(), testing.moe_config("sigmoid")])
def test_reference_is_the_model(config):
    params = testing.random_params(config)
    batch = testing.random_batch(config, 2, 12)
    forward = jax.jit(functools.partial(models.forward, config=config))
    output = forward(
        params, inputs_BT=batch["inputs"], positions_BT=batch["positions"], segments_BT=batch["segment_ids"]
    )
    real = batch["segment_ids"] > 0
    expected = reference.forward(params, config, batch)["hidden"][real]
    assert reference.relative(output.hidden_BTD[real], expected) < 2e-5  # float32, a few layers
