"""Products in 8 bits against float64, with the rounding written out in numpy; which products of a model they are."""

import dataclasses
import importlib.util
import re

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from kwaicoder_jax import models, testing
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.models import Quantization, Runtime, quantization
from tests.kwaicoder_jax.training import devices

# The largest number of each type.
INT8, E4M3, E5M2 = (None, 127.0), (ml_dtypes.float8_e4m3fn, 448.0), (ml_dtypes.float8_e5m2, 57344.0)


def rounded(x, kind, axis):
    """What 8 bits with one scale along `axis` leave of x, float64."""
    dtype, largest = kind
    scale = np.max(np.abs(x), axis=axis, keepdims=True) / np.float32(largest)
    scale = np.where(scale == 0, np.float32(1), scale)
    units = x / scale
    if dtype is None:
        return np.rint(units).astype(np.float64) * scale
    return np.clip(units, -largest, largest).astype(dtype).astype(np.float64) * scale


def operands():
    """Tokens and columns of very different sizes, a token of zeros, one large number."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((13, 24)) * np.exp(rng.standard_normal((13, 1)))
    x[4], x[7, 3] = 0.0, 50.0
    weight = rng.standard_normal((24, 17)) * np.exp(rng.standard_normal((1, 17)))
    dy = rng.standard_normal((13, 17)) * np.exp(rng.standard_normal((13, 1)))
    return tuple(each.astype(np.float32) for each in (x, weight, dy))


@pytest.mark.parametrize(("name", "kind", "of_gradients"), [("int8", INT8, INT8), ("fp8", E4M3, E5M2)])
@pytest.mark.parametrize("gradients", [False, True])
def test_product_and_gradients(name, kind, of_gradients, gradients):
    """To float32 rounding: that the numbers are rounded is in the reference."""
    x, weight, dy = operands()
    y, pull = jax.vjp(lambda *both: quantization.product(*both, Quantization(name), gradients), x, weight)
    dx, dweight = pull(jnp.asarray(dy))
    exact_x, exact_weight, exact_dy = (each.astype(np.float64) for each in (x, weight, dy))
    expected = rounded(x, kind, 1) @ rounded(weight, kind, 0)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    error = np.linalg.norm(expected - exact_x @ exact_weight) / np.linalg.norm(expected)
    assert 0.001 < error < (0.02 if name == "int8" else 0.06)
    if gradients:
        expected = rounded(dy, of_gradients, 1) @ rounded(weight, kind, 1).T
        assert np.linalg.norm(expected - exact_dy @ exact_weight.T) > 0.001 * np.linalg.norm(expected)
    else:
        expected = exact_dy @ exact_weight.T
    np.testing.assert_allclose(dx, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    expected = exact_x.T @ exact_dy
    np.testing.assert_allclose(dweight, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_bfloat16_operands_are_scaled_in_float32():
    x, weight, _ = (jnp.asarray(each, jnp.bfloat16) for each in operands())
    y = quantization.product(x, weight, Quantization.INT8, False)
    assert y.dtype == jnp.bfloat16
    x, weight = (np.asarray(each, np.float32) for each in (x, weight))
    expected = rounded(x, INT8, 1) @ rounded(weight, INT8, 0)
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=2**-8, atol=1e-6)  # one rounding to bfloat16


def traced(config, runtime, *, gradient=False):
    """The traced loss, or its gradient."""
    batch = testing.random_batch(config, 2, 12)
    inputs = (batch["inputs"], batch["positions"], batch["segment_ids"])

    def loss(params):
        hidden = models.forward(params, config, *inputs, runtime=runtime).hidden_BTD
        return models.cross_entropy(hidden, models.projection(params), batch["targets"], batch["loss_mask"])

    return jax.jit(jax.grad(loss) if gradient else loss, compiler_options=devices.QUICK), models.abstract(config)


def products(config, runtime, *, gradient=False):
    """How many products have operands in 8 bits, in one layer of each stack."""
    function, params = traced(config, runtime, gradient=gradient)
    text = function.lower(params).as_text()
    return len(re.findall(r"dot_general .*: \(tensor<[^>]*x(?:i8|f8E\w+)>, tensor<[^>]*x(?:i8|f8E\w+)>", text))


CONFIGS = testing.small_configs() | testing.family_configs()


ONE_LAYER = {"dense": 4 + 3, "moe_topk_softmax": 4, "moe_shared_gate": 4 + 3}


@pytest.mark.parametrize(("name", "count"), [*ONE_LAYER.items(), ("deepseek_v2", 2 * 4 + 3 + 3)])
def test_every_dense_projection_and_nothing_else(name, count):
    """Queries, keys, values, output; gate, up, down of dense and shared MLPs (deepseek_v2: one stack of each). No router,
    no routed expert, no gate of a shared one, no vocabulary."""
    config = CONFIGS[name].replace(layers=1) if name in ONE_LAYER else CONFIGS[name]
    kind = "fp8" if name == "dense" else "int8"
    assert products(config, Runtime(quantization=kind)) == count


def test_gradients_of_inputs_and_not_of_weights():
    config = CONFIGS["dense"]
    plain, quantised = (Runtime(quantization="int8", quantize_gradients=wanted) for wanted in (False, True))
    assert products(config, Runtime()) == products(config, Runtime(), gradient=True) == 0
    assert products(config, plain, gradient=True) == 7
    assert products(config, quantised, gradient=True) == 14
    again = dataclasses.replace(quantised, remat="full")  # the forward pass once more, but for the product that ends it
    assert 14 < products(config, again, gradient=True) <= 21


def test_quantised_gradients_are_near():
    """Half a step of 8 bits in every operand turns the gradient by some degrees, and does turn it."""
    config = CONFIGS["dense"].replace(layers=1)
    params = testing.random_params(config)
    (exact, _), (near, _) = (
        traced(config, runtime, gradient=True)
        for runtime in (Runtime(), Runtime(quantization="int8", quantize_gradients=True))
    )
    found = models.flatten(near(params))
    for name, expected in models.flatten(exact(params)).items():
        cosine = np.vdot(found[name], expected) / np.linalg.norm(found[name]) / np.linalg.norm(expected)
        assert cosine > 0.98, name
        assert cosine < 0.999999 or not name.endswith(("gate", "query", "out")), name


def test_without_qwix(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "qwix" else find(name, *rest))
    wanted = (
        r"^runtime.quantization: int8 needs qwix; pip install 'kwaicoder_jax\[quantization\]' \(qwix\), or use none$"
    )
    with pytest.raises(UserError, match=wanted):
        Runtime(quantization="int8")
    Runtime()


def test_a_choice_that_there_is_not():
    with pytest.raises(
        UserError, match=r"runtime.quantization: no choice 'int4'|no choice 'int4'.*use none, int8, fp8"
    ):
        Runtime(quantization="int4")
