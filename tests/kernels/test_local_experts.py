"""Experts of which more live elsewhere: against a float64 sum over the choices that are ours, in any number of passes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels.grouped_matmul import Backend, local_expert_mlp

TOKENS, CHOICES, EXPERTS, WIDTH, NEURONS = 40, 3, 4, 8, 12


def dense(x_MD, weight_MX, expert_MX, gate_EDF, up_EDF, down_EFD):
    """Every expert on every token, then a weighted selection: plain jnp, differentiated by JAX."""
    hidden = jax.nn.silu(jnp.einsum("MD,EDF->MEF", x_MD, gate_EDF)) * jnp.einsum("MD,EDF->MEF", x_MD, up_EDF)
    y_MED = jnp.einsum("MEF,EFD->MED", hidden, down_EFD)
    share_ME = jnp.einsum("MXE,MX->ME", jax.nn.one_hot(expert_MX, EXPERTS, dtype=x_MD.dtype), weight_MX)
    return jnp.einsum("ME,MED->MD", share_ME, y_MED)


def routings():
    rng = np.random.default_rng(0)
    spread = rng.integers(-EXPERTS, 2 * EXPERTS, (TOKENS, CHOICES))  # a third of them ours
    return {
        "spread": spread,
        "all to one": np.full((TOKENS, CHOICES), 2),
        "none": np.full((TOKENS, CHOICES), EXPERTS),
        "one token": np.where(np.arange(TOKENS)[:, None] == 7, 1, -1) * np.ones((1, CHOICES), int),
        "every one": rng.integers(0, EXPERTS, (TOKENS, CHOICES)),
    }


def arguments(dtype=np.float64):
    rng = np.random.default_rng(1)
    projection = (EXPERTS, WIDTH, NEURONS)
    shapes = [(TOKENS, WIDTH), (TOKENS, CHOICES), projection, projection, (EXPERTS, NEURONS, WIDTH)]
    return [rng.normal(size=shape).astype(dtype) for shape in shapes], rng.normal(size=(TOKENS, WIDTH)).astype(dtype)


def value_and_gradients(function, arrays, dy):
    y, pull = jax.vjp(function, *arrays)
    return y, *pull(dy.astype(y.dtype))


@pytest.mark.parametrize("rows", [8, 32, 1000])
@pytest.mark.parametrize("routing", routings())
def test_value_and_gradients_whatever_the_routing(routing, rows):
    expert_MX = routings()[routing].astype(np.int32)
    wide, dy = arguments()
    with jax.enable_x64(True):
        expected = value_and_gradients(lambda x, w, *rest: dense(x, w, expert_MX, *rest), wide, dy)
    narrow, dy = arguments(np.float32)

    @jax.jit
    def run(narrow, dy, expert_MX):
        function = functools.partial(local_expert_mlp, rows=rows, backend=Backend.CPU)
        return value_and_gradients(lambda x, w, *rest: function(x, w, expert_MX, *rest), narrow, dy)

    names = ("y", "dx", "dweight", "dgate", "dup", "ddown")
    for name, got, want in zip(names, run(narrow, dy, expert_MX), expected, strict=True):
        # float32 sums of some tens of products of numbers of order 1 to 10
        scale = max(np.abs(want).max(), 1e-3)
        assert np.abs(np.asarray(got, np.float64) - np.asarray(want)).max() <= 2e-5 * scale, name
