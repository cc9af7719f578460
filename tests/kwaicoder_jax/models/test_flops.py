"""Model FLOPs against closed forms written out by hand."""

import math

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


def test_latent_attention_with_dense_first_layers():
    config = testing.family_configs()["deepseek_v2"]  # D 32, H 5, F 48; R 9, U 4, P 6, W 7; 3 of 8 experts of 14
    attention = 2 * (32 * 5 * 10 + 32 * 15 + 9 * 5 * 11 + 5 * 7 * 32) + 2 * 5 * (10 + 7) * 100 / 2
    mixture = 2 * 32 * 8 + 2 * 3 * 3 * 32 * 14 + 2 * 3 * 32 * 10
    expected = 3 * attention + 2 * 3 * 32 * 48 + 2 * mixture
    assert models.forward_flops_per_token(config, 100, logits=False) == pytest.approx(expected, rel=1e-12)


def test_a_window_is_what_a_token_sees():
    """Layers that see all, 7 and 4 of 100: on average over positions, a continuous one."""
    config = testing.family_configs()["qwen2"]
    plain = config.replace(windows=())
    seen = {w: sum(min(at, w) for at in range(1, 101)) / 100 - 0.5 for w in (7, 4)}
    saved = 2 * 2 * 6 * 8 * sum(50 - visible for visible in seen.values())
    difference = models.forward_flops_per_token(plain, 100) - models.forward_flops_per_token(config, 100)
    assert difference == pytest.approx(saved, rel=0.02)
    assert models.forward_flops_per_token(config, 4) == models.forward_flops_per_token(plain, 4)


def test_six_times_the_active_parameters():
    """The usual estimate, 6 per active matmul parameter, at a length where attention is nothing."""
    for config in (testing.small_configs() | testing.family_configs()).values():
        if config.experts is not None and config.experts.bias:
            continue  # active biases are not whole arrays
        declared = models.declarations(config).items()
        norms = sum(math.prod(d.shape) for name, d in declared if name.endswith("scale"))
        biases = sum(math.prod(d.shape) for name, d in declared if name.endswith("bias"))
        tables = config.vocab_size * config.model_dim * (0 if config.tie_embeddings else 1)
        matmul = models.count_active(config) - norms - biases - tables  # the lookup of an untied table is no matmul
        assert models.train_flops_per_token(config, 0) == pytest.approx(6 * matmul, rel=1e-12)


def test_a_decode_step_sees_the_whole_cache_or_its_window():
    config = testing.family_configs()["qwen2"]  # three layers, of which two have windows of 7 and 4
    assert sorted(config.windows) == [0, 4, 7]
    per_key = 2 * 2 * 6 * 8
    none = models.forward_flops_per_token(config, 0)
    assert models.decode_flops_per_token(config, 100) == pytest.approx(none + per_key * (100 + 7 + 4), rel=1e-12)
    assert models.decode_flops_per_token(config, 3) == pytest.approx(none + per_key * 3 * 3, rel=1e-12)
