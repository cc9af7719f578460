"""Logits against Hugging Face transformers on copied weights, float32: the same mathematics, written by other people."""

import dataclasses

import numpy as np
import pytest

from kwaicoder_jax import models, testing
from kwaicoder_jax.models import ExpertsConfig, MlaConfig, RopeScaling
from kwaicoder_jax.models.rotary import is_dynamic

pytest.importorskip("torch")
pytest.importorskip("transformers")

from tests.kwaicoder_jax.models import huggingface_models

TOLERANCE = 1e-4  # float32 on both sides, logits of 10
LENGTHS = (24, 15, 7)  # beyond the positions of every config here, and below


def padded(config, side):
    """One document a row, padded on the left or on the right with random tokens."""
    batch = testing.random_batch(config, len(LENGTHS), max(LENGTHS), packed=False)
    place = np.arange(max(LENGTHS))[None]
    first = max(LENGTHS) - np.asarray(LENGTHS)[:, None] if side == "left" else 0
    batch["segment_ids"] = ((place >= first) & (place - first < np.asarray(LENGTHS)[:, None])).astype(np.int32)
    batch["positions"] = np.where(batch["segment_ids"] > 0, place - first, 0).astype(np.int32)
    return batch


def small_family(family, **changes):
    """The family's tiny config, cut to what transformers can say (one window, shared experts of whole widths)."""
    config = testing.family_configs()[family].replace(**changes)
    if config.windows:
        config = config.replace(windows=tuple(7 if w else 0 for w in config.windows))
    if config.experts is not None and config.experts.shared_mlp_dim and family != "qwen2_moe":
        config = config.replace(experts=dataclasses.replace(config.experts, shared_mlp_dim=2 * config.experts.mlp_dim))
    return config


LLAMA = testing.dense_config(model_dim=36)  # LlamaConfig refuses a width that its heads do not divide
GLM = testing.family_configs()["glm4_moe"]
YARN = RopeScaling("yarn", 4.0, original_length=6)
UNEVEN_YARN = RopeScaling("yarn", 2.5, original_length=9, beta_fast=3.0, beta_slow=0.5, truncate=False, mscale=2.0)
LONE_EXPERT = ExpertsConfig(6, 1, 14, "softmax_topk", shared_mlp_dim=14)
PLAIN_V3 = ExpertsConfig(6, 3, 14, "sigmoid", 1.5, router_bias=True, shared_mlp_dim=14)
GATED = testing.small_configs()["moe_shared_gate"].experts
CASES = {
    "llama: one KV head": ("llama", testing.odd_config(model_dim=25)),
    "llama: a KV head each": ("llama", LLAMA.replace(kv_heads=6, rope_theta=1e5, norm_epsilon=1e-5)),
    "llama: untied": ("llama", LLAMA.replace(tie_embeddings=False)),
    "llama: biases, llama3": ("llama", small_family("llama", model_dim=36)),
    "llama: linear": ("llama", LLAMA.replace(rope_scaling=RopeScaling("linear", 3.0))),
    "llama: dynamic": ("llama", LLAMA.replace(rope_scaling=RopeScaling("dynamic", 2.0), max_length=10)),
    "llama: yarn": ("llama", LLAMA.replace(rope_scaling=YARN)),
    "llama: uneven yarn": ("llama", LLAMA.replace(head_dim=24, rope_theta=5.0, rope_scaling=UNEVEN_YARN)),
    "llama: yarn with its factor": (
        "llama", LLAMA.replace(rope_scaling=dataclasses.replace(UNEVEN_YARN, attention_factor=1.3))
    ),
    "mistral: windows": ("mistral", small_family("mistral")),
    "mistral: none": ("mistral", LLAMA),
    "qwen2: some windows, yarn": ("qwen2", small_family("qwen2")),
    "qwen2: odd": ("qwen2", testing.odd_config(qkv_bias=True)),
    "qwen3": ("qwen3", small_family("qwen3")),
    "qwen3: biases, windows, linear": (
        "qwen3", small_family("qwen3", qkv_bias=True, out_bias=True, windows=(0, 7), rope_scaling=RopeScaling("linear", 2.0)),
    ),
    "mixtral": ("mixtral", testing.moe_config("topk_softmax", tie_embeddings=False)),
    "mixtral: windows": ("mixtral", small_family("mixtral")),
    "olmoe: clipped": ("olmoe", small_family("olmoe", model_dim=48)),
    "olmoe: one KV head": ("olmoe", testing.moe_config(
        "softmax_topk_renormalised", model_dim=48, kv_heads=1, qk_norm="full")),
    "qwen2_moe: some windows": ("qwen2_moe", small_family("qwen2_moe")),
    "qwen2_moe: a dense layer, renormalised": (
        "qwen2_moe", testing.moe_config(experts=GATED, qkv_bias=True, dense_layers=1),
    ),
    "qwen3_moe": ("qwen3_moe", small_family("qwen3_moe")),
    "deepseek_v2": ("deepseek_v2", small_family("deepseek_v2", model_dim=35, mla=MlaConfig(0, 10, 4, 6, 7))),
    "deepseek_v2: greedy, compressed queries": (
        "deepseek_v2", small_family("deepseek_v2", model_dim=35, experts=LONE_EXPERT, mla=MlaConfig(11, 10, 4, 6, 7),
                                    dense_layers=0, qkv_bias=True, out_bias=True, rope_scaling=None),
    ),
    "deepseek_v3": ("deepseek_v3", small_family("deepseek_v3")),
    "deepseek_v3: one group, yarn, full queries": (
        "deepseek_v3", small_family("deepseek_v3", experts=PLAIN_V3, mla=MlaConfig(0, 9, 4, 6, 7), dense_layers=1,
                                    rope_scaling=RopeScaling("yarn", 4.0, original_length=8, mscale=1.0, mscale_all_dim=1.0)),
    ),
    "glm4_moe": ("glm4_moe", small_family("glm4_moe")),
    "glm4_moe: groups, yarn, no norms": (
        "glm4_moe", small_family("glm4_moe", experts=dataclasses.replace(
            GLM.experts, num_experts=8, groups=4, top_groups=2, group_score="top2"), qk_norm="none", rope_scaling=YARN),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_logits_with_padding_on_either_side(case):
    family, config = CASES[case]
    params = testing.random_params(config)
    theirs = huggingface_models.build(family, params, config)
    assert huggingface_models.count(theirs) == models.count(config)
    for side in ("left", "right"):
        batch = padded(config, side)
        real = batch["segment_ids"] > 0
        # Dynamic frequencies follow the longest row there, and never shrink again: row by row, the shortest first.
        groups = [[row] for row in np.argsort(LENGTHS)] if is_dynamic(config) else [range(len(LENGTHS))]
        expected = np.zeros((*real.shape, config.vocab_size), np.float32)
        for rows in groups:
            expected[rows] = huggingface_models.logits(theirs, {name: array[rows] for name, array in batch.items()})
        got = np.asarray(testing.model_logits(params, config, batch))
        assert expected[real].std() > 2, "the reference must be worth comparing with"
        np.testing.assert_allclose(got[real], expected[real], atol=TOLERANCE, rtol=0, err_msg=side)
        assert np.isfinite(got).all(), "padding must not make NaN"


def test_dynamic_frequencies_while_generating():
    """Past max_length every new key turns as fast as the length at that moment says; keys in the cache stay."""
    family, config = CASES["llama: dynamic"]
    params = testing.random_params(config)
    theirs = huggingface_models.build(family, params, config)
    batch = testing.random_batch(config, 1, 20, packed=False)
    cache, past = models.empty_cache(config, 1, 20), None
    for start, stop in ((0, 8), *((at, at + 1) for at in range(8, 16)), (16, 20)):
        piece = {name: array[:, start:stop] for name, array in batch.items()}
        expected, past = huggingface_models.step(theirs, piece, past)
        output = testing.run(params, config, piece, cache=cache)
        cache = output.cache
        got = models.logits(output.hidden_BTD, models.projection(params))
        np.testing.assert_allclose(got, expected, atol=TOLERANCE, rtol=0, err_msg=f"tokens {start} to {stop}")
