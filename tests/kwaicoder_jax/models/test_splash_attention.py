"""The TPU kernels, interpreted, against float64: packed documents, several heads to a key, output and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kwaicoder_jax.models import splash_attention

TIME, HEADS, KV_HEADS, WIDTH = 256, 4, 2, 128


def arrays():
    rng = np.random.default_rng(0)
    q, k, v, weights = (rng.standard_normal((1, TIME, n, WIDTH)) for n in (HEADS, KV_HEADS, KV_HEADS, HEADS))
    return q, k, v, weights, np.where(np.arange(TIME) < 100, 1, 2)[None]


def reference(q, k, v, segments, scale):
    k, v = (jnp.repeat(x, HEADS // KV_HEADS, axis=2) for x in (k, v))
    scores = jnp.einsum("BTHN,BSHN->BHTS", q, k) * scale
    order = np.arange(TIME)
    see = (segments[:, :, None] == segments[:, None, :]) & (order[:, None] >= order[None])[None]
    weights = jax.nn.softmax(jnp.where(see[:, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("BHTS,BSHN->BTHN", weights, v)


def total(function, weights):
    def run(q, k, v):
        out = function(q, k, v)
        return jnp.sum(out * weights), out

    return jax.grad(run, (0, 1, 2), has_aux=True)


@pytest.mark.parametrize("block", [128, 256])
def test_output_and_gradients(block, monkeypatch):
    monkeypatch.setattr(splash_attention, "BLOCK", block)
    splash_attention._kernel.cache_clear()
    q, k, v, weights, segments = arrays()
    with jax.enable_x64(True):
        expected, out = total(lambda *x: reference(*x, segments, 0.1), weights)(q, k, v)
    small = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]
    kernel = lambda *x: splash_attention.attention(*x, jnp.asarray(segments), scale=0.1, interpret=True)  # noqa: E731
    gradients, got = total(kernel, jnp.asarray(weights, jnp.float32))(*small)
    np.testing.assert_allclose(got, out, atol=2e-5)  # float32 sums of 256 numbers of order 1
    for have, want in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(have, want, atol=2e-4)
    splash_attention._kernel.cache_clear()


def test_what_it_executes_is_at_least_half_the_square_and_less_than_all():
    flops, _ = splash_attention.work(2, 4, 4096, 128, 2, backward=False)
    square = 4 * 2 * 4 * 4096**2 * 128
    assert flops == pytest.approx(square * 5 / 8)  # four blocks a side: ten of sixteen
    assert splash_attention.work(2, 4, 4096, 128, 2, backward=True)[0] == pytest.approx(2.5 * flops)
    assert not splash_attention.fits(4096, 64, 64)
