"""Recorded activations against numpy, and that recording changes nothing else."""

import jax.numpy as jnp
import numpy as np
import pytest

from kwaicoder_jax import models, testing
from kwaicoder_jax.models.statistics import energy_share, group_norms, over_sequences


def test_reductions_match_numpy():
    rng = np.random.default_rng(0)
    values, mask = rng.standard_normal((3, 11, 5)).astype(np.float32) * 4, rng.random((3, 11)) < 0.6
    mask[2] = False
    values[~mask] = 1e6  # must not reach any result
    got = models.sequence_statistics(values, mask)
    for row in range(2):
        kept = np.abs(values[row][mask[row]].astype(np.float64))
        np.testing.assert_allclose(got["mean"][row], kept.mean(0), rtol=1e-5)
        np.testing.assert_allclose(got["l2"][row], np.sqrt((kept**2).sum(0)), rtol=1e-5)
        np.testing.assert_allclose(got["var"][row], kept.var(0), rtol=1e-4)
    assert all((np.asarray(got[name][2]) == 0).all() for name in got)
    for name, sums in over_sequences(got)["second"].items():
        np.testing.assert_allclose(sums, np.square(np.asarray(got[name], np.float64)).sum(0), rtol=1e-6)
    kept = values[mask].astype(np.float64) ** 2
    share = energy_share(values, mask)
    np.testing.assert_allclose(share, (kept / kept.sum(-1, keepdims=True)).sum(0), rtol=1e-5)
    np.testing.assert_allclose(np.sum(share), mask.sum(), rtol=1e-5)


@pytest.mark.parametrize("name", ["odd", "moe_bias"])
def test_a_model_records_every_unit_and_only_when_asked(name):
    c = testing.small_configs()[name]
    params, batch = testing.random_params(c), testing.random_batch(c, 3, 24)
    plain, recorded = testing.run(params, c, batch), testing.run(params, c, batch, statistics=True)
    assert plain.statistics is None
    np.testing.assert_allclose(plain.hidden_BTD, recorded.hidden_BTD, atol=1e-5)
    stats = recorded.statistics
    assert stats["layers"]["attention"]["heads"]["first"]["mean"].shape == (c.layers, c.heads)
    assert stats["layers"]["attention"]["groups"]["first"]["mean"].shape == (c.layers, c.kv_heads)
    assert stats["layers"]["attention_norm"]["channels"]["second"]["l2"].shape == (c.layers, c.model_dim)
    assert stats["layers"]["mlp_norm"]["energy"].shape == (c.layers, c.model_dim)
    assert stats["layers"]["influence"].shape == (c.layers,)
    assert stats["final_norm"]["channels"]["first"]["var"].shape == (c.model_dim,)
    if c.experts is None:
        assert stats["layers"]["mlp"]["neurons"]["first"]["l2"].shape == (c.layers, c.mlp_dim)
    else:
        shape = (c.layers, c.experts.num_experts, c.experts.mlp_dim)
        assert stats["layers"]["moe"]["expert_neurons"]["first"]["l2"].shape == shape
        assert stats["layers"]["moe"]["experts"].shape == shape[:2]
        shared = stats["layers"]["moe"]["shared"]["neurons"]["second"]["var"]
        assert shared.shape == (c.layers, c.experts.shared_mlp_dim)


def test_latent_attention_and_first_layers_record_theirs():
    c = testing.family_configs()["deepseek_v3"]
    params, batch = testing.random_params(c), testing.random_batch(c, 3, 24)
    stats = testing.run(params, c, batch, statistics=True).statistics
    for stack, layers in (("dense_layers", 2), ("layers", 2)):
        assert set(stats[stack]["attention"]) == {"heads", "groups"}
        assert stats[stack]["attention"]["heads"]["first"]["mean"].shape == (layers, c.heads)
    assert stats["dense_layers"]["mlp"]["neurons"]["first"]["mean"].shape == (2, c.mlp_dim)
    assert stats["layers"]["moe"]["experts"].shape == (2, c.experts.num_experts)


def test_values_of_the_final_norm_and_of_influence():
    """Two recordings whose inputs the output shows: the final hidden states, and the stream around a layer."""
    c = testing.odd_config()
    params, batch = testing.random_params(c), testing.random_batch(c, 3, 24)
    output = testing.run(params, c, batch, statistics=True, collect_layers=True)
    mask = batch["segment_ids"] > 0
    stream = np.concatenate([output.embedded_BTD[None], output.layers_LBTD]).astype(np.float64)
    norms = np.linalg.norm(stream, axis=-1)
    influence = 1 - (stream[:-1] * stream[1:]).sum(-1) / (norms[:-1] * norms[1:])
    np.testing.assert_allclose(output.statistics["layers"]["influence"], influence[:, mask].sum(-1), rtol=1e-4)
    hidden = np.abs(np.asarray(output.hidden_BTD, np.float64))
    means = [row[kept].mean(0) for row, kept in zip(hidden, mask)]
    np.testing.assert_allclose(output.statistics["final_norm"]["channels"]["first"]["mean"], sum(means), rtol=1e-4)


@pytest.mark.parametrize(
    ("heads", "groups", "width", "model_dim"),
    [(6, 2, 4, 32), (6, 2, 12, 32), (3, 1, 4, 10), (4, 4, 6, 6), (4, 4, 2, 9)],
)
def test_group_norms_match_numpy(heads, groups, width, model_dim):
    """One KV head, a KV head each, groups narrower, as wide as and wider than the model: three ways to compute it."""
    rng = np.random.default_rng(1)
    mixed, out = rng.standard_normal((2, 5, heads, width)), rng.standard_normal((heads, width, model_dim))
    parts = np.einsum("bthn,hnd->bthd", mixed, out).reshape(2, 5, groups, heads // groups, model_dim).sum(3)
    arrays = (jnp.asarray(x, jnp.float32) for x in (mixed, out, parts.sum(2)))
    np.testing.assert_allclose(group_norms(*arrays, groups), np.linalg.norm(parts, axis=-1), rtol=1e-5)


def test_energy_share_of_nothing_is_zero():
    share = energy_share(np.zeros((1, 4, 3), np.float32), np.zeros((1, 4), bool))
    np.testing.assert_array_equal(share, 0)
