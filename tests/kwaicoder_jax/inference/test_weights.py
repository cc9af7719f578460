"""Prepared weights compute what the declared parameters do."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.grouped_matmul import ScaledMatrices
from kwaicoder_jax import models, testing
from kwaicoder_jax.inference import Form, prepare
from kwaicoder_jax.inference.matrices import Int8Matrix
from kwaicoder_jax.models import ExpertsConfig, Runtime

CONFIGS = testing.small_configs() | testing.family_configs()
LATENT = CONFIGS["deepseek_v3"].replace(layers=1, dense_layers=0, experts=None)  # no choice of experts, which may flip


@functools.partial(jax.jit, static_argnames="config")
def prepared_logits(weights, config, batch):
    inputs = (batch["inputs"], batch["positions"], batch["segment_ids"])
    hidden = models.forward(weights.params(), config, *inputs, runtime=Runtime(scan_unroll=0)).hidden_BTD
    return weights.logits(hidden.reshape(-1, hidden.shape[-1])).reshape(*hidden.shape[:2], -1)


def both(config, form):
    params, batch = testing.random_params(config), testing.random_batch(config, 2, 12, packed=False)
    weights = prepare(params, config, form)
    return np.asarray(prepared_logits(weights, config, batch)), testing.reference_logits(params, config, batch), weights


@pytest.mark.parametrize("name", ["untied", "llama", "qwen2_moe", "deepseek_v3"])
def test_float(name):
    """All kinds of layers: biases, mixtures with shared experts, two stacks with latent attention."""
    got, expected, weights = both(CONFIGS[name], Form.FLOAT)
    np.testing.assert_allclose(got, expected, atol=1e-4)
    assert weights.platform == "cpu"


ALL_EXPERTS = testing.moe_config(layers=2, experts=ExpertsConfig(3, 3, 24))  # no choice either


@pytest.mark.parametrize(
    "config", [testing.dense_config(layers=2), LATENT, ALL_EXPERTS], ids=["dense", "latent", "experts"]
)
def test_int8(config):
    """Half a scale at most in every matrix and activation is a few percent of the logits' spread in layers so narrow;
    a wrong or a missing scale gives 100% and more."""
    got, expected, weights = both(config, "int8")
    spread = expected.std()
    assert 0 < np.sqrt(np.mean((got - expected) ** 2)) < 0.05 * spread
    assert np.abs(got - expected).max() < 0.25 * spread
    stored = [m for stack in weights.stacks.values() for layer in stack.matrices for m in layer.values()]
    assert all(isinstance(m, Int8Matrix) and m.matrix_JF.dtype == jnp.int8 for m in [*stored, weights.head])
    layers = [layer for stack in weights.stacks.values() for layer in stack.arrays]
    experts = [x for layer in layers for name, x in layer.items() if name in ("moe/gate", "moe/up", "moe/down")]
    assert len(experts) == (6 if config.experts else 0)
    assert all(isinstance(x, ScaledMatrices) and x.values_GKN.dtype == jnp.int8 for x in experts)


def test_int8_leaves_experts_with_biases_as_they_are():
    config = CONFIGS["mixtral_with_biases"]
    (stack,) = prepare(testing.random_params(config), config, "int8").stacks.values()
    assert stack.arrays[0]["moe/gate"].dtype == jnp.float32


def test_bfloat16():
    got, expected, weights = both(testing.dense_config(layers=1, dtype="bfloat16"), Form.FLOAT)
    assert np.abs(got - expected).max() < 0.1 * expected.std()
    assert weights.rest["embedding"].dtype == jnp.bfloat16
    norms = [layer["attention_norm/scale"] for layer in weights.stacks["layers"].arrays]
    assert {x.dtype for x in norms} == {jnp.dtype("float32")}, "norms stay as they are stored"


def test_matrices_of_one_input_are_side_by_side():
    config = testing.dense_config()
    (stack,) = prepare(testing.random_params(config), config).stacks.values()
    shapes = {name: matrix.matrix_JF.shape for name, matrix in stack.matrices[0].items()}
    assert shapes == {
        "attention/query": (32, 48 + 16 + 16), "attention/out": (48, 32), "mlp/gate": (32, 96), "mlp/down": (48, 32)
    }  # fmt: skip
    assert len(stack.matrices) == len(stack.arrays) == 3


def test_numpy_parameters_and_unknown_forms():
    config = testing.dense_config()
    params = jax.tree.map(np.asarray, testing.random_params(config))
    assert isinstance(prepare(params, config).rest["embedding"], jax.Array)
    with pytest.raises(ValueError, match="int4"):
        prepare(params, config, "int4")
