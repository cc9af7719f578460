"""Recorded activations against numpy, and that recording changes nothing else."""

import numpy as np
import pytest

from kwaicoder_jax import models, testing
from kwaicoder_jax.models.statistics import energy_share


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
    kept = values[mask].astype(np.float64) ** 2
    share = energy_share(values, mask)
    np.testing.assert_allclose(share, (kept / kept.sum(-1, keepdims=True)).mean(0), rtol=1e-5)
    np.testing.assert_allclose(np.sum(share), 1, rtol=1e-5)


@pytest.mark.parametrize("name", ["odd", "moe_topk_softmax"])
def test_a_model_records_every_unit_and_only_when_asked(name):
    c = testing.small_configs()[name]
    params, batch = testing.random_params(c), testing.random_batch(c, 3, 24)
    plain, recorded = testing.run(params, c, batch), testing.run(params, c, batch, statistics=True)
    assert plain.statistics is None
    np.testing.assert_allclose(plain.hidden_BTD, recorded.hidden_BTD, atol=1e-5)
    stats = recorded.statistics
    per_layer = (c.layers, 3)
    assert stats["layers"]["attention"]["heads"]["mean"].shape == (*per_layer, c.heads)
    assert stats["layers"]["attention_norm"]["channels"]["l2"].shape == (*per_layer, c.model_dim)
    assert stats["layers"]["mlp_norm"]["energy"].shape == (c.layers, c.model_dim)
    assert stats["layers"]["influence"]["mean"].shape == (*per_layer, 1)
    assert stats["final_norm"]["channels"]["var"].shape == (3, c.model_dim)
    if c.experts is None:
        assert stats["layers"]["mlp"]["neurons"]["l2"].shape == (*per_layer, c.mlp_dim)
    else:
        assert stats["layers"]["moe"]["router"]["mean"].shape == (*per_layer, c.experts.num_experts)


def test_values_of_the_final_norm_and_of_influence():
    """Two recordings whose inputs the output shows: the final hidden states, and the stream around a layer."""
    c = testing.odd_config()
    params, batch = testing.random_params(c), testing.random_batch(c, 3, 24)
    output = testing.run(params, c, batch, statistics=True, collect_layers=True)
    mask = batch["segment_ids"] > 0
    stream = np.concatenate([output.embedded_BTD[None], output.layers_LBTD]).astype(np.float64)
    norms = np.linalg.norm(stream, axis=-1)
    influence = 1 - (stream[:-1] * stream[1:]).sum(-1) / (norms[:-1] * norms[1:])
    for row in range(3):
        hidden = np.abs(np.asarray(output.hidden_BTD, np.float64)[row, mask[row]])
        np.testing.assert_allclose(output.statistics["final_norm"]["channels"]["mean"][row], hidden.mean(0), rtol=1e-4)
        got = output.statistics["layers"]["influence"]["mean"][:, row, 0]
        np.testing.assert_allclose(got, np.abs(influence[:, row, mask[row]]).mean(-1), rtol=1e-4)


def test_gradient_of_energy_share_of_nothing():
    share = energy_share(np.zeros((1, 4, 3), np.float32), np.zeros((1, 4), bool))
    np.testing.assert_array_equal(share, 0)
