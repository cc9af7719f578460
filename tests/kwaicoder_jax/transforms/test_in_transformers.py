"""Pruned and upcycled models in Hugging Face transformers, on copied weights: the reference implementation takes them."""

import numpy as np
import pytest

from kwaicoder_jax import models, testing
from kwaicoder_jax.transforms import Target, prune, upcycle
from tests.kwaicoder_jax.models.test_huggingface_parity import assert_same_logits, common_fields

from .test_prune import made_scores

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

BEFORE = testing.dense_config(layers=4, model_dim=48, heads=12, kv_heads=4, head_dim=8, mlp_dim=40)


def pruned(tied):
    """Layers, channels (with norm correction), neurons, whole KV groups and a head of each group cut."""
    config = BEFORE.replace(tie_embeddings=tied)
    target = Target(layers=3, model_dim=32, mlp_dim=32, heads=4, kv_heads=2)  # torch wants rows of experts of 16 bytes
    student, config, record = prune.apply(testing.random_params(config), config, made_scores(config), target)
    assert record["norm_factors"]
    assert ("head" in student) is not tied
    return student, config


@pytest.mark.parametrize("tied", [True, False])
def test_a_pruned_student_is_a_llama(tied):
    student, config = pruned(tied)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**common_fields(config)))
    assert_same_logits(model, student, config)


@pytest.mark.parametrize("tied", [True, False])
def test_an_upcycled_student_is_a_mixtral_of_the_same_function(tied):
    """Also against the dense student in transformers, where nothing but the weights is ours."""
    student, config = pruned(tied)
    moe, moe_config, _ = upcycle.apply(
        student, config, granularity=4, replicas=3, top_replicas=2, router_std=0.3, partition="random_per_replica"
    )
    e = moe_config.experts
    mixtral = transformers.MixtralForCausalLM(
        transformers.MixtralConfig(
            **common_fields(moe_config), num_local_experts=e.num_experts, num_experts_per_tok=e.experts_per_token
        )
    )
    assert_same_logits(mixtral, moe, moe_config)
    llama = transformers.LlamaForCausalLM(transformers.LlamaConfig(**common_fields(config)))
    assert_same_logits(llama, student, config)
    tokens = torch.from_numpy(testing.random_batch(config, 2, 16, packed=False)["inputs"]).long()
    with torch.no_grad():
        a, b = (model.eval().float()(tokens).logits.numpy() for model in (llama, mixtral))
    assert np.max(np.abs(a - b)) < 1e-5 * np.max(np.abs(a))
    assert models.count(moe_config) == sum(p.numel() for p in mixtral.parameters())
