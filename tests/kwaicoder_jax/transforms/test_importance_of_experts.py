"""Scores of mixtures against raw activations of the float64 reference."""

import dataclasses

import numpy as np
import pytest

from kwaicoder_jax import models, testing
from kwaicoder_jax.transforms import importance

from . import raw_activations, reference
from .test_importance import KINDS, TOLERANCE, make_batches, same

#: A scaled sigmoid router with a bias and a shared expert, and a softmax router with a gated one.
NAMES = ("moe_bias", "moe_shared_gate")
FIELDS = {"expert_neurons_LEF": "expert_neurons", "shared_neurons_LS": "shared_neurons", "heads_LH": "heads",
          "groups_LK": "groups"}  # fmt: skip


def setting(name):
    config = testing.small_configs()[name].replace(layers=2)
    params = testing.random_params(config)
    return config, params, make_batches(config)


@pytest.fixture(scope="module", params=NAMES)
def mixture(request):
    config, params, batches = setting(request.param)
    return importance.measure(params, config, batches), raw_activations.of(params, config, batches)


@pytest.mark.parametrize(("batch", "sequence", "tolerance"), KINDS)
def test_units_of_a_mixture(mixture, batch, sequence, tolerance):
    measured, raw = mixture
    scores = measured.scores(batch, sequence)
    assert scores.neurons_LF is None
    for field, name in FIELDS.items():
        if name in raw:
            expected = raw_activations.over_layers(raw[name], batch, sequence)
            assert reference.relative(getattr(scores, field), expected) < tolerance, name
        else:
            assert getattr(scores, field) is None


def test_some_sequence_leaves_an_expert_alone():
    """Or the rule about such sequences would go untested."""
    config, params, batches = setting("moe_bias")
    raw = raw_activations.of(params, config, batches)
    unused = [np.isnan(x).all(axis=(0, 2)) for layer in raw["expert_neurons"] for x in layer]
    assert np.any(unused)


def test_experts_channels_and_layers(mixture):
    measured, raw = mixture
    scores = measured.scores()
    experts_LE = [np.concatenate(layer).sum(0) for layer in raw["experts"]]
    assert reference.relative(scores.experts_LE, experts_LE) < TOLERANCE
    norms = ("attention_norm_out", "mlp_norm_out", "final_norm_out")
    channels_D = sum(raw_activations.over_layers(raw[name], "l2", "mean").sum(0) for name in norms)
    assert reference.relative(scores.channels_D, channels_D) < TOLERANCE
    for i, (before, after) in enumerate(zip(raw["in"], raw["out"])):
        assert abs(scores.layers_L[i] - raw_activations.influence(before, after)) < 1e-5


def test_scores_permute_with_experts_and_their_neurons():
    config, params, batches = setting("moe_bias")
    e, rng = config.experts, np.random.default_rng(0)
    sizes = {"experts": e.num_experts, "expert_mlp": e.mlp_dim, "shared_mlp": e.shared_mlp_dim}
    orders = {axis: rng.permutation(size) for axis, size in sizes.items()}
    flat = {name: np.asarray(x) for name, x in models.flatten(params).items()}
    for name, d in models.declarations(config).items():
        for axis, order in orders.items():
            if axis in d.axes:
                flat[name] = np.take(flat[name], order, d.axes.index(axis))
    before = importance.collect(params, config, batches, weight_aware=True)
    after = importance.collect(models.unflatten(flat), config, batches, weight_aware=True)
    experts, neurons, shared = orders.values()
    moved = before.replace(
        experts_LE=before.experts_LE[:, experts],
        expert_neurons_LEF=before.expert_neurons_LEF[:, experts][:, :, neurons],
        shared_neurons_LS=before.shared_neurons_LS[:, shared],
    )
    same(after, moved)


def test_weight_aware_save_and_load(mixture, tmp_path):
    measured, _ = mixture
    measured.save(tmp_path / "measured.npz")
    scores = importance.Measurements.load(tmp_path / "measured.npz").scores(weight_aware=True)
    same(scores, measured.scores(weight_aware=True), 1e-15)
    scores.save(tmp_path / "scores.npz")
    same(importance.Scores.load(tmp_path / "scores.npz"), scores, 1e-15)


def test_weight_aware_norms():
    config, params, batches = setting("moe_bias")
    measured = importance.measure(params, config, batches[:1])
    flat = models.flatten(reference.float64(params))
    plain, aware = measured.scores(), measured.scores(weight_aware=True)
    for field, name in (("expert_neurons_LEF", "layers/moe/down"), ("shared_neurons_LS", "layers/moe/shared/down")):
        expected = getattr(plain, field) * np.linalg.norm(flat[name], axis=-1)
        assert reference.relative(getattr(aware, field), expected) < TOLERANCE


def test_padding_does_not_count():
    config, params, batches = setting("moe_bias")
    wide = {name: np.pad(x, ((0, 1), (0, 5))) for name, x in batches[0].items()}
    wide["inputs"] = np.where(wide["segment_ids"] > 0, wide["inputs"], 11)
    same(importance.collect(params, config, [wide]), importance.collect(params, config, batches[:1]))


@pytest.mark.parametrize("backend", ["reference", "ragged_dot"])
def test_back_ends_agree(backend):
    config, params, batches = setting("moe_softmax_topk")
    other = importance.collect(params, config, batches[:1], runtime=models.Runtime(experts=backend))
    same(other, importance.collect(params, config, batches[:1]))


def test_scores_have_their_shapes():
    config, params, batches = setting("moe_bias")
    e = config.experts
    sizes = {"L": config.layers, "D": config.model_dim, "H": config.heads, "K": config.kv_heads, "E": e.num_experts,
             "F": e.mlp_dim, "S": e.shared_mlp_dim}  # fmt: skip
    scores = importance.collect(params, config, batches[:1], blocks=True)
    for field in dataclasses.fields(scores):
        value = getattr(scores, field.name)
        if isinstance(value, np.ndarray):
            assert value.shape == tuple(sizes[letter] for letter in field.name.rsplit("_", 1)[1]), field.name
