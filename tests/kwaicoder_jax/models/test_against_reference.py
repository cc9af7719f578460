"""The forward pass against float64 numpy, and what must not change it: neighbours, padding, run-time choices."""

import jax
import numpy as np
import pytest

from kwaicoder_jax import models, testing
from kwaicoder_jax.models import Remat, Runtime

CONFIGS = testing.small_configs() | testing.family_configs()
EACH = pytest.mark.parametrize("name", CONFIGS)
# Measured: 1e-5 (dense) to 3e-5 (mixtures) on logits of 10; float32 rounding through 3 layers.
TOLERANCE = 1e-4
LOSS_AND_GRADS = jax.jit(jax.value_and_grad(testing.mean_loss), static_argnums=(1, 3))


@EACH
def test_packed_batch_equals_float64_documents_run_alone(name):
    config = CONFIGS[name]
    params, batch = testing.random_params(config), testing.random_batch(config, 3, 24)
    expected = testing.reference_logits(params, config, batch)
    assert np.nanstd(expected) > 2, "the reference must be worth comparing with"
    real = batch["segment_ids"] > 0
    got = np.asarray(testing.model_logits(params, config, batch))
    np.testing.assert_allclose(got[real], expected[real], atol=TOLERANCE, rtol=0)
    assert np.isfinite(got).all(), "padding must not make NaN: its gradient would reach the parameters"


@EACH
def test_content_of_padding_changes_nothing(name):
    config = CONFIGS[name]
    params, batch = testing.random_params(config), testing.random_batch(config, 3, 24)
    padding = batch["segment_ids"] == 0
    noise = np.random.default_rng(1).integers(0, config.vocab_size, (2, *padding.shape), dtype=np.int32)
    other = batch | {"inputs": np.where(padding, noise[0], batch["inputs"])}
    other["positions"] = np.where(padding, noise[1], batch["positions"])
    a, b = testing.run(params, config, batch), testing.run(params, config, other)
    # Bitwise: a real token's numbers come from its own row, whatever stands elsewhere in the same shapes.
    np.testing.assert_array_equal(np.asarray(a.hidden_BTD)[~padding], np.asarray(b.hidden_BTD)[~padding])
    if config.experts is not None:
        for field in ("load_E", "probability_E", "z", "entropy", "confidence"):
            np.testing.assert_allclose(getattr(a.router, field), getattr(b.router, field), rtol=1e-6, err_msg=field)


@pytest.mark.parametrize("name", ["dense", "moe_sigmoid"])
def test_segments_in_any_order_of_the_row(name):
    """Only segment and position say what a token sees; segments need not be consecutive numbers."""
    config = CONFIGS[name]
    params, batch = testing.random_params(config), testing.random_batch(config, 3, 24)
    renumbered = batch | {"segment_ids": np.where(batch["segment_ids"] > 0, 40 - 3 * batch["segment_ids"], 0)}
    real = batch["segment_ids"] > 0
    a, b = (np.asarray(testing.run(params, config, x).hidden_BTD)[real] for x in (batch, renumbered))
    np.testing.assert_array_equal(a, b)


def test_collect_layers_returns_the_residual_stream():
    config = testing.odd_config()
    params, batch = testing.random_params(config), testing.random_batch(config, 3, 24)
    output = testing.run(params, config, batch, collect_layers=True)
    assert output.layers_LBTD.shape == (config.layers, 3, 24, config.model_dim)
    np.testing.assert_array_equal(output.embedded_BTD, np.asarray(params["embedding"])[batch["inputs"]])
    last = np.asarray(output.layers_LBTD[-1], np.float64)
    rms = np.sqrt((last**2).mean(-1, keepdims=True) + config.norm_epsilon)
    np.testing.assert_allclose(output.hidden_BTD, last / rms * params["final_norm"]["scale"][None, None], atol=1e-5)
    # A model of the first layer alone stops where the first layer did.
    first = dict(params, layers=jax.tree.map(lambda leaf: leaf[:1], params["layers"]))
    shallow = testing.run(first, config.replace(layers=1), batch, collect_layers=True)
    np.testing.assert_allclose(shallow.layers_LBTD[0], output.layers_LBTD[0], atol=1e-5)
    assert testing.run(params, config, batch).layers_LBTD is None


@pytest.mark.parametrize(
    ("name", "runtime"),
    [
        *(("odd", Runtime(remat=each)) for each in Remat),
        ("odd", Runtime(scan_unroll=0)),
        *(("moe_sigmoid", Runtime(remat=each)) for each in Remat if each is not Remat.NONE),
    ],
)
def test_runtime_changes_neither_loss_nor_gradients(name, runtime):
    config = CONFIGS[name]
    params, batch = testing.random_params(config), testing.random_batch(config, 1, 8)
    loss, grads = LOSS_AND_GRADS(params, config, batch, Runtime())
    assert all(np.abs(leaf).max() > 1e-4 for leaf in jax.tree.leaves(jax.device_get(grads))), "a parameter without use"
    other_loss, other_grads = LOSS_AND_GRADS(params, config, batch, runtime)
    np.testing.assert_allclose(other_loss, loss, rtol=1e-6)
    # The order of sums may differ between compilations: float32 rounding of gradients of order 1.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4), other_grads, grads)


@pytest.mark.parametrize(
    "name",
    [
        "odd",
        "moe_sigmoid",
        "olmoe",
        "deepseek_v3",
        *[
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("llama", "mixtral_with_biases", "deepseek_v2", "glm4_moe")
        ],
    ],
)
def test_gradients_match_finite_differences_of_the_float64_reference(name):
    config = CONFIGS[name]
    params, batch = testing.random_params(config), testing.random_batch(config, 1, 8)
    rng = np.random.default_rng(0)
    real = batch["segment_ids"] > 0

    def reference_loss(flat):
        logits = testing.reference_logits(models.unflatten(flat), config, batch)[real]
        shifted = logits - logits.max(-1, keepdims=True)
        logp = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
        return -np.take_along_axis(logp, batch["targets"][real][:, None], -1).mean()

    grads = models.flatten(LOSS_AND_GRADS(params, config, batch, Runtime())[1])
    flat = {name: np.asarray(leaf, np.float64) for name, leaf in models.flatten(params).items()}
    for leaf_name, leaf in flat.items():
        direction = rng.standard_normal(leaf.shape)
        ends = [reference_loss(flat | {leaf_name: leaf + sign * 1e-6 * direction}) for sign in (1, -1)]
        expected = (ends[0] - ends[1]) / 2e-6
        got = np.sum(np.asarray(grads[leaf_name], np.float64) * direction)
        np.testing.assert_allclose(got, expected, rtol=1e-3, atol=1e-4, err_msg=leaf_name)


@pytest.mark.parametrize("name", ["dense", "moe_sigmoid"])
def test_bfloat16_stays_near_float64(name):
    config = CONFIGS[name].replace(dtype="bfloat16", param_dtype="bfloat16")
    params, batch = testing.random_params(config), testing.random_batch(config, 3, 24)
    assert all(leaf.dtype == "bfloat16" for leaf in jax.tree.leaves(params))
    assert testing.run(params, config, batch).hidden_BTD.dtype == "bfloat16"
    real = batch["segment_ids"] > 0
    exact = testing.reference_logits(params, config, batch)[real]
    error = np.asarray(testing.model_logits(params, config, batch))[real] - exact
    # 8 bits of mantissa through 3 layers: some percent. A mixture routes a few near-ties elsewhere: use the median.
    assert np.median(np.abs(error)) < 0.05 * exact.std()


def test_bfloat16_gradients_are_finite_and_stay_near_float32():
    config = CONFIGS["odd"]
    params, batch = testing.random_params(config), testing.random_batch(config, 1, 8)
    loss, grads = LOSS_AND_GRADS(params, config.replace(dtype="bfloat16"), batch, Runtime())
    exact_loss, exact_grads = LOSS_AND_GRADS(params, config, batch, Runtime())
    assert loss.dtype == "float32"
    np.testing.assert_allclose(loss, exact_loss, rtol=0.05)
    for got, expected in zip(jax.tree.leaves(jax.device_get(grads)), jax.tree.leaves(jax.device_get(exact_grads))):
        assert got.dtype == np.float32
        cosine = np.sum(got * expected) / (np.linalg.norm(got) * np.linalg.norm(expected))
        assert cosine > 0.98
