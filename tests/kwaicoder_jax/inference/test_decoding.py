"""The device programs, called as an engine would call them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kwaicoder_jax import testing
from kwaicoder_jax.inference import prefill
from kwaicoder_jax.models import Runtime
from kwaicoder_jax.testing.reference import document_logits


@pytest.mark.parametrize("chunk", [8, 24, 7])
def test_prefill_gives_the_logits_after_each_prompt(chunk):
    """In three chunks, at once, and with a chunk that does not divide: the float64 model's, to float32 rounding."""
    config = testing.odd_config()
    params, lengths = testing.random_params(config), np.array([24, 3, 9, 0], np.int32)
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (4, 24), dtype=np.int32)
    run = jax.jit(prefill, static_argnames=("config", "slots", "runtime", "chunk"))
    logits, cache = run(
        params, config, jnp.asarray(tokens), jnp.asarray(lengths), slots=30, runtime=Runtime(), chunk=chunk
    )
    for row in range(3):
        expected = document_logits(params, config, tokens[row, 24 - lengths[row] :])[-1]
        np.testing.assert_allclose(logits[row], expected, atol=1e-4)
    assert np.isfinite(logits[3]).all(), "a row that only fills up the batch must not make NaN"
    assert int(cache.index) == 24
    np.testing.assert_array_equal(np.sum(cache.segments_BS, axis=1), lengths)
