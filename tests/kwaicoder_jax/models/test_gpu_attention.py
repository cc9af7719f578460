"""The GPU kernels, interpreted, against float64: packed documents and padding, several heads to a key; where they run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kwaicoder_jax.models import gpu_attention
from kwaicoder_jax.models.attention_ops import dot_product_attention
from tests.kwaicoder_jax.models.test_splash_attention import reference, total

TIME, HEADS, KV_HEADS = 256, 4, 2


@pytest.mark.parametrize("width", [64, 128])
def test_output_and_gradients(width):
    rng = np.random.default_rng(0)
    q, k, v, weights = (rng.standard_normal((2, TIME, n, width)) for n in (HEADS, KV_HEADS, KV_HEADS, HEADS))
    order = np.arange(TIME)
    segments = np.stack([np.where(order < 100, 1, 2), np.where(order < 70, 3, np.where(order < 200, 4, 0))])
    with jax.enable_x64(True):
        expected, out = total(lambda *x: reference(*x, segments, 0.1), weights)(q, k, v)
    kernel = functools.partial(
        gpu_attention.attention, segments_BT=jnp.asarray(segments, jnp.int32), scale=0.1, interpret=True
    )
    small = [jnp.asarray(x, jnp.float32) for x in (q, k, v)]
    gradients, got = jax.jit(total(kernel, jnp.asarray(weights, jnp.float32)))(*small)
    np.testing.assert_allclose(got, out, atol=2e-5)  # float32 sums of 256 numbers of order 1
    for have, want in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(have, want, atol=2e-4)


def lowered(platform, *, dtype=jnp.bfloat16, time=256, width=64, backend="auto", window=None):
    """The program for an NVIDIA GPU, gradients too; made without one."""
    heads = [jax.ShapeDtypeStruct((2, time, n, width), dtype) for n in (HEADS, KV_HEADS, KV_HEADS)]
    masks = [jax.ShapeDtypeStruct((2, time), jnp.int32)] * 2

    def loss(q, k, v, positions, segments):
        return jnp.sum(dot_product_attention(
            q, k, v, q_positions_BT=positions, k_positions_BS=positions, q_segments_BT=segments,
            k_segments_BS=segments, same_sequence=True, window=window, backend=backend, platform=platform,
        ).astype(jnp.float32))  # fmt: skip

    traced = jax.jit(jax.grad(loss, (0, 1, 2))).trace(*heads, *masks)
    return traced.lower(lowering_platforms=("cuda",)).as_text()


def test_auto_on_gpu():
    text = lowered("gpu")
    assert all(f'name = "{kernel}"' in text for kernel in ("mha_forward", "mha_backward"))
    assert "stablehlo.dot_general" not in text
    assert "mha_forward" in lowered(None, backend="flash")


@pytest.mark.parametrize(
    "changed",
    [{"dtype": jnp.float32}, {"time": 192}, {"width": 96}, {"window": jnp.int32(8)}, {"platform": "cpu"}],
)
def test_what_they_do_not_fit_is_left_to_xla(changed):
    text = lowered(**{"platform": "gpu", **changed})
    assert "mha_forward" not in text
    assert "stablehlo.dot_general" in text


def test_what_they_execute():
    flops, _ = gpu_attention.work(2, 4, 4096, 128, 2, backward=False)
    square = 4 * 2 * 4 * 4096**2 * 128
    blocks = sum(128 * (block + 1) * 128 for block in range(32))  # of queries, each with the keys up to its end
    assert flops == pytest.approx(square * blocks / 4096**2)
    blocks = sum(64 * (block + 1) * 64 for block in range(64))
    flops, _ = gpu_attention.work(2, 4, 4096, 128, 2, backward=True)
    assert flops == pytest.approx(3.5 * square * blocks / 4096**2)
