"""Pruned and upcycled models in Hugging Face transformers, on copied weights: the reference implementation takes them."""

import numpy as np
import pytest

from kwaicoder_jax import testing
from kwaicoder_jax.transforms import Target, prune, upcycle

from .test_prune import made_scores

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
huggingface_models = pytest.importorskip("tests.kwaicoder_jax.models.huggingface_models")

BEFORE = testing.dense_config(layers=4, model_dim=48, heads=12, kv_heads=4, head_dim=8, mlp_dim=40)


def pruned(tied):
    """Layers, channels (with norm correction), neurons, whole KV groups and a head of each group cut."""
    config = BEFORE.replace(tie_embeddings=tied)
    target = Target(layers=3, model_dim=32, mlp_dim=32, heads=4, kv_heads=2)
    student, config, record = prune.apply(testing.random_params(config), config, made_scores(config), target)
    assert record["norm_factors"]
    assert ("head" in student) is not tied
    return student, config


def both(family, params, config):
    """Logits by transformers and by us."""
    batch = testing.random_batch(config, 3, 24, packed=False)
    with torch.no_grad():
        tokens = torch.from_numpy(np.array(batch["inputs"])).long()
        theirs = huggingface_models.build(family, params, config)(tokens).logits.numpy()
    return theirs, np.asarray(testing.model_logits(params, config, batch))


@pytest.mark.parametrize("tied", [True, False])
def test_a_pruned_student_is_a_llama_and_upcycled_a_mixtral_of_the_same_function(tied):
    """Float32 on both sides. The last line compares transformers with itself: nothing but the weights is ours."""
    student, config = pruned(tied)
    llama, ours = both("llama", student, config)
    assert llama.std() > 1
    np.testing.assert_allclose(ours, llama, atol=1e-4, rtol=0)
    moe, moe_config, _ = upcycle.apply(
        student, config, granularity=4, replicas=3, top_replicas=2, router_std=0.3, partition="random_per_replica"
    )
    mixtral, ours = both("mixtral", moe, moe_config)
    np.testing.assert_allclose(ours, mixtral, atol=1e-4, rtol=0)
    assert np.max(np.abs(mixtral - llama)) < 1e-5 * np.max(np.abs(llama))
