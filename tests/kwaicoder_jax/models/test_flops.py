"""Model FLOPs against closed forms written out by hand."""

import pytest

from kwaicoder_jax import models, testing


@pytest.mark.parametrize("tied", [True, False])
def test_dense(tied):
    config = testing.dense_config(tie_embeddings=tied)  # D 32, H 6, K 2, N 8, F 48, V 97, L 3
    attention_weights, mlp = 32 * 48 + 2 * 32 * 16 + 48 * 32, 3 * 32 * 48
    causal = 2 * 2 * 6 * 8 * 100 / 2  # scores and mix, over half of 100 positions on average
    expected = 3 * (2 * (attention_weights + mlp) + causal)
    assert models.forward_flops_per_token(config, 100, logits=False) == expected
    assert models.forward_flops_per_token(config, 100) == expected + 2 * 97 * 32
    assert models.train_flops_per_token(config, 100) == 3 * (expected + 2 * 97 * 32)


def test_mixture_counts_the_experts_that_a_token_uses():
    config = testing.moe_config()  # 2 of 7 experts of 24 neurons
    layer = 2 * (32 * 48 + 2 * 32 * 16 + 48 * 32) + 2 * 32 * 7 + 2 * 2 * 3 * 32 * 24 + 2 * 6 * 8 * 100
    assert models.forward_flops_per_token(config, 100) == pytest.approx(3 * layer + 2 * 97 * 32, rel=1e-12)


def test_six_times_the_active_parameters():
    """The usual estimate, 6 per active matmul parameter, at a length where attention is nothing."""
    for config in testing.small_configs().values():
        norms = config.model_dim * (2 * config.layers + 1)
        biases = config.layers * config.experts.num_experts if config.experts and config.experts.router_bias else 0
        tables = config.vocab_size * config.model_dim * (0 if config.tie_embeddings else 1)
        matmul = models.count_active(config) - norms - biases - tables  # the lookup of an untied table is no matmul
        assert models.train_flops_per_token(config, 0) == pytest.approx(6 * matmul, rel=1e-12)
