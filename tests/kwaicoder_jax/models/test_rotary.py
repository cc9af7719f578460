"""Rotary frequencies against transformers' own functions, and what scaling must leave alone."""

import dataclasses
import types

import jax.numpy as jnp
import numpy as np
import pytest

from kwaicoder_jax import testing
from kwaicoder_jax.models import RopeScaling, rotary
from kwaicoder_jax.testing.reference_rotary import rotate

torch = pytest.importorskip("torch")
rope_utils = pytest.importorskip("transformers.modeling_rope_utils")

SCALINGS = {
    "linear": RopeScaling("linear", 3.0),
    "yarn": RopeScaling("yarn", 4.0, original_length=4096),
    "yarn of DeepSeek": RopeScaling("yarn", 40.0, original_length=4096, mscale=0.707, mscale_all_dim=0.707),
    "yarn, two scales": RopeScaling("yarn", 40.0, original_length=4096, mscale=1.0, mscale_all_dim=0.5),
    "yarn, exact borders": RopeScaling(
        "yarn", 8.0, original_length=2048, beta_fast=20.0, beta_slow=2.0, truncate=False
    ),
    "yarn, factor given": RopeScaling("yarn", 8.0, original_length=2048, attention_factor=1.25),
    "yarn, one border": RopeScaling("yarn", 8.0, original_length=100, beta_fast=32.0, beta_slow=31.0),
    "llama 3.1": RopeScaling("llama3", 8.0, original_length=8192),
    "llama 3.2": RopeScaling("llama3", 32.0, original_length=8192, low_freq_factor=1.0, high_freq_factor=4.0),
}


def theirs(scaling, theta, width):
    parameters = {"rope_theta": theta, "rope_type": str(scaling.kind)} | dataclasses.asdict(scaling)
    parameters["original_max_position_embeddings"] = scaling.original_length
    config = types.SimpleNamespace(
        rope_parameters=parameters, head_dim=width, hidden_size=width, num_attention_heads=1,
        max_position_embeddings=10, standardize_rope_params=lambda: None,
    )  # fmt: skip
    frequency_P, factor = rope_utils.ROPE_INIT_FUNCTIONS[str(scaling.kind)](config, torch.device("cpu"))
    return frequency_P.numpy(), factor


@pytest.mark.parametrize("name", SCALINGS)
@pytest.mark.parametrize(("theta", "width"), [(10_000.0, 64), (1e6, 128)])
def test_frequencies_and_lengths_are_those_of_transformers(name, theta, width):
    config = testing.dense_config(head_dim=width, rope_theta=theta, rope_scaling=SCALINGS[name])
    frequency_P, factor = theirs(SCALINGS[name], theta, width)
    # One step turns (1, 0) by the frequency, and the factor is its length.
    x_BTHN = jnp.zeros((1, 1, 1, width)).at[..., : width // 2].set(1.0)
    got = np.asarray(rotary.rotary(x_BTHN, jnp.ones((1, 1), jnp.int32), config)[0, 0, 0], np.float64)
    turned_P = got[: width // 2] + 1j * got[width // 2 :]
    np.testing.assert_allclose(np.abs(turned_P), factor, rtol=1e-6)
    np.testing.assert_allclose(np.angle(turned_P), frequency_P, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("name", SCALINGS)
def test_far_positions_keep_their_digits(name):
    """Position 20,000 times a frequency with 24 bits: an angle good to 2e-3."""
    config = testing.dense_config(head_dim=16, rope_scaling=SCALINGS[name])
    x_TN = np.random.default_rng(0).standard_normal((20_001, 16))
    exact = rotate(x_TN, config)[-1]
    got = rotary.rotary(jnp.asarray(x_TN[None, -1:, None], jnp.float32), jnp.asarray([[20_000]]), config)
    np.testing.assert_allclose(got[0, 0, 0], exact, atol=5e-3)


def test_only_the_first_dimensions_turn():
    config = testing.dense_config(rotary_dim=4)
    x_BTHN = jnp.asarray(np.random.default_rng(0).standard_normal((1, 5, 2, 8)), jnp.float32)
    got = np.asarray(rotary.rotary(x_BTHN, jnp.arange(5)[None], config))
    np.testing.assert_array_equal(got[..., 4:], x_BTHN[..., 4:])
    np.testing.assert_allclose(got[0, :, 1, :4], rotate(np.asarray(x_BTHN[0, :, 1, :4], np.float64), config), atol=1e-6)


def test_a_document_is_as_long_as_its_last_position():
    positions = jnp.asarray([[0, 1, 2, 0, 1, 7, 9], [3, 4, 0, 0, 0, 0, 1]])
    segments = jnp.asarray([[1, 1, 1, 2, 2, 0, 0], [5, 5, 3, 0, 0, 0, 0]])
    got = np.asarray(rotary.document_lengths(positions, segments))
    np.testing.assert_array_equal(got[0, :5], [3, 3, 3, 2, 2])
    np.testing.assert_array_equal(got[1, :3], [5, 5, 1])
