"""The comparison of two models against float64 numpy."""

import json

import jax.numpy as jnp
import numpy as np
import pytest

from kwaicoder_jax import testing
from kwaicoder_jax.errors import UserError
from kwaicoder_jax.transforms import groups, upcycle, verify

from . import reference

CONFIG = testing.dense_config(layers=2)
OTHER = CONFIG.replace(layers=1)


@pytest.fixture(scope="module")
def params():
    return testing.random_params(CONFIG)


@pytest.fixture(scope="module")
def batches():
    """Two batches; the second's loss mask is half closed."""
    made = [testing.random_batch(CONFIG, 2, 12, seed) for seed in (0, 1)]
    made[1]["loss_mask"][:, ::2] = 0
    return made


def log_softmax(x):
    return x - np.log(np.sum(np.exp(x - x.max(-1, keepdims=True)), -1, keepdims=True)) - x.max(-1, keepdims=True)


def expected_report(models_and_configs, batches):
    error, size, losses, kl, tokens = 0.0, 0.0, [0.0, 0.0], 0.0, 0.0
    for batch in batches:
        a, b = (reference.forward(p, c, batch)["logits"] for p, c in models_and_configs)
        real = batch["segment_ids"] > 0
        error, size = max(error, np.abs(a - b)[real].max()), max(size, np.abs(a)[real].max())
        logs, mask = [log_softmax(x) for x in (a, b)], batch["loss_mask"]
        for i, log in enumerate(logs):
            losses[i] -= np.sum(mask * np.take_along_axis(log, batch["targets"][..., None], -1)[..., 0])
        kl += np.sum(mask * np.sum(np.exp(logs[0]) * (logs[0] - logs[1]), -1))
        tokens += mask.sum()
    return error / size, losses[0] / tokens, losses[1] / tokens, kl / tokens, tokens


@pytest.mark.parametrize("logit_elements", [1 << 24, 97 * 2 * 5])
def test_two_different_models(params, batches, logit_elements):
    """One chunk, and chunks of 5 tokens that do not divide 12."""
    other = testing.random_params(OTHER, 3)
    report = verify.verify(params, CONFIG, other, OTHER, batches, logit_elements=logit_elements)
    error, dense, moe, kl, tokens = expected_report([(params, CONFIG), (other, OTHER)], batches)
    assert report.max_relative_logit_error == pytest.approx(error, rel=1e-5)
    assert report.valid_loss_dense == pytest.approx(dense, rel=1e-5)
    assert report.valid_loss_moe == pytest.approx(moe, rel=1e-5)
    assert report.kl_dense_to_moe == pytest.approx(kl, rel=1e-5)
    assert report.tokens == tokens
    assert report.layer_relative_error_L is None


def test_lossless_upcycling_is_seen_as_lossless(params, batches):
    moe, config, _ = upcycle.apply(params, CONFIG, granularity=4, replicas=4, router_std=0.3)
    report = verify.verify(params, CONFIG, moe, config, batches, per_layer=True)
    assert report.max_relative_logit_error < 1e-5
    assert report.valid_loss_dense == pytest.approx(report.valid_loss_moe, abs=1e-5)
    assert abs(report.kl_dense_to_moe) < 1e-5
    assert len(report.layer_relative_error_L) == 2
    assert max(report.layer_relative_error_L) < 1e-5
    json.dumps(report.to_dict())
    # one expert two hundredths too small: seen everywhere, and first in its own layer
    moe["layers"]["moe"]["up"] = moe["layers"]["moe"]["up"].at[1, 3].multiply(0.98)
    report = verify.verify(params, CONFIG, moe, config, batches, per_layer=True)
    assert report.max_relative_logit_error > 1e-4
    assert report.layer_relative_error_L[0] < 1e-5 < 1e-4 < report.layer_relative_error_L[1]


@pytest.mark.parametrize(
    ("options", "always"),
    [
        ({"top_replicas": 2, "router_init": "zeros", "router": "sigmoid", "router_bias": True}, True),
        ({"top_replicas": 3, "router_init": "zeros"}, False),  # all replicas: there is no border
    ],
)
def test_ties_and_loads_of_whole_groups(params, batches, options, always):
    moe, config, _ = upcycle.apply(params, CONFIG, granularity=4, replicas=3, **options)
    report = verify.verify(params, CONFIG, moe, config, batches, granularity=4)
    tokens = sum((b["segment_ids"] > 0).sum() for b in batches)
    assert report.border_ties_L == [tokens if always else 0] * 2
    assert report.broken_groups_L == [0, 0]
    load_LRG = np.reshape(report.load_LE, (2, 3, 4))
    assert (np.ptp(load_LRG, axis=-1) < 1e-6).all()
    np.testing.assert_allclose(load_LRG.sum((1, 2)), config.experts.experts_per_token, rtol=1e-6)
    if always:
        np.testing.assert_allclose(load_LRG[:, :, 0], [[1, 1, 0]] * 2, atol=1e-6)
        assert report.load_max_over_mean_L == pytest.approx([1.5, 1.5])
    values = json.loads(json.dumps(report.to_dict()))
    assert values["border_ties"] == sum(report.border_ties_L)
    assert values["broken_groups"] == 0
    assert values["loss_jump"] == report.valid_loss_moe - report.valid_loss_dense
    assert len(report.table().splitlines()) == 3


def test_loads_against_the_reference(params, batches):
    """Of the first layer, from the float64 model's inputs and its own choice, one token at a time."""
    moe, config, _ = upcycle.apply(params, CONFIG, granularity=4, replicas=3, router_std=0.3)
    report = verify.verify(params, CONFIG, moe, config, batches, granularity=4)
    assert report.border_ties_L == report.broken_groups_L == [0, 0]
    router_DR = np.asarray(moe["layers"]["moe"]["router"][0, :, ::4], np.float64)
    raw = [reference.forward(params, CONFIG, b)["layers"][0]["mlp_norm_out"][b["segment_ids"] > 0] for b in batches]
    chosen = np.argmax(np.concatenate(raw) @ router_DR, axis=-1)
    share_R = np.bincount(chosen, minlength=3) / len(chosen)
    np.testing.assert_allclose(np.reshape(report.load_LE[0], (3, 4)), np.tile(share_R[:, None], 4), rtol=1e-5)
    assert report.load_max_over_mean_L[0] == pytest.approx(3 * share_R.max())


def test_broken_groups_are_counted(params, batches):
    """Shard-major order with ties takes two copies of a shard; half a replica more is not a broken group."""
    moe, config, _ = upcycle.apply(params, CONFIG, granularity=2, replicas=2, router_init="zeros")
    shard_major = [0, 2, 1, 3]  # what is called replica 0 holds shard 0 twice
    moe["layers"]["moe"] = {
        n: x if n == "router" else jnp.take(x, np.array(shard_major), axis=1) for n, x in moe["layers"]["moe"].items()
    }
    report = verify.verify(params, CONFIG, moe, config, batches, granularity=2)
    assert report.max_relative_logit_error > 0.01
    one_hot = np.zeros((5, 2), int)
    one_hot[:] = [[0, 1], [2, 3], [1, 2], [0, 3], [3, 2]]
    ranked = np.array([[1.0, 1, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1], [1, 0, 0, 1], [0, 0, 0, 0]])
    counts = groups.count_choice(jnp.asarray(ranked), jnp.asarray(one_hot), jnp.array([1, 1, 1, 1, 0]), granularity=2)
    assert (int(counts["ties"]), int(counts["broken"])) == (2, 2)
    counts = groups.count_choice(jnp.ones((1, 8)), jnp.array([[0, 1, 2, 3, 4, 5]]), jnp.ones(1), granularity=4)
    assert (int(counts["ties"]), int(counts["broken"])) == (0, 0)


def test_padding_does_not_count(params, batches):
    """An error at padding is no error: the models differ in the embedding of a word that only padding holds."""
    batch = {name: x.copy() for name, x in batches[0].items()}
    batch["inputs"] = np.where(batch["segment_ids"] > 0, np.maximum(batch["inputs"], 1), 0)
    config = CONFIG.replace(tie_embeddings=False)
    first = testing.random_params(config)
    second = first | {"embedding": first["embedding"].at[0].multiply(-3.0)}
    report = verify.verify(first, config, second, config, [batch])
    assert report.max_relative_logit_error == 0.0
    assert report.kl_dense_to_moe == 0.0


def test_errors(params, batches):
    with pytest.raises(UserError, match="no tokens"):
        verify.verify(params, CONFIG, params, CONFIG, [])
    with pytest.raises(UserError, match="'loss_mask'"):
        verify.verify(params, CONFIG, params, CONFIG, [{k: v for k, v in batches[0].items() if k != "loss_mask"}])
    with pytest.raises(UserError, match="vocab_size"):
        verify.verify(params, CONFIG, params, CONFIG.replace(vocab_size=5), batches)
    with pytest.raises(UserError, match="per_layer"):
        verify.verify(params, CONFIG, params, OTHER, batches, per_layer=True)
